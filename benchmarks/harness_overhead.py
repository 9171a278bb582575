"""What the harness itself costs: decode time and memory, against the same engine asked by a bare loop.

    python benchmarks/harness_overhead.py ARTEFACT [--rounds 40]

One process of a GGUF artefact is asked in turns for 64 tokens after the same prompt, in three ways. `watched`: as `edgeft bench` does it
(memory of the process tree every 50 ms, the box looked at before and after, every piece of text timed, logged to the journal), by the
client's clock, as a report counts. `bare`: a plain HTTP request that waits for the whole answer, by the engine's own clock
(llama.cpp's `timings`). `stream`: the stream read by nothing but `recv`, by the engine's own clock, which tells what streaming costs
the engine. Memory: of this process while it measures, imports included, beside a bare interpreter with httpx and numpy.
At most 1 % (watched over bare) and 60 MB are asked.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from edgeft.bench import speed
from edgeft.bench.energy import Meter
from edgeft.bench.journal import Journal
from edgeft.bench.pool import Pool
from edgeft.bench.speed import Point
from edgeft.bench.targets import find
from edgeft.engines.local import LocalModel

POINT = Point(64, 64)
SIDES = ("bare", "stream", "watched")
ROWS = [{"messages": [{"role": "user", "content": f"Tell me about the {n}th month of the year and what it is known for."},
                      {"role": "assistant", "content": "-"}]} for n in range(12)]  # fmt: skip


def bare(client: httpx.Client, local: LocalModel, body: dict[str, Any]) -> float:
    """Milliseconds a token by the engine's own clock, asked without a stream and without a watch."""
    answer = client.post(f"{local.url}/v1/chat/completions", json=body,
                         headers={"Authorization": f"Bearer {local.key}"}, timeout=600).json()  # fmt: skip
    return float(answer["timings"]["predicted_per_token_ms"])


def stream(local: LocalModel, body: dict[str, Any]) -> float:
    """The same from the last event of a stream that is read and not looked at until its end."""
    data = json.dumps({**body, "stream": True}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.0\r\nAuthorization: Bearer {local.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    pieces = []
    with socket.create_connection(("127.0.0.1", local.port), 600) as connection:
        connection.sendall(head.encode() + data)
        while piece := connection.recv(1 << 16):
            pieces.append(piece)
    events = [line for line in b"".join(pieces).splitlines() if line.startswith(b"data: {")]
    return float(json.loads(events[-1][6:])["timings"]["predicted_per_token_ms"])


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


def ratio(times: dict[str, list[float]], side: str) -> dict[str, Any]:
    """Median ratio of a side's times to the bare ones, round by round, with its 95 % bootstrap interval."""
    ratios = np.array(times[side]) / np.array(times["bare"])
    picks = np.random.default_rng(0).integers(0, len(ratios), (5000, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return {"median": float(np.median(ratios)), "ci95": [float(low), float(high)], "ratios": ratios.tolist()}


def main() -> None:
    """Print a JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("artefact", type=Path)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    (target,) = find([options.artefact], [])
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        place = Path(scratch)
        journal, meter = Journal(place / "journal.jsonl", "k"), Meter()
        pool = stack.enter_context(Pool(None, 2048, lambda t: place / "engine.log"))
        client = stack.enter_context(httpx.Client())
        with pool.use(target) as running:
            plan = speed.warm_up(running.ask, ROWS, (POINT,))
        local = running.local
        assert local
        shape = (plan["chars"][0], plan["output_tokens"][0])
        for number in range(options.rounds):
            for turn in range(len(SIDES)):
                side = SIDES[(number + turn) % len(SIDES)]
                if side == "watched":
                    with pool.use(target) as running:
                        times[side].append(watched(running, plan, number, journal, meter))
                    continue
                bare(client, local, speed.body_of(ROWS, number, 40, 4))  # as a block of the harness begins
                body = speed.body_of(ROWS, number + 1, *shape)
                times[side].append(bare(client, local, body) if side == "bare" else stream(local, body))
        mine = psutil.Process().memory_info().rss / 1e6
    beside_mb = rss_mb("import httpx, numpy")
    print(json.dumps({
        "ms_per_token": {side: statistics.median(values) for side, values in times.items()},
        "watched_over_bare": ratio(times, "watched"), "stream_over_bare": ratio(times, "stream"),
        "harness_rss_mb": mine, "interpreter_httpx_numpy_rss_mb": beside_mb, "harness_adds_mb": mine - beside_mb,
        "interpreter_rss_mb": rss_mb("pass"), "rounds": options.rounds,
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
