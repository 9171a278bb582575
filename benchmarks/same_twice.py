"""A/A: is one artefact, measured twice by new processes, called different from itself? And is a slowdown of 5 % found?

    python benchmarks/same_twice.py ARTEFACT TASKS WORK [--runs 40] [--in-turns 10]

Runs `edgeft bench` on ARTEFACT so many times, each with processes of its own, and keeps the reports in WORK (an interrupted series goes
on). Then: (1) of 100 pairs drawn from the runs, their raw samples resampled, how many does `edgeft bench compare`'s rule call different
(at most 10 asked), and in how many is a planted 5 % slowdown found (at least 80); (2) of the runs taken two by two, how many pairs'
95 % intervals of the median decode rate overlap (18 of 20 asked). With --in-turns as many benches more, each of the artefact and a copy of it,
which are asked in turns; (3) of 100 drawn from these the counts of (1) by the rule for one report.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgeft.bench.aa import calibrate, calibrate_in_turns
from edgeft.bench.compare_speed import FLOOR, FLOOR_VIRTUAL
from edgeft.files import read_json, write_json
from edgeft.profiles.detection import virtualized


def run(artefacts: list[Path], tasks: Path, out: Path, seconds: int) -> list[dict[str, Any]]:
    """The speed entries of one bench."""
    if not (out / "report.json").is_file():
        subprocess.run(
            [sys.executable, "-m", "edgeft", "bench", *artefacts, "--tasks", tasks, "--limit", "4", "--no-fidelity", "--allow-seen-rows",
             "--speed-points", "64x64", "--repetitions", "8", "--speed-seconds", str(seconds), "--quiet", "--out", out],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    return [result["speed"] for result in read_json(out / "report.json")["results"]]


def copied(artefact: Path, work: Path) -> Path:
    """A copy with an id of its own."""
    copy = work / "copy"
    if not copy.is_dir():
        shutil.copytree(artefact, copy)
        write_json(copy / "artifact.json", {**read_json(copy / "artifact.json"), "id": "copy"})
    return copy


def in_turns(artefact: Path, tasks: Path, work: Path, runs: int) -> dict[str, Any]:
    """What the rule for one report makes of the artefact and its copy."""
    pairs = []
    for number in range(runs):
        both = run([artefact, copied(artefact, work)], tasks, work / f"turns-{number}", 14)
        samples = [speed["decode_tok_per_s"]["samples"] for speed in both]
        shared = min(map(len, samples))
        pairs.append((samples[0][:shared], samples[1][:shared]))
        print(
            f"in turns {number + 1}/{runs}: {[s['decode_tok_per_s']['p50'] for s in both]}", file=sys.stderr
        )
    return calibrate_in_turns(pairs)


def main() -> None:
    """Print a JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("artefact", type=Path)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--in-turns", type=int, default=0)
    options = parser.parse_args()
    found = []
    for number in range(options.runs):
        found += run([options.artefact], options.tasks, options.work / f"run-{number}", 12)
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
        "one report": in_turns(options.artefact, options.tasks, options.work, options.in_turns) if options.in_turns else None,
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
