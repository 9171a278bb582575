"""ONNX: onnxruntime-genai, greedy or sampled, one request at a time.

On a CPU what the last request read and said is kept: one that begins alike and asks for it (`cache_prompt`) computes the rest alone. genai
fixes temperature and length when a generator is made, so tokens are chosen here. On a GPU, and under a JSON schema, it chooses.

Text becomes tokens by the `tokenizers` package and the folder's tokenizer.json, as in transformers: genai's own reading
of that file knows some pre-tokenizers alone, and leaves others out without a word (`Digits` among them).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeft.device import CPU
from edgeft.engines.chat_server import Reader, features, listen
from edgeft.engines.decoding import (
    BadRequest,
    Pace,
    Sampling,
    Steps,
    Token,
    beginning,
    chosen,
    likeliest,
    log_softmax,
)
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

    pace, device = Pace(options.get("batch_s")), device_of(model)
    context = min(options["context"], longest(folder))
    kept = Kept(model, context) if device == CPU else None

    def chat(messages: list[dict[str, Any]], sampling: Sampling) -> tuple[int, Steps]:
        ids = tokenize(render(messages))
        return len(ids), complete(ids, sampling)

    def complete(ids: list[int], sampling: Sampling) -> Steps:
        if len(ids) + 1 > context:
            raise BadRequest(f"the prompt has {len(ids)} tokens and the context {context}")
        if max(ids) >= reads.get_vocab_size():
            raise BadRequest(f"the token id {max(ids)} is not in the vocabulary")
        if kept and sampling.schema is None:
            return on_kept(kept, tokenizer, reads, ids, sampling, pace)
        if kept:
            kept.drop()
        return generate(model, tokenizer, reads, ids, sampling, context, pace)

    begin = tuple(reads.encode("", add_special_tokens=True).ids)
    reader = Reader(
        tokenize, render, complete, begin, None, guided(model), (lambda: kept.reused) if kept else None
    )
    return {
        "port": listen(chat, options["key"], options["name"], reader),
        "build": genai_build(),
        "load_mode": "read",
        "device": device,
        "features": features(reader, id_slot=kept is not None),
    }


def longest(folder: Path) -> int:
    """Tokens that the model was made for; genai makes no generator of more."""
    return int(json.loads((folder / "genai_config.json").read_text())["model"]["context_length"])


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


@dataclass
class Kept:
    """A generator and the ids whose keys and values it holds; `reused`: how many of them the last request found there."""

    model: Any
    context: int
    generator: Any = None
    ids: list[int] = field(default_factory=list)
    reused: int = 0

    def drop(self) -> None:
        """Keep nothing."""
        self.generator, self.ids, self.reused = None, [], 0

    def begin(self, ids: list[int], reuse: bool) -> int:
        """Make it hold a beginning of `ids`, none where it must not be reused or can't be; returns how many ids that is."""
        import onnxruntime_genai as og

        shared = beginning(ids, self.ids) if reuse and self.generator else 0
        if shared:
            try:
                self.generator.rewind_to(shared)
            except Exception:  # some kinds of memory can't be cut
                shared = 0
        if not shared:
            self.drop()
            parameters = og.GeneratorParams(self.model)
            parameters.set_search_options(max_length=self.context, batch_size=1, do_sample=False)
            self.generator = og.Generator(self.model, parameters)
        self.ids, self.reused = ids[:shared], shared
        return shared

    def read(self, ids: list[int]) -> None:
        """Compute what comes behind these ids too."""
        import numpy as np

        try:
            self.generator.append_tokens(np.array(ids, dtype=np.int32))
        except BaseException:
            self.drop()
            raise
        self.ids += ids


def on_kept(kept: Kept, tokenizer: Any, reads: Any, ids: list[int], sampling: Sampling, pace: Pace) -> Steps:
    """None after each piece of the prompt that was read, then tokens, one by one."""
    import numpy as np

    for piece in pace.pieces(ids[kept.begin(ids, sampling.reuse) :]):
        kept.read(piece)
        yield None
    chance = np.random.default_rng(sampling.seed)
    stream, ends = tokenizer.create_stream(), [int(e) for e in tokenizer.eos_token_ids]
    while True:
        logits = np.asarray(kept.generator.get_logits(), dtype=np.float32).reshape(-1)
        if sampling.ignore_eos:
            logits[ends] = -np.inf
        token = chosen(logits, sampling, chance)
        if token in ends:
            return
        text = stream.decode(token)
        yield (
            told(text, token, log_softmax(logits), sampling, reads)
            if sampling.logprobs
            else Token(text, None)
        )
        if len(kept.ids) + 1 >= kept.context:
            return
        kept.read([token])


def told(text: str, token: int, logprobs: Any, sampling: Sampling, reads: Any) -> Token:
    """A token with its log-probability and the likeliest in its place."""
    top = likeliest(logprobs, sampling.top_logprobs)
    texts = [reads.decode([one], skip_special_tokens=False) for one in top]
    return Token(
        text,
        float(logprobs[token]),
        tuple(zip(texts, (float(logprobs[one]) for one in top), strict=True)),
    )


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
        text = stream.decode(token)
        yield Token(text, None) if logprobs is None else told(text, token, logprobs, sampling, reads)


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
