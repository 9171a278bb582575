"""Resident memory of the proxy alone, and whether it grows: so many requests a second for minutes, all of them different.

    python benchmarks/serve_memory.py [--minutes 20] [--warm-up 20] [--rate 200] [--litellm-python PYTHON | --no-litellm]

Open loop at a fixed rate (a late answer delays nobody), a third of it streamed, one in twenty hung up in the middle, before the stand-in
upstream that answers at once; exact cache on, half of the requests repeatable. RSS is read every 5 s, and
what of it is not shared with a mapped file (the cache's database). What is kept (answers, decisions, pages of the database) fills for some
twenty minutes: the same load runs before, and the slope is that of the means of twelve equal blocks after it, by
least squares, with its t interval (df 10): neighbouring readings are not independent, blocks of minutes nearly are.
The rival is LiteLLM's proxy at a tenth of the rate (it takes no more here), for its memory alone.
Must reach: 150 MiB without engines, litellm and MiniLM; a slope of zero within its 95 % interval. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from serving import rivals, stage
from serving.proxy import edgeft
from serving.stage import Server, memory_bytes
from serving.wire import Hangup, Pool

MIB, SAMPLE_S, BLOCKS, T_95_DF10 = 1 << 20, 5.0, 12, 2.228


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument(
        "--warm-up", type=float, default=20, help="minutes of the same load before those that count"
    )
    parser.add_argument("--rate", type=float, default=200, help="requests/s")
    parser.add_argument("--litellm-python", type=Path, help="an interpreter that has litellm[proxy]")
    parser.add_argument("--no-litellm", action="store_true")
    options = parser.parse_args()
    found: dict[str, Any] = {
        "minutes": options.minutes,
        "warm_up_minutes": options.warm_up,
        "rate": options.rate,
        "upstream": "stand-in, instant",
    }
    table = [
        [
            "",
            "requests",
            "failed",
            "RSS at start MiB",
            "median MiB",
            "most MiB",
            "by tenths",
            "slope KiB/min",
            "95 % interval",
            "of it not shared",
            "95 % interval",
        ]
    ]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        with ExitStack() as stack:
            upstream = stack.enter_context(stage.module("upstream", scratch=scratch))
            candidates = [f"openai:{upstream.url}#{name}" for name in ("small", "large")]
            proxy = stack.enter_context(edgeft(candidates, scratch, cache=True))
            found["edgeft"] = asyncio.run(watch(proxy, options.rate, options.minutes, options.warm_up))
        if not options.no_litellm:
            with ExitStack() as stack:
                upstream = stack.enter_context(stage.module("upstream", scratch=scratch))
                python = options.litellm_python or rivals.litellm_python()
                proxy = stack.enter_context(rivals.litellm(upstream.url, python, scratch))
                short = min(options.minutes, 2.0)
                found["litellm"] = asyncio.run(watch(proxy, options.rate / 10, short))
            found["rss_ratio"] = round(
                found["edgeft"]["rss_median_mib"] / found["litellm"]["rss_median_mib"], 3
            )
    for label in ("edgeft", "litellm"):
        if label in found:
            table.append([label, *(str(value) for value in found[label].values())])
    stage.show(table, found)


async def watch(server: Server, rate: float, minutes: float, warm_up: float = 0.0) -> dict[str, Any]:
    """Load and readings for so many minutes after those of warming up."""
    at_start = memory_bytes(server.pid)[0] / MIB
    pool, chance = Pool(server.url, server.key), random.Random(0)
    counts = Counter({"sent": 0, "failed": 0})
    began, running = time.monotonic(), set()
    readings: list[tuple[float, float, float]] = []
    next_reading = began
    while (now := time.monotonic()) < began + 60 * (warm_up + minutes):
        if now >= next_reading:
            resident, own = memory_bytes(server.pid)
            readings.append(((now - began) / 60, resident / MIB, own / MIB))
            next_reading += SAMPLE_S
        while counts["sent"] < (now - began) * rate:
            counts["sent"] += 1
            task = asyncio.create_task(one(pool, server.model, counts, chance))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.sleep(0.002)
    if running:
        await asyncio.wait(running, timeout=30)
    pool.close()
    counted = [reading for reading in readings if reading[0] >= warm_up]
    slope, half = trend([(minute, mib) for minute, mib, _ in counted])
    own_slope, own_half = trend([(minute, mib) for minute, _, mib in counted])
    memory = [mib for _, mib, _ in readings]
    return {
        "requests": counts["sent"],
        "failed": {key: n for key, n in counts.items() if key not in ("sent", "failed")} or counts["failed"],
        "rss_at_start_mib": round(at_start, 1),
        "rss_median_mib": round(float(np.median(memory)), 1),
        "rss_most_mib": round(max(memory), 1),
        "every_tenth_mib": [round(float(part.mean()), 1) for part in np.array_split(np.array(memory), 10)],
        "slope_kib_per_min": round(1024 * slope, 2),
        "slope_ci95_kib_per_min": [round(1024 * (slope - half), 2), round(1024 * (slope + half), 2)],
        "unshared_slope_kib_per_min": round(1024 * own_slope, 2),
        "unshared_ci95_kib_per_min": [
            round(1024 * (own_slope - own_half), 2),
            round(1024 * (own_slope + own_half), 2),
        ],
    }


async def one(pool: Pool, model: str, counts: Counter[str], chance: random.Random) -> None:
    """One request; each has words of its own."""
    (body,) = stage.bodies(1, model, tokens=200, stream=chance.random() < 1 / 3)
    body["messages"][0]["content"] += f" {chance.random()}"
    if chance.random() < 0.5:
        body["temperature"] = 0
    try:
        response = await pool.send(stage.PATH, orjson.dumps(body))
        if chance.random() < 0.05:
            await asyncio.sleep(0.005 * chance.random())
            pool.hang_up(response)
            return
        status = await response.head()
        await response.body()
        pool.keep(response)
        if status != 200:
            counts["failed"] += 1
            counts[f"status {status}"] += 1
    except (Hangup, OSError):
        counts["failed"] += 1


def trend(readings: list[tuple[float, float]]) -> tuple[float, float]:
    """(slope, half of its 95 % interval) in MiB a minute, of the means of twelve blocks."""
    later = np.array(readings)
    if len(later) < BLOCKS:
        return float("nan"), float("nan")
    x, y = (np.array([part.mean() for part in np.array_split(column, BLOCKS)]) for column in later.T)
    spread = ((x - x.mean()) ** 2).sum()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / spread)
    rest = y - y.mean() - slope * (x - x.mean())
    return slope, float(T_95_DF10 * np.sqrt((rest**2).sum() / (BLOCKS - 2) / spread))


if __name__ == "__main__":
    main()
