"""A/A: is one artefact, measured twice by new processes, called different from itself? And is a slowdown of 5 % found?

    python benchmarks/same_twice.py ARTEFACT TASKS WORK [--benches 20] [--restarts 5] [--seconds 10]

Runs `edgeft bench` on ARTEFACT and a copy of it, asked in turns, so many times, and keeps the reports in WORK (an interrupted series
goes on). Asked of 100 pairs drawn from them, the rounds of each process resampled: at most 10 called different by `edgeft bench
compare`'s rule, and a planted 5 % slowdown found in at least 80; of 20 pairs of benches, one after the other: 95 % intervals of the
median decode rate overlap in 18. The rival in the same run is the same samples taken as if of one process a bench, with the
floors for that.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from edgeft.bench.aa import calibrate, calibrate_in_turns
from edgeft.bench.compare_speed import floor_of
from edgeft.bench.stats import summary
from edgeft.files import read_json, write_json

Sides = list[dict[str, Any]]  # the first point of each bench, of one artefact
OTHER_FLOORS = (0.0, 0.01, 0.03)  # shares that are tried beside the rule's own


def bench(artefacts: list[Path], tasks: Path, out: Path, restarts: int, seconds: float) -> dict[str, Any]:
    """The report of one bench, made where it is not there yet."""
    if not (out / "report.json").is_file():
        subprocess.run(
            [sys.executable, "-m", "edgeft", "bench", *artefacts, "--tasks", tasks, "--limit", "2", "--max-tokens", "4", "--no-fidelity",
             "--allow-seen-rows", "--speed-points", "64x64", "--repetitions", str(2 * restarts), "--restarts", str(restarts),
             "--speed-seconds", str(seconds), "--quiet", "--out", out],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    report: dict[str, Any] = read_json(out / "report.json")
    return report


def copied(artefact: Path, work: Path) -> Path:
    """A copy with an id of its own."""
    copy = work / "copy"
    if not copy.is_dir():
        shutil.copytree(artefact, copy)
        write_json(copy / "artifact.json", {**read_json(copy / "artifact.json"), "id": "copy"})
    return copy


def rates(point: dict[str, Any]) -> list[float]:
    """Decode rates of a bench, tok/s."""
    samples: list[float] = point["decode_tok_per_s"]["samples"]
    return samples


def overlapping(sides: Sides, plain: bool) -> list[bool]:
    """Of benches 1 and 2, 3 and 4, …: do their intervals overlap?"""
    ends = [summary(rates(p), None if plain else p["process"])["p50_ci95"] for p in sides]
    return [a[0] <= b[1] and b[0] <= a[1] for a, b in zip(ends[::2], ends[1::2], strict=False)]


def two_reports(sides: Sides, floor: float, plain: bool) -> dict[str, Any]:
    """The rule between benches."""
    return calibrate(
        [rates(p) for p in sides], rounds_by_run=[p["round"] for p in sides],
        processes_by_run=None if plain else [p["process"] for p in sides], floor=floor,
    )  # fmt: skip


def one_report(first: Sides, second: Sides, floor: float, plain: bool) -> dict[str, Any]:
    """The rule within a bench, on the rounds that both were asked in."""
    pairs, processes = [], []
    for x, y in zip(first, second, strict=True):
        a, b = (dict(zip(p["round"], zip(rates(p), p["process"], strict=True), strict=True)) for p in (x, y))
        shared = [r for r in a if r in b]
        pairs.append(([a[r][0] for r in shared], [b[r][0] for r in shared]))
        processes.append([a[r][1] for r in shared])
    return calibrate_in_turns(pairs, processes_by_pair=None if plain else processes, floor=floor)


def counted(found: dict[str, Any]) -> str:
    """The two counts in words."""
    return f"{found['called_different']} called different, {found['found']} found of {found['trials']}"


def main() -> None:
    """Print a JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("artefact", type=Path)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--benches", type=int, default=20)
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10)
    options = parser.parse_args()
    both = [options.artefact, copied(options.artefact, options.work)]
    reports = []
    for number in range(options.benches):
        begun = time.monotonic()
        place = options.work / f"bench-{number}"
        reports.append(bench(both, options.tasks, place, options.restarts, options.seconds))
        middle = [round(r["speed"]["decode_tok_per_s"]["p50"], 1) for r in reports[-1]["results"]]
        took = time.monotonic() - begun
        print(f"{number + 1}/{options.benches}: {middle} tok/s, {took:.0f} s", file=sys.stderr)
    first, second = ([r["results"][i]["speed"]["points"][0] for r in reports] for i in (0, 1))
    virtual = any(r["environment"]["virtual_machine"] for r in reports)
    several = {"over processes": False, "as if of one process": True}
    floors = {
        (where, name): floor_of(where == "one report", None, None, virtual, not plain)[0]
        for where in ("one report", "two reports") for name, plain in several.items()
    }  # fmt: skip

    def rule(where: str, floor: float, plain: bool) -> str:
        if where == "one report":
            return counted(one_report(first, second, floor, plain))
        return counted(two_reports(first, floor, plain))

    print(json.dumps({
        "benches": len(reports), "restarts": options.restarts, "virtual_machine": virtual,
        "rounds": [len(p["round"]) for p in first],
        "disturbed_rounds": [len({f["round"] for f in r["results"][0]["flags"]}) for r in reports],
        "medians_tok_per_s": [[p["decode_tok_per_s"]["p50"] for p in side] for side in (first, second)],
        "intervals_overlap": {
            n: f"{sum(o)} of {len(o)}" for n, plain in several.items() for o in [overlapping(first, plain) + overlapping(second, plain)]
        },
        "rule": {
            f"{where}, {n}, floor {100 * math.expm1(floors[where, n]):.1f} %": rule(where, floors[where, n], plain)
            for where in ("one report", "two reports") for n, plain in several.items()
        },
        "over processes with other floors": {
            f"{where}, floor {100 * floor:.0f} %": rule(where, math.log1p(floor), False)
            for where in ("one report", "two reports") for floor in OTHER_FLOORS
        },
        "two_reports": {k: two_reports(first, floors["two reports", "over processes"], False)[k] for k in ("repeats", "floor_measured")},
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
