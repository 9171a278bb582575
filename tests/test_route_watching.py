"""What serving keeps between requests: the drift alarm over a window, and the budget's λ."""

from __future__ import annotations

import random

import numpy as np
import pytest

from edgeft.router import clusters, drift
from edgeft.router.features import arrays, matrix
from edgeft.router.figures import tradeoff_choices
from edgeft.router.watching import LOOK_EVERY, BudgetWatch, DriftWatch
from edgeft.types import Decision

LOSS = {"kind": "loss", "threshold": 0.0, "price_of_cost": 0.0}


def decided(gain: float, costs: tuple[float, float] = (0.0, 1.0), **more) -> Decision:
    choice = "strong" if gain >= 0 else "weak"
    return Decision(
        choice,
        "",
        {"weak": 0.5, "strong": 0.5 + gain},
        dict(zip(("weak", "strong"), costs, strict=True)),
        1.0,
        **more,
    )


def certificate(chance: random.Random, void: str | None = None) -> dict:
    rows = [
        drift.observe(chance.gauss(0, 1), int(chance.expovariate(0.01)), chance.random()) for _ in range(800)
    ]
    return {"void": void, "drift_reference": drift.reference(rows)}


def watched(watch: DriftWatch, chance: random.Random, n: int, shift: float) -> int | None:
    """After how many requests it suspends."""
    for place in range(n):
        if watch.saw(decided(chance.gauss(shift, 1)), int(chance.expovariate(0.01)), chance.random()):
            return place + 1
    return None


def test_traffic_like_the_calibration_rows_raises_no_alarm_and_other_traffic_does():
    chance = random.Random(1)
    known = certificate(chance)
    assert watched(DriftWatch(known), chance, 5 * LOOK_EVERY, 0.0) is None
    watch = DriftWatch(known)
    assert watched(watch, chance, 3 * LOOK_EVERY, 0.6) == LOOK_EVERY, "at the first look"
    assert watch.suspended_because and watch.suspended_because.startswith("gain")
    assert watched(watch, chance, 1, 0.0) == 1, "it stays suspended when the traffic comes back"


def test_the_alarm_is_raised_when_drift_begins_later():
    chance = random.Random(2)
    watch = DriftWatch(certificate(chance))
    assert watched(watch, chance, LOOK_EVERY, 0.0) is None
    assert watched(watch, chance, LOOK_EVERY, 0.6) == LOOK_EVERY


def test_without_a_certificate_in_force_and_for_removed_candidates_nothing_is_watched():
    chance = random.Random(3)
    for known in (None, certificate(chance, void="another artefact"), {"void": None}):
        watch = DriftWatch(known)
        assert watched(watch, chance, 2 * LOOK_EVERY, 3.0) is None and not watch.window
    watch = DriftWatch(certificate(chance))
    assert not watch.saw(decided(3.0, removed={"strong": "private: tenant"}), 10, 1.0) and not watch.window


def run(watch: BudgetWatch, chance: random.Random, n: int) -> np.ndarray:
    """Costs a request where the watch's λ decides; one request a second."""
    spent = []
    for second in range(n):
        gain, price = chance.uniform(-0.2, 0.8), watch.price_of_cost
        strong = gain >= 0 if price is None else gain > price
        made = decided(gain)
        watch.saw(made, float(second), float(strong))
        spent.append(float(strong))
    return np.array(spent)


def test_the_price_of_cost_keeps_the_budget_of_the_period():
    chance = random.Random(4)
    watch = BudgetWatch(0.3 * 86_400, "day", LOSS)
    spent = run(watch, chance, 86_400 // 12)
    # The own rule sends .8 to strong at 1 USD each; .3 a request is what the day allows.
    assert spent[:100].mean() == pytest.approx(0.8, abs=0.15)
    assert spent[-2000:].mean() == pytest.approx(0.3, abs=0.05)
    assert watch.spent_usd == pytest.approx(spent.sum())


def test_a_budget_that_suffices_moves_nothing_and_a_new_period_begins_at_nought():
    chance = random.Random(5)
    watch = BudgetWatch(2.0 * 86_400, "day", LOSS)
    run(watch, chance, 500)
    assert watch.price_of_cost is None, "the policy's own rule stays, and with it the certificate"
    watch.saw(decided(0.5), 90_000.0, 1.0)
    assert watch.spent_usd == 1.0


def test_where_the_budget_is_spent_only_the_cheapest_answers():
    watch = BudgetWatch(10.0, "day", LOSS, look_every=10)
    for second in range(20):
        watch.saw(decided(0.5), float(second), 1.0)
    assert watch.price_of_cost is not None
    scores, costs = np.array([[0.5, 1.0]]), np.array([[0.0, 1.0]])
    assert tradeoff_choices(scores, costs, watch.price_of_cost).tolist() == [0]


def test_another_mix_of_topics_raises_the_alarm_where_scores_and_lengths_do_not():
    chance = np.random.default_rng(5)
    topics = [
        [f"{topic}{i}" for i in range(30)] for topic in ("card", "loan", "rate", "form")
    ]  # no word in common

    def texts(n: int, odds: list[float]) -> list[str]:
        return [" ".join(chance.choice(topics[t], 12)) for t in chance.choice(4, n, p=odds)]

    even, skewed = [0.25] * 4, [0.55, 0.15, 0.15, 0.15]
    centres = clusters.fit(matrix(texts(400, even)))
    assert centres is not None and centres.dtype == np.int8 and len(centres) == clusters.MOST

    def rows(n: int, odds: list[float]) -> list[dict[str, float]]:
        own = [clusters.nearest(centres, *arrays(text)) for text in texts(n, odds)]
        return [drift.observe(chance.normal(), int(chance.integers(50, 90)), chance.random(), c) for c in own]

    of_topic = [
        {clusters.nearest(centres, *arrays(" ".join(chance.choice(words, 12)))) for _ in range(50)}
        for words in topics
    ]
    assert not any(a & b for i, a in enumerate(of_topic) for b in of_topic[:i]), "no cluster has two topics"
    known = drift.reference(rows(800, even))
    assert sum(drift.alarm(known, rows(drift.WINDOW, even)) is not None for _ in range(50)) <= 2
    assert (drift.alarm(known, rows(drift.WINDOW, skewed)) or "").startswith("cluster")
    # A cluster that no calibration row was in, and a certificate from before there were clusters.
    elsewhere = [{**row, "cluster": 7 + (i % 2)} for i, row in enumerate(rows(drift.WINDOW, even))]
    assert (drift.alarm(known, elsewhere) or "").startswith("cluster")
    del known["cluster"]
    assert drift.alarm(known, rows(drift.WINDOW, skewed)) is None
    assert clusters.fit(matrix(texts(40, even))) is None and clusters.nearest(centres, *arrays("")) == 0
    assert clusters.fit(matrix(["the same"] * 100)) is not None
