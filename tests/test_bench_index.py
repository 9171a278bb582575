"""The index of runs: it only grows, adding twice is nothing, a stick with broken reports gives what is whole."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from edgeft.bench import index, reading
from edgeft.bench.stats import summary
from edgeft.errors import EnvironmentFault, UsageError
from tests.conftest import ROOT
from tests.test_cli import assert_two_lines, edgeft


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("EDGEFT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def result(name: str, decode: list[float], **more) -> dict:
    speed = {
        "decode_tok_per_s": summary(decode),
        "ttft_s": summary([1 / d for d in decode]),
        "prefill_tok_per_s": None,
    }
    return {
        "id": name, "kind": "artifact", "engine": "gguf", "engine_build": "llama.cpp 1", "artifact_sha256": f"sha-{name}",
        "size_bytes": 1000, "speed": {**speed, "side": "client"}, "accuracy": {"share": 0.5, "n": 2, "ci95": [0, 1]},
        **more,
    }  # fmt: skip


def write(
    folder: Path, results: list[dict], when: str = "2026-01-01T00:00:00+00:00", box: str = "A box", items=()
) -> Path:
    value = {
        "schema": "edgeft/report@1", "created_at": when, "environment": {"machine": "aarch64"},
        "profile": {"id": box.lower().replace(" ", "-"), "name": box},
        "workload": {"tasks_sha256": "t", "threads": 4, "context": 2048, "rows": 2, "tasks": "rows.jsonl"},
        "results": results, "reference": None, "seen_rows": {},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(value))
    (folder / "items.jsonl").write_text("".join(json.dumps(i) + "\n" for i in items))
    return folder


def test_adding_twice_is_one_report(tmp_path):
    folder = write(tmp_path / "r", [result("a", [50.0] * 3), result("b", [60.0] * 3)])
    digest, new = index.add(folder)
    assert new and index.add(folder) == (digest, False)
    found = index.runs()
    assert [r["result_id"] for r in found] == ["a", "b"] and {r["report_sha256"] for r in found} == {digest}
    assert (
        found[0]["decode_tok_per_s"] == 50.0
        and found[0]["box"] == "A box"
        and found[0]["machine"] == "aarch64"
    )
    import hashlib

    assert digest == hashlib.sha256((folder / "report.json").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE runs SET decode_tok_per_s = 99", "DELETE FROM runs", "UPDATE reports SET json = '{}'", "DELETE FROM reports",
        "UPDATE baselines SET result_id = 'b'", "DELETE FROM baselines",
        "INSERT OR REPLACE INTO runs (report_sha256, result_id, created_at) SELECT report_sha256, result_id, 'x' FROM runs LIMIT 1",
    ],
)  # fmt: skip
def test_it_only_grows(tmp_path, statement):
    digest, _ = index.add(write(tmp_path / "r", [result("a", [50.0] * 3)]))
    index.set_baseline("gold", digest, "a")
    before = index.runs(), index.baselines()
    with pytest.raises(EnvironmentFault, match="only grows"), index.opened() as connection, connection:
        connection.execute(statement)
    assert (index.runs(), index.baselines()) == before


def test_a_stick_of_many_boards_gives_what_is_whole(tmp_path):
    stick = tmp_path / "stick"
    for n in range(3):
        write(stick / f"board-{n}" / "deep" / "report", [result("a", [50.0 + n] * 3)], box=f"Board {n}")
    write(stick / "copy-of-1", [result("a", [51.0] * 3)], box="Board 1")
    (stick / "cut-off").mkdir()
    (stick / "cut-off" / "report.json").write_text('{"schema": "edgeft/report@1", "resul')
    write(stick / "twice", [result("a", [1.0] * 3), result("a", [2.0] * 3)])
    (stick / "other").mkdir()
    (stick / "other" / "report.json").write_text('{"coverage": 0.9}')
    write(stick / "huge", [result("a", [1.0] * 3, size_bytes=10**30)])
    write(stick / "surrogate", [result("a", [1.0] * 3, model_name="\ud800")])
    (write(stick / "items", [result("a", [4.0] * 3)]) / "items.jsonl").write_text("[1]\n")
    done = index.merge([stick])
    assert len(done["added"]) == 3 and done["known"] == 1
    skipped = {Path(s["path"]).parent.name: s["why"] for s in done["skipped"]}
    assert sorted(skipped) == ["cut-off", "huge", "items", "other", "surrogate", "twice"]
    assert "has no 'schema'" in skipped["other"] and "two results" in skipped["twice"]
    assert sorted(r["box"] for r in index.runs()) == ["Board 0", "Board 1", "Board 2"]
    again = index.merge([stick])
    assert again["added"] == [] and again["known"] == 4


def test_a_report_that_cannot_be_kept_leaves_no_half(tmp_path):
    """The second result is beyond 64 bits: the first must not stay behind."""
    folder = write(tmp_path / "r", [result("a", [50.0] * 3), result("b", [50.0] * 3, size_bytes=10**30)])
    with pytest.raises(UsageError, match="cannot be kept"):
        index.add(folder)
    assert index.runs() == []
    with index.opened() as connection:
        assert connection.execute("SELECT count(*) FROM reports").fetchone()[0] == 0


def test_filters_are_parts_of_values_and_never_sql(tmp_path):
    index.add(write(tmp_path / "1", [result("gguf-q4", [50.0] * 3)], "2026-01-01T00:00:00+00:00", "Pi 5"))
    index.add(write(tmp_path / "2", [result("gguf-q8", [40.0] * 3)], "2026-02-01T00:00:00+00:00", "N100"))
    ids = lambda **f: [r["result_id"] for r in index.runs(**f)]  # noqa: E731
    assert ids() == ["gguf-q8", "gguf-q4"] and ids(limit=1) == ["gguf-q8"]
    assert (
        ids(box="pi") == ["gguf-q4"]
        and ids(model="Q8") == ["gguf-q8"]
        and ids(since="2026-01-15") == ["gguf-q8"]
    )
    assert ids(artifact="sha-gguf-q4") == ["gguf-q4"] and ids(artifact="gguf-q4") == []
    assert ids(model="' OR 1=1 --") == [] and ids(model="%") == []
    with pytest.raises(UsageError, match="boxx"):
        index.runs(boxx="x")


def test_the_newest_of_a_baselines_name_counts_and_the_folder_may_go(tmp_path):
    import shutil

    items = [
        {
            "item_id": "1",
            "model_id": "a",
            "row_hash": "h",
            "correct": True,
            "score": 1.0,
            "request": "private text",
        }
    ]
    folder = write(tmp_path / "r", [result("a", [50.0] * 3), result("b", [50.0] * 3)], items=items)
    digest, _ = index.add(folder)
    index.set_baseline("gold", digest, "a")
    index.set_baseline("gold", digest, "b")
    assert index.baselines()["gold"]["result_id"] == "b" and len(index.baselines()) == 1
    shutil.rmtree(folder)
    report, kept = index.stored(digest)
    assert report.results[0]["id"] == "a"
    assert kept == [
        {"item_id": "1", "model_id": "a", "row_hash": "h", "correct": True, "score": 1.0}
    ]  # no texts
    with pytest.raises(UsageError, match="'c'"):
        index.set_baseline("gold", digest, "c")
    with pytest.raises(UsageError, match="no report"):
        index.stored("0" * 64)


def test_repeated_runs_set_the_spread_of_their_box_and_engine_alone(tmp_path):
    import math

    decode = {"a": [50.0, 51.0, 52.0], "b": [100.0, 102.0]}
    for name, medians in decode.items():
        for n, median in enumerate(medians):
            index.add(
                write(
                    tmp_path / f"{name}{n}", [result(name, [median] * 3)], f"2026-01-0{n + 1}T00:00:00+00:00"
                )
            )
    index.add(write(tmp_path / "far", [result("a", [5.0] * 3)], box="Another box"))
    index.add(write(tmp_path / "old", [result("a", [5.0] * 3, engine_build="llama.cpp 0")]))
    new = reading.sides(str(write(tmp_path / "new", [result("a", [50.5] * 3)])))[0]
    found = index.repeats(new)["decode tok/s"]
    logs = {k: [math.log(m) for m in v] for k, v in decode.items()}
    squares = sum((x - sum(v) / len(v)) ** 2 for v in logs.values() for x in v)
    assert found.freedom == 3 and found.deviation == pytest.approx(math.sqrt(squares / 3))
    # What is being compared is no evidence of its own spread.
    left_out = reading.sides(str(tmp_path / "a2"))[0].report_sha256
    assert index.repeats(new, (left_out,))["decode tok/s"].freedom == 2


def test_after_run_never_fails(tmp_path, home):
    folder = write(tmp_path / "r", [result("a", [50.0] * 3)])
    assert "is in the index" in index.after_run(folder) and "was in" in index.after_run(folder)
    assert "not added" in index.after_run(tmp_path / "nothing")
    index.path().write_bytes(b"no database at all, " * 100)
    for extra in ("-wal", "-shm"):
        index.path().with_name(index.path().name + extra).unlink(missing_ok=True)
    assert "not added" in index.after_run(folder)
    with pytest.raises(EnvironmentFault, match="not a database") as caught:
        index.runs()
    assert "merge" in caught.value.hint
    assert index.path().read_bytes().startswith(b"no database")  # left for its owner to look at


def test_a_home_that_cannot_be_made_is_two_lines(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEFT_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(EnvironmentFault, match="cannot be opened"):
        index.runs()


def test_an_index_of_a_newer_edgeft_is_left_alone(home):
    index.runs()
    with sqlite3.connect(index.path()) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(EnvironmentFault, match="newer edgeft"):
        index.runs()


def test_many_processes_add_at_once(tmp_path):
    """Six writers begin with no index at all; every run arrives and the shared one once."""
    shared = write(tmp_path / "shared", [result("s", [9.0] * 3)])
    code = (
        "import sys\nfrom pathlib import Path\nfrom edgeft.bench import index\n"
        "for folder in sys.argv[1:]:\n    index.add(Path(folder))\n"
    )
    started = []
    for n in range(6):
        own = [write(tmp_path / f"{n}-{k}", [result(f"r{n}{k}", [float(n + k + 1)] * 3)]) for k in range(3)]
        words = [sys.executable, "-c", code, *map(str, [*own, shared])]
        started.append(subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    for process in started:
        _, complaint = process.communicate(timeout=120)
        assert process.returncode == 0, complaint
    assert len(index.runs()) == 6 * 3 + 1
    with index.opened() as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_folders_and_ids_name_sides(tmp_path):
    folder = str(write(tmp_path / "r", [result("a", [50.0] * 3), result("openai:http://x#m", [50.0] * 3)]))
    assert [s.result["id"] for s in reading.sides(folder)] == ["a", "openai:http://x#m"]
    assert [s.result["id"] for s in reading.sides(f"{folder}#openai:http://x#m")] == ["openai:http://x#m"]
    with pytest.raises(UsageError, match="the result 'b' is not known"):
        reading.sides(f"{folder}#b")
    one, other = (
        reading.sides(folder),
        reading.sides(str(write(tmp_path / "q", [result("a", [51.0] * 3), result("c", [1.0] * 3)]))),
    )
    assert [(a.result["id"], b.result["id"]) for a, b in reading.pairs(one, other)] == [("a", "a")]
    assert len(reading.pairs(one[:1], [*one, *other])) == 3  # against all but itself
    with pytest.raises(UsageError, match="nothing to compare"):
        reading.pairs(one[:1], one[:1])


# --- the commands


def test_compare_from_the_command_line(tmp_path):
    fast = write(tmp_path / "fast", [result("a", [50.0, 50.1, 50.2, 50.1, 50.0])])
    slow = write(tmp_path / "slow", [result("a", [40.0, 40.1, 40.2, 40.1, 40.0])])
    shown = edgeft("bench", "compare", fast, slow)
    assert shown.returncode == 0 and "slower" in shown.stdout, shown.stderr
    assert "decode tok/s: B is -20.0 % against A" in shown.stdout
    assert_two_lines(edgeft("bench", "compare", fast, slow, "--gate"), 1, "is worse", "decode tok/s")
    assert edgeft("bench", "compare", slow, f"{fast}#a", "--gate").returncode == 0
    noisy = write(tmp_path / "noisy", [result("a", [50.0, 40.1, 60.2, 45.1, 52.0])])
    assert_two_lines(edgeft("bench", "compare", fast, noisy, "--gate"), 4, "do not exclude 5 %")
    value = json.loads(edgeft("bench", "compare", fast, slow, "--json", "--gate").stdout)
    assert value["comparisons"][0]["gate"]["exit"] == 1
    assert_two_lines(edgeft("bench", "compare", fast), 2, "two are needed")
    assert_two_lines(edgeft("bench", "compare", fast, tmp_path / "none"), 2, "no file")
    assert_two_lines(edgeft("bench", "compare", fast, "--baseline", "gold"), 2, "no baseline")


def test_baseline_merge_and_runs_from_the_command_line(tmp_path):
    fast = write(
        tmp_path / "stick" / "fast", [result("a", [50.0, 50.1, 50.2, 50.1, 50.0]), result("b", [1.0] * 3)]
    )
    slow = write(
        tmp_path / "stick" / "slow", [result("a", [40.0, 40.1, 40.2, 40.1, 40.0], error="out of memory")]
    )
    assert_two_lines(edgeft("bench", "baseline", "gold", fast), 2, "2 results", f"{fast}#a")
    assert edgeft("bench", "baseline", "gold", f"{fast}#a").returncode == 0
    against = edgeft("bench", "compare", slow, "--baseline", "gold")
    assert "slower" in against.stdout and "ended with an error: out of memory" in against.stdout
    merged = json.loads(edgeft("bench", "merge", tmp_path / "stick", "--json").stdout)
    assert len(merged["added"]) == 1 and merged["known"] == 1
    listed = edgeft("bench", "runs")
    assert "a (failed)" in listed.stdout and "3 run(s)" in listed.stdout
    assert [r["result_id"] for r in json.loads(edgeft("bench", "--json", "runs", "--limit", "1").stdout)] == [
        "a"
    ]
    assert "gold" in edgeft("bench", "baseline").stdout
    assert_two_lines(edgeft("bench", "baseline", "gld", fast, "x"), 2, "unexpected")
    assert_two_lines(edgeft("bench", "merge", tmp_path / "nowhere"), 2, "nowhere")


def test_what_is_no_command_is_a_bench(tmp_path):
    """The commands beside it leave `edgeft bench PLACES --tasks ROWS` as it was, options first or last."""
    for words in (
        ["bench", "--tasks", tmp_path / "none.jsonl", tmp_path],
        ["bench", tmp_path, "--tasks", tmp_path / "none.jsonl"],
        ["bench", "--json", "--tasks", tmp_path / "none.jsonl", tmp_path],
        ["bench", "run", tmp_path, "--tasks", tmp_path / "none.jsonl"],
    ):
        assert_two_lines(edgeft(*words), 2, "none.jsonl")
