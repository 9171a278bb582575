"""The whole line on shipped data, with the commands a user would type: adapter to bill.

pull -> tune -> compress -> bench -> route -> serve -> tco. What stands in demo-out/ from an earlier
run is reused; the measurements are always taken anew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "demo-out"
DESK = HERE / "desk"
EDGEFT = [sys.executable, "-m", "edgeft"]
BASE = "smollm2-135m-instruct"
FORMATS = ["gguf:f16", "gguf:q8_0", "gguf:q4_k_m", "gguf:q3_k_m", "onnx:int8", "onnx:int4", "gptq:4"]
TIMES: list[tuple[str, float]] = []  # chapters and when they began
WEAK, STRONG = "gguf-q3_k_m", "gguf-q8_0"


def edgeft(*words: str | Path) -> None:
    """Run one command of edgeft, shown as it would be typed; end the demo where it fails."""
    typed = " ".join(
        os.path.relpath(w) if isinstance(w, Path) else (f"'{w}'" if " " in w else w) for w in words
    )
    print(f"\n$ edgeft {typed}", flush=True)
    code = subprocess.run([*EDGEFT, *map(str, words)], check=False).returncode
    if code != 0:
        sys.exit(code)


def chapter(title: str) -> None:
    """A heading with the time since the start; `TIMES` keeps when each began."""
    TIMES.append((title, time.monotonic()))
    print(f"\n== {title}  [{time.monotonic() - STARTED:.0f} s]", flush=True)


def times() -> str:
    """How long each chapter took."""
    ends = [began for _, began in TIMES[1:]] + [time.monotonic()]
    return "\n".join(
        f"  {end - began:5.0f} s  {title}" for (title, began), end in zip(TIMES, ends, strict=True)
    )


def compress_and_bench() -> None:
    """Tune, compress and measure."""
    chapter("1. Tune an adapter (5 minutes at most)")
    edgeft(
        "tune",
        BASE,
        "--data",
        DESK / "train.jsonl",
        "--out",
        OUT / "adapter",
        "--last-layers",
        "20",
        "--max-seconds",
        "255",
    )
    chapter("2. Merge and quantize")
    wanted = [word for spec in FORMATS for word in ("--to", spec)]
    edgeft(
        "compress",
        BASE,
        "--adapter",
        OUT / "adapter",
        *wanted,
        "--calibration",
        DESK / "calibrate.jsonl",
        "--eval-limit",
        "24",
        "--out",
        OUT / "dist",
    )
    edgeft("compress", BASE, "--to", "gguf:q8_0", "--out", OUT / "base", "--name", "base")
    chapter("3. Measure (5 minutes at most)")
    edgeft(
        "bench", OUT / "dist", OUT / "base" / "gguf-q8_0", "--profile", "auto", "--tasks", DESK / "report.jsonl",
        "--limit", "50", "--repetitions", "3", "--restarts", "1", "--speed-seconds", "5", "--speed-points", "128x32", "--fidelity-rows", "16",
        "--out", OUT / "report",
    )  # fmt: skip


def fit_router() -> None:
    """Fit a router between two artefacts on rows that neither training nor the report saw."""
    chapter(f"4. Route between {WEAK} (small) and {STRONG} (large)")
    edgeft(
        "bench", OUT / "dist" / WEAK, OUT / "dist" / STRONG, "--tasks", DESK / "select.jsonl", "--no-speed", "--no-fidelity",
        "--out", OUT / "select",
    )  # fmt: skip
    edgeft("route", "fit", OUT / "select", "--weak", WEAK, "--strong", STRONG, "--out", OUT / "policy")
    edgeft("route", "eval", OUT / "policy", OUT / "report")
    again = subprocess.run(
        [*EDGEFT, "route", "eval", OUT / "policy", OUT / "report", "--json"], check=True, capture_output=True, text=True
    )  # fmt: skip
    verdicts = [json.loads((OUT / "policy" / "policy.json").read_text())["fitted"], json.loads(again.stdout)]
    gains = [v["figures"]["gain_over_random"] for v in verdicts]
    said = [f"{100 * g['mean']:+.1f} ({100 * g['ci95'][0]:+.1f} to {100 * g['ci95'][1]:+.1f})" for g in gains]
    worth = all(v["worth_it"] for v in verdicts)
    print(
        f"\nGain over a coin of the same share, in points: {said[0]} on the threshold's rows, {said[1]} on the report's.\n"
        + (
            "Both are above 0: here routing is worth it."
            if worth
            else "Not both are above 0 for sure: here routing is NOT worth it; serve one model. "
            "The proxy below shows how it works all the same."
        )
    )


def serve_and_ask() -> None:
    """Start the proxy, send a dozen requests and two repeats, show where each went."""
    chapter("5. Serve it, and ask")
    shutil.rmtree(OUT / "cache", ignore_errors=True)  # else a second run's answers all come from it
    command = [
        *EDGEFT,
        "serve",
        "--policy",
        str(OUT / "policy"),
        "--port",
        "0",
        "--cache",
        str(OUT / "cache"),
        "--json",
    ]
    print(f"\n$ edgeft serve --policy {os.path.relpath(OUT / 'policy')}", flush=True)
    proxy = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert proxy.stdout is not None
        line = proxy.stdout.readline()
        if not line:
            sys.exit(proxy.wait())
        url = json.loads(line)["url"]
        rows = [json.loads(line) for line in (DESK / "report.jsonl").read_text().splitlines()][5::14][:12]
        asked = [*rows, rows[0], rows[5]]
        print(f"\n{'request':58s} {'went to':12s} {'cache':5s} {'gain':>6s} {'ms':>6s}  answer (expected)")
        for row in asked:
            body = {"model": "auto", "messages": row["messages"][:-1], "temperature": 0, "max_tokens": 16}
            started = time.perf_counter()
            reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
            spent_ms = 1e3 * (time.perf_counter() - started)
            reply.raise_for_status()
            answer, head = reply.json()["choices"][0]["message"]["content"], reply.headers
            right = "" if answer == row["messages"][-1]["content"] else f" ({row['messages'][-1]['content']})"
            request = row["messages"][-2]["content"]
            request = request if len(request) <= 58 else request[:57] + "…"
            gain = head.get("x-edgeft-gain", "")
            print(
                f"{request:58s} {head['x-edgeft-route']:12s} {head['x-edgeft-cache']:5s} {gain:>6s} {spent_ms:6.0f}  {answer}{right}"
            )
        hits = re.findall(
            r'^edgeft_cache_total\{result="hit"\} ([\d.]+)', httpx.get(f"{url}/metrics").text, re.M
        )
        print(f"\n/metrics counts {sum(map(float, hits)):.0f} answers from the cache")
    finally:
        proxy.send_signal(signal.SIGINT)
        proxy.wait(20)


def main() -> None:
    """The line."""
    print(f"edgeft demo: {BASE}, {os.cpu_count()} cores, into {OUT.name}/")
    chapter("0. The machine and the base model")
    edgeft("pull", BASE)
    compress_and_bench()
    fit_router()
    serve_and_ask()
    chapter("6. What it costs")
    edgeft(
        "tco",
        "--report",
        OUT / "report",
        "--profile",
        "intel-n100",
        "--model",
        "gguf-q4_k_m",
        "--out",
        OUT / "tco.md",
    )
    print(
        f"\n{times()}\nDone in {(time.monotonic() - STARTED) / 60:.1f} minutes. The report with its plots:\n  {OUT / 'report' / 'report.html'}"
    )


if __name__ == "__main__":
    STARTED = time.monotonic()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
