"""Speed of B against A: a ratio of medians, its interval over rounds, and the floor that two runs of one artefact set.

A process keeps its luck (memory layout, neighbours on the box) as long as it lives, so no number of samples of one
process shows how far the next one lies. A difference is therefore told only where it is beyond chance, which is of processes
where both sides have three or more, *and* beyond the floor, which is of what chance does not see. docs/compare.md says why the
floors are what they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import Any

from edgeft.bench.processes import Processes, log_ratio, several, split
from edgeft.bench.significance import ALPHA, FEWEST_ROUNDS, LogRatio, t_quantile

FLOOR = math.log(1.03)  # two reports, no repeated runs known
# … of which one is of a virtual machine, whose neighbours come and go: forty runs of one artefact on one had medians with a
# deviation of 7.5 %, so 95 of 100 pairs of runs lie within 24 %
FLOOR_VIRTUAL = math.log(1.25)
FLOOR_WITHIN = math.log(
    1.01
)  # one report: measured in turns, so the box's state is shared; the processes differ
# … and of a virtual machine: pairs of processes of one artefact differed there with a deviation of 2.0 % (ten benches), which is
# 1.64 deviations for ten false alarms of 100
FLOOR_WITHIN_VIRTUAL = math.log(1.035)
FEWEST_REPEATS = 4  # degrees of freedom from which repeated runs set the floor
PROMPTS_ALIKE = 0.1  # |ln ratio| of token counts up to which whole figures are compared

# figure -> (key in `speed`, word for more, word for less, the measurement it comes from)
SPEEDS = {
    "decode tok/s": ("decode_tok_per_s", "faster", "slower", "decode"),
    "prefill tok/s": ("prefill_tok_per_s", "faster", "slower", "first token"),
    "TTFT s": ("ttft_s", "slower", "faster", "first token"),
}

ByRound = dict[Any, list[float]]  # round -> samples; None: samples that name no round


@dataclass(frozen=True)
class Repeats:
    """How far runs of one artefact lie apart on a box: deviation of ln(median) between runs, its degrees of freedom."""

    deviation: float
    freedom: int


def floor_between(a: Repeats, b: Repeats) -> float:
    """The |ln ratio| that 95 of 100 pairs of runs stay under where the artefacts are equally fast."""
    return t_quantile(1 - ALPHA / 2, min(a.freedom, b.freedom)) * math.hypot(a.deviation, b.deviation)


def floor_of(
    paired: bool, a: Repeats | None, b: Repeats | None, virtual: bool, restarted: bool = False
) -> tuple[float, str]:
    """(|ln ratio| that a difference must pass, what that rests on). `restarted`: chance is of several processes a side.

    In turns the floor of a virtual machine is how far two processes lie apart, which several show themselves. Two reports
    keep theirs: their processes ran within a minute or two, and a box drifts for longer.
    """
    if paired and virtual and not restarted:
        return FLOOR_WITHIN_VIRTUAL, "assumed of a virtual machine, measured in turns"
    if paired:
        return FLOOR_WITHIN, "assumed, measured in turns"
    if a and b and min(a.freedom, b.freedom) >= FEWEST_REPEATS:
        return floor_between(a, b), f"measured on {a.freedom} and {b.freedom} repetitions of whole runs"
    if virtual:
        return FLOOR_VIRTUAL, "assumed of a virtual machine, not measured in turns"
    return FLOOR, "assumed, not measured in turns"


def told(estimate: LogRatio, floor: float, beyond_chance: bool) -> int:
    """1 where B's figure is called higher than A's, -1 lower, 0 not told apart."""
    if not beyond_chance or abs(estimate.value) <= floor:
        return 0
    return 1 if estimate.value > 0 else -1


def speed_figure(
    name: str,
    a: dict[str, Any],
    b: dict[str, Any],
    one_report: bool,
    repeats: tuple[Repeats | None, Repeats | None],
    virtual: bool = False,
) -> tuple[dict[str, Any], LogRatio | None] | None:
    """One speed figure of two `speed` entries and the estimate that `judge` takes; None where one side has none."""
    key, *_, measurement = SPEEDS[name]
    if not all((s.get(key) or {}).get("samples") for s in (a, b)):
        return None
    figure: dict[str, Any] = {"figure": name, "a": None, "b": None, "p": None, "measurement": measurement}
    x, y, at = common_samples(a, b, key)
    left, right = by_round(x, key), by_round(y, key)
    if not left or not right:
        return {**figure, "verdict": "not comparable", "why": at}, None
    paired = one_report and None not in left and None not in right
    sides = together(x, y, left, right) if paired else (by_process(x, left), by_process(y, right))
    rounds = [[r for process in side for r in process] for side in sides]
    fewest = min(map(len, rounds))
    if fewest < FEWEST_ROUNDS:
        why = f"{fewest} rounds, and {FEWEST_ROUNDS} are needed"
        return {**figure, "verdict": "too few rounds", "why": why}, None
    estimate, restarted = log_ratio(*sides, paired), several(*sides)
    floor, basis = floor_of(paired, *repeats, virtual, restarted)
    figure |= {
        "at": at,
        "a": median(s for r in rounds[0] for s in r),
        "b": median(s for r in rounds[1] for s in r),
        "ratio": math.exp(estimate.value),
        "ci95": estimate.interval(),
        "p": estimate.p(),
        "rounds": [len(r) for r in rounds],
        "samples": [sum(map(len, r)) for r in rounds],
        "processes": [len(side) for side in sides],
        "paired_by_round": paired,
        "test": f"Student's t, bootstrap error over {'processes and their rounds' if restarted else 'rounds'}",
        "floor": math.expm1(floor),
        "floor_basis": basis,
    }
    return figure, estimate


def judge(figure: dict[str, Any], estimate: LogRatio, level: float, tests: int) -> None:
    """Add the verdict by the corrected p, the interval at Holm's `level`, what could be shown among `tests`, and the
    slowdown that stays possible."""
    floor, beyond_chance = math.log1p(figure["floor"]), figure["p_holm"] < ALPHA
    called = told(estimate, floor, beyond_chance)
    _, more, less, _ = SPEEDS[figure["figure"]]
    reach = estimate.could_show(ALPHA / tests, floor)
    figure |= {
        "ci_holm": estimate.interval(level),
        "could_show": None if reach is None else math.expm1(reach),
        "slowdown_at_worst": _at_worst(figure["figure"], estimate, floor),
        "verdict": more if called > 0 else less if called < 0 else "not told apart",
    }
    if not called and beyond_chance:
        figure["why"] = f"within the {100 * figure['floor']:.1f} % that two runs of one artefact differ by"
    elif not called:
        figure["why"] = "within chance"


def _at_worst(name: str, estimate: LogRatio, floor: float) -> float:
    """The largest slowdown of B that stays possible (one-sided 95 %), as a share of time: 0.05 is 5 % more time."""
    error = estimate.error or 0.0
    reach = max(floor, t_quantile(1 - ALPHA, estimate.freedom) * error)
    slower = estimate.value if name == "TTFT s" else -estimate.value
    return math.expm1(slower + reach)


def common_samples(
    a: dict[str, Any], b: dict[str, Any], key: str
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The first point that was asked of both, as each has it, and the point in words; or ({}, {}, why there is none).

    Reports without points are compared as a whole where prompts and answers were about as long.
    """
    points, others = a.get("points") or [], b.get("points") or []
    for point in points:
        for other in others:
            if point.get("asked") == other.get("asked") and point.get(key) and other.get(key):
                return point, other, _in_words(point.get("asked") or {})
    if points and others:
        return {}, {}, "no point of the speed workload was asked of both"
    for tokens in ("prompt_tokens", "output_tokens"):
        left, right = (sorted(s.get(tokens) or []) for s in (a, b))
        if left and right:
            x, y = left[len(left) // 2], right[len(right) // 2]
            if x and y and abs(math.log(x / y)) > PROMPTS_ALIKE:
                return {}, {}, f"{x:g} and {y:g} {tokens.replace('_', ' ')}"
    return a, b, ""


def _in_words(asked: dict[str, Any]) -> str:
    return f"{asked.get('prompt_tokens') or 0}+{asked.get('output_tokens') or 0} tokens"


def by_round(point: dict[str, Any], key: str) -> ByRound:
    """Samples by the round they came from; all under None where rounds are not named. What has no logarithm is left out."""
    samples, rounds = (point.get(key) or {}).get("samples") or [], point.get("round")
    named = rounds if rounds and len(rounds) == len(samples) else [None] * len(samples)
    found: ByRound = {}
    for index, sample in zip(named, samples, strict=True):
        if sample > 0 and math.isfinite(sample):
            found.setdefault(index, []).append(sample)
    return found


def by_process(point: dict[str, Any], found: ByRound) -> Processes:
    """Rounds by process; of one where none is named. A sample that names no round is a round of its own."""
    if None in found:
        return [[[s] for s in found[None]]]
    return split(list(found.values()), [process_of(point).get(r) for r in found])


def together(
    x: dict[str, Any], y: dict[str, Any], left: ByRound, right: ByRound
) -> tuple[Processes, Processes]:
    """Both sides' shared rounds by process: of the side that had fewer, where one was started in between."""
    shared = [r for r in left if r in right]
    labels = min(([process_of(p).get(r) for r in shared] for p in (x, y)), key=lambda found: len(set(found)))
    return split([left[r] for r in shared], labels), split([right[r] for r in shared], labels)


def process_of(point: dict[str, Any]) -> dict[int, int]:
    """The process of each round, where the report names them."""
    return dict(zip(point.get("round") or [], point.get("process") or [], strict=False))
