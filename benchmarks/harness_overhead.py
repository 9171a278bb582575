"""What the harness itself costs: decode time and memory, against the same engine asked by a bare loop.

    python benchmarks/harness_overhead.py ARTEFACT [--rounds 20]

Two processes of the same artefact are asked in turns for 64 tokens after the same prompt. One is watched as `edgeft bench` does it (memory
of the process tree every 50 ms, the box looked at before and after, every piece of text timed, logged to the journal); the other is asked
by a plain HTTP request that waits for the whole answer. The watched side counts by the client's clock, as a report does; the bare side
by the engine's own (llama.cpp's `timings`), so what the stream and the client add counts as well.
Memory: of this process while it measures, imports included, beside a bare
interpreter with httpx and numpy. At most 1 % and 60 MB are asked.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil

from edgeft.bench import speed
from edgeft.bench.energy import Meter
from edgeft.bench.journal import Journal
from edgeft.bench.pool import Pool
from edgeft.bench.speed import Point
from edgeft.bench.targets import find
from edgeft.engines.local import LocalModel

POINT = Point(64, 64)
ROWS = [{"messages": [{"role": "user", "content": f"Tell me about the {n}th month of the year and what it is known for."},
                      {"role": "assistant", "content": "-"}]} for n in range(12)]  # fmt: skip


def bare(client: httpx.Client, local: LocalModel, body: dict[str, Any]) -> float:
    """Milliseconds a token by the engine's own clock, asked without a stream and without a watch."""
    answer = client.post(f"{local.url}/v1/chat/completions", json={**body, "model": local.options["name"]},
                         headers={"Authorization": f"Bearer {local.key}"}, timeout=600).json()  # fmt: skip
    return float(answer["timings"]["predicted_per_token_ms"])


def watched(running: Any, plan: dict[str, Any], number: int, journal: Journal, meter: Meter) -> float:
    """Milliseconds a token by the client's clock, as the report shows it, from a whole block of the harness."""
    block = speed.block(running, ROWS, (POINT,), plan, number, meter)
    journal.add("m", "block", block)
    return 1e3 / block["requests"][0]["decode_tok_per_s"]


def rss_mb(code: str) -> float:
    """Resident memory of an interpreter that ran `code`."""
    read = f"{code}\nimport psutil; print(psutil.Process().memory_info().rss / 1e6)"
    return float(
        subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, check=True).stdout
    )


def main() -> None:
    """Print a JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("artefact", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    (target,) = find([options.artefact], [])
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        place = Path(scratch)
        journal, meter = Journal(place / "journal.jsonl", "k"), Meter()
        pool = stack.enter_context(Pool(None, 2048, lambda t: place / "watched.log"))
        plain = stack.enter_context(LocalModel(target.path, target.engine, log=place / "bare.log"))
        client = stack.enter_context(httpx.Client())
        with pool.use(target) as running:
            plan = speed.warm_up(running.ask, ROWS, (POINT,))
        shape = (plan["chars"][0], plan["output_tokens"][0])
        times: dict[str, list[float]] = {"bare": [], "watched": []}
        for number in range(options.rounds):
            for side in ("bare", "watched") if number % 2 == 0 else ("watched", "bare"):
                if side == "bare":
                    bare(client, plain, speed.body_of(ROWS, number, 40, 4))
                    times[side].append(bare(client, plain, speed.body_of(ROWS, number + 1, *shape)))
                else:
                    with pool.use(target) as running:
                        times[side].append(watched(running, plan, number, journal, meter))
        mine = psutil.Process().memory_info().rss / 1e6
    ratios = [w / b for w, b in zip(times["watched"], times["bare"], strict=True)]
    bare_mb = rss_mb("import httpx, numpy")
    print(json.dumps({
        "ms_per_token": {side: statistics.median(values) for side, values in times.items()},
        "watched_over_bare": statistics.median(ratios), "ratios": ratios,
        "harness_rss_mb": mine, "interpreter_httpx_numpy_rss_mb": bare_mb, "harness_adds_mb": mine - bare_mb,
        "interpreter_rss_mb": rss_mb("pass"), "rounds": options.rounds,
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
