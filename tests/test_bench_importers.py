"""llama-bench and GuideLLM reports become ours: rates from raw times, nothing invented; and the published schema."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgeft.bench.csv_out import csv_text
from edgeft.bench.importers import import_file
from edgeft.bench.reading import checked
from edgeft.bench.schema import faults, schema
from edgeft.errors import UsageError
from edgeft.types import BenchReport

HERE = Path(__file__).parent / "imports"


def made(tmp_path: Path, value) -> BenchReport:
    file = tmp_path / "in.json"
    file.write_text(json.dumps(value))
    return import_file(file)


def llama() -> list[dict]:
    return json.loads((HERE / "llama-bench.json").read_text())


def guidellm() -> dict:
    return json.loads((HERE / "guidellm.json").read_text())


def test_llama_bench_rates_come_from_the_raw_times():
    report = import_file(HERE / "llama-bench.json")
    two, one = report.results
    assert (two["id"], one["id"]) == ("example-135m-q4_k_m-1", "example-135m-q4_k_m-2")
    assert two["speed"]["prefill_tok_per_s"]["samples"] == [512.0, 500.0, 250.0]
    assert two["speed"]["prefill_tok_per_s"]["p50"] == 500.0  # avg_ts says 420.7
    assert two["speed"]["decode_tok_per_s"]["samples"] == [100.0, 80.0, 100.0]
    assert one["speed"]["decode_tok_per_s"]["p50"] == 50.0 and one["speed"]["prefill_tok_per_s"] is None
    asked = [p["asked"] for p in two["speed"]["points"]]
    assert asked == [{"prompt_tokens": 512, "output_tokens": 0}, {"prompt_tokens": 0, "output_tokens": 128}]
    # One time for prompt and answer together is neither speed; it is kept as it is.
    assert [t["n_prompt"] for t in two["other_tests"]] == [512] and len(
        two["other_tests"][0]["samples_ns"]
    ) == 2


def test_llama_bench_invents_nothing():
    report = import_file(HERE / "llama-bench.json")
    entry = report.results[0]
    assert all(
        entry[k] is None for k in ("accuracy", "memory", "fidelity", "artifact_sha256", "size_bytes", "path")
    )
    assert entry["speed"]["ttft_s"] is None and entry["speed"]["side"] == "engine"
    assert entry["bits_per_weight"] == pytest.approx(8 * 103668480 / 134515008)
    assert entry["engine_build"] == "llama.cpp abc1234 (4321)"
    assert report.profile["id"] == "imported" and report.profile["name"] == "Example CPU 4 cores"
    assert report.created_at == "2026-02-03T04:05:06+00:00" and report.workload["threads"] is None
    assert report.environment["imported_from"]["tool"] == "llama-bench"


def test_a_path_of_the_other_machine_stays_there(tmp_path):
    value = llama()
    for entry, path in zip(
        value, ["/home/someone/a.gguf", "C:\\Users\\someone\\b.gguf", "x/c.gguf", "d.gguf"], strict=True
    ):
        entry["model_filename"] = path
    report = made(tmp_path, value)
    assert [r["id"] for r in report.results] == ["a", "b", "c", "d"]
    value[0]["n_gen"] = 64  # a test of both kinds is kept as it is, but for the path
    assert "someone" not in json.dumps([report.to_dict(), made(tmp_path, value).to_dict()])


def test_depth_is_part_of_what_was_asked(tmp_path):
    value = llama()
    value[1]["n_depth"] = 1024
    points = made(tmp_path, value).results[0]["speed"]["points"]
    assert points[1]["asked"] == {"prompt_tokens": 0, "output_tokens": 128, "depth_tokens": 1024}


def test_guidellm_requests_become_samples():
    report = import_file(HERE / "guidellm.json")
    alone, eight, _ = report.results
    assert [r["id"] for r in report.results] == [
        "example/model-1b@synchronous", "example/model-1b@concurrent-8", "example/model-1b@constant-2.5",
    ]  # fmt: skip
    assert alone["speed"]["ttft_s"]["samples"] == [0.1, 0.125, 0.11]
    assert alone["speed"]["decode_tok_per_s"]["samples"] == [50.0, 40.0, 50.0]
    assert alone["speed"]["tpot_s"]["p50"] == pytest.approx(0.02)
    # Prefill: one request at a time, and only where the server said that nothing came from its cache.
    assert alone["speed"]["prefill_tok_per_s"]["samples"] == [2000.0, 2000.0]
    assert eight["speed"]["prefill_tok_per_s"] is None
    assert (
        eight["speed"]["decode_tok_per_s"]["n"] == 1 and eight["speed"]["ttft_s"]["n"] == 2
    )  # one token has no gap
    assert eight["load_test"]["streams"] == 8 and eight["load_test"]["output_tok_per_s_mean"] == 40.0
    assert report.environment["imported_from"]["version"] == "0.8.1"
    assert report.created_at.startswith("2026-02-03T")


def test_guidellm_without_requests_keeps_its_own_percentiles():
    rate = import_file(HERE / "guidellm.json").results[2]
    assert rate["speed"]["ttft_s"] == {
        "p50": 0.2, "p90": pytest.approx(0.22), "p95": pytest.approx(0.24), "p99": pytest.approx(0.26), "p50_ci95": None,
        "n": 3, "samples": [],
    }  # fmt: skip
    assert (
        rate["speed"]["decode_tok_per_s"] is None
    )  # a percentile of gaps turned round is no percentile of speeds


def test_an_older_guidellm_is_read_too(tmp_path):
    value = guidellm()
    del value["config"]
    for benchmark in value["benchmarks"]:
        benchmark["args"] = {"strategy": benchmark.pop("config")["strategy"]}
        benchmark["worker"] = {"backend_model": "/models/old"}
    assert made(tmp_path, value).results[0]["id"] == "old@synchronous"


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        ([], "neither"),
        ({"benchmarks": []}, "neither"),
        ([{"samples_ns": [1]}], "not as llama-bench writes it"),
        ([{"samples_ns": [0], "model_filename": "x", "n_prompt": 1, "n_gen": 0}], "ZeroDivisionError"),
        ({"benchmarks": ["x"]}, "not as guidellm writes it"),
        (
            {"benchmarks": [{"requests": {"successful": [{"time_to_first_token_ms": "x"}]}}]},
            "not as guidellm writes it",
        ),
    ],
)
def test_other_files_are_refused_in_two_lines(tmp_path, value, seen):
    with pytest.raises(UsageError, match=seen) as caught:
        made(tmp_path, value)
    assert caught.value.hint


def test_imports_are_compared_as_any_other_report(tmp_path):
    from edgeft.bench.compare import Side, compare

    slow = llama()
    for entry in slow:
        entry["samples_ns"] = [2 * ns for ns in entry["samples_ns"]]
    a, b = import_file(HERE / "llama-bench.json"), made(tmp_path, slow)
    found = {
        f["figure"]: f for f in compare(Side("a", a, a.results[0]), Side("b", b, b.results[0]))["figures"]
    }
    assert found["decode tok/s"]["ratio"] == 0.5 and found["decode tok/s"]["at"] == "0+128 tokens"
    assert "TTFT s" not in found


def test_the_command_writes_a_report_and_never_over_one(tmp_path, monkeypatch):
    from edgeft.cli import cli

    monkeypatch.setenv("EDGEFT_HOME", str(tmp_path / "home"))
    words = ["bench", "import", str(HERE / "llama-bench.json"), "--out", str(tmp_path / "r")]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert len(BenchReport.load(tmp_path / "r" / "report.json").results) == 2
    again = CliRunner().invoke(cli, words)
    assert isinstance(again.exception, UsageError) and "there already" in str(again.exception)


# --- the schema

REPORTS = [import_file(HERE / name) for name in ("llama-bench.json", "guidellm.json")]


@pytest.mark.parametrize("report", REPORTS, ids=["llama-bench", "guidellm"])
def test_reports_are_valid_by_the_published_schema(report):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema())
    value = json.loads(json.dumps(report.to_dict()))
    jsonschema.Draft202012Validator(schema()).validate(value)
    assert faults(value) == [] and checked(value, "x") == BenchReport(
        **{k: v for k, v in value.items() if k != "schema"}
    )


BREAKS = {
    "no id": lambda v: v["results"][0].pop("id"),
    "another schema": lambda v: v.update(schema="edgeft/report@2"),
    "results are no list": lambda v: v.update(results={}),
    "a sample is text": lambda v: v["results"][0]["speed"]["decode_tok_per_s"]["samples"].append("fast"),
    "true is no number": lambda v: v["results"][0].update(size_bytes=True),
    "no profile": lambda v: v.pop("profile"),
    "half a summary": lambda v: v["results"][0]["speed"]["decode_tok_per_s"].pop("n"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_broken_is_found_with_and_without_jsonschema(name):
    value = copy.deepcopy(json.loads(json.dumps(REPORTS[0].to_dict())))
    BREAKS[name](value)
    assert len(faults(value)) == 1
    with pytest.raises(UsageError, match="no bench report"):
        checked(value, "x")
    jsonschema = pytest.importorskip("jsonschema")
    assert not jsonschema.Draft202012Validator(schema()).is_valid(value)


@pytest.mark.parametrize("report", REPORTS, ids=["llama-bench", "guidellm"])
def test_imports_have_a_line_of_csv_each(report):
    assert len(csv_text(report).splitlines()) == 1 + len(report.results)


@pytest.mark.parametrize("name", ["llama-bench", "guidellm"])
def test_an_imported_report_is_shown_and_claims_no_measuring(name):
    from edgeft.bench.html import page
    from edgeft.bench.report import markdown

    report = import_file(Path(__file__).parent / "imports" / f"{name}.json")
    assert "did not measure" in markdown(report) and "did not measure" in page(report)
