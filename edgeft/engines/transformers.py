"""Safetensors and GPTQ: transformers with torch, greedy or sampled, one request at a time."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeft.device import CPU, name_of, torch_device
from edgeft.engines.chat_server import Reader, features, listen
from edgeft.engines.decoding import BadRequest, Pace, Sampling, Steps, Token, chosen, likeliest
from edgeft.errors import UsageError

KERNELS = ("auto", "gptq_triton", "gptq_torch")  # of gptqmodel, in the order that they are tried on a GPU
REQUIRES = {"torch": "compress", "transformers": "compress"}


def start(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Load the model in `folder` and listen. Runs in a worker process."""
    import transformers

    if options.get("adapters"):
        raise UsageError(
            "the engine 'transformers' switches no adapters by request.",
            "a gguf-lora artefact and the engine 'gguf' do",
        )
    model, tokenizer = load(folder, options["threads"])
    pace = Pace(options.get("batch_s"))

    def chat(messages: list[dict[str, Any]], sampling: Sampling) -> tuple[int, Steps]:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return len(ids), complete(ids, sampling)

    def complete(ids: list[int], sampling: Sampling) -> Steps:
        must_fit(ids, options["context"], model.config.get_text_config().vocab_size)
        return generate(model, tokenizer, ids, sampling, pace)

    def embed(ids: list[int]) -> Iterator[list[float] | None]:
        must_fit(ids, options["context"] + 1, model.config.get_text_config().vocab_size)
        return embedding(model, ids, pace, options.get("embeddings") == "mean")

    def render(messages: list[dict[str, Any]]) -> str:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    begin = put_before(tokenizer)
    reader = Reader(
        lambda text: tokenizer.encode(text, add_special_tokens=False), render, complete, begin, embed
    )
    return {
        "port": listen(chat, options["key"], options["name"], reader),
        "build": f"transformers {transformers.__version__}{kernel_of(model)}",
        "load_mode": "read",
        "device": name_of(model.device.type),
        "features": features(reader, embeddings="mean" if options.get("embeddings") == "mean" else "last"),
    }


def put_before(tokenizer: Any) -> tuple[int, ...]:
    """The ids that the tokenizer puts before a text by itself."""
    bare = tokenizer.encode("x", add_special_tokens=False)
    whole = tokenizer.encode("x")
    place = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return tuple(whole[:place])


def must_fit(ids: list[int], context: int, vocabulary: int) -> None:
    """Raises BadRequest where a prompt leaves no room for a token, or has an id that is none."""
    if len(ids) + 1 > context:
        raise BadRequest(f"the prompt has {len(ids)} tokens and the context {context}")
    if max(ids) >= vocabulary:
        raise BadRequest(f"the token id {max(ids)} is not in the vocabulary of {vocabulary}")


def load(folder: Path, threads: int, exact: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer), on the GPU where torch sees one.

    Quantized weights as they are stored; others as float32 on a CPU, and on a GPU as they are stored unless `exact`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from edgeft.tokenizer import load_tokenizer

    torch.set_num_threads(threads)
    quantized = "quantization_config" in json.loads((folder / "config.json").read_text())
    device = torch_device()
    if quantized and device != CPU:
        return by_kernel(folder, device).eval(), load_tokenizer(folder)
    whole = not quantized and (exact or device == CPU)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if whole else "auto")
    return (model if device == CPU else model.to(device)).eval(), load_tokenizer(folder)


def by_kernel(folder: Path, device: str) -> Any:
    """A GPTQ checkpoint on the GPU, by the first of KERNELS that takes its widths.

    gptqmodel's own choice by way of transformers looks at bits and card and not at the widths: on an H100 it was Machete, which
    can't hold a layer of 192 outputs. Raises what the last of them raises.
    """
    from transformers import AutoModelForCausalLM, GPTQConfig

    bits = json.loads((folder / "config.json").read_text())["quantization_config"]["bits"]
    for kernel in KERNELS:
        try:
            return AutoModelForCausalLM.from_pretrained(
                folder,
                dtype="auto",
                device_map={"": device},
                quantization_config=GPTQConfig(bits=bits, backend=kernel),
            )
        except (NotImplementedError, ValueError) as error:
            refused = error
            print(f"the kernel {kernel} does not take this checkpoint: {error}", file=sys.stderr)
    raise refused


def kernel_of(model: Any) -> str:
    """The class of quantized linear layer that computes, after a comma; empty for a model that is not quantized."""
    return next((f", {type(m).__name__}" for m in model.modules() if hasattr(m, "qweight")), "")


def generate(model: Any, tokenizer: Any, ids: list[int], sampling: Sampling, pace: Pace) -> Steps:
    """None after each piece of the prompt, then tokens, one by one."""
    import numpy as np
    import torch
    from tokenizers.decoders import DecodeStream

    ends = end_tokens(model, tokenizer)
    chance = np.random.default_rng(sampling.seed)
    stream = DecodeStream(ids=[], skip_special_tokens=True)
    past, out = None, None
    for piece in pace.pieces(ids):
        with torch.inference_mode():
            out = model(
                input_ids=torch.tensor([piece], device=model.device),
                past_key_values=past,
                use_cache=True,
                logits_to_keep=1,
            )
        past = out.past_key_values
        yield None
    while True:
        logprobs = out.logits[0, -1].float().cpu().log_softmax(-1)  # type: ignore[union-attr]
        if sampling.ignore_eos:
            logprobs[list(ends)] = -torch.inf
        token = chosen(logprobs.numpy(), sampling, chance)
        if token in ends:
            return
        top = likeliest(logprobs.numpy(), sampling.top_logprobs)
        yield Token(
            stream.step(tokenizer._tokenizer, token) or "",
            float(logprobs[token]),
            tuple((tokenizer.decode([one]), float(logprobs[one])) for one in top),
        )
        with torch.inference_mode():
            out = model(
                input_ids=torch.tensor([[token]], device=model.device),
                past_key_values=past,
                use_cache=True,
                logits_to_keep=1,
            )
        past = out.past_key_values


def embedding(model: Any, ids: list[int], pace: Pace, mean: bool) -> Iterator[list[float] | None]:
    """The last layer's state of the last token or the mean over all tokens, of length 1, after None for each piece."""
    import torch

    past: Any = None
    summed: Any = 0.0
    state: Any = None
    for piece in pace.pieces(ids):
        with torch.inference_mode():
            ids_in = torch.tensor([piece], device=model.device)
            out = model.base_model(input_ids=ids_in, past_key_values=past, use_cache=True)
        past, state = out.past_key_values, out.last_hidden_state[0].float()
        summed = summed + state.sum(0)
        yield None
    vector = summed if mean else state[-1]
    yield (vector / vector.norm().clamp_min(1e-12)).tolist()


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The ids that end a turn, by the generation config and the tokenizer."""
    ends = model.generation_config.eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    return {int(e) for e in [*listed, tokenizer.eos_token_id] if e is not None}


def logits(folder: Path, ids: list[list[int]], options: dict[str, Any]) -> Iterator[Any]:
    """Logits of every position, a float32 array [tokens, vocabulary] a row. Runs in a child process."""
    import torch

    model, _ = load(folder, options["threads"], exact=True)
    for row in ids:
        with torch.inference_mode():
            yield model(input_ids=torch.tensor([row], device=model.device)).logits[0].float().cpu().numpy()


def logits_build() -> str:
    """The package that computes the logits."""
    from importlib.metadata import version

    return f"transformers {version('transformers')}"
