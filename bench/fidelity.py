"""How far an artefact's next-token distribution is from the merged model's.

KLD = KL(p_reference || p_artefact) over the full vocabulary, in nats, on identical token ids. The
reference is the merged model in float32 through transformers. Two figures: all positions of the
rendered chat after what all rows share (the system prompt), and the answer's positions alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgeft.bench.stats import bootstrap_ratio_of_sums

MAX_REFERENCE_BYTES = 1 << 30


def prepare(
    reference: str, rows_file: str, limits: list[int | None], out: str, threads: int
) -> dict[str, Any]:
    """Write the reference's log-probabilities for rows of a file to `out`. Runs in a child process.

    `limits`: the rows that the bench answers, and how many of those are taken here, each spread over the one before.

    `out/reference.npy` is float32 [positions, vocabulary]; the plan returned says which positions of
    which token ids they are.
    """
    from edgeft.rows import load_rows, spread
    from edgeft.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Path(reference))
    chosen = load_rows(Path(rows_file))
    for limit in limits:
        chosen = spread(chosen, limit)
    return write_reference(reference, encode_rows(tokenizer, chosen, 1 << 20), out, threads)


def encode_rows(tokenizer: Any, rows: list[dict[str, Any]], max_tokens: int) -> list[dict[str, Any]]:
    """Rows as token ids: `ids`, `skip` (positions that all share, left out), `answer_start`; longer ones are dropped."""
    from edgeft.tune.lora import common_prefix, encode

    encoded = [e for row in rows if (e := encode(tokenizer, row, max_tokens))]
    shared = max(1, common_prefix(encoded)) if len(encoded) > 1 else 1
    return [{"ids": ids, "skip": shared, "answer_start": start} for ids, start in encoded]


def write_reference(reference: str, rows: list[dict[str, Any]], out: str, threads: int) -> dict[str, Any]:
    """Write the reference's log-probabilities for encoded rows to `out/reference.npy`.

    Returns the plan: the rows that had room in MAX_REFERENCE_BYTES, each with its `offset`.
    """
    from edgeft.engines.transformers import logits

    vocabulary = None
    kept: list[dict[str, Any]] = []
    target = None
    written = 0
    for row, found in zip(
        rows, logits(Path(reference), [row["ids"] for row in rows], {"threads": threads}), strict=True
    ):
        if target is None:
            vocabulary = found.shape[1]
            room = MAX_REFERENCE_BYTES // (4 * vocabulary)
            total = min(room, sum(len(r["ids"]) - r["skip"] for r in rows))
            target = np.lib.format.open_memmap(
                Path(out, "reference.npy"), mode="w+", dtype=np.float32, shape=(total, vocabulary)
            )
        count = len(row["ids"]) - row["skip"]
        if written + count > len(target):
            break
        target[written : written + count] = log_softmax(found[row["skip"] - 1 : -1])
        kept.append({**row, "offset": written})
        written += count
        print(f"progress: reference {len(kept)}/{len(rows)} rows")
    assert target is not None
    target.flush()
    return {"rows": kept, "vocabulary": vocabulary, "rows_asked": len(rows)}


def compare(engine: str, folder: str, plan: dict[str, Any], reference: str, threads: int) -> dict[str, Any]:
    """Distances of an artefact's distributions from the reference's, a position each. Runs in a child process.

    Returns lists over rows of lists over positions: kld (nats), same_top1 (0/1), right_delta (change of
    the right token's probability), nll and nll_reference (nats), answer (is it an answer position).
    """
    from edgeft.engines import engine as module_of

    module = module_of(engine)
    target = np.load(reference, mmap_mode="r")
    result: dict[str, Any] = {
        k: [] for k in ("kld", "same_top1", "right_delta", "nll", "nll_reference", "answer")
    }
    # What all rows share is left out of the figures; an engine that knows `reuse` computes it once.
    options = {"threads": threads, "context": 1 << 12, "reuse": True}
    found = module.logits(Path(folder), [row["ids"] for row in plan["rows"]], options)
    for row, values in zip(plan["rows"], found, strict=True):
        skip = row["skip"]
        count = len(row["ids"]) - skip
        expected = np.asarray(target[row["offset"] : row["offset"] + count])
        for key, numbers in distances(expected, values[skip - 1 : -1], row["ids"][skip:]).items():
            result[key].append(numbers)
        result["answer"].append([int(i >= row["answer_start"]) for i in range(skip, len(row["ids"]))])
    return {**result, "build": module.logits_build()}


def distances(reference: Any, logits: Any, right: list[int]) -> dict[str, list[float]]:
    """Per position: KLD (nats), same top token, change in the right token's probability, both NLLs (nats).

    `reference` holds log-probabilities and `logits` raw scores, both [positions, vocabulary]; where one
    vocabulary is padded, the common part is compared, renormalized.
    """
    width = min(reference.shape[1], logits.shape[1])
    p = reference[:, :width].astype(np.float64)
    if width < reference.shape[1]:
        p = log_softmax(p)
    q = log_softmax(logits[:, :width].astype(np.float64))
    rows = np.arange(len(right))
    weight = np.exp(p)
    return {
        # The sum is never negative but for rounding.
        "kld": np.maximum((weight * (p - q)).sum(1), 0.0).tolist(),
        "same_top1": (p.argmax(1) == q.argmax(1)).astype(int).tolist(),
        "right_delta": (np.exp(q[rows, right]) - np.exp(p[rows, right])).tolist(),
        "nll": (-q[rows, right]).tolist(),
        "nll_reference": (-p[rows, right]).tolist(),
    }


def log_softmax(values: Any) -> Any:
    """Log-probabilities over the last axis, in the values' precision."""
    shifted = values - values.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def summarize(found: dict[str, Any]) -> dict[str, Any]:
    """`all` and `answer` figures of what `compare` returned; intervals by bootstrap over rows."""
    return {
        "all": figures_of(found, lambda answer: [True] * len(answer)),
        "answer": figures_of(found, lambda answer: [bool(a) for a in answer]),
        "basis": "full vocabulary",
        "formula": "KL(p_reference || p_artefact), full vocabulary, nats; mean over positions, interval over rows",
        "logits_build": found["build"],
    }


def figures_of(found: dict[str, Any], keep: Any) -> dict[str, Any]:
    """Means, percentiles and intervals over the positions that `keep` (of a row's `answer` marks) leaves."""
    masks = [np.array(keep(answer)) for answer in found["answer"]]
    take = {
        k: [np.array(v)[m] for v, m in zip(found[k], masks, strict=True)]
        for k in found
        if k not in ("answer", "build")
    }
    take = {k: v for k, v in take.items() if isinstance(v, list)}
    kld, same = np.concatenate(take["kld"]), np.concatenate(take["same_top1"])
    counts = [len(v) for v in take["kld"]]
    right = np.concatenate(take["right_delta"])
    return {
        "kld_mean": float(kld.mean()),
        "kld_ci95": bootstrap_ratio_of_sums([v.sum() for v in take["kld"]], counts),
        "kld_p50": float(np.percentile(kld, 50)),
        "kld_p99": float(np.percentile(kld, 99)),
        "kld_max": float(kld.max()),
        "same_top1": float(same.mean()),
        "same_top1_ci95": bootstrap_ratio_of_sums([v.sum() for v in take["same_top1"]], counts),
        "right_probability_rms": float(np.sqrt((right**2).mean())),
        "perplexity": float(np.exp(np.concatenate(take["nll"]).mean())),
        "perplexity_reference": float(np.exp(np.concatenate(take["nll_reference"]).mean())),
        "positions": len(kld),
        "rows": len(counts),
    }
