"""GGUF by llama-cpp-python: the second engine for such files, where xllamacpp has no wheel and to compare builds of llama.cpp.

One request at a time; the Python loop sees one token id a step.
"""

from __future__ import annotations

import codecs
import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from edgeft.device import gpu_layers
from edgeft.engines.chat_server import Reader, features, listen
from edgeft.engines.decoding import BadRequest, Pace, Sampling, Steps, Token, log_softmax
from edgeft.engines.decoding import likeliest as likeliest_of
from edgeft.engines.gguf import logits, logits_build, model_and_adapter, model_parameters
from edgeft.errors import UsageError

__all__ = ["REQUIRES", "logits", "logits_build", "start"]
REQUIRES = {"llama_cpp": "compress"}


def start(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Load the GGUF file in `folder` and listen. Runs in a worker process."""
    import llama_cpp as llama
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    file, adapter = model_and_adapter(folder)
    if adapter or options.get("adapters"):
        raise UsageError(
            f"{folder} is an adapter to be loaded beside a base.",
            "edgeft bench … --gguf-engine gguf loads it",
        )
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(str(file).encode(), model_parameters(llama, gpu_layers(options)))
    if not model:
        raise RuntimeError(f"llama.cpp can't load {file}")
    context = new_context(llama, model, options)
    vocabulary = llama.llama_model_get_vocab(model)
    template = llama.llama_model_chat_template(model, None)
    if not template:
        raise UsageError(f"{file} has no chat template.", "edgeft compress … writes the tokenizer's own")
    ends = [
        piece(llama, vocabulary, end(vocabulary)).decode()
        for end in (llama.llama_vocab_eos, llama.llama_vocab_bos)
    ]
    render_chat = Jinja2ChatFormatter(template.decode(), ends[0], ends[1])

    def tokenize(text: str) -> list[int]:
        raw = text.encode()
        ids = (llama.llama_token * (len(raw) + 8))()
        count = llama.llama_tokenize(vocabulary, raw, len(raw), ids, len(ids), False, True)
        return list(ids[:count])

    def render(messages: list[dict[str, Any]]) -> str:
        return str(render_chat(messages=messages).prompt)  # type: ignore[arg-type]

    pace = Pace(options.get("batch_s"))

    def complete(ids: list[int], sampling: Sampling) -> Steps:
        if len(ids) + 1 > options["context"]:
            raise BadRequest(f"the prompt has {len(ids)} tokens and the context {options['context']}")
        if max(ids) >= llama.llama_vocab_n_tokens(vocabulary):
            raise BadRequest(f"the token id {max(ids)} is not in the vocabulary")
        return generate(llama, context, vocabulary, ids, sampling, options["context"], pace)

    def chat(messages: list[dict[str, Any]], sampling: Sampling) -> tuple[int, Steps]:
        ids = tokenize(render(messages))
        return len(ids), complete(ids, sampling)

    begin = (int(llama.llama_vocab_bos(vocabulary)),) if llama.llama_vocab_get_add_bos(vocabulary) else ()
    reader = Reader(tokenize, render, complete, begin)
    return {
        "port": listen(chat, options["key"], options["name"], reader),
        "build": logits_build(),
        "load_mode": "mmap",
        "features": features(reader),
    }


def new_context(llama: Any, model: Any, options: dict[str, Any]) -> Any:
    """A context of one sequence with the options of a run profile; what is absent stays llama.cpp's default."""
    wanted = llama.llama_context_default_params()
    wanted.n_ctx = options["context"]
    wanted.n_threads = options["threads"]
    wanted.n_threads_batch = options.get("threads_batch", options["threads"])
    wanted.n_batch, wanted.n_ubatch = (
        options.get("batch", wanted.n_batch),
        options.get("ubatch", wanted.n_ubatch),
    )
    if "flash_attention" in options:
        wanted.flash_attn_type = (
            llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if options["flash_attention"]
            else llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
    if "kv_type" in options:
        wanted.type_k = wanted.type_v = getattr(llama, f"GGML_TYPE_{options['kv_type'].upper()}")
    return llama.llama_init_from_model(model, wanted)


def generate(
    llama: Any, context: Any, vocabulary: Any, ids: list[int], sampling: Sampling, room: int, pace: Pace
) -> Steps:
    """None after each piece of the prompt, then tokens, one by one; the cache is emptied first."""
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    chain = None if sampling.temperature == 0 else sampler(llama, sampling)
    choices = llama.llama_vocab_n_tokens(vocabulary)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    size = llama.llama_n_batch(context)
    try:
        for part in pace.pieces(ids):
            for start in range(0, len(part), size):
                few = part[start : start + size]
                decode(llama, context, (llama.llama_token * len(few))(*few), len(few))
            yield None
        token = (llama.llama_token * 1)()
        for _ in range(min(sampling.max_tokens, room - len(ids))):
            token[0] = (
                llama.llama_sampler_sample(chain, context, -1)
                if chain
                else likeliest(llama, context, choices)
            )
            if llama.llama_vocab_is_eog(vocabulary, token[0]) and not sampling.ignore_eos:
                return
            said = told(llama, context, vocabulary, choices, token[0], sampling)
            yield Token(decoder.decode(piece(llama, vocabulary, token[0])), *said)
            decode(llama, context, token, 1)
    finally:
        if chain:
            llama.llama_sampler_free(chain)


def told(
    llama: Any, context: Any, vocabulary: Any, choices: int, token: int, sampling: Sampling
) -> tuple[float | None, tuple[tuple[str, float], ...]]:
    """(log-probability of the token, the likeliest with theirs), before any sampler; (None, ()) where they are not asked for."""
    if not sampling.logprobs:
        return None, ()
    row = llama.llama_get_logits_ith(context, -1)
    logprobs = log_softmax(np.ctypeslib.as_array(row, (choices,)))
    top = likeliest_of(logprobs, sampling.top_logprobs)
    texts = [piece(llama, vocabulary, one).decode(errors="replace") for one in top]
    return float(logprobs[token]), tuple(zip(texts, (float(logprobs[one]) for one in top), strict=True))


def likeliest(llama: Any, context: Any, choices: int) -> int:
    """The id of the largest logit, the first of equals; llama.cpp's greedy sampler copies every candidate beforehand."""
    row = llama.llama_get_logits_ith(context, -1)
    return int(np.ctypeslib.as_array(row, (choices,)).argmax())


def decode(llama: Any, context: Any, tokens: Any, count: int) -> None:
    """Read tokens into the context."""
    if llama.llama_decode(context, llama.llama_batch_get_one(tokens, count)) != 0:
        raise RuntimeError(f"llama_decode failed on {count} tokens")


def sampler(llama: Any, sampling: Sampling) -> Any:
    """llama.cpp's own chain: nucleus, temperature, and a draw."""
    chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
    for part in (
        llama.llama_sampler_init_top_p(sampling.top_p, 1), llama.llama_sampler_init_temp(sampling.temperature),
        llama.llama_sampler_init_dist(sampling.seed if sampling.seed is not None else llama.LLAMA_DEFAULT_SEED),
    ):  # fmt: skip
        llama.llama_sampler_chain_add(chain, part)
    return chain


def piece(llama: Any, vocabulary: Any, token: int) -> bytes:
    """A token's bytes; a control token's are its name."""
    room = ctypes.create_string_buffer(256)
    count = llama.llama_token_to_piece(vocabulary, token, room, len(room), 0, True)
    return room.raw[: max(0, count)]
