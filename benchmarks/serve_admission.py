"""50 users on 2 slots: who is taken gets its first token as promised, the rest is told 429 at once.

    python benchmarks/serve_admission.py [--minutes 2] [--users 50] [--gguf MODEL.gguf] [--promised-ttft-s 10]

Each user asks, reads its stream to the end, thinks for 0 to 1 s, asks again; told 429, it comes back when it
was told to (retry-after-ms, as OpenAI's client does). The engine is a stand-in
with two slots at 50 tokens/s (simulated: the queue is real, the tokens are not), or with `--gguf` a real one, which the proxy starts. The
rival is the same engine without a proxy before it: it queues for ever. Beside each run a bystander sleeps 10 ms at a time: how late
it wakes is what the box alone does to whoever has to answer.
Must reach: 95 % of accepted requests within the promised TTFT; every 429 within 50 ms. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from serving import stage
from serving.proxy import edgeft
from serving.stage import Server
from serving.wire import Hangup, Pool

TOKENS, TOKEN_S, TOLD_MS = 32, 0.02, 50.0
DEADLINE_S = 120.0
BYSTANDER = """
import json, select, sys, time
late = []
while True:
    began = time.monotonic()
    if select.select([sys.stdin], [], [], 0.01)[0]:
        break
    late.append(round(1e3 * (time.monotonic() - began) - 10, 3))
print(json.dumps(late))
"""


@dataclass(frozen=True)
class Asked:
    """One request as its user saw it; seconds from sending."""

    status: int  # 0: no whole answer
    first_s: float  # the status line; of a 200 the first text
    retry_after_s: float
    promised_s: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument(
        "--promised-ttft-s", type=float, default=10.0, help="what the proxy is configured to promise"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        scratch = Path(name)
        threads = len(os.sched_getaffinity(0))
        limits = {"slots": options.slots, "promised_ttft_s": options.promised_ttft_s}
        runs: dict[str, tuple[list[Asked], list[float]]] = {}
        if options.gguf:
            gguf = options.gguf.resolve()
            names = ["openai:http://127.0.0.1:9#small", "openai:http://127.0.0.1:9#other"]
            with edgeft(names, scratch, model=names[0], gguf=gguf, threads=threads, **limits) as proxy:
                runs["edgeft"] = asyncio.run(watched(proxy, options))
            engine = stack.enter_context(stage.engine(gguf, scratch, threads, options.slots, context=2048))
        else:
            pace = ("--tokens", str(TOKENS), "--token-s", str(TOKEN_S), "--slots", str(options.slots))
            engine = stack.enter_context(stage.module("upstream", *pace, scratch=scratch))
            names = [f"openai:{engine.url}#{name}" for name in (engine.model, "other")]
            with edgeft(names, scratch, model=names[0], **limits) as proxy:
                runs["edgeft"] = asyncio.run(watched(proxy, options))
        runs["engine alone"] = asyncio.run(watched(engine, options))
    report(runs, options)


async def watched(server: Server, options: argparse.Namespace) -> tuple[list[Asked], list[float]]:
    """What the crowd saw, and by how many ms the bystander woke too late."""
    bystander = await asyncio.create_subprocess_exec(
        sys.executable, "-c", BYSTANDER, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    found = await crowd(server, options)
    told, _ = await bystander.communicate(b"")  # its input ends
    return found, json.loads(told)


async def crowd(server: Server, options: argparse.Namespace) -> list[Asked]:
    """All users for the time that was asked for; what was under way then is read to its end, at most two minutes."""
    ends = time.monotonic() + 60 * options.minutes
    found: list[Asked] = []
    users = [
        asyncio.create_task(user(server, i, ends, options.promised_ttft_s, found))
        for i in range(options.users)
    ]
    await asyncio.gather(*users)
    return found


async def user(server: Server, index: int, ends: float, promised_s: float, found: list[Asked]) -> None:
    """One user in a closed loop."""
    chance, pool = random.Random(index), Pool(server.url, server.key)
    await asyncio.sleep(chance.random())
    while time.monotonic() < ends:
        (body,) = stage.bodies(
            1, server.model, tokens=chance.randint(40, 200), max_tokens=TOKENS, stream=True
        )
        body["messages"][0]["content"] += f" {index} {chance.random()}"
        one = await ask(pool, orjson.dumps(body), promised_s)
        found.append(one)
        await asyncio.sleep(one.retry_after_s or chance.random())


async def ask(pool: Pool, body: bytes, promised_s: float) -> Asked:
    """One request, read to its end. A promise in the response (x-edgeft-ttft-s) goes before the configured one."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(DEADLINE_S):
            response = await pool.send(stage.PATH, body)
            status = await response.head()
            told_s, first_s, text = time.monotonic() - began, None, b""
            async for data in response.chunks():
                text += data
                if first_s is None and b'"content"' in text:
                    first_s = time.monotonic() - began
            pool.keep(response)
    except (TimeoutError, Hangup, OSError):
        return Asked(0, time.monotonic() - began, 1.0, promised_s)
    if status != 200:
        pause_s = float(response.headers.get("retry-after-ms", 1000)) / 1000  # as OpenAI's client has it
        return Asked(status, told_s, pause_s, promised_s)
    if first_s is None or b"[DONE]" not in text:
        return Asked(0, told_s, 0.0, promised_s)
    return Asked(200, first_s, 0.0, float(response.headers.get("x-edgeft-ttft-s", promised_s)))


def report(runs: dict[str, tuple[list[Asked], list[float]]], options: argparse.Namespace) -> None:
    """Shares and percentiles."""
    table = [
        [
            "",
            "accepted",
            "429",
            "other",
            "within promise",
            "TTFT p50 s",
            "TTFT p95 s",
            "429 p50 ms",
            "429 max ms",
            "429 in 50 ms",
            "bystander max ms",
            "over 50 ms",
        ]
    ]
    found: dict[str, Any] = {
        "users": options.users,
        "slots": options.slots,
        "minutes": options.minutes,
        "engine": options.gguf.name
        if options.gguf
        else f"simulated, {TOKENS} tokens of {1e3 * TOKEN_S:.0f} ms",
        "promised_ttft_s": options.promised_ttft_s,
    }
    for name, (asked, late_ms) in runs.items():
        taken = [one for one in asked if one.status == 200]
        refused_ms = [1e3 * one.first_s for one in asked if one.status == 429]
        ttft = [one.first_s for one in taken] or [float("nan")]
        figures = {
            "accepted": len(taken),
            "refused": len(refused_ms),
            "other": len(asked) - len(taken) - len(refused_ms),
            "within_promise": sum(one.first_s <= one.promised_s for one in taken) / max(1, len(taken)),
            "ttft_p50_s": float(np.percentile(ttft, 50)),
            "ttft_p95_s": float(np.percentile(ttft, 95)),
            "told_p50_ms": float(np.percentile(refused_ms or [float("nan")], 50)),
            "told_max_ms": max(refused_ms, default=float("nan")),
            "told_in_50_ms": sum(ms <= TOLD_MS for ms in refused_ms) / max(1, len(refused_ms)),
            "bystander_max_ms": max(late_ms),
            "bystander_over_50_ms": sum(ms > TOLD_MS for ms in late_ms),
        }
        found[name] = {key: None if value != value else round(value, 4) for key, value in figures.items()}
        table.append([name, *(str(v) if isinstance(v, int) else f"{v:.3f}" for v in figures.values())])
    found["ttft_p95_ratio"] = round(found["edgeft"]["ttft_p95_s"] / found["engine alone"]["ttft_p95_s"], 3)
    stage.show(table, found)


if __name__ == "__main__":
    main()
