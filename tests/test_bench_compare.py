"""Comparing two results: the statistics against slow references, the rule against planted and absent differences."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from edgeft.bench import compare_text, significance
from edgeft.bench.aa import calibrate, calibrate_in_turns
from edgeft.bench.compare import Side, compare, compare_many, gate
from edgeft.bench.compare_speed import Repeats
from edgeft.bench.csv_out import csv_text
from edgeft.bench.significance import holm, log_ratio, mcnemar_could_show, paired_mean, t_cdf, t_quantile
from edgeft.bench.stats import mcnemar, summary
from edgeft.types import BenchReport

ASKED = {"prompt_tokens": 128, "output_tokens": 64}


def result(name: str, decode: list[float], rounds: list[int] | None = None, **more) -> dict:
    point = {
        "asked": ASKED,
        "decode_tok_per_s": summary(decode),
        "ttft_s": summary([4 / d for d in decode]),
        "prefill_tok_per_s": summary([32 * d for d in decode]),
    }
    if rounds:
        point["round"] = rounds
    speed = {k: point[k] for k in ("decode_tok_per_s", "ttft_s", "prefill_tok_per_s")}
    return {
        "id": name,
        "kind": "artifact",
        "engine": "gguf",
        "speed": {**speed, "side": "client", "points": [point]},
        **more,
    }


def report(*results: dict, **more) -> BenchReport:
    return BenchReport(
        **{
            "created_at": "2026-01-01T00:00:00+00:00", "environment": {"machine": "x86_64"},
            "profile": {"id": "box", "name": "A box"}, "workload": {"tasks": "rows.jsonl", "tasks_sha256": "r", "threads": 2},
            "results": list(results), "reference": None, **more,
        }
    )  # fmt: skip


def side(made: BenchReport, index: int = 0, items: list[dict] | None = None, name: str = "") -> Side:
    entry = made.results[index]
    return Side(name or entry["id"], made, entry, items or [], f"sha of {id(made)}")


def answers(right: list[bool | None], scores: list[float] | None = None) -> list[dict]:
    return [
        {"item_id": str(i), "row_hash": f"h{i}", "correct": r, "score": scores[i] if scores else None if r is None else float(r)}
        for i, r in enumerate(right)
    ]  # fmt: skip


def of(comparison: dict, figure: str) -> dict:
    return next(f for f in comparison["figures"] if f["figure"] == figure)


def noisy(middle: float, rounds: int, seed: int, sd: float = 0.01) -> list[float]:
    return list(middle * np.exp(sd * np.random.default_rng(seed).normal(size=rounds)))


# --- the statistics


def test_students_t_matches_the_tables():
    assert [t_quantile(0.975, v) for v in (1, 2, 4, 10, 30)] == pytest.approx(
        [12.706, 4.303, 2.776, 2.228, 2.042], abs=1e-3
    )
    assert t_cdf(0, 7) == 0.5 and t_cdf(-2, 3) == pytest.approx(1 - t_cdf(2, 3))
    # One degree of freedom is Cauchy's distribution.
    assert t_cdf(1.7, 1) == pytest.approx(0.5 + math.atan(1.7) / math.pi)


def test_holm_adjusts_step_by_step_and_its_levels_say_the_same():
    adjusted, levels = holm([0.01, 0.04, 0.03])
    assert adjusted == pytest.approx([0.03, 0.06, 0.06])
    assert levels == pytest.approx([0.05 / 3, 0.05 / 2, 0.05 / 2])
    # The second fails at its level, so the third is not called although 0.04 < 0.05.
    for ps in product([0.001, 0.012, 0.02, 0.03, 0.049, 0.4], repeat=3):
        adjusted, levels = holm(list(ps))
        assert [a < 0.05 for a in adjusted] == [p < level for p, level in zip(ps, levels, strict=True)]
    assert holm([]) == ([], [])


def test_the_error_of_a_median_ratio_is_near_that_of_many_fresh_samples():
    """The bootstrap's error against the deviation of the log-ratio over 400 fresh pairs of runs."""
    chance = np.random.default_rng(3)
    values, errors = [], []
    for _ in range(400):
        a, b = ([[x] for x in np.exp(0.02 * chance.normal(size=15))] for _ in range(2))
        found = log_ratio(a, b, paired=False)
        values.append(found.value)
        errors.append(found.error)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.2)


def test_samples_of_one_round_do_not_count_as_independent():
    """Ten samples with one round's noise say no more than one of them."""
    chance = np.random.default_rng(0)
    a, b = ([[float(np.exp(0.05 * n))] for n in chance.normal(size=8)] for _ in range(2))
    one = log_ratio(a, b, paired=False)
    ten = log_ratio([r * 10 for r in a], [r * 10 for r in b], paired=False)
    flat = log_ratio([[s] for r in a for s in r * 10], [[s] for r in b for s in r * 10], paired=False)
    assert ten.error == pytest.approx(one.error) and flat.error < 0.6 * one.error


def test_pairing_by_round_takes_the_shared_noise_out():
    chance = np.random.default_rng(1)
    shared, own = 0.1 * chance.normal(size=40), 0.01 * chance.normal(size=40)
    a, b = (
        [[math.exp(x)] for x in shared],
        [[1.04 * math.exp(x + e)] for x, e in zip(shared, own, strict=True)],
    )
    apart, together = log_ratio(a, b, paired=False), log_ratio(a, b, paired=True)
    assert together.error < apart.error / 5
    low, high = together.interval()
    assert low < 1.04 < high < low + 0.015  # about 4 * 1.25 * 0.01 / sqrt(40) wide, in spite of the 10 %


def test_interval_and_p_are_the_same_test():
    found = log_ratio([[x] for x in noisy(50, 9, 1)], [[x] for x in noisy(49.3, 9, 2)], paired=False)
    p = found.p()
    low, high = found.interval(p)
    assert min(abs(low - 1), abs(high - 1)) == pytest.approx(0, abs=1e-6)


def test_two_rounds_have_no_interval():
    found = log_ratio([[1.0], [1.1]], [[2.0], [2.1]], paired=True)
    assert found.error is None and found.p() is None and found.interval() is None


@pytest.mark.parametrize(("n", "share"), [(60, 0.2), (300, 0.1)])
def test_what_mcnemar_could_show_is_shown_in_80_of_100(n, share):
    """Planted differences of that size, and the exact test counts how many are found."""
    d = mcnemar_could_show(n, round(share * n), 0.05)
    s = max(share, d)
    chance = np.random.default_rng(5)
    trials = 2000
    lost, gained, _ = chance.multinomial(n, [(s + d) / 2, (s - d) / 2, 1 - s], trials).T
    found = np.mean([mcnemar(int(a), int(b)) < 0.05 for a, b in zip(lost, gained, strict=True)])
    assert 0.68 < found < 0.88  # the formula is for large n and the exact test is a little shy


def test_too_few_rows_can_show_nothing():
    assert mcnemar_could_show(5, 0, 0.05) is None and mcnemar_could_show(0, 0, 0.05) is None


def test_sign_flips_agree_with_all_of_them():
    differences = [0.3, 0.1, 0.4, -0.1, 0.2, 0.25, 0.05, 0.3]
    mean = np.mean(differences)
    flips = [np.mean(np.multiply(signs, differences)) for signs in product([-1, 1], repeat=8)]
    exact = np.mean([abs(f) >= mean - 1e-12 for f in flips])
    found, (low, high), p = paired_mean(differences)
    assert found == pytest.approx(mean) and low < mean < high and p == pytest.approx(exact, abs=0.012)


# --- the rule


def test_a_clear_slowdown_is_called_and_gated():
    a, b = report(result("q", noisy(50, 10, 1))), report(result("q", noisy(44, 10, 2)))
    found = compare(side(a), side(b))
    decode = of(found, "decode tok/s")
    assert decode["verdict"] == "slower" and decode["ratio"] == pytest.approx(0.88, abs=0.02)
    assert decode["ci_holm"][1] < 1 and decode["p_holm"] < 0.05 and not decode["paired_by_round"]
    assert of(found, "TTFT s")["verdict"] == of(found, "prefill tok/s")["verdict"] == "slower"
    assert found["tests"] == 2  # TTFT and prefill are one measurement
    assert gate(found)[0] == 1
    assert gate(compare(side(b), side(a)))[0] == 0


def test_two_reports_are_not_told_apart_within_what_two_processes_differ_by():
    """2 % is beyond the chance of these rounds, and two processes of one artefact differ by as much."""
    a, b = (report(result("q", noisy(m, 30, m, 0.003))) for m in (50, 49))
    decode = of(compare(side(a), side(b)), "decode tok/s")
    assert decode["p_holm"] < 0.001 and decode["verdict"] == "not told apart" and "3.0 %" in decode["why"]
    known = {"decode tok/s": Repeats(0.002, 10)}
    quiet = compare(replace(side(a), repeats=known), replace(side(b), repeats=known))
    assert of(quiet, "decode tok/s")["verdict"] == "slower"
    # Too few repeated runs prove nothing of the box, and neither do those of one side.
    few = {"decode tok/s": Repeats(0.002, 2)}
    assert of(compare(replace(side(a), repeats=few), replace(side(b), repeats=few)), "decode tok/s")[
        "floor"
    ] == pytest.approx(0.03)
    assert of(compare(replace(side(a), repeats=known), side(b)), "decode tok/s")["floor"] == pytest.approx(
        0.03
    )


def test_reports_of_virtual_machines_are_told_apart_by_more():
    a, b = (
        report(result("q", noisy(m, 30, m, 0.003)), environment={"virtual_machine": m == 50})
        for m in (50, 43)
    )
    decode = of(compare(side(a), side(b)), "decode tok/s")
    assert decode["verdict"] == "not told apart" and "25.0 %" in decode["why"]
    both = report(
        result("a", noisy(50, 30, 1, 0.002)),
        result("b", noisy(49, 30, 2, 0.002)),
        environment={"virtual_machine": True},
    )
    for one in both.results:
        one["speed"]["points"][0]["round"] = list(range(30))
    assert of(compare(side(both), side(both, 1)), "decode tok/s")["floor"] == pytest.approx(0.035)
    known = {"decode tok/s": Repeats(0.002, 10)}
    measured = compare(replace(side(a), repeats=known), replace(side(b), repeats=known))
    assert of(measured, "decode tok/s")["verdict"] == "slower"


def test_within_one_report_rounds_are_paired_and_less_is_told():
    shared = np.exp(0.1 * np.random.default_rng(1).normal(size=12))
    rounds = list(range(12))
    made = report(
        result("a", list(50 * shared), rounds), result("b", list(49 * shared * (1 + 1e-3 * shared)), rounds)
    )
    decode = of(compare(side(made, 0), side(made, 1)), "decode tok/s")
    assert decode["paired_by_round"] and decode["verdict"] == "slower"
    apart = [report(entry) for entry in made.results]
    decode = of(compare(side(apart[0]), side(apart[1])), "decode tok/s")
    assert not decode["paired_by_round"] and decode["verdict"] == "not told apart"


def test_few_noisy_rounds_say_what_they_could_have_shown():
    a, b = report(result("q", noisy(50, 4, 1, 0.05))), report(result("q", noisy(49, 4, 2, 0.05)))
    found = compare(side(a), side(b))
    decode = of(found, "decode tok/s")
    assert decode["verdict"] == "not told apart" and decode["could_show"] > 0.08
    code, why = gate(found)
    assert code == 4 and "do not exclude 5 %" in why
    text = compare_text.sentence(decode)
    assert "would have been found in 80 of 100" in text


def test_what_could_be_shown_is_shown():
    """Slowdowns of the size that a comparison says it could have shown are found in about 80 of 100 fresh pairs."""
    first = compare(
        side(report(result("q", noisy(50, 12, 0, 0.05)))), side(report(result("q", noisy(50, 12, 1, 0.05))))
    )
    sizes = []
    for seed in range(30):
        pair = [report(result("q", noisy(50, 12, 1000 + 2 * seed + i, 0.05))) for i in range(2)]
        sizes.append(of(compare(side(pair[0]), side(pair[1])), "decode tok/s")["could_show"])
    size = float(np.median(sizes))
    found = 0
    for seed in range(100):
        a, b = noisy(50, 12, 5000 + 2 * seed, 0.05), noisy(50 / (1 + size), 12, 5001 + 2 * seed, 0.05)
        found += (
            of(compare(side(report(result("q", a))), side(report(result("q", b)))), "decode tok/s")["verdict"]
            == "slower"
        )
    assert first["tests"] == 2 and 60 <= found <= 95


def test_other_prompts_are_not_compared():
    a, b = result("q", noisy(50, 5, 1)), result("q", noisy(50, 5, 2))
    b["speed"]["points"][0]["asked"] = {"prompt_tokens": 512, "output_tokens": 64}
    decode = of(compare(side(report(a)), side(report(b))), "decode tok/s")
    assert decode["verdict"] == "not comparable" and decode["p"] is None
    for entry, tokens in ((a, 130), (b, 512)):
        entry["speed"] |= {"points": None, "prompt_tokens": [tokens] * 5}
    found = compare(side(report(a)), side(report(b)))
    assert "130 and 512 prompt tokens" in of(found, "decode tok/s")["why"]
    assert gate(found)[0] == 4


def test_accuracy_is_paired_on_rows_that_did_not_change():
    right = [True] * 40 + [False] * 10
    a, b = answers(right), answers([False] * 9 + right[9:])
    b[20]["row_hash"], b[21]["correct"] = "edited", None
    b.append({"item_id": "new", "row_hash": "n", "correct": True, "score": 1.0})
    made = [report({"id": "q", "kind": "artifact", "engine": "gguf"}) for _ in range(2)]
    found = of(compare(side(made[0], items=a), side(made[1], items=b)), "right %")
    assert (found["n"], found["lost"], found["gained"]) == (48, 9, 0)
    assert found["p"] == pytest.approx(2 / 2**9) and found["verdict"] == "worse"
    assert found["difference"] == pytest.approx(-100 * 9 / 48)
    assert found["ci95"][0] < found["difference"] < found["ci95"][1] < 0


def test_scores_between_right_and_wrong_are_tested_too():
    a, b = answers([None] * 12, [0.5] * 12), answers([None] * 12, [0.6 + 0.01 * i for i in range(12)])
    made = [report({"id": "q", "kind": "artifact", "engine": "gguf"}) for _ in range(2)]
    found = compare(side(made[0], items=a), side(made[1], items=b))
    assert of(found, "mean score")["verdict"] == "better"
    assert not any(f["figure"] == "right %" for f in found["figures"])


def test_one_correction_runs_over_all_that_is_held_against_a_baseline():
    """A difference that one comparison would call is not called among twenty."""
    a = report({"id": "q", "kind": "artifact", "engine": "gguf"})
    base, worse = answers([True] * 30), answers([False] * 7 + [True] * 23)
    pair = side(a, items=base), side(report(*a.results), items=worse)
    assert of(compare(*pair), "right %")["verdict"] == "worse"
    same = [(pair[0], side(report(*a.results), items=base)) for _ in range(19)]
    many = compare_many([pair, *same])
    assert of(many[0], "right %")["verdict"] == "not told apart"
    assert many[0]["tests"] == 20 and of(many[0], "right %")["p_holm"] == pytest.approx(20 * 2 / 2**7)


def test_kld_keeps_intervals_alone_and_only_of_the_same_rows():
    def with_kld(mean: float, half: float, positions: int = 100) -> BenchReport:
        distance = {"kld_mean": mean, "kld_ci95": [mean - half, mean + half], "positions": positions}
        return report(
            {"id": "q", "kind": "artifact", "engine": "gguf", "fidelity": {"all": distance, "answer": None}}
        )

    def verdict(b: BenchReport) -> str:
        return of(compare(side(with_kld(0.1, 0.01)), side(b)), "KLD all nats")["verdict"]

    assert verdict(with_kld(0.2, 0.02)) == "farther"
    assert verdict(with_kld(0.02, 0.02)) == "nearer"
    assert verdict(with_kld(0.12, 0.02)) == "not told apart"
    assert verdict(with_kld(0.2, 0.02, 50)) == "not comparable"


def test_memory_and_size_are_ratios_without_a_test():
    a, b = (result("q", noisy(50, 5, 1), size_bytes=s, memory={"peak_rss_bytes": 2 * s}) for s in (100, 150))
    found = compare(side(report(a)), side(report(b)))
    assert of(found, "size bytes")["ratio"] == 1.5 and of(found, "peak memory bytes")["p"] is None
    assert gate(found)[0] != 1


def test_what_is_missing_is_left_out_and_said_by_the_gate():
    bare = {
        "id": "q",
        "kind": "api",
        "engine": "litellm",
        "speed": None,
        "accuracy": None,
        "error": "lost its server",
    }
    found = compare(side(report(bare)), side(report(bare)))
    assert found["figures"] == [] and found["tests"] == 0
    assert any("lost its server" in note for note in found["notes"])
    assert gate(found) == (4, "q: decode speed could not be compared (not measured on both sides).")


def test_broken_samples_have_no_logarithm_and_are_left_out():
    good = noisy(50, 6, 1)
    a = report(result("q", good))
    b = report(result("q", good))
    b.results[0]["speed"]["points"][0]["decode_tok_per_s"]["samples"] = [0.0, float("nan"), *good]
    assert of(compare(side(a), side(b)), "decode tok/s")["ratio"] == pytest.approx(1)


def test_flags_and_other_engines_are_told():
    a = report(
        result(
            "q",
            noisy(50, 5, 1),
            engine_build="llama.cpp 1",
            flags=[{"what": "throttle", "detail": "", "round": 2}],
        )
    )
    b = report(result("q", noisy(50, 5, 2), engine_build="llama.cpp 2"), profile={"id": "other"})
    notes = compare(side(a, name="A"), side(b, name="B"))["notes"]
    assert "A was flagged while it was measured: throttle" in notes
    assert "other engine: llama.cpp 1 and llama.cpp 2" in notes and "other profile: box and other" in notes


def test_a_comparison_is_json_and_a_table():
    a, b = report(result("q", noisy(50, 5, 1))), report(result("q", noisy(51, 5, 2)))
    found = compare(side(a, items=answers([True] * 5)), side(b, items=answers([True] * 5)))
    assert json.loads(json.dumps(found)) == found
    rows = compare_text.table_rows(found)
    assert all(len(row) == len(compare_text.COLUMNS) for row in rows) and len(rows) == len(found["figures"])


# --- A/A and a planted slowdown


def runs_of(between: float, within: float, runs: int, rounds: int, seed: int) -> list[list[float]]:
    """tok/s of runs whose processes differ by `between` and whose rounds by `within` (deviations of the logarithm)."""
    chance = np.random.default_rng(seed)
    return [
        list(50 * np.exp(between * chance.normal() + within * chance.normal(size=rounds)))
        for _ in range(runs)
    ]


@pytest.mark.parametrize(
    ("between", "within", "rounds"), [(0.0, 0.01, 10), (0.008, 0.01, 10), (0.01, 0.02, 20)]
)
def test_aa_is_quiet_and_five_percent_is_found(between, within, rounds):
    """The targets, on boxes whose processes differ by up to 1 %; fresh runs, not resampled ones."""
    called = found = 0
    for trial in range(100):
        a, b = (result("q", samples) for samples in runs_of(between, within, 2, rounds, trial))
        slow = result("q", [s / 1.05 for s in b["speed"]["points"][0]["decode_tok_per_s"]["samples"]])
        same, planted = (of(compare(side(report(a)), side(report(x))), "decode tok/s") for x in (b, slow))
        called += same["verdict"] != "not told apart"
        found += planted["verdict"] == "slower"
    assert called <= 10 and found >= 80


def test_samples_alone_would_cry_wolf():
    """Without the floor, runs of processes that differ by 1 % are called different far too often: the floor is needed."""
    runs = runs_of(0.01, 0.003, 12, 20, 4)
    assert calibrate(runs, floor=0.0)["called_different"] > 40
    assert calibrate(runs)["called_different"] <= 10


def test_turns_find_five_percent_through_a_box_that_drifts():
    chance = np.random.default_rng(3)
    pairs = []
    for _ in range(10):
        drift = 100 * np.exp(0.08 * chance.normal(size=20))
        pairs.append(tuple(list(drift * np.exp(0.01 * chance.normal(size=20))) for _ in range(2)))
    found = calibrate_in_turns(pairs)
    assert found["called_different"] <= 10 and found["found"] >= 80
    assert calibrate([a for a, _ in pairs])["found"] < 60, "which two reports do not"


def test_calibrate_counts_and_measures_the_floor():
    runs = runs_of(0.004, 0.01, 10, 12, 1)
    found = calibrate(runs)
    assert (
        found["called_different"] <= 10
        and found["found"] >= 80
        and found["trials"] == 100
        and found["runs"] == 10
    )
    assert calibrate(runs) == found  # the seed decides
    assert calibrate(runs, slowdown=0.0)["found"] <= 10  # nothing planted, nothing found
    logs = np.log([np.median(r) for r in runs])
    assert found["repeats"]["deviation"] == pytest.approx(logs.std(ddof=1))
    assert found["floor_measured"] == pytest.approx(
        math.expm1(t_quantile(0.975, 9) * math.sqrt(2) * logs.std(ddof=1))
    )


def test_calibrate_resamples_rounds_where_they_are_named():
    runs = [[s for s in run for _ in range(4)] for run in runs_of(0.0, 0.04, 4, 8, 2)]
    rounds = [[i // 4 for i in range(32)]] * 4
    named, flat = calibrate(runs, rounds_by_run=rounds, floor=0.0), calibrate(runs, floor=0.0)
    assert named["rounds"] == [8] * 4 and flat["rounds"] == [32] * 4
    assert named["called_different"] < flat["called_different"] and named["found"] < flat["found"]


def test_calibrate_needs_runs():
    with pytest.raises(ValueError, match="three rounds"):
        calibrate([[1.0, 2.0, 3.0]])


# --- CSV


def test_csv_has_units_and_empty_cells():
    import csv

    made = report(
        result("q,1", [50.0, 51.0, 52.0], size_bytes=7, flags=[{"what": "busy"}]),
        {"id": "bare", "kind": "api", "engine": "x"},
    )
    lines = list(csv.DictReader(csv_text(made).splitlines()))
    assert [line["id"] for line in lines] == ["q,1", "bare"]
    assert (
        lines[0]["decode_tok_per_s_p50"] == "51.0"
        and lines[0]["size_bytes"] == "7"
        and lines[0]["flags"] == "busy"
    )
    assert lines[0]["peak_rss_bytes"] == lines[1]["decode_tok_per_s_p50"] == ""
    assert significance.RESAMPLES >= 1000
