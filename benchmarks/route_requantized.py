"""Why a re-quantized artefact voids a certificate: one earned on F16, served on a smaller file, and earned there again.

    python benchmarks/route_requantized.py BANKING77 DIST WORK --encoder DIR [--rows N]

DIST holds gguf-f16, gguf-q3_k_m (and gguf-q2_k) of one adapter, as `edgeft compress` made them. Every artefact really answers the rows of
dev.csv, greedily, through its own engine. The stronger candidate is real too: the label of most of the 9 nearest of 2,000 rows of train.csv,
by MiniLM. A policy is fitted (`edgeft.router.fit`) on a third of the rows with F16's scores. The rest is split at random many times: half
certifies, half stands for the traffic. A promise is broken where the traffic loses more than alpha. Scores stay in WORK. Prints JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import route_data
from retention import scores
from same_size import SYSTEM

from edgeft.files import sha256_json
from edgeft.router import Options, fit, load_policy
from edgeft.router.certificate import rcps_threshold
from edgeft.router.embedding import nearest
from edgeft.router.heads import read, scores_of
from edgeft.rows import row_hash, spread
from edgeft.tune.rows import rows_from_csv
from edgeft.types import Artifact

CERTIFIED_ON, SERVED = "gguf-f16", ("gguf-f16", "gguf-q3_k_m", "gguf-q2_k")
MEMORY_ROWS, NEIGHBOURS = 2000, 9


def main() -> None:
    """Answer, fit, split, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("dist", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--splits", type=int, default=1000)
    parser.add_argument("--delta", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    rows: list[Any] = rows_from_csv(options.data / "dev.csv", "text", "category", SYSTEM)
    rows = spread(rows, options.rows) if options.rows else rows
    texts = [row["messages"][-2]["content"] for row in rows]
    quality = {}
    for name in SERVED:
        if (options.dist / name / "artifact.json").is_file():
            artifact = Artifact.load(options.dist / name / "artifact.json")
            kept = (
                options.work
                / f"scores-{name}-{sha256_json([artifact.sha256, [row_hash(r) for r in rows]])[:16]}.json"
            )
            found = scores(
                options.dist / name, artifact.engine, rows, kept, options.work / "log", options.threads
            )
            quality[name] = np.array(found, float)
    strong = nearest_label(options.data, rows, texts, options.encoder)
    order = np.random.default_rng(0).permutation(len(rows))
    fitting, rest = order[: len(rows) // 3], order[len(rows) // 3 :]
    gains = predicted_gains(
        [texts[i] for i in fitting],
        quality[CERTIFIED_ON][fitting],
        strong[fitting],
        [texts[i] for i in rest],
        options,
    )
    shown: dict[str, Any] = {
        "rows": len(rows), "fitted_on": len(fitting), "certified_on": len(rest) // 2, "traffic": len(rest) - len(rest) // 2,
        "splits": options.splits, "delta": options.delta, "right": {n: round(float(q.mean()), 4) for n, q in quality.items()},
        "right_strong": round(float(strong.mean()), 4),
        "sampling_error_95": round(1.96 * (options.delta * (1 - options.delta) / options.splits) ** 0.5, 4),
    }  # fmt: skip
    for alpha in (0.05, 0.1, 0.2):
        shown[f"alpha {alpha}"] = cases(
            gains, {n: q[rest] for n, q in quality.items()}, strong[rest], alpha, options
        )
    print(json.dumps(shown, indent=1))


def cases(
    gains: np.ndarray, quality: dict[str, np.ndarray], strong: np.ndarray, alpha: float, options: Any
) -> dict[str, Any]:
    """Case -> promises broken, mean risk and share kept over the splits."""
    lost = {name: own < strong for name, own in quality.items()}
    pairs = [(on, served) for served in quality for on in dict.fromkeys((CERTIFIED_ON, served))]
    found: dict[str, list[tuple[float, float]]] = {
        f"certified on {on}, served on {served}": [] for on, served in pairs
    }
    chance = np.random.default_rng(1)
    for _ in range(options.splits):
        split = chance.permutation(len(gains))
        own, traffic = split[: len(gains) // 2], split[len(gains) // 2 :]
        limit = {on: rcps_threshold(gains[own], lost[on][own], alpha, options.delta) for on in quality}
        for (on, served), runs in zip(pairs, found.values(), strict=True):
            kept = gains[traffic] < limit[on]
            runs.append((float((kept & lost[served][traffic]).mean()), float(kept.mean())))
    return {
        name: {
            "broken": round(float(np.mean([risk > alpha for risk, _ in runs])), 4),
            "mean_risk": round(float(np.mean([risk for risk, _ in runs])), 4),
            "kept": round(float(np.mean([kept for _, kept in runs])), 4),
        }
        for name, runs in found.items()
    }


def predicted_gains(
    texts: list[str], weak: np.ndarray, strong: np.ndarray, asked: list[str], options: Any
) -> np.ndarray:
    """What the policy that these rows fit predicts for the others."""
    with tempfile.TemporaryDirectory() as scratch:
        table = Path(scratch, "rows.jsonl")
        lines = [
            {"request": t, "weak:score": w, "strong:score": s}
            for t, w, s in zip(texts, weak.tolist(), strong.tolist(), strict=True)
        ]
        table.write_text("".join(json.dumps(line) + "\n" for line in lines))
        fit([table], ["weak", "strong"], Path(scratch, "policy"), Options(encoder=options.encoder))
        policy = load_policy(Path(scratch, "policy"))
        found = [scores_of(policy, read(policy, text)) for text in asked]
    return np.array([s[1] - s[0] for s in found])


def nearest_label(data: Path, rows: list[Any], texts: list[str], encoder: Path) -> np.ndarray:
    """1 where the nearest rows of train.csv know the label, else 0."""
    with (data / "train.csv").open(newline="", encoding="utf-8") as file:
        memory = spread(list(csv.DictReader(file)), MEMORY_ROWS)  # type: ignore[arg-type]
    known: Any = memory
    there = route_data.embeddings(data, "banking77-train", [m["text"] for m in known], encoder)
    here = route_data.embeddings(data, "banking77-dev", texts, encoder)
    near = nearest(here, there, NEIGHBOURS)
    said = [Counter(known[i]["category"] for i in places).most_common(1)[0][0] for places in near]
    return np.array([float(s == r["messages"][-1]["content"]) for s, r in zip(said, rows, strict=True)])


if __name__ == "__main__":
    main()
