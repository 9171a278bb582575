"""Safetensors and GPTQ: transformers with torch, greedy or sampled, one request at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeft.engines.chat_server import Reader, Sampling, Token, listen

REQUIRES = {"torch": "compress", "transformers": "compress"}


def start(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Load the model in `folder` and listen. Runs in a worker process."""
    import transformers

    model, tokenizer = load(folder, options["threads"])

    def chat(messages: list[dict[str, Any]], sampling: Sampling) -> tuple[int, Iterator[Token]]:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return len(ids), complete(ids, sampling)

    def complete(ids: list[int], sampling: Sampling) -> Iterator[Token]:
        if len(ids) + 1 > options["context"]:
            raise ValueError(f"the prompt has {len(ids)} tokens and the context {options['context']}")
        return generate(model, tokenizer, ids, sampling)

    def render(messages: list[dict[str, Any]]) -> str:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    reader = Reader(lambda text: tokenizer.encode(text, add_special_tokens=False), render, complete)
    port = listen(chat, options["key"], options["name"], reader)
    return {"port": port, "build": f"transformers {transformers.__version__}", "load_mode": "read"}


def load(folder: Path, threads: int) -> tuple[Any, Any]:
    """(model, tokenizer), the weights as float32 unless they are quantized."""
    import json

    import torch
    from transformers import AutoModelForCausalLM

    from edgeft.tokenizer import load_tokenizer

    torch.set_num_threads(threads)
    quantized = "quantization_config" in json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto" if quantized else torch.float32)
    return model.eval(), load_tokenizer(folder)


def generate(model: Any, tokenizer: Any, ids: list[int], sampling: Sampling) -> Iterator[Token]:
    """Tokens after `ids`, one by one."""
    import torch
    from tokenizers.decoders import DecodeStream

    ends = end_tokens(model, tokenizer)
    chance = torch.Generator().manual_seed(sampling.seed) if sampling.seed is not None else None
    stream = DecodeStream(ids=[], skip_special_tokens=True)
    step, past = torch.tensor([ids]), None
    while True:
        with torch.inference_mode():
            out = model(input_ids=step, past_key_values=past, use_cache=True, logits_to_keep=1)
        past = out.past_key_values
        logprobs = out.logits[0, -1].float().log_softmax(-1)
        if sampling.ignore_eos:
            logprobs[list(ends)] = -torch.inf
        token = int(logprobs.argmax()) if sampling.temperature == 0 else draw(logprobs, sampling, chance)
        if token in ends:
            return
        piece = stream.step(tokenizer._tokenizer, token) or ""
        yield Token(piece, float(logprobs[token]))
        step = torch.tensor([[token]])


def draw(logprobs: Any, sampling: Sampling, chance: Any) -> int:
    """A token by temperature and nucleus sampling."""
    import torch

    probabilities = (logprobs / sampling.temperature).softmax(-1)
    ordered, order = probabilities.sort(descending=True)
    ordered[(ordered.cumsum(-1) - ordered) > sampling.top_p] = 0
    return int(order[torch.multinomial(ordered, 1, generator=chance)])


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The ids that end a turn, by the generation config and the tokenizer."""
    ends = model.generation_config.eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    return {int(e) for e in [*listed, tokenizer.eos_token_id] if e is not None}


def logits(folder: Path, ids: list[list[int]], options: dict[str, Any]) -> Iterator[Any]:
    """Logits of every position, a float32 array [tokens, vocabulary] a row. Runs in a child process."""
    import torch

    model, _ = load(folder, options["threads"])
    for row in ids:
        with torch.inference_mode():
            yield model(input_ids=torch.tensor([row])).logits[0].float().numpy()


def logits_build() -> str:
    """The package that computes the logits."""
    from importlib.metadata import version

    return f"transformers {version('transformers')}"
