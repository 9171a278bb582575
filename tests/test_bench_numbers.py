"""The figures of a report against slow references worked out another way."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgeft.bench import answers, fidelity, report
from edgeft.bench.entries import compare_with_reference
from edgeft.bench.score import score
from edgeft.bench.stats import bootstrap_ratio_of_sums, mcnemar, summary, wilson
from edgeft.engines.client import events, gather
from edgeft.types import BenchReport


def ask(task: str, answer: str, output: str) -> float | None:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    return score({"task": task, "messages": messages}, output)


def test_kld_is_the_sum_over_the_vocabulary():
    chance = np.random.default_rng(0)
    left, right = chance.normal(size=(3, 7)), chance.normal(size=(3, 7))
    found = fidelity.distances(
        fidelity.log_softmax(left).astype(np.float32), right.astype(np.float32), [1, 2, 3]
    )
    for row in range(3):
        p = [math.exp(x) / sum(math.exp(y) for y in left[row]) for x in left[row]]
        q = [math.exp(x) / sum(math.exp(y) for y in right[row]) for x in right[row]]
        assert found["kld"][row] == pytest.approx(
            sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), abs=1e-6
        )
        token = row + 1
        assert found["right_delta"][row] == pytest.approx(q[token] - p[token], abs=1e-6)
        assert found["nll"][row] == pytest.approx(-math.log(q[token]), abs=1e-5)
        assert found["same_top1"][row] == int(p.index(max(p)) == q.index(max(q)))


def test_a_padded_vocabulary_is_renormalized():
    logits = np.array([[1.0, 2.0, 3.0]])
    padded = np.concatenate([logits, [[5.0]]], axis=1)
    assert fidelity.distances(fidelity.log_softmax(logits), padded, [0])["kld"][0] == pytest.approx(
        0, abs=1e-9
    )
    assert fidelity.distances(fidelity.log_softmax(padded), logits, [0])["kld"][0] == pytest.approx(
        0, abs=1e-9
    )


def test_answer_positions_are_told_apart():
    found = {
        "kld": [[1.0, 3.0], [5.0]], "same_top1": [[1, 0], [1]], "right_delta": [[0.0, 0.1], [0.2]],
        "nll": [[1.0, 1.0], [1.0]], "nll_reference": [[1.0, 1.0], [1.0]], "answer": [[0, 1], [1]], "build": "x",
    }  # fmt: skip
    figures = fidelity.summarize(found)
    assert figures["all"]["kld_mean"] == 3.0 and figures["all"]["positions"] == 3
    assert figures["answer"]["kld_mean"] == 4.0 and figures["answer"]["same_top1"] == 0.5
    low, high = figures["all"]["kld_ci95"]
    assert 2.0 <= low <= 3.0 <= high <= 5.0


def test_bootstrap_resamples_rows_not_positions():
    # Two rows, one long: whole rows are drawn, so the mean is one of the three values that pairs of rows can have.
    low, high = bootstrap_ratio_of_sums([0.0, 90.0], [10, 90])
    assert low == 0.0 and high == 1.0


def test_wilson_matches_the_textbook():
    low, high = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(0, 0) == [0.0, 1.0]


def test_mcnemar_is_the_exact_binomial():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 6) == pytest.approx(2 / 64)
    assert mcnemar(2, 5) == pytest.approx(2 * (1 + 7 + 21) / 128)


def test_percentiles_keep_their_samples():
    found = summary([3.0, 1.0, 2.0])
    assert found["p50"] == 2.0 and found["samples"] == [3.0, 1.0, 2.0] and found["n"] == 3


@pytest.mark.parametrize(
    ("task", "answer", "output", "right"),
    [
        ("exact", "order_status", " order_status\n", 1.0),
        ("exact", "order_status", "order_status.", 0.0),
        ("exact", "a b", "a  b", 1.0),
        ("choice", "B", "b.", 1.0),
        ("choice", "B", "C", 0.0),
        ("numeric", "the answer is 1,200", "so 600 + 600 = 1200.", 1.0),
        ("numeric", "12", "no number", 0.0),
        ("text", "x", "x", 1.0),
    ],
)
def test_scores(task, answer, output, right):
    assert ask(task, answer, output) == right


def test_a_reply_is_timed_and_counted_from_usage():
    chunks = [
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {
            "choices": [
                {"delta": {"content": "a b"}, "logprobs": {"content": [{"logprob": -1.0}, {"logprob": -3.0}]}}
            ]
        },
        {"choices": [{"delta": {"content": "c"}, "finish_reason": "stop"}]},
        {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}},
    ]
    reply = gather(zip((0.1, 0.2, 0.5, 0.6), chunks, strict=True))
    assert (reply.text, reply.prompt_tokens, reply.output_tokens) == ("a bc", 7, 5)
    assert reply.mean_logprob == -2.0 and reply.finish_reason == "stop" and len(reply.chunk_s) == 2
    assert (reply.ttft_s, reply.e2e_s, reply.chunk_s) == (0.2, 0.6, [0.2, 0.5])
    assert reply.decode_tok_per_s == pytest.approx(4 / 0.4)


def test_an_event_counts_from_when_its_line_is_whole():
    pieces = [
        (0.1, b'data: {"a": 1}\n\nda'),
        (0.2, b'ta: {"b"'),
        (0.3, b": 2}\r\n\n: note\n"),
        (0.4, b"data: [DONE]\n\n"),
    ]
    assert list(events(pieces)) == [(0.1, {"a": 1}), (0.3, {"b": 2})]


def items(model: str, right: list[bool]) -> list[dict]:
    return [{"model_id": model, "item_id": str(i), "correct": r} for i, r in enumerate(right)]


def test_lost_and_gained_are_paired():
    results = [{"id": "merged"}, {"id": "q"}]
    compare_with_reference(results, items("merged", [1, 1, 0, 0]) + items("q", [1, 0, 1, 0]), "merged")
    assert results[1]["against_reference"] == {"lost": 1, "gained": 1, "n": 4, "mcnemar_p": 1.0}
    assert results[0]["against_reference"] is None


def test_report_shows_a_dash_for_what_was_not_measured_and_loads_nothing():
    from edgeft.bench.html import page

    accuracy = answers.figures(
        [{"score": 1.0, "correct": True, "ttft_s": 0.1, "e2e_s": 0.2, "prompt_tokens": 3, "output_tokens": 2}]
        * 4
    )
    result = {
        "id": "x<y", "format": "gguf", "size_bytes": 10**8, "bits_per_weight": None, "accuracy": accuracy, "speed": None,
        "fidelity": None, "memory": None, "load": None, "against_reference": None,
    }  # fmt: skip
    made = BenchReport(
        created_at="2026-01-01", environment={}, profile={"id": "box"}, results=[result], reference=None,
        workload={"rows": 4, "tasks": "rows.jsonl", "max_tokens": 16, "threads": 2},
    )  # fmt: skip
    row = dict(zip(report.COLUMNS, report.table_rows(made)[0], strict=True))
    assert row["KLD all"] == "–" and row["peak MB"] == "–" and row["right %"].startswith("100.0")
    text = page(made)
    assert "x&lt;y" in text and "<svg" in text
    assert not any(mark in text for mark in ("<script", "src=", 'href="http'))


def test_an_artefact_of_another_model_is_told_in_the_report(tmp_path):
    """An earlier adapter's artefact, or the base's own, beside a new merged model: its KLD holds more than quantizing."""
    from edgeft.bench.reference import of_another_model
    from edgeft.bench.targets import Target

    def target(name: str, digest: str, **facts: str) -> Target:
        return Target(name, "artifact", "gguf", tmp_path / name, digest, 1, facts, {})

    merged = target("merged", "new")
    found = [of_another_model(target("q", "x", **f), merged) for f in ({"merged_sha256": "old"}, {"merged_sha256": "new"}, {})]  # fmt: skip
    assert found == [True, False, False]
    figures = {"positions": 3, "rows": 1}
    results = [
        {"id": name, "fidelity": {"logits_build": "b", "answer": figures, "all": figures, "of_another_model": other}}
        for name, other in (("base/q", True), ("q", False))
    ]  # fmt: skip
    made = BenchReport(
        created_at="2026-01-01", environment={}, profile={"id": "box"}, results=results, reference="merged",
        workload={"rows": 4, "tasks": "rows.jsonl", "max_tokens": 16, "threads": 2},
    )  # fmt: skip
    assert next(n for n in report.notes(made) if "another merged model" in n).startswith("base/q: ")
