"""ONNX: onnxruntime-genai, greedy or sampled, one request at a time.

Text becomes tokens by the `tokenizers` package and the folder's tokenizer.json, as in transformers: genai's own reading
of that file knows some pre-tokenizers alone, and leaves others out without a word (`Digits` among them).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeft.device import CPU
from edgeft.engines.chat_server import Reader, features, listen
from edgeft.engines.decoding import BadRequest, Pace, Sampling, Steps, Token, likeliest, log_softmax
from edgeft.errors import UsageError

GENAI = ("onnxruntime-genai", "onnxruntime-genai-cuda")
REQUIRES = {"onnxruntime_genai": "onnx", "tokenizers": "onnx"}


def start(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Load the model in `folder` and listen. Runs in a worker process."""
    import onnxruntime_genai as og
    from tokenizers import Tokenizer

    if options.get("adapters"):
        raise UsageError(
            "the engine 'onnx' switches no adapters by request.",
            "a gguf-lora artefact and the engine 'gguf' do",
        )
    model = load(folder, options)
    tokenizer = og.Tokenizer(model)
    reads = Tokenizer.from_file(str(folder / "tokenizer.json"))
    reads.no_truncation()
    reads.no_padding()

    def tokenize(text: str) -> list[int]:
        return list(reads.encode(text, add_special_tokens=False).ids)

    def render(messages: list[dict[str, Any]]) -> str:
        return str(tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True))

    pace = Pace(options.get("batch_s"))

    def chat(messages: list[dict[str, Any]], sampling: Sampling) -> tuple[int, Steps]:
        ids = tokenize(render(messages))
        return len(ids), complete(ids, sampling)

    def complete(ids: list[int], sampling: Sampling) -> Steps:
        if len(ids) + 1 > options["context"]:
            raise BadRequest(f"the prompt has {len(ids)} tokens and the context {options['context']}")
        if max(ids) >= reads.get_vocab_size():
            raise BadRequest(f"the token id {max(ids)} is not in the vocabulary")
        return generate(model, tokenizer, reads, ids, sampling, options["context"], pace)

    begin = tuple(reads.encode("", add_special_tokens=True).ids)
    reader = Reader(tokenize, render, complete, begin, constrains=guided(model))
    return {
        "port": listen(chat, options["key"], options["name"], reader),
        "build": genai_build(),
        "load_mode": "read",
        "device": device_of(model),
        "features": features(reader),
    }


def device_of(model: Any) -> str:
    """'cpu', or the GPU's name where the model computes on one."""
    from edgeft.profiles.detection import gpu_facts

    on_cpu = str(model.device_type).lower() != "cuda"
    return CPU if on_cpu else str((gpu_facts({}) or [{"name": "cuda"}])[0]["name"])


def guided(model: Any) -> bool:
    """True where this build of onnxruntime-genai can hold answers to a JSON schema: some wheels come without."""
    import onnxruntime_genai as og

    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=8)
    try:
        parameters.set_guidance("json_schema", '{"type": "object"}')
        og.Generator(model, parameters)
    except Exception:
        return False
    return True


def load(folder: Path, options: dict[str, Any]) -> Any:
    """The model with its thread count set."""
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    session: dict[str, Any] = {"intra_op_num_threads": options["threads"], "inter_op_num_threads": 1}
    if not options.get("spin", True):
        session["session.intra_op.allow_spinning"] = "0"
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    return og.Model(config)


def generate(
    model: Any, tokenizer: Any, reads: Any, ids: list[int], sampling: Sampling, context: int, pace: Pace
) -> Steps:
    """None after each piece of the prompt, then tokens, one by one."""
    import numpy as np
    import onnxruntime_genai as og

    parameters = og.GeneratorParams(model)
    wanted: dict[str, Any] = {"max_length": min(context, len(ids) + sampling.max_tokens), "batch_size": 1}
    if sampling.ignore_eos:
        wanted["min_length"] = wanted["max_length"]
    if sampling.temperature == 0:
        wanted["do_sample"] = False
    else:
        wanted |= {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.seed is not None:
            wanted["random_seed"] = sampling.seed
    parameters.set_search_options(**wanted)
    if sampling.schema is not None:
        parameters.set_guidance("json_schema", sampling.schema)
    try:
        generator = og.Generator(model, parameters)
    except Exception as error:
        if sampling.schema is None:
            raise
        raise BadRequest("the engine can't hold answers to this schema") from error
    for piece in pace.pieces(ids):
        generator.append_tokens(np.array(piece, dtype=np.int32))
        yield None
    stream = tokenizer.create_stream()
    ends = {int(e) for e in tokenizer.eos_token_ids}
    while not generator.is_done():
        logprobs = None
        if sampling.logprobs:
            logprobs = log_softmax(np.asarray(generator.get_logits(), dtype=np.float32).reshape(-1))
        generator.generate_next_token()
        token = int(generator.get_next_tokens()[0])
        if token in ends:
            return
        if logprobs is None:
            yield Token(stream.decode(token), None)
            continue
        top = likeliest(logprobs, sampling.top_logprobs)
        texts = [reads.decode([one], skip_special_tokens=False) for one in top]
        yield Token(
            stream.decode(token),
            float(logprobs[token]),
            tuple(zip(texts, (float(logprobs[one]) for one in top), strict=True)),
        )


def logits(folder: Path, ids: list[list[int]], options: dict[str, Any]) -> Iterator[Any]:
    """Logits of every position, a float32 array [tokens, vocabulary] a row. Runs in a child process."""
    import numpy as np
    import onnxruntime_genai as og

    model = load(folder, options)
    for row in ids:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(row) + 1, batch_size=1, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(np.array(row, dtype=np.int32))
        found = np.asarray(generator.get_output("logits"), dtype=np.float32)
        if found.shape[1] != len(row):
            raise RuntimeError(f"the ONNX model gives logits of {found.shape[1]} of {len(row)} positions")
        yield found[0]


def logits_build() -> str:
    """The package that computes the logits."""
    return genai_build()


def genai_build() -> str:
    """onnxruntime-genai's distribution and version: the one for CUDA has a name of its own."""
    from importlib.metadata import PackageNotFoundError, version

    for name in GENAI:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "onnxruntime-genai, version not known"
