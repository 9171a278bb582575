"""Curves against slow references, budgets, drift, replay, near-duplicates."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from edgeft.cli import run as cli
from edgeft.errors import UsageError
from edgeft.router import decide, fit
from edgeft.router.budget import allowance, price_of_cost
from edgeft.router.curves import aiq, apgr, hull, interval, isotonic, pgr_curve, routing_figures
from edgeft.router.drift import WINDOW, alarm, chi_square_tail, observe, reference
from edgeft.router.duplicates import near, signatures
from edgeft.router.figures import choose_loss_threshold, loss_choices, mix_figures, picked, tradeoff_choices
from edgeft.router.replay import quality, replay
from tests.test_privacy import NAMES, policy
from tests.test_router import PAIR, by_word, write_report


def test_apgr_against_the_protocol_written_out():
    chance = np.random.default_rng(0)
    scores = np.round(chance.random(300), 1)  # ties: edges may coincide
    weak, strong = (chance.random(300) < 0.5).astype(float), (chance.random(300) < 0.8).astype(float)
    edges = sorted(set(np.quantile(scores, [i / 10 for i in range(11)])))
    points = []
    for edge in edges:
        sent = [s > edge if edge == edges[-1] else s >= edge for s in scores]
        quality_ = sum(b if up else a for a, b, up in zip(weak, strong, sent, strict=True)) / 300
        points.append((sum(sent) / 300, (quality_ - weak.mean()) / (strong.mean() - weak.mean())))
    points.sort()
    area = sum((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in pairwise(points))
    assert apgr(scores, weak, strong) == pytest.approx(area)
    share, pgr = pgr_curve(scores, weak, strong)
    assert share[0] == 0 and share[-1] == 1 and pgr[0] == 0 and pgr[-1] == pytest.approx(1)


def test_random_scores_have_apgr_a_half_and_perfect_ones_more_than_one():
    chance, found = np.random.default_rng(1), []
    weak, strong = (chance.random(4000) < 0.5).astype(float), (chance.random(4000) < 0.8).astype(float)
    for _ in range(20):
        found.append(apgr(chance.random(4000), weak, strong))
    assert np.mean(found) == pytest.approx(0.5, abs=0.02)
    assert apgr(strong - weak + 1e-6 * chance.random(4000), weak, strong) > 1, (
        "strong is not sent what it breaks"
    )
    assert apgr(np.zeros(4000), weak, strong) == 0.5
    with pytest.raises(ValueError, match="not better"):
        apgr(chance.random(4000), strong, weak)


def test_isotonic_is_the_nearest_rising_sequence():
    assert isotonic(np.array([0.0, 3.0, 1.0, 2.0, 5.0])).tolist() == [0, 2, 2, 2, 5]
    chance = np.random.default_rng(2)
    values = chance.normal(size=40)
    fitted = isotonic(values)
    assert (np.diff(fitted) >= 0).all()
    for _ in range(200):  # no rising sequence nearby is closer
        other = np.sort(fitted + 0.1 * chance.normal(size=40))
        assert ((values - fitted) ** 2).sum() <= ((values - other) ** 2).sum() + 1e-12
    figures = routing_figures(chance.random(100), np.zeros(100), np.ones(100))
    assert figures["cpt50"] == pytest.approx(0.5, abs=0.06) and figures["apgr_isotonic"] == pytest.approx(
        figures["apgr"]
    )


def test_the_hull_and_its_area():
    assert hull([0, 1, 2, 3], [0.5, 0.6, 0.9, 0.8]) == [(0, 0.5), (2, 0.9)]
    assert aiq([0, 2, 3], [0.5, 0.9, 0.8]) == pytest.approx((2 * 0.7 + 0.9) / 3)
    assert aiq([1, 1], [0.3, 0.4]) is None


def test_an_interval_leaves_out_what_is_not_defined_and_says_none_where_that_is_much():
    values = np.random.default_rng(0).normal(size=200)
    low, high = interval(lambda i: values[i].mean(), 200) or [0, 0]
    assert low < values.mean() < high and high - low == pytest.approx(
        4 * values.std() / math.sqrt(200), rel=0.15
    )

    def never(rows: np.ndarray) -> float:
        raise ValueError

    assert interval(never, 10) is None


def test_rules_over_rows_are_the_rule_of_one_request():
    from edgeft.router.rule import choose

    chance = np.random.default_rng(3)
    scores, costs = chance.random((200, 4)), np.sort(chance.random((200, 4)), 1)
    for t in (-2.0, 0.0, 0.1, 0.5, 2.0):
        expected = [
            choose({"kind": "loss", "threshold": t}, "abcd", row.tolist(), c.tolist())
            for row, c in zip(scores, costs, strict=True)
        ]
        assert loss_choices(scores, t).tolist() == expected
        rule = {"kind": "tradeoff", "price_of_cost": abs(t)}
        expected = [
            choose(rule, "abcd", row.tolist(), c.tolist()) for row, c in zip(scores, costs, strict=True)
        ]
        assert tradeoff_choices(scores, costs, abs(t)).tolist() == expected


def test_more_candidates_stay_within_the_loss_and_beat_their_mix():
    chance = np.random.default_rng(4)
    truth = np.clip(chance.random((3000, 1)) + np.array([0.0, 0.2, 0.4]), 0, 1)
    quality_ = (chance.random((3000, 3)) < truth).astype(float)
    t = choose_loss_threshold(truth, quality_, 0.02)
    found = mix_figures(quality_, loss_choices(truth, t), ["a", "b", "c"])
    assert found["loss_to_strong"]["mean"] <= 0.02 + 1e-9 and found["shares"]["c"] < 1
    assert found["gain_over_random"]["ci95"][0] > 0 and found["best_single"]["name"] == "c"
    assert found["random_same_share"] == pytest.approx(
        sum(found["shares"][n] * quality_[:, i].mean() for i, n in enumerate("abc"))
    )


def test_the_budget_is_kept_with_the_least_price():
    chance = np.random.default_rng(5)
    scores, costs = np.sort(chance.random((500, 3)), 1), np.tile([0.001, 0.01, 0.1], (500, 1))
    for budget in (0.002, 0.03, 0.2):
        price = price_of_cost(scores, costs, budget)
        spent = picked(costs, tradeoff_choices(scores, costs, price)).mean()
        assert spent <= budget
        if price:
            assert picked(costs, tradeoff_choices(scores, costs, 0.98 * price)).mean() > 0.9 * budget
    assert price_of_cost(scores, costs, 0.2) == 0
    assert set(tradeoff_choices(scores, costs, price_of_cost(scores, costs, 0.0)).tolist()) == {0}
    assert allowance(10, 4, 50, 100, 2) == pytest.approx(0.06) and allowance(10, 12, 50, 100, 2) == 0


def test_chi_square_against_known_values():
    for statistic, freedom, p in (
        (3.841, 1, 0.05),
        (16.919, 9, 0.05),
        (27.877, 9, 0.001),
        (2.0, 2, math.exp(-1)),
        (0.0, 4, 1.0),
    ):
        assert chi_square_tail(statistic, freedom) == pytest.approx(p, rel=2e-3)


def test_the_alarm_is_silent_on_the_same_traffic_and_speaks_on_another():
    chance = np.random.default_rng(6)

    def rows(n: int, shift: float) -> list[dict[str, float]]:
        return [
            observe(chance.normal(0.1 + shift, 0.1), int(chance.lognormal(4, 1)), float(chance.beta(5, 2)))
            for _ in range(n)
        ]

    known = reference(rows(1000, 0))
    assert sum(alarm(known, rows(WINDOW, 0)) is not None for _ in range(200)) <= 3
    assert "gain" in (alarm(known, rows(WINDOW, 0.05)) or "")
    one_value = reference([observe(0.0, 10, 1.0)] * 100)
    assert alarm(one_value, [observe(0.0, 10, 1.0)] * 100) is None


def test_near_duplicates_are_found_and_others_are_not():
    texts = [
        f"how do I {verb} the card that I lost on my trip to {place} last week"
        for verb, place in (("block", "Rome"), ("find", "Oslo"))
    ]
    long = " ".join(f"word{i}" for i in range(60))
    seen = signatures([*texts, long])
    assert near(
        [long.replace("word30", "other"), texts[0].upper(), "what is the fee for a transfer abroad"], seen
    ).tolist() == [True, True, False]
    assert near(["x"], np.zeros((0, 32), np.uint32)).tolist() == [False]


def test_signatures_estimate_the_share_of_common_triples():
    words = [f"word{i}" for i in range(400)]
    one = signatures([" ".join(words[:300])])[0]
    for start in (30, 100, 200):
        other = signatures([" ".join(words[start : start + 200])])[0]
        triples = (
            {tuple(words[i : i + 3]) for i in range(298)},
            {tuple(words[i : i + 3]) for i in range(start, start + 198)},
        )
        share = len(triples[0] & triples[1]) / len(triples[0] | triples[1])
        assert (one == other).mean() == pytest.approx(share, abs=0.27), "three deviations of 32 hashes"
    few = [f"a b c d {x}" for x in "efghijklmnop"]
    assert len({tuple(s) for s in signatures(few)}) == len(few)


def log_line(chance: np.random.Generator, explore: float) -> dict:
    """The log's base choice is weak; strong is right nine times in ten, weak one in two."""
    explored = bool(chance.random() < explore)
    choice = "strong" if explored else "weak"
    return {
        "choice": choice, "scores": {"weak": 0.6, "strong": 0.7}, "costs": {"weak": 0.0, "strong": 1.0}, "latency_s": 1.0 + explored,
        "propensity": explore if explored else 1 - explore, "explored": explored,
        "score": float(chance.random() < (0.9 if explored else 0.5)),
    }  # fmt: skip


def test_estimates_hit_the_truth_where_the_log_explored():
    chance = np.random.default_rng(7)
    lines = [log_line(chance, 0.2) for _ in range(5000)]
    found = quality([(line, "strong") for line in lines])
    for name in ("ips", "self_normalised", "doubly_robust"):
        low, high = found[name]["ci95"]
        assert low < 0.9 < high, name
    assert found["logged_mean"] == pytest.approx(0.58, abs=0.02)


def test_replay_of_a_log(tmp_path, capsys):
    chance = np.random.default_rng(8)
    fit([write_report(tmp_path / "one", by_word(100, 1))], PAIR, tmp_path / "policy")
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(log_line(chance, 0.0)) + "\n" for _ in range(50)))
    assert cli(["route", "replay", str(tmp_path / "policy"), str(log)]) == 0
    assert "no exploration is logged" in capsys.readouterr().out
    log.write_text(
        "".join(json.dumps({**log_line(chance, 0.3), "request": "refund please"}) + "\n" for _ in range(400))
    )
    from edgeft.router import load_policy

    found = replay(load_policy(tmp_path / "policy"), log)
    assert found["shares"]["strong"] == 1 and found["cost_per_request"] == 1
    assert (
        found["quality"]["ips"]["mean"] == pytest.approx(0.9, abs=0.25)
        and found["latency_s"]["replayed"] == 2.0
    )
    log.write_text('{"choice": "weak"}\n')
    with pytest.raises(UsageError, match="line 1 is no logged decision: it lacks scores, costs, propensity"):
        replay(load_policy(tmp_path / "policy"), log)


def test_limits_stickiness_and_distance():
    from edgeft.router import Request, State

    free = policy(privacy={})
    asked = Request([{"role": "user", "content": "a hard question"}])
    costs = decide(free, asked).costs
    assert list(costs) == list(NAMES) and decide(free, asked).choice == "api-big"
    assert decide(free, replace(asked, max_cost=1.0)).choice == "local-large", (
        "steps: the second is the dearest allowed"
    )
    late = State(queue_s={"api-big": 9.0})
    assert decide(free, replace(asked, max_latency_s=1.0), state=late).choice == "api-mid"
    nobody = decide(free, replace(asked, max_cost=-1.0))
    assert nobody.choice == "local-small" and "nobody keeps max_cost" in nobody.reason
    assert decide(free, replace(asked, previous="local-small")).reason.startswith("the conversation stays")
    assert decide(free, replace(asked, previous="gone")).choice == "api-big"
    assert decide(free, replace(asked, tools=True)).removed == {"local-small": "takes no tool calls"}
    assert "context" in decide(free, replace(asked, prompt_tokens=500)).removed["local-small"]
    easy = Request([{"role": "user", "content": "hello"}])
    far = replace(
        free,
        policy=replace(free.policy, rule={**free.policy.rule, "threshold": 2.0, "far": 0.5}),
        arrays={"seen.columns": np.zeros(4096)},
    )
    assert decide(far, easy).choice == "api-big" and "far from the training rows" in decide(far, easy).reason
    greedy = replace(
        free, policy=replace(free.policy, rule={**free.policy.rule, "kind": "tradeoff", "price_of_cost": 9.0})
    )
    assert decide(greedy, asked).choice == "local-small"
    exploring = replace(
        free, policy=replace(free.policy, rule={**free.policy.rule, "threshold": 2.0, "explore": 0.1})
    )
    assert (
        decide(exploring, easy, u=0.05).choice == "api-big"
        and decide(exploring, easy, u=0.05).propensity == 0.1
    )
    assert (
        decide(exploring, easy, u=0.5).choice == "local-small"
        and decide(exploring, easy, u=0.5).propensity == 0.9
    )
