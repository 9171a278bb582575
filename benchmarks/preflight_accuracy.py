"""What the pre-flight predicted of each step against what was then seen, as one JSON line.

    python benchmarks/preflight_accuracy.py BASE --adapter DIR --calibration rows.jsonl [--to gguf:q4_k_m …]

Ratios are predicted / seen. `within_25_percent`: the share of the steps' peak memory, of the wall times of steps over
5 s, and of the sizes that are; `worst` the furthest of each. On a quiet box: time is predicted from what it does then.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from edgeft.compress import Recipe, compress
from edgeft.pull import pull
from edgeft.types import Artifact


def ratios(artifact: Artifact) -> list[dict[str, Any]]:
    """One entry a step with a prediction."""
    return [
        {
            "artefact": artifact.id,
            "step": step["name"],
            "rss": round(step["predicted"]["peak_rss_bytes"] / step["peak_rss_bytes"], 2),
            "anon": round(step["predicted"]["peak_anon_bytes"] / step["peak_anon_bytes"], 2),
            "wall": round(step["predicted"]["wall_s"] / step["wall_s"], 2),
            "seen_s": round(step["wall_s"], 1),
        }
        for step in artifact.steps
        if "predicted" in step
    ]


def main() -> None:
    """Compress into a temporary folder and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--to", action="append", default=[])
    words = parser.parse_args()
    formats = tuple(words.to or ("gguf:q8_0", "gguf:q4_k_m", "onnx:int8"))
    with tempfile.TemporaryDirectory(prefix="edgeft-") as scratch:
        recipe = Recipe(out=Path(scratch), formats=formats, calibration=words.calibration)
        made = compress(pull(words.base), words.adapter, recipe)
    steps = [entry for artifact in made for entry in ratios(artifact)]
    sizes = {a.id: round(a.cost["predicted"]["size_bytes"] / a.size_bytes, 2) for a in made}
    found = {
        "memory": [s["rss"] for s in steps],
        "wall": [s["wall"] for s in steps if s["seen_s"] > 5],
        "size": list(sizes.values()),
    }
    close = {
        name: f"{sum(0.75 <= r <= 1.25 for r in values)} of {len(values)}" for name, values in found.items()
    }
    worst = {name: max(values, key=lambda r: max(r, 1 / r)) for name, values in found.items() if values}
    print(json.dumps({"within_25_percent": close, "worst": worst, "steps": steps, "sizes": sizes}))


if __name__ == "__main__":
    main()
