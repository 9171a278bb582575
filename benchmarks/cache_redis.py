"""Time of a hit in the shared cache: answers of 4 KB in Redis over loopback, beside the exact cache on disk, in turns of one run.

Needs redis-server (Debian: redis-server). Prints JSON; times in µs. Three ways are compared: the disk, a blocking call, and a call in
the event loop; of the last also how long the loop stands still, alone and with 16 callers at a time, since serving has one loop.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgeft.router.cache import ExactCache
from edgeft.router.cache.shared import RedisCache

ENTRIES, READS, ROUNDS, CALLERS = 2000, 4000, 5, 16


def main() -> None:
    if not shutil.which("redis-server"):
        sys.exit("redis-server is not installed: apt-get install redis-server")
    chance = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in chance.integers(0, 26, 6)) for _ in range(3000)]
    answers = [{"text": " ".join(chance.choice(words, 580)), "finish_reason": "stop"} for _ in range(50)]
    keys = [f"{i:064x}" for i in range(ENTRIES)]
    with tempfile.TemporaryDirectory() as scratch:
        process, url = start(Path(scratch))
        try:
            disk, shared = ExactCache(Path(scratch, "disk")), RedisCache(url)
            times: dict[str, list[float]] = {}
            for i, key in enumerate(keys):
                for name, cache in (("disk put", disk), ("redis put", shared)):
                    began = time.perf_counter()
                    cache.put(key, answers[i % 50], 3600, ["model:weak", "tenant:a"])
                    times.setdefault(name, []).append(1e6 * (time.perf_counter() - began))
            for _ in range(ROUNDS):
                order = [keys[i] for i in chance.integers(0, ENTRIES, READS)]
                times.setdefault("disk get", []).extend(timed(order, disk.get))
                times.setdefault("redis get", []).extend(timed(order, shared.get))
                alone, together, cpu = asyncio.run(in_loop(url, order))
                times.setdefault("redis aget", []).extend(alone)
                times.setdefault(f"redis aget, {CALLERS} callers", []).extend(together)
                times.setdefault("redis aget, loop's own time a call", []).append(cpu)
            began = time.perf_counter()
            dropped = shared.drop("tenant:a")
            drop_s = time.perf_counter() - began
            assert dropped == ENTRIES, dropped
        finally:
            process.kill()
            process.wait()
    shown: dict[str, Any] = {
        "entries": ENTRIES,
        "answer_bytes": len(json.dumps(answers[0])),
        "drop of all by label, s": round(drop_s, 3),
    }
    for name, found in times.items():
        shown[name] = {f"p{q}_us": round(float(np.percentile(found, q)), 1) for q in (50, 95, 99)}
    p50 = {name: float(np.percentile(found, 50)) for name, found in times.items()}
    shown["ratio of p50, redis get : disk get"] = round(p50["redis get"] / p50["disk get"], 2)
    shown["ratio of p50, aget : redis get"] = round(p50["redis aget"] / p50["redis get"], 2)
    print(json.dumps(shown, indent=1))


def start(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A redis-server on a free port of loopback that writes nothing to disk; (process, URL)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(folder)],
        stdout=subprocess.DEVNULL,
    )
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process, f"redis://127.0.0.1:{port}/0"
        time.sleep(0.05)
    process.kill()
    sys.exit("redis-server did not start")


def timed(order: list[str], call: Callable[[str], Any]) -> list[float]:
    """µs of each call."""
    found = []
    for key in order:
        began = time.perf_counter()
        call(key)
        found.append(1e6 * (time.perf_counter() - began))
    return found


async def in_loop(url: str, order: list[str]) -> tuple[list[float], list[float], float]:
    """µs of each call one after the other; of each with CALLERS at a time; processor time of the loop's thread a call, one after the other."""
    cache = RedisCache(url)
    await cache.aget(order[0])
    began_cpu = time.thread_time()
    alone = await _one_after_the_other(cache, order)
    cpu = 1e6 * (time.thread_time() - began_cpu) / len(order)
    parts = [order[i::CALLERS] for i in range(CALLERS)]
    together = await asyncio.gather(*(_one_after_the_other(cache, part) for part in parts))
    await cache.aclose()
    return alone, [one for part in together for one in part], cpu


async def _one_after_the_other(cache: RedisCache, order: list[str]) -> list[float]:
    found = []
    for key in order:
        began = time.perf_counter()
        value = await cache.aget(key)
        found.append(1e6 * (time.perf_counter() - began))
        assert value is not None
    return found


if __name__ == "__main__":
    main()
