"""Is the adapter still there in 8 bits? Adapter-gain retention of Q8_0 and ONNX INT8 as a non-inferiority test.

    python benchmarks/retention.py BANKING77 ADAPTER WORK [--base FOLDER] [--to gguf:q8_0 …] [--rows N]

BANKING77 holds train.csv (calibration) and dev.csv (text,category), ADAPTER is a LoRA adapter for the built-in
SmolLM2, or for `--base`, which is better: the built-in's weights sit on a 4-bit grid (off_grid_twin.py makes an exact
twin of both that does not). Every row of dev.csv is answered greedily by the base, by the merged model in float32
(transformers: the rival) and by each artefact through its own engine. Retention = (artefact - base) / (merged - base)
of exact matches; merged retains 1 by definition. Not worse by more than MARGIN where the lower bound of a one-sided
95 % paired bootstrap interval is at least 1 - MARGIN. `n_needed`: rows that would decide if there were no difference.
Scores stay in WORK, so an interrupted run goes on; about an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from same_size import SYSTEM, rows_of, run

from edgeft.bench import stats
from edgeft.compress import gate, gate_quality
from edgeft.compress.gate_reading import Running
from edgeft.engines.local import LocalModel
from edgeft.files import read_json, sha256_json, write_json
from edgeft.pull import pull
from edgeft.rows import Row, row_hash, spread
from edgeft.tune.rows import rows_from_csv
from edgeft.types import Artifact

FORMATS = ("gguf:q8_0", "onnx:int8")
MARGIN, ONE_SIDED, Z = 0.01, 5.0, 1.645
CHUNK_ROWS, RESAMPLES = 100, 10_000


def scores(folder: Path, engine: str, rows: list[Row], kept: Path, log: Path, threads: int) -> list[float]:
    """1 for an exact match, else 0, for each row; kept after every hundred."""
    found = read_json(kept) if kept.is_file() else []
    room = gate_quality.max_tokens(rows)
    if len(found) < len(rows):
        with (
            LocalModel(folder, engine, log=log, threads=threads, context=gate.CONTEXT) as model,
            httpx.Client() as client,
        ):
            while len(found) < len(rows):
                part = rows[len(found) : len(found) + CHUNK_ROWS]
                found += [float(v or 0) for v in gate_quality.scores(Running(model, client), part, room)]
                write_json(kept, found)
                print(f"{folder.name}: {len(found)} of {len(rows)}", file=sys.stderr)
    return found


def judged(artefact: list[float], merged: list[float], base: list[float]) -> dict[str, Any]:
    """Retention, its bounds, and whether it is not worse than merged's by more than MARGIN."""
    q, m, b = (np.asarray(s) for s in (artefact, merged, base))
    value, ci95 = stats.retention(q, m, b)
    picks = np.random.default_rng(0).integers(0, len(m), (RESAMPLES, len(m)))
    ratios = (q - b)[picks].mean(1) / (m - b)[picks].mean(1)
    bound = float(np.percentile(ratios, ONE_SIDED))
    return {
        "right": float(q.mean()),
        "retention": value,
        "ci95": ci95,
        "lower_bound": bound,
        "margin": MARGIN,
        "not_worse": bound >= 1 - MARGIN,
        "only_artefact": int((q > m).sum()),
        "only_merged": int((m > q).sum()),
        "mcnemar_p": stats.mcnemar(int((q > m).sum()), int((m > q).sum())),
        "n": len(m),
        "n_needed": int(np.ceil((q - m).var() * (Z / (MARGIN * (m - b).mean())) ** 2)),
    }


def main() -> None:
    """Make, answer, judge; one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--to", action="append")
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    base, dist = options.base or pull("smollm2-135m-instruct"), options.work / "dist"
    options.work.mkdir(parents=True, exist_ok=True)
    parts = rows_of(options.data / "train.csv", options.work / "rows")
    asked = [w for text in options.to or FORMATS for w in ("--to", text)]
    run("compress", base, "--adapter", options.adapter, "--name", "m", "--no-gate", *asked,
        "--calibration", parts / "calibrate.jsonl", "--out", dist)  # fmt: skip
    rows: list[Any] = rows_from_csv(options.data / "dev.csv", "text", "category", SYSTEM)
    rows = spread(rows, options.rows) if options.rows else rows
    made = {f.parent.name: Artifact.load(f) for f in sorted(dist.glob("*/artifact.json"))}
    merged = made.pop("merged")
    models = {
        "base": (base, gate.MERGED_ENGINE, gate.model_sha256(base)),
        "merged": (dist / "merged", gate.MERGED_ENGINE, merged.sha256),
        **{name: (dist / name, artifact.engine, artifact.sha256) for name, artifact in made.items()},
    }
    found = {}
    for name, (folder, engine, digest) in models.items():
        key = sha256_json([digest, [row_hash(row) for row in rows]])[:16]
        kept = options.work / f"scores-{name}-{key}.json"
        found[name] = scores(folder, engine, rows, kept, options.work / "log", options.threads)
    result = {name: judged(found[name], found["merged"], found["base"]) for name in made}
    right = {which: float(np.mean(found[which])) for which in ("base", "merged")}
    print(json.dumps({"rows": len(rows), **right, "artefacts": result}))


if __name__ == "__main__":
    main()
