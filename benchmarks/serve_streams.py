"""Tokens/s of a real model: through edgeft's proxy beside the same engine alone, at 1 and 8 streams; 8 streams beside llama_cpp.server.

    python benchmarks/serve_streams.py MODEL.gguf [--rounds 5] [--tokens 128] [--llama-python PYTHON | --no-llama]

Engine alone and proxy are the same child process of edgeft, spoken to in turns: what the proxy takes. edgeft with the file as its candidate
(its own slots and queue) is compared with `python -m llama_cpp.server` on the same file and threads. Greedy, a different short prompt a
stream, tokens as the servers' own usage counts them, over the wall time of all streams of a turn. Rotating rounds, medians.
Must reach: proxy / engine 0.97 at 1 and 8 streams; edgeft / llama_cpp.server 3.2 at 8. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orjson
from serving import rivals, stage
from serving.proxy import edgeft
from serving.stage import Server
from serving.wire import Pool

CONTEXT = 2048


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--llama-python", type=Path, help="an interpreter that has llama_cpp.server")
    parser.add_argument("--no-llama", action="store_true")
    options = parser.parse_args()
    gguf = options.gguf.resolve()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        scratch = Path(name)
        engine = stack.enter_context(stage.engine(gguf, scratch, options.threads, slots=8, context=CONTEXT))
        candidates = [f"openai:{engine.url}#{name}" for name in (engine.model, "other")]
        servers = {
            "engine alone": engine,
            "through the proxy": stack.enter_context(
                edgeft(candidates, scratch, model=candidates[0], upstream_key=engine.key)
            ),
        }
        loads = [(name, streams) for streams in (1, 8) for name in servers]
        servers["edgeft, its own engine"] = stack.enter_context(
            edgeft(candidates, scratch, model=candidates[0], gguf=gguf, threads=options.threads, slots=8)
        )
        loads.append(("edgeft, its own engine", 8))
        if not options.no_llama:
            python = options.llama_python or rivals.llama_python()
            servers["llama_cpp.server"] = stack.enter_context(
                rivals.llama_cpp_server(gguf, python, options.threads, CONTEXT, scratch)
            )
            loads.append(("llama_cpp.server", 8))
        for name, streams in loads:
            asyncio.run(turn(servers[name], streams, 8))
        runs: dict[tuple[str, int], list[float]] = {load: [] for load in loads}
        for place in range(options.rounds):
            start = place % len(loads)
            for load in loads[start:] + loads[:start]:
                runs[load].append(asyncio.run(turn(servers[load[0]], load[1], options.tokens)))
    report(runs, options)


async def turn(server: Server, streams: int, tokens: int) -> float:
    """Tokens/s of so many streams at a time."""
    pool = Pool(server.url, server.key)
    began = time.monotonic()
    counts = await asyncio.gather(*(stream(pool, server, i, tokens) for i in range(streams)))
    took = time.monotonic() - began
    pool.close()
    return sum(counts) / took


async def stream(pool: Pool, server: Server, index: int, tokens: int) -> int:
    """Completion tokens of one stream: as the server's usage says, else the chunks with a text (llama_cpp.server tells no usage)."""
    text = f"Count slowly from {index + 1} to two hundred, one number a line, in words."
    body = {
        "model": server.model, "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    response = await pool.send(stage.PATH, orjson.dumps(body))
    if await response.head() != 200:
        raise SystemExit(f"{server.url}: {response.status} {(await response.body())[:300]!r}")
    told, chunks = None, 0
    async for event in events(response):
        if event.get("usage"):
            told = int(event["usage"]["completion_tokens"])
        chunks += any((c.get("delta") or {}).get("content") for c in event.get("choices") or [])
    pool.keep(response)
    return chunks if told is None else told


async def events(response: Any) -> Any:
    """The JSON of a stream's events."""
    left = b""
    async for data in response.chunks():
        *lines, left = (left + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and b"[DONE]" not in line:
                yield orjson.loads(line[5:])


def report(runs: dict[tuple[str, int], list[float]], options: argparse.Namespace) -> None:
    """Medians, and ratios of the same round."""
    table = [["", "streams", "tokens/s", "ratio", "asked"]]
    found: dict[str, Any] = {
        "model": options.gguf.name,
        "tokens": options.tokens,
        "threads": options.threads,
        "rounds": options.rounds,
    }
    pairs = {
        ("through the proxy", 1): (("engine alone", 1), 0.97),
        ("through the proxy", 8): (("engine alone", 8), 0.97),
        ("edgeft, its own engine", 8): (("llama_cpp.server", 8), 3.2),
    }
    for (name, streams), rates in runs.items():
        row = [name, str(streams), f"{statistics.median(rates):.1f}", "", ""]
        found[f"{name}, {streams}"] = {"tokens_per_s": round(statistics.median(rates), 2)}
        rival, asked = pairs.get((name, streams), (None, 0.0))
        if rival in runs:
            ratio = statistics.median(mine / its for mine, its in zip(rates, runs[rival], strict=True))
            row[3:] = [f"{ratio:.3f} of {rival[0]}", str(asked)]
            found[f"{name}, {streams}"]["ratio"] = round(ratio, 3)
        table.append(row)
    stage.show(table, found)


if __name__ == "__main__":
    main()
