"""Does the rule of `edgeft bench compare` keep its promises on a box? Resamples kept samples of real runs of one artefact.

A/A: two runs of one artefact, called different although nothing is. Planted: the second run is slowed down, and found.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import numpy as np

from edgeft.bench.compare_speed import FLOOR, FLOOR_WITHIN, Repeats, floor_between, told
from edgeft.bench.processes import Processes, log_ratio, split
from edgeft.bench.significance import ALPHA


def calibrate(
    samples_by_run: list[list[float]],
    slowdown: float = 0.05,
    trials: int = 100,
    seed: int = 0,
    *,
    rounds_by_run: list[list[int]] | None = None,
    processes_by_run: list[list[int]] | None = None,
    floor: float = FLOOR,
    tests: int = 1,
) -> dict[str, Any]:
    """Draw pairs of different runs, resample the rounds of each process, and count what the rule says.

    `samples_by_run`: tok/s of runs of one artefact, new processes each; `rounds_by_run`: the round of each sample (a
    sample is a round of its own without it); `processes_by_run`: its process (all of one without it). Processes are as they
    were: drawing them with repeats would hold a run of fewer against the rule. A planted slowdown of 0.05 takes 5 % more
    time: tok/s / 1.05. `floor` is a |ln ratio|; `tests` is the size of the family, held to Bonferroni's level, the
    strictest that Holm's is.
    Returns {called_different, found, trials, runs, floor, ...}: counts of `trials`. `repeats` is the spread between the
    runs' medians, and `floor_measured` the floor that it sets.
    """
    runs = [
        _grouped(s, *(by_run[i] if by_run else None for by_run in (rounds_by_run, processes_by_run)))
        for i, s in enumerate(samples_by_run)
    ]
    rounds = [sum(map(len, run)) for run in runs]
    if len(runs) < 2 or min(rounds) < 3:
        raise ValueError(f"two runs of three rounds are needed, not {rounds}")
    chance = np.random.default_rng(seed)
    called = found = 0
    for trial in range(trials):
        first, second = chance.choice(len(runs), 2, replace=False)
        a, b = _drawn(runs[first], chance), _drawn(runs[second], chance)
        called += _called(a, b, floor, ALPHA / tests, trial) != 0
        found += _called(a, _slowed(b, slowdown), floor, ALPHA / tests, trial) == -1
    measured = spread([_median(r) for r in runs])
    return {
        "called_different": called,
        "found": found,
        "trials": trials,
        "slowdown": slowdown,
        "runs": len(runs),
        "rounds": rounds,
        "processes": [len(run) for run in runs],
        "medians": [_median(r) for r in runs],
        "floor": math.expm1(floor),
        "repeats": {"deviation": measured.deviation, "freedom": measured.freedom},
        "floor_measured": math.expm1(floor_between(measured, measured)),
        "tests": tests,
    }


def calibrate_in_turns(
    pairs: list[tuple[list[float], list[float]]],
    slowdown: float = 0.05,
    trials: int = 100,
    seed: int = 0,
    *,
    processes_by_pair: list[list[int]] | None = None,
    floor: float = FLOOR_WITHIN,
) -> dict[str, Any]:
    """`calibrate` for one artefact twice in one bench, asked in turns: of each bench tok/s of both, round by round.

    `processes_by_pair`: the process of each round (all of one without it). A trial takes one bench and resamples the rounds of each
    process. Returns {called_different, found, trials, slowdown, runs, rounds, processes, floor}.
    """
    chance = np.random.default_rng(seed)
    called = found = 0
    labels = processes_by_pair or [[0] * len(first) for first, _ in pairs]
    benches = [
        split([list(both) for both in zip(*pair, strict=True)], of)
        for pair, of in zip(pairs, labels, strict=True)
    ]
    for trial in range(trials):
        drawn = _drawn(benches[chance.integers(len(benches))], chance)
        a, b = ([[[both[side]] for both in process] for process in drawn] for side in (0, 1))
        called += _called(a, b, floor, ALPHA, trial, paired=True) != 0
        found += _called(a, _slowed(b, slowdown), floor, ALPHA, trial, paired=True) == -1
    return {
        "called_different": called,
        "found": found,
        "trials": trials,
        "slowdown": slowdown,
        "runs": len(benches),
        "rounds": [sum(map(len, b)) for b in benches],
        "processes": [len(b) for b in benches],
        "floor": math.expm1(floor),
    }


def _called(a: Processes, b: Processes, floor: float, level: float, seed: int, paired: bool = False) -> int:
    estimate = log_ratio(a, b, paired=paired, seed=seed)
    p = estimate.p()
    return told(estimate, floor, p is not None and p < level)


def spread(medians: list[float]) -> Repeats:
    """The deviation of ln(median) between runs of one artefact (two or more)."""
    logs = np.log(medians)
    return Repeats(float(logs.std(ddof=1)), len(medians) - 1)


def _grouped(samples: list[float], rounds: list[int] | None, processes: list[int] | None) -> Processes:
    """Samples by process and round."""
    found: dict[int, list[float]] = {}
    of: dict[int, int] = {}
    for i, sample in enumerate(samples):
        index = rounds[i] if rounds else i
        found.setdefault(index, []).append(sample)
        of[index] = processes[i] if processes else 0
    return split(list(found.values()), list(of.values()))


def _drawn(processes: Processes, chance: np.random.Generator) -> Processes:
    """Every process as often as it was, rounds drawn in each."""
    return [[rounds[i] for i in chance.integers(0, len(rounds), len(rounds))] for rounds in processes]


def _slowed(processes: Processes, slowdown: float) -> Processes:
    return [[[s / (1 + slowdown) for s in r] for r in rounds] for rounds in processes]


def _median(processes: Processes) -> float:
    return float(np.median(list(chain(*chain(*processes)))))
