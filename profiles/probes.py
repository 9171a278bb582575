"""How fast this box reads memory, with numpy alone.

A box that other work keeps busy measures low, so `detect` records the load average beside it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

MB = 1_000_000


def read_bandwidth(
    threads: int, cache_bytes: int | None, free_bytes: int | None, budget_s: float = 2.0
) -> dict[str, Any]:
    """Memory read bandwidth in GB/s (10**9 bytes): the best of four read kernels, one thread a core.

    A kernel's rate is that of its second-fastest pass: one alone can be a slip. On a virtual machine one of
    320 passes came out at 47.6 GB/s where the others ended at 32.

    The array is at least 4x the last-level cache (metrics.md, Roofline); where a quarter of the free
    memory does not hold that, the figure is left out. `budget_s` bounds the time of all passes.
    """
    import numpy as np

    wanted = max(256 * MB, 4 * (cache_bytes or 64 * MB))
    if free_bytes is not None and wanted > free_bytes / 4:
        return _absent(
            f"an array of 4x the last-level cache ({wanted / 1e9:.1f} GB) is over a quarter of free memory"
        )
    count = wanted // threads // 8 * 2  # float32; even, so that it can be viewed as 64-bit words
    parts: list[Any] = [None] * threads

    def fill(index: int) -> None:  # each thread touches its own pages first
        parts[index] = np.ones(count, dtype=np.float32)

    _together([partial(fill, i) for i in range(threads)])
    # The dot product of an array with itself goes through BLAS, whose loops are vectorised whatever numpy's own are.
    kernels: dict[str, Callable[[Any], Any]] = {
        "max of float32": np.max,
        "sum of float64": lambda part: part.view(np.float64).sum(),
        "or of int64": lambda part: np.bitwise_or.reduce(part.view(np.int64)),
        "dot product of float32": lambda part: np.dot(part, part),
    }
    best = {}
    for name, kernel in kernels.items():
        passes: list[float] = []
        until = time.perf_counter() + budget_s / len(kernels)
        while len(passes) < 3 or (time.perf_counter() < until and len(passes) < 20):
            passes.append(_together([partial(kernel, part) for part in parts]))
        best[name] = count * 4 * threads / sorted(passes)[1] / 1e9
    winner = max(best, key=lambda name: best[name])
    cache = f"{cache_bytes / MB:.0f} MB" if cache_bytes else "of unknown size"
    return {
        "gb_per_s": round(best[winner], 2),
        "kernels_gb_per_s": {name: round(value, 2) for name, value in best.items()},
        "method": f"best of {len(kernels)} numpy read kernels, second-fastest pass ({winner}), "
        f"{threads} threads over {wanted / MB:.0f} MB; last-level cache {cache}",
        "reason": None,
    }


def _absent(reason: str) -> dict[str, Any]:
    return {"gb_per_s": None, "kernels_gb_per_s": {}, "method": None, "reason": reason}


def _together(tasks: Sequence[Callable[[], Any]]) -> float:
    """Run each task in a thread of its own; seconds from the first start to the last end."""
    gate = threading.Barrier(len(tasks))
    spans: list[tuple[float, float]] = []

    def run(task: Callable[[], Any]) -> None:
        gate.wait()
        begun = time.perf_counter()
        task()
        spans.append((begun, time.perf_counter()))

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(end for _, end in spans) - min(begun for begun, _ in spans)
