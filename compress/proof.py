"""Proof of a merge: the merged model computes what base + live adapter computes, and not what the base does.

The live adapter runs through peft, in float32, on the calibration prompts. The yardstick is the adapter's own effect:
KL(live || merged) must be a small share of KL(live || base).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeft.compress.merge_base import round_model
from edgeft.errors import GateError

PROMPTS = 8
MAX_TOKENS = 128  # of each prompt
# Storing in 16 bits rounds the sum once; beyond this share of its effect the adapter is not what was trained.
MAX_SHARE_OF_EFFECT = 0.05
NO_EFFECT_KLD = 1e-9
TEXTS = (
    "Summarize the following message in one sentence: the parcel left on Monday and came back on Friday.",
    "def mean(values):\n    return sum(values) /",
    "Ce qui compte, c'est que la réponse soit juste.",
    "Which intent does this request have? I was charged twice for the same order.",
)
# Base and merged in float32 one after the other, with what loading needs beside; SmolLM2-135M was seen to take 1.9 GB.
BYTES_PER_PARAMETER, FIXED_BYTES = 9.0, 0.7e9


def owed(parameters: int, several: bool) -> str | None:
    """Why the proof can't be had here, or None."""
    import importlib.util

    import psutil

    if importlib.util.find_spec("peft") is None:
        return "peft is not installed: pip install 'edgeft[tune]'"
    if several:
        return "several adapters have no live equivalent in peft for every kind"
    needed, free = parameters * BYTES_PER_PARAMETER + FIXED_BYTES, psutil.virtual_memory().available
    if needed > free:
        return f"needs about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
    return None


def prove(
    base: str, adapter: str, merged: str, rows_file: str | None, threads: int, merge_base: str = "16bit"
) -> dict[str, Any]:
    """Compare live and merged logits. Runs in a child process.

    The live adapter stands on the base that was merged into (`merge_base`).
    Returns kld_merged and kld_base (nats, means over positions), same_top1 (share of positions),
    largest_logprob_difference (nats), positions.
    """
    import gc

    import numpy as np
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from edgeft.files import read_json
    from edgeft.tokenizer import load_tokenizer

    torch.set_num_threads(threads)
    ids = prompts(load_tokenizer(Path(merged)), rows_file)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if merge_base != "16bit":
        transposed = bool(read_json(Path(adapter, "adapter_config.json")).get("fan_in_fan_out"))
        round_model(model, merge_base, transposed)

    def logits() -> list[Any]:
        with torch.inference_mode():
            return [model(torch.tensor([row])).logits[0].log_softmax(-1).numpy() for row in ids]

    plain = logits()
    vocabulary = read_json(Path(merged, "config.json")).get("vocab_size")
    if vocabulary and vocabulary != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    model = PeftModel.from_pretrained(model, adapter).eval()
    live = logits()
    del model
    gc.collect()
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    found = logits()

    def kld(p: Any, q: Any) -> Any:
        p, q = p[:, : q.shape[1]].astype(np.float64), q[:, : p.shape[1]].astype(np.float64)
        return np.maximum((np.exp(p) * (p - q)).sum(1), 0.0)

    return {
        "kld_merged": float(np.concatenate([kld(a, b) for a, b in zip(live, found, strict=True)]).mean()),
        "kld_base": float(np.concatenate([kld(a, b) for a, b in zip(live, plain, strict=True)]).mean()),
        "same_top1": float(
            np.mean(np.concatenate([a.argmax(1) == b.argmax(1) for a, b in zip(live, found, strict=True)]))
        ),
        "largest_logprob_difference": float(
            max(np.abs(a - b).max() for a, b in zip(live, found, strict=True))
        ),
        "positions": sum(len(row) for row in ids),
        "prompts": "calibration rows" if rows_file else "built-in texts",
    }


def prompts(tokenizer: Any, rows_file: str | None) -> list[list[int]]:
    """Token ids: chats of the calibration rows, or a few texts where there are none."""
    from edgeft.rows import load_rows, spread

    if rows_file is None:
        return [tokenizer.encode(text)[:MAX_TOKENS] for text in TEXTS]
    rows = spread(load_rows(Path(rows_file)), PROMPTS)
    return [tokenizer.apply_chat_template(row["messages"], return_dict=False)[:MAX_TOKENS] for row in rows]


def judge(found: dict[str, Any], merged: str) -> dict[str, Any]:
    """The proof as artifact.json has it. Raises GateError where the merged model is not base + adapter."""
    proof = {"status": "held", "max_share_of_effect": MAX_SHARE_OF_EFFECT, **found}
    if found["kld_base"] <= NO_EFFECT_KLD:
        if found["kld_merged"] > NO_EFFECT_KLD:
            return _fail(proof, merged)
        raise GateError(
            "the adapter changes nothing: what is merged computes what the base does.",
            "was it trained? (B is zero before the first step); without --adapter the base itself is packed",
        )
    proof["share_of_effect"] = found["kld_merged"] / found["kld_base"]
    return proof if proof["share_of_effect"] <= MAX_SHARE_OF_EFFECT else _fail(proof, merged)


def _fail(proof: dict[str, Any], merged: str) -> dict[str, Any]:
    raise GateError(
        f"the merged model is not base + adapter: KL(live || merged) is {proof['kld_merged']:.2g}, "
        f"the adapter's whole effect {proof['kld_base']:.2g} nats.",
        f"less {merged}/reasons.json; a base in 16 or 32 bits may hold what this one rounds away",
    )
