"""Multiple choice by log-probability, against sums worked out one sequence at a time."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from edgeft import child
from edgeft.bench import choices, likelihood
from edgeft.bench.journal import Journal
from edgeft.bench.pool import Pool
from edgeft.bench.targets import Target, find
from edgeft.errors import UsageError
from edgeft.rows import Row
from tests.conftest import ROOT, write_rows


def row(answer: str = "yes", options: list | None = None, **more) -> Row:
    return {
        "id": "r1", "task": "choice", "choices": ["yes", "no"] if options is None else options,
        "messages": [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": answer}], **more,
    }  # fmt: skip


# --- which sequences are run


def test_choices_of_one_token_cost_one_run_and_a_stem_is_shared():
    one = [{"prompt": [1, 2], "continuations": [[5], [6], [7], [8]]}]
    assert likelihood.plan(one)[0] == [[1, 2]]
    stem = [{"prompt": [1], "continuations": [[5, 6, 7], [5, 6, 8], [5, 9], [4]]}]
    runs, where = likelihood.plan(stem)
    assert runs == [[1, 5, 6]] and sorted(where[0]) == [(0, 0), (0, 1), (0, 2), (0, 3)]


def test_every_continuation_is_answered_once_by_a_run_that_begins_with_it():
    chance = np.random.default_rng(0)
    for _ in range(50):
        items = [
            {
                "prompt": chance.integers(0, 3, chance.integers(1, 5)).tolist(),
                "continuations": [
                    chance.integers(0, 3, chance.integers(1, 5)).tolist()
                    for _ in range(chance.integers(1, 6))
                ],
            }
            for _ in range(chance.integers(1, 6))
        ]
        runs, where = likelihood.plan(items)
        seen = []
        for run, answers in zip(runs, where, strict=True):
            for number, index in answers:
                seen.append((number, index))
                fed = items[number]["prompt"] + items[number]["continuations"][index][:-1]
                assert run[: len(fed)] == fed
        assert sorted(seen) == [
            (n, i) for n, item in enumerate(items) for i in range(len(item["continuations"]))
        ]
        assert not any(a != b and b[: len(a)] == a for a in runs for b in runs), (
            "a run that another holds is waste"
        )
        assert len({tuple(r) for r in runs}) == len(runs)


def test_a_continuations_sum_is_the_sum_of_its_tokens():
    logits = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)
    p = [[math.exp(x) / sum(math.exp(y) for y in line) for x in line] for line in logits.tolist()]
    found = likelihood.of_continuation(logits, 2, [3, 0, 5])
    assert found["logprob"] == pytest.approx(
        math.log(p[1][3]) + math.log(p[2][0]) + math.log(p[3][5]), abs=1e-6
    )
    best = [int(np.argmax(logits[i])) for i in (1, 2)]
    assert likelihood.of_continuation(logits, 2, best)["greedy"]
    assert not likelihood.of_continuation(logits, 2, [best[0], (best[1] + 1) % 6])["greedy"]


# --- what is right


def test_the_greatest_sum_and_the_greatest_sum_a_byte_can_be_two_choices():
    asked = row("längere", ["nö", "längere"])
    found = choices.judged(asked, [-3.0, -4.0])
    assert (found["choice"], found["choice_norm"]) == ("nö", "längere"), "3 and 8 bytes: -1 and -0.5 a byte"
    assert not found["choice_correct"] and found["choice_correct_norm"]
    assert found["choice_margin"] == pytest.approx(-1.0)
    # By characters (2 and 7) -3.2/2 against -10/7 would turn; by bytes (3 and 8) it does not.
    assert choices.judged(asked, [-3.2, -10.0])["choice_norm"] == "nö"


def test_figures_are_shares_with_wilsons_intervals():
    lines = [choices.judged(row(), [-1.0, -2.0]) for _ in range(3)] + [choices.judged(row(), [-2.0, -1.0])]
    found = choices.figures(lines)
    assert found["accuracy"] == 0.75 and found["n"] == 4 and found["chance"] == 0.5
    assert found["ci95"] == pytest.approx([0.3006, 0.9544], abs=1e-3) and found[
        "margin_mean"
    ] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({k: v for k, v in row().items() if k != "choices"}, "no list 'choices'"),
        (row(options=["yes"]), "no list 'choices'"),
        (row(options=["yes", "yes"]), "not texts that differ"),
        (row(options=["yes", ""]), "not texts that differ"),
        (row("maybe"), "'maybe' of row 'r1' is none"),
    ],
)
def test_a_row_without_what_it_needs_is_named(bad, says):
    with pytest.raises(UsageError, match=says) as caught:
        choices.check([bad], "rows.jsonl")
    assert "r1" in caught.value.message and caught.value.hint


def test_a_bad_row_is_refused_before_a_model_is_loaded(tmp_path, tiny_models):
    from edgeft.bench import Workload, bench

    file = write_rows(tmp_path / "rows.jsonl", [row("maybe")])
    with pytest.raises(UsageError, match="none of its 'choices'"):
        bench([tiny_models["llama"]], [], Workload(tasks=file), "auto", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- a real model


OPTIONS = ["a", "return_label", "return_start", "zwei Wörter"]
ROWS = [
    {
        "id": str(i), "task": "choice", "choices": OPTIONS,
        "messages": [
            {"role": "system", "content": "Name the intent."}, {"role": "user", "content": f"Question {i}?"},
            {"role": "assistant", "content": OPTIONS[i]},
        ],
    }
    for i in range(3)
]  # fmt: skip


def lines_of(place: Path, tmp_path: Path) -> tuple[Journal, Target]:
    target = find([place], [])[0]
    journal = Journal(tmp_path / f"{target.id}.jsonl", "k")
    with Pool(1, 512, lambda t: tmp_path / f"{t.id}.log") as pool:
        choices.read(target, pool, ROWS, journal)
    choices.measure([target], ROWS, 1, journal, tmp_path)
    assert journal.last(target.id, "choices-error") is None
    return journal, target


def test_sums_are_those_of_whole_forward_passes(tmp_path, tiny_models):
    import torch

    from edgeft.engines.transformers import load

    journal, target = lines_of(tiny_models["llama"], tmp_path)
    model, tokenizer = load(tiny_models["llama"], 1)
    found = journal.last(target.id, "choices")
    for asked, line in zip(ROWS, found["items"], strict=True):
        prompt = tokenizer.apply_chat_template(
            asked["messages"][:-1], add_generation_prompt=True, return_dict=False
        )
        for choice, got in zip(OPTIONS, line["choice_logprobs"], strict=True):
            ids = prompt + tokenizer.encode(choice, add_special_tokens=False)
            with torch.inference_mode():
                logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            wanted = sum(float(logp[i - 1, ids[i]]) for i in range(len(prompt), len(ids)))
            assert got == pytest.approx(wanted, abs=1e-3)
    again = choices.result(journal, target)
    assert again and "items" not in again and again["n"] == 3
    items = choices.with_choices(
        [{"item_id": "1", "model_id": target.id}, {"item_id": "x", "model_id": target.id}], journal
    )
    assert "choice_correct" in items[0] and "choice_correct" not in items[1]
    assert f"n {again['n']}" in choices.notes({"id": "m", "choices": again})[0]


def test_a_gguf_file_reads_and_scores_as_its_source(tmp_path, tiny_dist):
    gguf, ours = (lines_of(tiny_dist / "dist" / name, tmp_path) for name in ("gguf-f16", "merged"))
    ids, wanted_ids = (journal.last(target.id, "choice-ids") for journal, target in (gguf, ours))
    assert ids == wanted_ids
    found, wanted = (journal.last(target.id, "choices")["items"] for journal, target in (gguf, ours))
    for a, b in zip(found, wanted, strict=True):
        assert a["choice_logprobs"] == pytest.approx(b["choice_logprobs"], abs=0.05)


def test_what_rows_begin_with_alike_is_computed_once_with_the_same_result(tmp_path, tiny_dist):
    rows = [[1, 40, 50, 60], [1, 40, 50, 61, 62], [1, 40, 50, 61, 62], [1, 40, 50], [7, 8], [1, 40]]
    found = []
    for reuse in (False, True):
        child.call(
            "tests_support:dump_logits", log=tmp_path / "log", title="t", engine="gguf", ids=rows, reuse=reuse,
            folder=str(tiny_dist / "dist" / "gguf-f16"), out=str(tmp_path / f"{reuse}.npz"), env={"PYTHONPATH": str(ROOT / "tests")},
        )  # fmt: skip
        found.append(np.load(tmp_path / f"{reuse}.npz"))
    for index, row in enumerate(rows):
        fresh, reused = (values[str(index)] for values in found)
        # Batches of another size are rounded otherwise; a token at a wrong place is off by a tenth.
        assert fresh.shape[0] == len(row) and np.abs(fresh - reused).max() < 2e-3


def test_one_run_answers_all_choices_of_one_token(tmp_path, tiny_models):
    found = child.call(
        "edgeft.bench.likelihood:score", log=tmp_path / "log", title="t", engine="transformers",
        folder=str(tiny_models["llama"]), items=[{"prompt": [1, 50, 60], "continuations": [[7], [8], [9]]}], threads=1,
    )  # fmt: skip
    assert found["runs"] == 1 and len({c["logprob"] for c in found["items"][0]}) == 3
