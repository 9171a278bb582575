"""Effective context against a stand-in whose limits are known, and once on a real engine."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import pytest

from edgeft.bench import context
from edgeft.bench.context_task import DEPTHS, PERIOD, code_in, locker_prompt, sentences_for
from edgeft.bench.journal import Journal
from edgeft.bench.targets import Target
from edgeft.engines.client import Reply
from edgeft.errors import EnvironmentFault, UsageError
from tests.conftest import write_rows

LENGTHS = (256, 512, 1024)
TARGET = Target("m", "artifact", "gguf", Path("/nowhere"), "sha", 10**6)
ROWS = [
    {
        "id": str(i), "task": "exact",
        "messages": [
            {"role": "user", "content": f"Question number {i}, which is asked."}, {"role": "assistant", "content": "a"},
        ],
    }
    for i in range(12)
]  # fmt: skip


class Stand:
    """A model of one token a word, that finds the fact where `finds(tokens, depth)` says so, and own rows in short prompts."""

    def __init__(self, finds=lambda tokens, depth: True, breaks_at: int = 0) -> None:
        self.finds, self.breaks_at, self.asked, self.local = finds, breaks_at, [], None

    def use(self, target):
        return contextlib.nullcontext(self)

    def ask(self, body):
        self.asked.append(body)
        if len(self.asked) == self.breaks_at:
            raise EnvironmentFault("the engine is gone", "less log")
        text = body["messages"][-1]["content"]
        tokens = 10 + len(text.split())
        if asked := re.search(r"What is the code of locker (\w+)\?", text):
            place = text.index(f"The code of locker {asked[1]} is ")
            code = text[place:].split(" is ")[1][:4]
            notes = text[text.index("\n\n") + 2 : text.rindex("\n\n")]
            depth = (place - text.index("\n\n") - 2) / max(
                1, len(notes) - len(f"The code of locker {asked[1]} is {code}.")
            )
            output = f"It is {code[0]},{code[1:]}." if self.finds(tokens, depth) else "9999999"
        else:
            output = "a" if tokens < 400 else "b"
        return Reply(output, tokens, 4, tokens / 1000, 1.0, [], None, "stop")


def measured(tmp_path: Path, stand: Stand, repetitions: int = 4) -> Journal:
    journal = Journal(tmp_path / "j.jsonl", "k")
    for row in ROWS:
        journal.add("m", "answer", {"item_id": row["id"], "correct": True})
    context.measure(TARGET, stand, ROWS, LENGTHS, repetitions, 8, journal, lambda text: None)
    return journal


# --- the task


def test_a_prompt_is_the_same_for_its_seed_and_holds_its_code_once_at_its_depth():
    for depth in DEPTHS:
        prompt, code = locker_prompt(80, depth, "7")
        assert (prompt, code) == locker_prompt(80, depth, "7") != locker_prompt(80, depth, "8")
        assert prompt.count(code) == 1
        sentences = prompt.split("\n\n")[1].split(". ")
        assert len(sentences) == 81 and code in sentences[round(80 * depth)]
        assert sum("The code of locker" in s for s in sentences) == 1 + 80 // PERIOD * 2, (
            "others must distract"
        )


@pytest.mark.parametrize(
    ("output", "code"),
    [
        ("4815", "4815"),
        ("It is 4,815.", "4815"),
        ("locker K271: 4815", "4815"),
        ("48151", None),
        ("none", None),
    ],
)
def test_a_code_is_found_in_an_answer(output, code):
    assert code_in(output) == code


def test_prompts_are_as_long_as_asked_and_not_longer(tmp_path):
    stand = Stand()
    found = context.result(measured(tmp_path, stand), TARGET)
    for length in found["lengths"]:
        assert all(length["tokens"] - 20 <= n <= length["tokens"] + 4 for n in length["prompt_tokens"])
    for own in found["rows"]:
        assert all(0.85 * own["tokens"] <= n <= own["tokens"] for n in own["prompt_tokens"])
    assert all(body["cache_prompt"] is False and body["temperature"] == 0 for body in stand.asked)
    assert sentences_for(100, 200, 300) == 0


# --- what is made of it


def test_a_model_that_ends_at_600_tokens_is_told_so(tmp_path):
    found = context.result(measured(tmp_path, Stand(lambda tokens, depth: tokens < 600)), TARGET)
    assert [c["right"] for c in found["lengths"]] == [20, 20, 0] and found["effective_tokens"] == 512
    assert found["lengths"][0]["n"] == 20 and found["lengths"][0]["ci95"][0] == pytest.approx(
        0.8389, abs=1e-3
    )
    assert found["lengths"][1]["ttft_s"]["p50"] == pytest.approx(0.5, abs=0.02)
    assert found["lengths"][1]["prefill_tok_per_s"]["p50"] == pytest.approx(1000)
    own = found["rows"]
    assert [r["right"] for r in own] == [12, 0, 0] and own[1]["lost"] == 12 and own[1]["gained"] == 0
    assert own[1]["mcnemar_p"] == pytest.approx(2 / 2**12) and own[0]["mcnemar_p"] == 1.0
    said = " ".join(context.notes({"id": "m", "context": found}))
    assert "effective context 512 tokens" in said and "synthetic" in said and "0/12 against 12" in said


def test_a_model_that_loses_the_middle_shows_it_by_depth(tmp_path):
    found = context.result(
        measured(tmp_path, Stand(lambda t, depth: t < 300 or abs(depth - 0.5) > 0.2)), TARGET
    )
    assert {d["depth"]: d["right"] for d in found["lengths"][2]["depths"]} == {
        0: 4,
        0.25: 4,
        0.5: 0,
        0.75: 4,
        1: 4,
    }
    assert "depth 0.5" in " ".join(context.notes({"id": "m", "context": found}))


def test_a_model_that_cannot_do_the_task_has_no_effective_context(tmp_path):
    found = context.result(measured(tmp_path, Stand(lambda tokens, depth: False)), TARGET)
    assert found["effective_tokens"] is None, "0.85 x 0 is held by every length, and means nothing"
    assert "no effective context" in context.notes({"id": "m", "context": found})[0]


def test_a_length_behind_one_that_failed_does_not_count():
    def cell(tokens, right):
        return {"tokens": tokens, "right": right, "n": 20, "ci95": context.wilson(right, 20)}

    assert context.effective([cell(256, 20), cell(512, 5), cell(1024, 20)]) == 256
    # 14 of 20: the interval reaches 0.855, which is not below 0.85.
    assert context.effective([cell(256, 20), cell(512, 14)]) == 512
    assert context.effective([cell(256, 20), cell(512, 13)]) == 256


def test_an_interrupted_run_goes_on_and_a_broken_engine_is_told(tmp_path):
    whole = Stand()
    measured(tmp_path / "a", whole)
    journal = measured(tmp_path / "b", Stand(breaks_at=20))
    assert journal.last("m", "context-error") == "the engine is gone" and journal.all("m", "context")
    assert context.result(journal, TARGET) is None
    del journal.facts[("m", "context-error")]
    again = Stand()
    context.measure(TARGET, again, ROWS, LENGTHS, 4, 8, journal, lambda text: None)
    assert len(again.asked) == len(whole.asked) - 19, "nothing is asked twice"
    assert len(journal.all("m", "context")) == 60 and len(journal.all("m", "context-row")) == 36


# --- what is refused


def test_a_length_that_does_not_fit_is_refused_with_the_number(tmp_path, rows_file, tiny_models):
    from edgeft.bench import Workload, bench

    with pytest.raises(UsageError, match=r"2040 tokens.*context of 2048") as caught:
        bench(
            [tiny_models["llama"]],
            [],
            Workload(tasks=rows_file, context_lengths=(256, 2040)),
            "auto",
            tmp_path / "out",
        )
    assert "--context 2080" in caught.value.hint and not (tmp_path / "out").exists()
    context.check((256, 2008), 16, 2048)
    with pytest.raises(UsageError, match="500 for its answer"):
        context.check((1900,), 500, 2048)
    context.check((), 500, 64)


@pytest.mark.parametrize("text", ["64", "a", "256,", "256,-5"])
def test_what_is_no_length_is_named(text):
    with pytest.raises(UsageError, match="no length in tokens"):
        context.read_lengths(text)


def test_lengths_are_read_shortest_first():
    assert context.read_lengths("512,256,512") == (256, 512) and context.read_lengths(None) == ()


# --- a real engine, from the command line


def test_a_bench_with_choices_and_lengths_writes_both(tmp_path, tiny_models):
    from tests.test_cli import edgeft

    rows = [
        {
            "id": str(i), "task": "choice", "choices": ["good", "bad"],
            "messages": [{"role": "user", "content": f"Is {i} good?"}, {"role": "assistant", "content": "good"}],
        }
        for i in range(3)
    ]  # fmt: skip
    file = write_rows(tmp_path / "rows.jsonl", rows)
    done = edgeft(
        "bench", tiny_models["llama"], "--tasks", file, "--out", tmp_path / "out", "--no-speed", "--context", 512, "--threads", 1,
        "--context-lengths", "128,256", "--context-repetitions", 1, EDGEFT_HOME=str(tmp_path / "home"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "report.json").read_text())["results"][0]
    assert result["error"] is None
    found = result["context"]
    assert found["label"] == "synthetic" and found["effective_tokens"] is None, "random weights find nothing"
    assert [c["n"] for c in found["lengths"]] == [5, 5] and [r["n"] for r in found["rows"]] == [3, 3]
    for length in found["lengths"]:
        assert all(length["tokens"] - 20 <= n <= length["tokens"] + 8 for n in length["prompt_tokens"])
    assert result["choices"]["n"] == 3
    items = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    assert [i["choice_correct"] for i in items].count(True) == round(3 * result["choices"]["accuracy"])
    said = (tmp_path / "out" / "report.md").read_text()
    assert "synthetic task by prompt tokens" in said and "multiple choice by log-probability" in said
