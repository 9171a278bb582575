"""Does the rule of `edgeft bench compare` keep its promises on a box? Resamples kept samples of real runs of one artefact.

A/A: two runs of one artefact, called different although nothing is. Planted: the second run is slowed down, and found.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgeft.bench.compare_speed import FLOOR, FLOOR_WITHIN, Repeats, floor_between, told
from edgeft.bench.significance import ALPHA, Rounds, log_ratio


def calibrate(
    samples_by_run: list[list[float]],
    slowdown: float = 0.05,
    trials: int = 100,
    seed: int = 0,
    *,
    rounds_by_run: list[list[int]] | None = None,
    floor: float = FLOOR,
    tests: int = 1,
) -> dict[str, Any]:
    """Draw pairs of different runs, resample their rounds, and count what the rule says.

    `samples_by_run`: tok/s of runs of one artefact, new processes each; `rounds_by_run`: the round of each sample (a
    sample is a round of its own without it). A planted slowdown of 0.05 takes 5 % more time: tok/s / 1.05. `floor` is
    a |ln ratio|; `tests` is the size of the family, held to Bonferroni's level, the strictest that Holm's is.
    Returns {called_different, found, trials, runs, floor, ...}: counts of `trials`. `repeats` is the spread between the
    runs' medians, and `floor_measured` the floor that it sets.
    """
    runs = [_grouped(s, rounds_by_run[i] if rounds_by_run else None) for i, s in enumerate(samples_by_run)]
    if len(runs) < 2 or min(map(len, runs)) < 3:
        raise ValueError(f"two runs of three rounds are needed, not {[len(r) for r in runs]}")
    chance = np.random.default_rng(seed)
    called = found = 0
    for trial in range(trials):
        first, second = chance.choice(len(runs), 2, replace=False)
        a, b = _drawn(runs[first], chance), _drawn(runs[second], chance)
        slowed = [[s / (1 + slowdown) for s in r] for r in b]
        called += _called(a, b, floor, ALPHA / tests, trial) != 0
        found += _called(a, slowed, floor, ALPHA / tests, trial) == -1
    measured = spread([_median(r) for r in runs])
    return {
        "called_different": called,
        "found": found,
        "trials": trials,
        "slowdown": slowdown,
        "runs": len(runs),
        "rounds": [len(r) for r in runs],
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
    floor: float = FLOOR_WITHIN,
) -> dict[str, Any]:
    """`calibrate` for two processes of one artefact that one bench asked in turns: of each bench tok/s of both, round by round.

    A trial takes one bench and resamples its rounds. Returns {called_different, found, trials, slowdown, runs, rounds, floor}.
    """
    chance = np.random.default_rng(seed)
    called = found = 0
    for trial in range(trials):
        first, second = pairs[chance.integers(len(pairs))]
        picks = chance.integers(0, len(first), len(first))
        a, b = [[first[i]] for i in picks], [[second[i]] for i in picks]
        slowed = [[s / (1 + slowdown) for s in r] for r in b]
        called += _called(a, b, floor, ALPHA, trial, paired=True) != 0
        found += _called(a, slowed, floor, ALPHA, trial, paired=True) == -1
    return {
        "called_different": called,
        "found": found,
        "trials": trials,
        "slowdown": slowdown,
        "runs": len(pairs),
        "rounds": [len(a) for a, _ in pairs],
        "floor": math.expm1(floor),
    }


def _called(a: Rounds, b: Rounds, floor: float, level: float, seed: int, paired: bool = False) -> int:
    estimate = log_ratio(a, b, paired=paired, seed=seed)
    p = estimate.p()
    return told(estimate, floor, p is not None and p < level)


def spread(medians: list[float]) -> Repeats:
    """The deviation of ln(median) between runs of one artefact (two or more)."""
    logs = np.log(medians)
    return Repeats(float(logs.std(ddof=1)), len(medians) - 1)


def _grouped(samples: list[float], rounds: list[int] | None) -> Rounds:
    if rounds is None:
        return [[s] for s in samples]
    found: dict[int, list[float]] = {}
    for index, sample in zip(rounds, samples, strict=True):
        found.setdefault(index, []).append(sample)
    return list(found.values())


def _drawn(rounds: Rounds, chance: np.random.Generator) -> Rounds:
    return [rounds[i] for i in chance.integers(0, len(rounds), len(rounds))]


def _median(rounds: Rounds) -> float:
    return float(np.median([s for r in rounds for s in r]))
