"""A head on what a request looks like: kept where it pays, and read by `decide` as it was fitted."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from edgeft.errors import UsageError
from edgeft.router import blend, decide, fit, load_policy, surface
from edgeft.router.draft_features import FEATURES, QUESTION, features, question
from edgeft.router.drafts import Draft
from edgeft.router.explain import explain
from edgeft.router.fit_heads import predicted
from edgeft.router.heads import read, scores_of
from edgeft.router.reports import join
from tests.test_router import PAIR, WORDS, by_word, line, write_report


def by_numbers(n: int, seed: int) -> dict[str, list[dict]]:
    """The weak model fails where more than three numbers stand; the numbers themselves never come again."""
    chance = random.Random(seed)
    items: dict[str, list[dict]] = {"weak": [], "strong": []}
    for index in range(n):
        count = chance.randrange(8)
        words = [chance.choice(WORDS) for _ in range(10)] + [
            str(chance.randrange(10**6)) for _ in range(count)
        ]
        chance.shuffle(words)
        text = " ".join(words)
        for name, share in (("weak", 0.05 if count > 3 else 0.95), ("strong", 0.95)):
            items[name].append(line(index, text, float(chance.random() < share), seed))
    return items


def test_where_the_numbers_decide_the_head_is_kept_and_decide_reads_it(tmp_path):
    report = write_report(tmp_path / "r", by_numbers(400, 1))
    made = fit([report], PAIR, tmp_path / "policy")
    assert made.policy.features["surface"]["names"] == list(QUESTION)
    weights = made.policy.fitted["heads"]["blend"]
    assert list(weights) == ["hashed", "looks", "surface"]
    assert weights["looks"][1] + weights["surface"][1] > 0.5
    read_back = load_policy(tmp_path / "policy")
    few, many = "card refund limit 17", "card 1 refund 22 limit 333 address 4444 payment 55555 transfer 6"
    assert (decide(read_back, few).choice, decide(read_back, many).choice) == ("weak", "strong")
    told = explain(read_back, many)
    mean = float(read_back.arrays["blend.means"][-1])
    assert list(told["spoke_by_head"]) == list(weights)
    assert mean + sum(told["spoke_by_head"].values()) == pytest.approx(
        told["scores"]["strong"] - told["scores"]["weak"], abs=1e-6
    )
    words = read(read_back, many)
    bias = weights["hashed"][1] * (read_back.bias[-1] - mean)
    every = weights["hashed"][1] * sum(read_back.weights[-1][c] * v for c, v in words.sparse.items())
    assert told["spoke_by_head"]["hashed"] == pytest.approx(bias + every, abs=1e-6)
    assert (
        sum(abs(s["gain"]) for s in told["spoke"])
        <= sum(weights["hashed"][1] * abs(read_back.weights[-1][c] * v) for c, v in words.sparse.items())
        + 1e-9
    ), "the words speak at the head's weight"
    # What fitting computes for many rows is what a decision computes for one.
    joined = join([report], PAIR)
    rows = predicted(read_back.arrays | {
        "text.weights": np.array(read_back.weights), "text.bias": np.array(read_back.bias)
    }, read_back.policy.features, joined.items[:20])  # fmt: skip
    ones = [scores_of(read_back, read(read_back, item.request)) for item in joined.items[:20]]
    np.testing.assert_allclose(rows, ones, atol=1e-5)


def test_where_words_decide_it_is_left_out(tmp_path):
    made = fit([write_report(tmp_path / "r", by_word(300, 2))], PAIR, tmp_path / "policy")
    assert "surface" not in made.policy.features and "blend" not in made.arrays
    assert read(made, "refund my 12 cards").looks == {}


def test_a_head_pays_where_it_says_something_and_seldom_where_not():
    chance = np.random.default_rng(0)
    signal, noise = chance.normal(size=(500, 1)), chance.normal(size=(500, 1))
    targets = np.column_stack([np.zeros(500), signal[:, 0] + 0.5 * chance.normal(size=500)])
    nothing = np.zeros((500, 2))
    assert blend.pays([nothing], np.column_stack([np.zeros(500), signal[:, 0]]), targets)
    kept = [
        blend.pays([nothing], np.column_stack([np.zeros(500), chance.normal(size=500)]), targets)
        for _ in range(40)
    ]
    assert sum(kept) < 20
    assert not blend.pays([targets], np.column_stack([noise[:, 0], noise[:, 0]]), targets)
    # Beside a head that says too much, one that says nothing must not be kept for drawing the other's weight down.
    kept = []
    for _ in range(40):
        targets = np.column_stack([np.zeros(500), chance.normal(size=500)])
        there, silent = (
            np.column_stack([np.zeros(500), scale * chance.normal(size=500)]) for scale in (0.1, 0.01)
        )
        kept.append(blend.pays([there], silent, targets))
    assert sum(kept) < 10


def test_the_questions_numbers_are_those_that_the_judge_reads():
    prompt = "Each of 3 boxes holds 12.5 kg. How much is left after 20% went, half of it first?"
    judged = dict(zip(FEATURES, features(prompt, Draft("12 - 3 = 9")), strict=True))
    assert {name: float(value) for name, value in question(prompt).items()} == {
        n: judged[n] for n in QUESTION
    }
    assert set(question(prompt)) == set(QUESTION)
    for kind, (names, _) in surface.KINDS.items():
        for text in (prompt, "", "\n", "A. 1\nB. \nC. 3", "?" * 5000):
            found = surface.numbers(kind, text)
            assert found.shape == (len(names),) and np.isfinite(found).all()


def test_a_policy_whose_surface_head_is_gone_is_refused(tmp_path):
    fit([write_report(tmp_path / "r", by_numbers(400, 1))], PAIR, tmp_path / "policy")
    file = tmp_path / "policy" / "policy.json"
    value = json.loads(file.read_text())
    value["features"]["surface"]["names"] = ["another"]
    file.write_text(json.dumps(value))
    with pytest.raises(UsageError, match="the policy's features are not those of this edgeft"):
        load_policy(tmp_path / "policy")
