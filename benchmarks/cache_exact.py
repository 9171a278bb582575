"""Time of a hit in the exact cache: answers of 4 KB on disk, in process. The rival is diskcache's own JSONDisk. Prints JSON; times in µs."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgeft.router.cache import ExactCache, key_of

ENTRIES, READS = 2000, 20000


def main() -> None:
    from diskcache import Cache, JSONDisk

    chance = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in chance.integers(0, 26, 6)) for _ in range(3000)]
    answers = [{"text": " ".join(chance.choice(words, 580)), "finish_reason": "stop"} for _ in range(50)]
    requests = [
        {
            "messages": [{"role": "user", "content": f"question {i}: {' '.join(chance.choice(words, 40))}"}],
            "temperature": 0,
        }
        for i in range(ENTRIES)
    ]
    keys = [key_of(r, "model", artifact_sha256="a" * 64) for r in requests]
    order = chance.integers(0, ENTRIES, READS)
    with tempfile.TemporaryDirectory() as scratch:
        own, rival = ExactCache(Path(scratch, "own")), Cache(str(Path(scratch, "rival")), disk=JSONDisk)
        for i, key in enumerate(keys):
            own.put(key, answers[i % 50], 3600)
            rival.set(key, answers[i % 50], expire=3600)
        shown: dict[str, Any] = {
            "entries": ENTRIES,
            "reads": READS,
            "answer_bytes": len(json.dumps(answers[0])),
        }
        shown["get"] = _times(order, lambda i: own.get(keys[i]))
        shown["rival: JSONDisk get"] = _times(order, lambda i: rival.get(keys[i]))
        shown["key and get"] = _times(
            order, lambda i: own.get(key_of(requests[i], "model", artifact_sha256="a" * 64))
        )
        shown["ratio p50"] = round(shown["get"]["p50_us"] / shown["rival: JSONDisk get"]["p50_us"], 3)
        assert all(own.get(keys[i]) == answers[i % 50] for i in range(ENTRIES))
    print(json.dumps(shown, indent=1))


def _times(order: np.ndarray, call: Any) -> dict[str, float]:
    found = []
    for i in order:
        began = time.perf_counter()
        call(i)
        found.append(1e6 * (time.perf_counter() - began))
    return {f"p{q}_us": round(float(np.percentile(found, q)), 2) for q in (50, 95, 99)}


if __name__ == "__main__":
    main()
