"""A/A: is one artefact, measured twice by new processes, called different from itself? And is a slowdown of 5 % found?

    python benchmarks/same_twice.py ARTEFACT TASKS WORK [--runs 40]

Runs `edgeft bench` on ARTEFACT so many times, each with processes of its own, and keeps the reports in WORK (an interrupted series goes
on). Then: (1) of 100 pairs drawn from the runs, their raw samples resampled, how many does `edgeft bench compare`'s rule call different
(at most 10 asked), and in how many is a planted 5 % slowdown found (at least 80); (2) of the runs taken two by two, how many pairs'
95 % intervals of the median decode rate overlap (18 of 20 asked).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgeft.bench.aa import calibrate
from edgeft.bench.compare_speed import FLOOR, FLOOR_VIRTUAL
from edgeft.files import read_json
from edgeft.profiles.detection import virtualized


def run(artefact: Path, tasks: Path, out: Path) -> dict[str, Any]:
    """One bench's speed entry."""
    if not (out / "report.json").is_file():
        subprocess.run(
            [sys.executable, "-m", "edgeft", "bench", artefact, "--tasks", tasks, "--limit", "4", "--no-fidelity", "--allow-seen-rows",
             "--speed-points", "64x64", "--repetitions", "8", "--speed-seconds", "12", "--quiet", "--out", out],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    return read_json(out / "report.json")["results"][0]["speed"]


def main() -> None:
    """Print a JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("artefact", type=Path)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--runs", type=int, default=40)
    options = parser.parse_args()
    found = []
    for number in range(options.runs):
        found.append(run(options.artefact, options.tasks, options.work / f"run-{number}"))
        print(
            f"{number + 1}/{options.runs}: {found[-1]['decode_tok_per_s']['p50']:.1f} tok/s", file=sys.stderr
        )
    decode = [s["decode_tok_per_s"] for s in found]
    pairs = list(zip(decode[::2], decode[1::2], strict=False))
    overlap = sum(
        a["p50_ci95"][0] <= b["p50_ci95"][1] and b["p50_ci95"][0] <= a["p50_ci95"][1] for a, b in pairs
    )
    rounds = [s["points"][0]["round"] for s in found]
    samples = [d["samples"] for d in decode]
    rules = {"two reports": FLOOR, "two reports of a virtual machine": FLOOR_VIRTUAL}
    print(json.dumps({
        "runs": len(found), "medians_tok_per_s": [d["p50"] for d in decode],
        "pairs": len(pairs), "intervals_overlap": overlap,
        "virtual_machine": virtualized({}),
        "calibration": {n: calibrate(samples, rounds_by_run=rounds, floor=f) for n, f in rules.items()},
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
