"""Several processes of one artefact: what their intervals cover and what the rule over them says. All samples are simulated."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgeft.bench import compare_text, processes, significance
from edgeft.bench.aa import calibrate, calibrate_in_turns
from edgeft.bench.compare import compare
from edgeft.bench.compare_speed import FLOOR, FLOOR_WITHIN, told
from edgeft.bench.csv_out import csv_text
from edgeft.bench.report import notes
from edgeft.bench.stats import summary
from edgeft.bench.verdict import verdicts
from tests.test_bench_compare import of, report, result, side


def simulated(
    between: float, within: float, count: int, rounds: int, chance: np.random.Generator
) -> list[list[float]]:
    """tok/s by process of an artefact of 50: `between` and `within` are deviations of the logarithm."""
    return [
        list(50 * np.exp(between * chance.normal() + within * chance.normal(size=rounds)))
        for _ in range(count)
    ]


def flat(runs: list[list[float]]) -> tuple[list[float], list[int]]:
    return [s for run in runs for s in run], [i for i, run in enumerate(runs) for _ in run]


def made(name: str, runs: list[list[float]], environment: dict | None = None, **more):
    samples, labels = flat(runs)
    entry = result(name, samples, list(range(len(samples))), size_bytes=1)
    entry["speed"]["points"][0]["process"] = labels
    entry["speed"]["processes"] = len(runs)
    return report(entry, environment=environment or {}, **more)


@pytest.mark.parametrize(("count", "rounds", "most_plain"), [(3, 4, 160), (5, 2, 184), (1, 10, 40)])
def test_the_interval_over_processes_covers_what_the_plain_one_does_not(count, rounds, most_plain):
    """Simulated: processes differ by 3 %, rounds by 0.5 %; of 200 artefacts 95 % intervals hold the true 50 of 186 or more."""
    chance = np.random.default_rng(2)
    plain = by_process = 0
    for _ in range(200):
        samples, labels = flat(simulated(0.03, 0.005, count, rounds, chance))
        (low, high), found = summary(samples)["p50_ci95"], summary(samples, labels)
        plain += low <= 50 <= high
        by_process += found["p50_ci95"][0] <= 50 <= found["p50_ci95"][1]
        assert found["p50_ci95"][0] <= found["p50"] <= found["p50_ci95"][1]
    assert plain < most_plain, "samples of few processes are no more than the processes"
    assert by_process >= 186 if count >= 3 else by_process == plain, (
        "one process can't tell, whatever is done"
    )


def test_intervals_of_two_runs_overlap():
    """Simulated: 18 of 20 pairs, where processes differ by 3 %; by the plain interval far fewer do."""
    chance = np.random.default_rng(3)
    overlaps = {"plain": 0, "processes": 0}
    for _ in range(20):
        pair = [flat(simulated(0.03, 0.002, 5, 2, chance)) for _ in range(2)]
        alone = [flat(simulated(0.03, 0.002, 1, 10, chance)) for _ in range(2)]
        for name, (a, b) in (
            ("processes", [summary(*run)["p50_ci95"] for run in pair]),
            ("plain", [summary(run)["p50_ci95"] for run, _ in alone]),
        ):
            overlaps[name] += a[0] <= b[1] and b[0] <= a[1]
    assert overlaps["processes"] >= 18 > 12 > overlaps["plain"], overlaps


def test_few_processes_and_unnamed_ones_keep_the_plain_interval():
    samples, labels = flat(simulated(0.03, 0.01, 2, 5, np.random.default_rng(0)))
    assert summary(samples, labels) == summary(samples)
    more = summary(samples, [0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert more["processes"] == 3 and "processes" not in summary(samples)


def test_the_hierarchical_error_is_that_of_fresh_processes():
    """Simulated: the mean bootstrap variance against the deviation of 300 fresh artefacts' means, where processes differ most."""
    chance = np.random.default_rng(4)
    values, parts = [], []
    for _ in range(300):
        runs = [[[s] for s in run] for run in simulated(0.03, 0.005, 4, 3, chance)]
        values.append(np.mean([math.log(np.median(run)) for run in runs]))
        parts.append(processes.variance(runs, np.log, chance))
    assert math.sqrt(np.mean(parts)) == pytest.approx(np.std(values), rel=0.12)
    same = processes.variance([[[50.0]], [[50.0]], [[50.0]]], np.log, chance)
    assert same == 0 and processes.interval([[[50.0]], [[50.0]], [[50.0]]]) == pytest.approx([50, 50])


def test_one_process_a_side_is_held_as_before():
    a, b = ([[s] for s in simulated(0, 0.02, 1, 8, np.random.default_rng(n))[0]] for n in (1, 2))
    assert processes.log_ratio([a], [b], paired=False) == significance.log_ratio(a, b, paired=False)
    two = processes.log_ratio([a[:4], a[4:]], [b[:4], b[4:]], paired=True)
    assert two == significance.log_ratio(a, b, paired=True), (
        "two processes are too few to tell how far they lie apart"
    )


def in_turns(between: float, within: float, count: int, rounds: int, chance: np.random.Generator):
    """Two processes at a time on a box that drifts by 8 %: of both, tok/s and processes round by round."""
    drift = np.exp(0.08 * chance.normal(size=count * rounds))
    both = [np.array(flat(simulated(between, within, count, rounds, chance))[0]) * drift for _ in range(2)]
    return both, [i // rounds for i in range(count * rounds)]


def test_in_turns_equal_artefacts_are_equal_and_five_percent_is_found():
    """Simulated, as the virtual machine was: processes differ by 1.4 %, so pairs by 2 %. One process with the 1 % floor fails."""
    chance = np.random.default_rng(5)
    called = found = alone = 0

    def verdict(a, b, labels: list[int]) -> int:
        x, y = (processes.split([[s] for s in samples], labels) for samples in (a, b))
        estimate = processes.log_ratio(x, y, paired=True)
        return told(estimate, FLOOR_WITHIN, estimate.p() < 0.05)

    for _ in range(100):
        (a, b), labels = in_turns(0.014, 0.008, 5, 2, chance)
        (c, d), one = in_turns(0.014, 0.008, 1, 10, chance)
        called += verdict(a, b, labels) != 0
        found += verdict(a, b / 1.05, labels) == -1
        alone += verdict(c, d, one) != 0
    assert called <= 10 and found >= 80 and alone > 20, (called, found, alone)


def test_two_reports_of_processes_that_differ():
    """Simulated: processes differ by 1.7 %, five a report. One process a report with the same floor cries wolf."""
    chance = np.random.default_rng(6)
    called = found = alone = 0

    def verdict(a: list[list[float]], b: list[list[float]], slower: float = 1.0) -> int:
        x, y = [[[s] for s in p] for p in a], [[[s / slower] for s in p] for p in b]
        estimate = processes.log_ratio(x, y, paired=False)
        return told(estimate, FLOOR, estimate.p() < 0.05)

    for _ in range(100):
        a, b = (simulated(0.017, 0.005, 5, 2, chance) for _ in range(2))
        c, d = (simulated(0.017, 0.005, 1, 10, chance) for _ in range(2))
        called += verdict(a, b) != 0
        found += verdict(a, b, 1.05) == -1
        alone += verdict(c, d) != 0
    assert called <= 10 < alone and found >= 80, (called, found, alone)


def test_floors_fall_only_where_processes_show_what_they_stood_for():
    chance = np.random.default_rng(7)
    virtual = {"virtual_machine": True}
    runs = simulated(0.01, 0.005, 4, 3, chance)
    apart = of(compare(side(made("q", runs, virtual)), side(made("q", runs, virtual))), "decode tok/s")
    assert apart["floor"] == pytest.approx(0.25) and apart["processes"] == [4, 4]
    metal = of(compare(side(made("q", runs)), side(made("q", runs))), "decode tok/s")
    assert metal["floor"] == pytest.approx(0.03) and "processes" in metal["test"]
    assert "4 and 4 processes)" in compare_text.sentence(metal)
    both = made("a", runs, virtual)
    both.results.append({**both.results[0], "id": "b"})
    together = of(compare(side(both, 0), side(both, 1)), "decode tok/s")
    assert together["floor"] == pytest.approx(0.01) and together["paired_by_round"]
    # A model that was started once more than the other: pairs are of the one with fewer processes.
    more = made("a", runs, virtual)
    other = {**result("b", flat(runs)[0], list(range(12))), "id": "b"}
    other["speed"]["points"][0]["process"] = [0] * 12
    more.results.append(other)
    mixed = of(compare(side(more, 0), side(more, 1)), "decode tok/s")
    assert mixed["processes"] == [1, 1] and mixed["floor"] == pytest.approx(0.035)


def test_calibrate_keeps_processes_together():
    chance = np.random.default_rng(8)
    benches = [flat(simulated(0.03, 0.004, 4, 3, chance)) for _ in range(8)]
    samples, labels = [b[0] for b in benches], [b[1] for b in benches]
    by_process = calibrate(samples, processes_by_run=labels, floor=0.0)
    plain = calibrate(samples, floor=0.0)
    assert by_process["processes"] == [4] * 8 and plain["processes"] == [1] * 8
    assert by_process["called_different"] < plain["called_different"]
    turns = [in_turns(0.014, 0.008, 4, 2, chance) for _ in range(6)]
    pairs = [(list(a), list(b)) for (a, b), _ in turns]
    found = calibrate_in_turns(pairs, processes_by_pair=[labels for _, labels in turns])
    assert found["processes"] == [4] * 6
    assert found["called_different"] < calibrate_in_turns(pairs)["called_different"]


def test_processes_are_told_where_they_decide():
    runs = simulated(0.02, 0.005, 4, 3, np.random.default_rng(9))
    samples, labels = flat(runs)
    one = made("q", runs, workload={"rows": 1, "max_tokens": 1, "tasks": "rows.jsonl", "threads": 2})
    one.results[0]["speed"]["tpot_s"] = summary([1 / s for s in samples], labels)
    (limit,) = verdicts(one.results[0], {"tpot_s": 0.0202})
    assert limit["n"] == 4 and limit["n_of"] == "processes" and limit["verdict"] == "INCONCLUSIVE"
    assert ",speed_processes," in csv_text(one) and ",4," in csv_text(one)
    told = [line for line in notes(one) if "one after another" in line]
    assert len(told) == 1 and "timed in 4 processes" in told[0]
