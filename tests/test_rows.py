"""Rows, their five parts, and what may be done with them."""

from __future__ import annotations

import json

import pytest

from edgeft.errors import UsageError
from edgeft.rows import load_rows, messages_hash, refuse_seen, row_hash, spread
from edgeft.tune.rows import PARTS, near_duplicate_clusters, rows_from_csv, split, write_parts
from tests.conftest import DESK, write_rows

SYSTEM = "Name the intent of this shop request."


def row(text: str, answer: str = "a") -> dict:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]}


def test_the_examples_are_what_the_command_makes(tmp_path):
    counts = write_parts(split(rows_from_csv(DESK / "requests.csv", "text", "intent", SYSTEM)), tmp_path)
    for part in PARTS:
        assert (tmp_path / f"{part}.jsonl").read_text() == (DESK / f"{part}.jsonl").read_text()
    assert sum(counts.values()) == 1050


def test_the_examples_parts_are_apart_and_cover_every_intent():
    parts = {part: load_rows(DESK / f"{part}.jsonl") for part in PARTS}
    texts = [(part, r["messages"][-2]["content"]) for part, rows in parts.items() for r in rows]
    clusters = near_duplicate_clusters([t for _, t in texts])
    where: dict[int, set[str]] = {}
    for (part, _), cluster in zip(texts, clusters, strict=True):
        where.setdefault(cluster, set()).add(part)
    assert all(len(found) == 1 for found in where.values())
    intents = {part: {r["messages"][-1]["content"] for r in rows} for part, rows in parts.items()}
    assert len(intents["train"]) == 25
    assert all(intents[part] <= intents["train"] for part in PARTS)


def test_near_duplicates_stay_together_and_others_apart():
    texts = ["where is my parcel, order 123?", "Where is my parcel? Order 124", "the toaster does not toast"]
    clusters = near_duplicate_clusters(texts)
    assert clusters == [0, 0, 2]
    rows = [{**row(t), "id": messages_hash(row(t)["messages"])} for t in texts]
    home = {r["messages"][0]["content"]: part for part, found in split(rows).items() for r in found}
    assert home[texts[0]] == home[texts[1]]


def test_a_rows_part_does_not_depend_on_the_others():
    rows = load_rows(DESK / "report.jsonl")
    alone = split(rows[:50])
    assert len(alone["report"]) == 50


def test_csv_without_the_column_names_the_nearest(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("text,category\nhello,x\n")
    with pytest.raises(UsageError, match="Did you mean 'category'"):
        rows_from_csv(file, "text", "categry", SYSTEM)
    file.write_text("text,category\nhello,x\nbye,\n")
    with pytest.raises(UsageError, match="line 3 has no answer"):
        rows_from_csv(file, "text", "category", SYSTEM)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2 is not JSON"),
        ('{"messages": []}', "line 2 has no list 'messages'"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "line 2 has no answer"),
        ('{"messages": [{"role": "usr", "content": "x"}]}', "line 2: a message's role"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "line 2 has an answer and no question"),
        (json.dumps({**row("x"), "task": "exakt"}), "Did you mean 'exact'"),
        (json.dumps(row("first")), "line 2: the id"),
    ],
)
def test_a_wrong_row_is_named_by_its_line(tmp_path, line, complaint):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row("first")) + "\n" + line + "\n")
    with pytest.raises(UsageError) as caught:
        load_rows(file)
    assert complaint in caught.value.message


def test_unknown_keys_are_kept_and_the_id_is_the_hash(tmp_path):
    file = write_rows(tmp_path / "r.jsonl", [{**row("x"), "colour": "red"}])
    found = load_rows(file)[0]
    assert found["colour"] == "red" and found["id"] == row_hash(found) and found["task"] == "exact"


def test_rows_seen_by_training_are_refused(tmp_path):
    rows = load_rows(write_rows(tmp_path / "r.jsonl", [row("x"), row("y")]))
    with pytest.raises(UsageError, match=r"1 row\(s\) were used to train"):
        refuse_seen(rows, {"train": [row_hash(rows[1])]}, "measure", tmp_path / "r.jsonl")
    refuse_seen(rows, {"train": ["0" * 16]}, "measure", tmp_path / "r.jsonl")


def test_a_limit_is_spread_over_the_file():
    rows = [{"id": i} for i in range(10)]
    assert [row["id"] for row in spread(rows, 4)] == [0, 2, 5, 7]
    assert spread(rows, 10) == spread(rows, 99) == spread(rows, None) == rows


def test_a_cosine_of_just_eight_tenths_is_no_near_duplicate_on_any_machine():
    # Eight of ten 4-grams in common; in float32, divided by lengths first, this came out above or below by the BLAS.
    assert near_duplicate_clusters(["abcdefghijk", "abcdefghijz"]) == [0, 1]
    assert near_duplicate_clusters(["abcdefghijkl", "abcdefghijkz"]) == [0, 0]  # nine of eleven
