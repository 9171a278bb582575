"""Which base a QLoRA adapter is merged into: the 16-bit one, or what 4-bit training made of it.

QLoRA (arXiv 2305.14314) trains the adapter beside weights that were rounded to NF4, blocks of 64, so the adapter may
have learned to make up for that rounding. `dequantized` merges into base weights put through the same rounding by
bitsandbytes itself; `dequantized-double` rounds the blocks' scales as well (`bnb_4bit_use_double_quant`). Which is
better for an adapter is measured by `auto`: the lower mean NLL of the answers on rows of kind select, and the 16-bit base
where the difference could be chance.

An adapter seldom records what it was trained beside: `trained_on_4bit` looks for the signs there are.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.errors import UsageError, missing_extra, unknown

CANDIDATES = ("16bit", "dequantized", "dequantized-double")
WORDS = (*CANDIDATES, "auto")
BLOCK = 64
MAX_ROWS, MAX_TOKENS = 128, 1024


def refuse(
    asked: str,
    base: Path,
    adapters: Sequence[tuple[Path, float]],
    rows: Path | None,
    formats: Sequence[str] = (),
) -> None:
    """Raise what is wrong with `asked` for these adapters, before anything is written."""
    from edgeft.compress.adapter import header_of

    if asked not in WORDS:
        raise unknown("the merge base", asked, WORDS, "--merge-base 16bit")
    if asked == "16bit":
        return
    if not adapters:
        raise UsageError(f"--merge-base {asked} is for an adapter, and none was given.", "--adapter DIR")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise missing_extra("bitsandbytes", "qlora")
    if asked == "auto" and rows is None:
        raise UsageError("--merge-base auto chooses by measuring, which needs rows.", "--eval rows.jsonl")
    if "gguf-lora" in formats:
        raise UsageError(
            f"gguf-lora loads the adapter beside the 16-bit base, and --merge-base {asked} merges into another.",
            "--merge-base 16bit, or leave gguf-lora out",
        )
    experts = (n for file in base.glob("*.safetensors") for n in header_of(file) if ".experts." in n)
    if name := next(experts, None):
        raise UsageError(
            f"{base.name} has experts ({name}), and which of those 4-bit training rounds depends on its versions.",
            "--merge-base 16bit",
        )


def trained_on_4bit(folder: Path) -> str | None:
    """What in an adapter's files says that it was trained beside 4-bit weights; None where nothing does."""
    from edgeft.files import read_json

    config = read_json(folder / "adapter_config.json")
    named = str(config.get("base_model_name_or_path") or "")
    if re.search(r"(bnb|nf4|4.?bit)", named, re.IGNORECASE):
        return f"its base was {named}"
    for key in ("quantization_config", "load_in_4bit"):
        if config.get(key):
            return f"its adapter_config.json has {key}"
    return None


def is_rounded(name: str, shape: Sequence[int]) -> bool:
    """Whether 4-bit training rounds a weight: a matrix inside a numbered layer.

    transformers replaces every linear layer but the head by a 4-bit one, adapter beside it or not; embeddings, norms and
    biases stay. (`llm_int8_skip_modules` can leave out more, which no adapter records.)
    """
    return len(shape) == 2 and name.endswith(".weight") and re.search(r"\.\d+\.", f".{name}") is not None


def rounded(weight: Any, kind: str, transposed: bool = False) -> Any:
    """A weight [out, in] (or [in, out], transposed) in float32 as 4-bit training saw it, dequantized to float32.

    In float32 throughout, as bitsandbytes' kernels compute whatever they are given.
    """
    from bitsandbytes import functional

    turned = (weight.T if transposed else weight).float().contiguous()
    packed, state = functional.quantize_4bit(
        turned, blocksize=BLOCK, compress_statistics=kind == "dequantized-double", quant_type="nf4"
    )
    found = functional.dequantize_4bit(packed, state)
    return found.T.contiguous() if transposed else found


def round_model(model: Any, kind: str, transposed: bool) -> None:
    """Put a loaded model's linear weights through the rounding, in place."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if is_rounded(name, weight.shape):
                weight.copy_(rounded(weight, kind, transposed))


def build(
    base: Path, adapters: Sequence[tuple[Path, float]], out: Path, asked: str, rows: Path | None, work: Path, threads: int
) -> dict[str, Any]:  # fmt: skip
    """Write base + adapters into `out` on the base asked for, or on the best of them.

    Returns what `merge` returns, `merge_base` (the one taken), and under `checks` what was measured.
    """
    if asked != "auto":
        return {**_merge(base, adapters, out, asked, work), "merge_base": asked}
    made: dict[str, dict[str, Any]] = {}
    scores: dict[str, dict[str, Any]] = {}
    place = work / "merge-base"
    shutil.rmtree(place, ignore_errors=True)
    try:
        for kind in CANDIDATES:
            folder = place / kind
            folder.mkdir(parents=True)
            made[kind] = _merge(base, adapters, folder, kind, work)
            scores[kind] = child.call(
                "edgeft.compress.merge_base:score", log=work / "merge.log", title=f"scoring the merge base {kind}",
                merged=str(folder), rows_file=str(rows), threads=threads,
            )  # fmt: skip
        told = judge(scores)
        for file in (place / told["chosen"]).iterdir():
            shutil.move(file, out / file.name)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    steps = [*made.values(), *scores.values()]
    cost = {key: (sum if key == "wall_s" else max)(step[key] for step in steps) for key in child.COST}
    return {
        **made[told["chosen"]],
        **cost,
        "merge_base": told["chosen"],
        "checks": {"choices": {"merge_base": told}},
    }


def _merge(
    base: Path, adapters: Sequence[tuple[Path, float]], out: Path, kind: str, work: Path
) -> dict[str, Any]:
    return child.call(
        "edgeft.compress.merge:merge",
        log=work / "merge.log",
        title="merging",
        base=str(base),
        adapters=[[str(folder), share] for folder, share in adapters],
        out=str(out),
        merge_base=kind,
    )


def score(merged: str, rows_file: str, threads: int) -> dict[str, Any]:
    """{"nll": mean over the answer's tokens (nats), "right": greedy decoding gives the answer}, lists over rows.

    Runs in a child process.
    """
    import torch

    from edgeft.engines.transformers import load
    from edgeft.rows import load_rows, spread
    from edgeft.tune.lora import answer_loss, encode

    model, tokenizer = load(Path(merged), threads)
    rows = spread(load_rows(Path(rows_file)), MAX_ROWS)
    nll, right = [], []
    for number, row in enumerate(rows):
        if encoded := encode(tokenizer, row, MAX_TOKENS):
            with torch.inference_mode():
                loss, good = answer_loss(model, [encoded], tokenizer.pad_token_id or 0)
            nll.append(float(loss))
            right.append(bool(good[0]))
        print(f"progress: {number + 1}/{len(rows)} rows")
    if not nll:
        raise UsageError(f"no row of {rows_file} has at most {MAX_TOKENS} tokens.", f"head -1 {rows_file}")
    return {"nll": nll, "right": right}


def judge(scores: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The candidate to take, and why: the lowest mean NLL, if its paired difference from 16bit is not chance."""
    import numpy as np

    from edgeft.bench.stats import bootstrap

    first = np.array(scores[CANDIDATES[0]]["nll"])
    measured: dict[str, dict[str, Any]] = {}
    for kind, found in scores.items():
        nll = np.array(found["nll"])
        measured[kind] = {"answer_nll": float(nll.mean()), "exact": float(np.mean(found["right"]))}
        if kind != CANDIDATES[0]:
            measured[kind]["minus_16bit_ci95"] = bootstrap(nll - first, np.mean)
    best = min(measured, key=lambda kind: measured[kind]["answer_nll"])
    told = "; ".join(
        f"{kind}: answer NLL {facts['answer_nll']:.4f}, {facts['exact']:.0%} exact"
        for kind, facts in measured.items()
    )
    if best == CANDIDATES[0]:
        chosen, why = best, f"{told}: 16bit is the lowest"
    elif measured[best]["minus_16bit_ci95"][1] < 0:
        chosen, why = best, f"{told}: {best} is lower than 16bit, and that is no chance (95 % interval)"
    else:
        chosen, why = CANDIDATES[0], f"{told}: {best} is the lowest by what could be chance, so 16bit stays"
    return {
        "chosen": chosen,
        "why": why,
        "measured": measured,
        "rows": len(first),
        "pin": f"--merge-base {chosen}",
    }
