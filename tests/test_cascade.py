"""The cascade: what is computed of a draft, the judge, the expected-value rule."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest

from edgeft.cli import run as cli
from edgeft.errors import UsageError
from edgeft.router import Options, decide, fit, kernel, load_policy
from edgeft.router.calibrate import calibrate
from edgeft.router.cascade import (
    drafts,
    enough,
    first,
    fit_judge,
    judge,
    judge_draft,
    judge_tensors,
    load_judge,
    predicted_gain,
    strongest_allowed,
)
from edgeft.router.draft_features import FEATURES, features
from edgeft.router.drafts import Draft, agree, answer_number, arithmetic, checks, compute, first_tokens
from edgeft.router.prefix import by_first_tokens
from tests.test_router import PAIR, line, write_report


@pytest.mark.parametrize(
    "text, value",
    [
        ("2+3*4", 14),
        ("(1,000 - 1) / 9", 111),
        ("$80,000 + $50,000", 130000),
        ("3 x 7", 21),
        ("50% * 80", 40),
        ("1/0", None),
        ("__import__", None),
        ("2**9", None),
        ("9" * 300, None),
    ],
)
def test_arithmetic_is_parsed_never_run(text, value):
    assert compute(text) == value


def test_equations_are_checked_to_the_digits_shown():
    assert arithmetic("so 3 x 7 = 21 eggs and 84 / 12 = 7.\n") == (2, 0)
    assert arithmetic("235 / 3 = 78.33 and 2 + 2 = 5") == (2, 1)
    assert arithmetic("no sums here") == (0, 0)
    assert arithmetic("12 * 30 = <<12*30=360>>360")[1] == 0


def test_answers():
    assert answer_number("it is 3, so\n#### 1,234.5\n\n") == 1234.5
    assert answer_number("first 3 then $40") == 40 and answer_number("none") is None
    assert (
        agree("#### 7", "so it is 7.0")
        and not agree("7", "8")
        and agree("Yes ", "yes")
        and not agree("yes", "no")
    )


def test_checks_say_none_where_they_do_not_apply():
    assert set(checks(Draft("hello")).values()) == {None}
    schema = {
        "type": "object",
        "required": ["a"],
        "properties": {"a": {"type": "integer"}},
        "additionalProperties": False,
    }
    for text, fits in (
        ('{"a": 1}', True),
        ('{"a": "1"}', False),
        ("{}", False),
        ('{"a": 1, "b": 2}', False),
        ("not json", False),
        ('{"a": true}', False),
    ):
        assert checks(Draft(text), schema=schema)["json_schema"] is fits, text
    assert checks(Draft("Refund"), labels=["refund", "fee"])["label"] is True
    assert checks(Draft("9", second="9"))["agreement"] is True
    assert checks(Draft("x", finish_reason="length"))["ended"] is False


def test_features_are_as_many_as_their_names_and_finite():
    for text in ("", "#### 7", "9" * 400, "a\n\n$1,2,3 = <<", "1e999 = 3"):
        found = features("prompt 1 2 3 %", Draft(text))
        assert len(found) == len(FEATURES) and np.isfinite(found).all(), text


def world(n: int, seed: int) -> tuple[list[tuple[str, Draft]], np.ndarray, np.ndarray]:
    """Drafts that are right exactly where their sum is, nearly always; the strong model is always right."""
    chance = random.Random(seed)
    rows, right = [], []
    for _ in range(n):
        a, b = chance.randint(2, 50), chance.randint(2, 50)
        good = chance.random() < 0.6
        shown = a + b if good else a + b + chance.randint(1, 9)
        rows.append((f"What is {a} and {b} together?", Draft(f"{a} + {b} = {shown}\n#### {shown}")))
        right.append(good if chance.random() < 0.95 else not good)
    scores = np.array(right, float)
    return rows, 1.0 - scores, scores


def test_the_judge_learns_what_the_checks_show_and_reads_back():
    made = fit_judge(*world(300, 1), max_loss=0.02)
    good, bad = Draft("30 + 12 = 42\n#### 42"), Draft("30 + 12 = 49\n#### 49")
    prompt = "What is 30 and 12 together?"
    assert predicted_gain(made, prompt, good) < 0.2 and predicted_gain(made, prompt, bad) > 0.7
    assert not judge_draft(made, prompt, bad).keep
    assert judge_draft(made, prompt, bad, may_escalate=False).keep, "a private request has nobody else"
    verdict = judge_draft(made, prompt, good, schema={"type": "object"})
    assert not verdict.keep and "json_schema" in verdict.reason
    rows, _, scores = world(400, 2)
    kept = np.array([judge_draft(made, p, d).keep for p, d in rows])
    policy = np.where(kept, scores, 1.0).mean()
    assert policy > 0.94 and 0.3 < kept.mean() < 0.7
    tensors, block = judge_tensors(made)
    again = load_judge(tensors, block)
    for p, d in rows[:20]:
        assert predicted_gain(again, p, d) == pytest.approx(predicted_gain(made, p, d), abs=1e-4)
    with pytest.raises(ValueError):
        load_judge(tensors, {**block, "features": []})


def test_the_replay_sees_steps_that_do_not_hang_together():
    def of(
        text: str, prompt: str = "Tom buys 3 pens at 4 dollars and 2 books at 9 dollars."
    ) -> dict[str, float]:
        return dict(zip(FEATURES, features(prompt, Draft(text)), strict=True))

    whole = of("3 * 4 = 12\n2 * 9 = 18\n12 + 18 = 30\n#### 30")
    assert whole["answer_is_last_result"] == 1 and whole["results_unused"] == whole["operands_strange"] == 0
    assert whole["multiplications"] == 2 and whole["additions"] == 1 and whole["answer_repeated"] == 1
    assert of("3 * 4 = 12\n2 * 9 = 18\n#### 18")["results_unused"] == 1
    assert of("3 * 4 = 12\n12 + 17 = 29\n#### 29")["operands_strange"] == 1
    assert of("3 * 4 = 12\n#### 31")["answer_is_last_result"] == 0


def test_a_long_hostile_draft_is_read_in_no_time():
    import time

    began = time.process_time()
    features("1 " * 500, Draft("1+1=2 " * 4000))
    assert time.process_time() - began < 10


def test_a_judge_of_the_first_tokens_reads_no_more_and_says_when_it_has_enough():
    rows, gain, scores = world(300, 4)
    made = fit_judge(rows, gain, scores, after_tokens=5)
    head, tail = "30 + 12 = 49 so I say", " it is\n#### 42"
    whole, cut = (
        Draft(head + tail, "stop", -0.1, "#### 42"),
        first_tokens(Draft(head + tail, "stop", -0.1, "#### 42"), 5),
    )
    assert (
        cut == Draft(head[:20], complete=False)
        and first_tokens(whole, None) is whole
        and first_tokens(whole, 500) is whole
    )
    prompt = "What is 30 and 12 together?"
    assert predicted_gain(made, prompt, whole) == predicted_gain(
        made, prompt, Draft(head[:20] + " other words", complete=False)
    )
    again = load_judge(*judge_tensors(made))
    assert again.after_tokens == 5
    from types import SimpleNamespace

    assert enough(SimpleNamespace(judge=again), head) and not enough(SimpleNamespace(judge=again), head[:20])
    assert not enough(SimpleNamespace(judge=replace(again, after_tokens=None)), head * 100)


def test_the_curve_by_first_tokens_rises_to_the_whole_draft():
    rows, gain, scores = world(200, 5)
    curve = by_first_tokens(rows, scores, scores + gain, share=0.4, tokens=(1, 3))
    assert (
        [e["tokens"] for e in curve] == [1, 3, None]
        and curve[-1]["ended_share"] == 1.0
        and curve[0]["ended_share"] == 0.0
    )
    # Six of ten drafts are right, so that full knowledge has an APGR of .8; three digits do not tell what the sum will be.
    assert curve[0]["apgr"] + 0.1 < curve[-1]["apgr"] < 0.85
    assert curve[-1]["score_at_same_share"] > curve[0]["score_at_same_share"] + 0.1
    assert by_first_tokens(rows, scores + gain, scores) == []


def test_the_first_move_is_the_one_of_most_worth():
    assert first(0.7, 0.9, 0.99, 0.0, 1.0, 0.05)[0] == "strong"
    assert first(0.7, 0.99, 0.99, 0.0, 1.0, 0.05, draft_s=9)[0] == "local"
    assert first(0.1, 0.2, 0.95, 0.3, 1.0, 0.0)[0] == "strong"
    assert first(0.5, 0.99, 0.99, 0.0, 1.0, 0.1)[0] == "local"
    worth = first(0.7, 0.95, 0.96, 0.1, 1.0, 0.2)[1]
    assert worth["cascade"] == pytest.approx(0.7 * 0.95 + 0.3 * 0.96 - 0.2 * (0.1 + 0.3))
    assert "cascade" not in first(0.7, 0.9, 0.95, 0.1, 1.0, 0.2, draft_s=2, strong_s=2, max_latency_s=3)[1]


def test_the_kernel_head_equals_a_slow_solve_and_refits_without_each_row():
    chance = np.random.default_rng(0)
    x, y = chance.normal(size=(30, 3)), chance.normal(size=(30, 2))
    head = kernel.fit(x, y, (2.0,), most=30)
    slow = np.exp(-((x[:, None] - head.landmarks[None]) ** 2).sum(2) / 2.0)
    np.testing.assert_allclose(kernel.gram(x, head.landmarks, 2.0), slow, atol=1e-5)
    np.testing.assert_allclose(kernel.predict(head, x), slow @ head.weights + head.bias, atol=1e-4)
    smooth = np.sin(x[:, :1])
    assert kernel.fit(x, smooth, (2.0, 10.0), most=20).loo_mse[0] < 0.3 * smooth.var()


def drafted(n: int, seed: int) -> dict[str, list[dict]]:
    """The world as a report of both models' answers."""
    rows, _, scores = world(n, seed)
    items: dict[str, list[dict]] = {"weak": [], "strong": []}
    for index, ((prompt, draft), score) in enumerate(zip(rows, scores, strict=True)):
        items["weak"].append({**line(index, prompt, float(score), seed), "output": draft.text})
        items["strong"].append({**line(index, prompt, 1.0, seed), "output": "#### right"})
    return items


def test_a_policy_that_drafts_is_fitted_certified_and_read_back(tmp_path, capsys):
    report = write_report(tmp_path / "r", drafted(500, 1))
    options = Options(max_loss=0.05, cascade=True, privacy={"patterns": ["email"]}, local=("weak",))
    fit([report], PAIR, tmp_path / "policy", options)
    later = write_report(tmp_path / "later", drafted(400, 3))
    found = calibrate(tmp_path / "policy", [later], alpha=0.06)
    assert found["share_kept"] > 0.33 > found["share_kept_random"] * 2, (
        "drafts that fail their sums are not kept"
    )
    policy = load_policy(tmp_path / "policy")
    prompt = "What is 30 and 12 together?"
    decision = decide(policy, prompt)
    assert (
        decision.choice == "weak"
        and drafts(policy, decision)
        and strongest_allowed(policy, decision) == "strong"
    )
    assert judge(policy, prompt, Draft("30 + 12 = 42\n#### 42"), decision).keep
    assert not judge(policy, prompt, Draft("30 + 12 = 49\n#### 49"), decision).keep
    remote = replace(
        policy,
        policy=replace(
            policy.policy, candidates=[{**c, "remote": c["id"] == "strong"} for c in policy.policy.candidates]
        ),
    )
    private = f"{prompt} Mail it to erika@example.org"
    alone = decide(remote, private)
    assert alone.private and not drafts(remote, alone)
    assert judge(remote, private, Draft("30 + 12 = 49\n#### 49"), alone).keep
    page = tmp_path / "page.html"
    assert (
        cli(
            [
                "route",
                "eval",
                str(tmp_path / "policy"),
                str(write_report(tmp_path / "third", drafted(200, 5))),
                "--html",
                str(page),
            ]
        )
        == 0
    )
    assert "always strong: strong" in capsys.readouterr().out and "<svg" in page.read_text()
    assert cli(["route", "explain", str(tmp_path / "policy"), prompt, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["choice"] == "weak" and told["certificate"].startswith("holds") and told["would_change_it"]
    del_outputs = drafted(60, 7)
    for item in del_outputs["weak"]:
        del item["output"]
    with pytest.raises(UsageError, match="holds no answer, which a cascade is fitted on"):
        fit([write_report(tmp_path / "none", del_outputs)], PAIR, tmp_path / "other", Options(cascade=True))
    assert not (tmp_path / "other").exists()
