"""The certificate: its bound against a slow sum, its promise on worlds whose truth is known, its refusals, what voids it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from edgeft.cli import run as cli
from edgeft.errors import Inconclusive, UsageError
from edgeft.router import Options, State, decide, fit, load_policy
from edgeft.router.calibrate import calibrate, observation, suspend
from edgeft.router.certificate import certify, least_n, most_losses, rcps_threshold, upper_bound
from edgeft.router.drift import alarm
from tests.test_router import PAIR, by_word, write_report


@pytest.mark.parametrize("n, losses", [(45, 0), (100, 3), (1000, 41)])
def test_the_bound_is_where_so_few_losses_have_the_chance_delta(n, losses):
    bound = upper_bound(losses, n, 0.1)
    tail = sum(math.comb(n, k) * bound**k * (1 - bound) ** (n - k) for k in range(losses + 1))
    assert tail == pytest.approx(0.1, abs=1e-6)
    assert upper_bound(n, n, 0.1) == 1.0
    assert (
        upper_bound(most_losses(n, 0.2, 0.1), n, 0.1)
        <= 0.2
        < upper_bound(most_losses(n, 0.2, 0.1) + 1, n, 0.1)
    )


def test_the_least_n():
    assert least_n(0.05, 0.1) == 45 and upper_bound(0, 45, 0.1) <= 0.05 < upper_bound(0, 44, 0.1)
    assert least_n(0.05, 0.1, 0.05) is None
    n = least_n(0.05, 0.1, 0.03)
    assert n is not None and upper_bound(math.ceil(0.03 * n), n, 0.1) <= 0.05


def test_the_sequence_ends_at_the_first_rule_that_fails():
    allowed = most_losses(200, 0.05, 0.1)
    assert certify([0, allowed, allowed + 1, 0], 200, 0.05, 0.1) == 2
    assert certify([allowed + 1, 0], 200, 0.05, 0.1) == 0
    assert certify([0, 0], 200, 0.05, 0.1) == 2


def test_the_promise_is_broken_in_at_most_delta_of_worlds():
    """Risk at threshold t in [0, 1] is t * .2 by construction: gains uniform, a kept row loses with chance .2."""
    chance, broken, worlds = np.random.default_rng(3), 0, 2000
    for _ in range(worlds):
        gains = chance.random(400)
        threshold = rcps_threshold(gains, chance.random(400) < 0.2, 0.05, 0.1)
        broken += min(1.0, threshold) * 0.2 > 0.05
    assert broken / worlds <= 0.1 + 3 * math.sqrt(0.09 / worlds)
    assert broken / worlds > 0.02, "so careful that it keeps nothing would pass as well"


def test_rows_of_one_score_go_together():
    gains = np.array([0.1, 0.2, 0.2, 0.2] * 50)
    losses = np.array([False, True, False, False] * 50)
    threshold = rcps_threshold(gains, losses, 0.05, 0.1)
    assert threshold == 0.2 and not (losses & (gains < threshold)).any()


@pytest.fixture
def policy(tmp_path):
    fit([write_report(tmp_path / "one", by_word(600, 1))], PAIR, tmp_path / "policy")
    return tmp_path / "policy"


def test_a_policy_is_certified_as_it_serves(policy, tmp_path):
    found = calibrate(policy, [write_report(tmp_path / "two", by_word(500, 2))], alpha=0.1)
    assert found["bound"] <= 0.1 and 0 < found["share_kept"] <= 1 and found["n"] == 500
    assert found["share_kept"] > found["share_kept_random"], "the words tell"
    loaded = load_policy(policy)
    assert loaded.policy.rule["threshold"] == found["rule"]["threshold"]
    assert loaded.certificate and loaded.certificate["void"] is None
    assert decide(loaded, "card limit").certified
    assert not decide(loaded, "card limit", state=State(price_of_cost=3.0)).certified
    assert not decide(loaded, "card limit", state=State(unavailable=frozenset({"strong"}))).certified
    known = found["drift_reference"]
    assert alarm(known, [observation(loaded, line["request"]) for line in by_word(500, 4)["weak"]]) is None
    assert alarm(
        known, [observation(loaded, f"please tell me a long story about {i} dragons") for i in range(500)]
    )
    later = by_word(3000, 3)
    kept = [decide(loaded, line["request"]).choice == "weak" for line in later["weak"]]
    lost = [
        k and w["score"] < s["score"] for k, w, s in zip(kept, later["weak"], later["strong"], strict=True)
    ]
    assert np.mean(lost) < 0.1
    with pytest.raises(UsageError, match="used to certify already"):
        calibrate(policy, [tmp_path / "two"])


def test_too_few_rows_and_rows_seen_are_refused(policy, tmp_path):
    before = (policy / "policy.json").read_bytes()
    with pytest.raises(Inconclusive, match="45 rows are the least"):
        calibrate(policy, [write_report(tmp_path / "few", by_word(44, 7))])
    with pytest.raises(UsageError, match="used to fit router already"):
        calibrate(policy, [tmp_path / "one"])
    with pytest.raises(UsageError, match=r"--alpha 2 is not between"):
        calibrate(policy, [tmp_path / "one"], alpha=2)
    with pytest.raises(UsageError, match="not the artefact"):
        calibrate(policy, [write_report(tmp_path / "other", by_word(60, 5), sha="b" * 64)])
    assert (policy / "policy.json").read_bytes() == before and not (policy / "certificate.json").exists()


def test_where_nothing_can_be_kept_the_n_that_would_do_is_told(policy, tmp_path):
    hopeless = by_word(100, 9)
    for line in hopeless["weak"]:
        line["score"] = 0.0
    with pytest.raises(Inconclusive, match="rows would do at this rate"):
        calibrate(policy, [write_report(tmp_path / "hopeless", hopeless)], alpha=0.03)


def test_another_artefact_or_rule_voids_and_suspension_goes_to_strong(policy, tmp_path, capsys):
    assert (
        cli(
            [
                "route",
                "calibrate",
                str(policy),
                str(write_report(tmp_path / "two", by_word(500, 2))),
                "--alpha",
                "0.1",
            ]
        )
        == 0
    )
    assert "certified on 500 rows" in capsys.readouterr().out
    kept = "card limit address"
    assert decide(load_policy(policy), kept).choice == "weak"
    suspend(policy, "drift")
    held = decide(load_policy(policy), kept)
    assert held.choice == "strong" and not held.certified and "suspended" in held.reason
    suspend(policy, None)
    assert decide(load_policy(policy), kept).certified
    assert decide(load_policy(policy), kept, state=State(suspended=True)).choice == "strong"
    manifest = policy / "policy.json"
    changed = json.loads(manifest.read_text())
    changed["candidates"][0]["artifact_sha256"] = "c" * 64
    manifest.write_text(json.dumps(changed))
    loaded = load_policy(policy)
    assert loaded.certificate and "another one than was certified" in loaded.certificate["void"]
    assert not decide(loaded, kept).certified
    changed["candidates"][0]["artifact_sha256"] = "a" * 64
    changed["candidates"][0]["path"] = "/moved/elsewhere"
    manifest.write_text(json.dumps(changed))
    assert decide(load_policy(policy), kept).certified, "where it lies does not matter"


def test_a_stricter_threshold_may_stand_in_for_a_suspended_one(tmp_path):
    made = fit(
        [write_report(tmp_path / "one", by_word(300, 1))],
        PAIR,
        tmp_path / "policy",
        Options(rule={"on_suspended": -0.5}),
    )
    assert made.policy.rule["on_suspended"] == -0.5


def test_a_judges_own_error_comes_off_alpha(policy, tmp_path):
    graded = tmp_path / "graded.jsonl"
    graded.write_text('{"judge_loss": 0, "human_loss": 0}\n' * 99)
    rows = [write_report(tmp_path / "two", by_word(800, 2))]
    with pytest.raises(UsageError, match="99 rows that a person graded; 100 are the least"):
        calibrate(policy, rows, judged=graded)
    graded.write_text(
        '{"judge_loss": 0, "human_loss": 1}\n' * 20 + '{"judge_loss": 0, "human_loss": 0}\n' * 80
    )
    with pytest.raises(Inconclusive, match="more than alpha"):
        calibrate(policy, rows, judged=graded)
    graded.write_text('{"judge_loss": 0, "human_loss": 0}\n' * 400)
    found = calibrate(policy, rows, alpha=0.1, judged=graded)
    assert (
        found["judge"]["bound"] == upper_bound(0, 400, 0.05)
        and found["alpha"] == 0.1
        and found["delta"] == 0.1
    )
    assert found["bound"] == pytest.approx(
        upper_bound(found["losses"], found["n"], 0.05) + found["judge"]["bound"]
    )
    assert found["bound"] <= 0.1
