"""What an artefact needs of memory: keys and values per 1,000 tokens, and the smallest limit at which it keeps its speed.

The limit is set by a control group (v1 or v2) around the engine's process, swap left out, and halved in: the least that keeps
KEEP of the speed without a limit, which is asked in turns with it. Files are dropped from the page cache before each start,
since pages that another group read are charged to that one.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgeft.bench import speed
from edgeft.bench.callers import caller
from edgeft.bench.pool import drop_from_cache
from edgeft.bench.roofline import shape_of
from edgeft.bench.speed import Point
from edgeft.bench.targets import Target
from edgeft.child import process_tree
from edgeft.device import driver_seen, vram_bytes
from edgeft.engines import GGUF
from edgeft.errors import EnvironmentFault
from edgeft.rows import Row

KEEP = 0.95
POINT, REQUESTS = Point(128, 32), 3
WITHIN = 0.03  # of the limit: where halving ends
CONTEXTS = (1024, 9216)  # tokens
ROOT = Path("/sys/fs/cgroup")
V1, V2 = "cgroup v1", "cgroup v2"


def taken(local: Any) -> dict[str, Any]:
    """What a model's process tree took at most so far; and, on a GPU, what it holds there now: engines give none of that back."""
    if local is None or local.memory is None:
        return {"memory": None}
    vram = vram_bytes([p.pid for p in process_tree(local.pid)]) if driver_seen() else None
    return {"memory": local.memory.peak, "vram_bytes": vram}


def kept_tokens(target: Target, threads: int | None, log: Path) -> dict[str, Any] | None:
    """{"computed_bytes", "measured_bytes"} of keys and values per 1,000 tokens.

    Computed from the shape. Measured, where the engine takes the whole context's room at the start (llama.cpp): the growth of
    anonymous memory from a context of 1,024 tokens to one of 9,216.
    """
    shape = shape_of(target)
    found: dict[str, Any] = {
        "computed_bytes": shape.kv_bytes_per_token * 1000 if shape else None,
        "measured_bytes": None,
    }
    if target.engine in GGUF:
        seen = []
        for context in CONTEXTS:
            with caller(target, log, threads, context) as (ask, local):
                ask({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "temperature": 0})
                if local and local.memory:
                    local.memory.sample_once()
                    seen.append(local.memory.peak["anon_bytes"])
        if len(seen) == 2:
            found["measured_bytes"] = round((seen[1] - seen[0]) / (CONTEXTS[1] - CONTEXTS[0]) * 1000)
    return found if any(found.values()) else None


def groups(root: Path = ROOT) -> tuple[str, Path] | None:
    """(version, the folder in which a group may be made), or None where this process may not."""
    for version, parent in ((V1, root / "memory"), (V2, root)):
        if version == V2 and "memory" not in _words(parent / "cgroup.subtree_control"):
            continue
        try:
            with made(version, parent):
                return version, parent
        except OSError:
            continue
    return None


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


@contextmanager
def made(version: str, parent: Path, limit_bytes: int | None = None) -> Iterator[Path]:
    """A group of its own, with a limit; removed in the end. Raises OSError where it can't be made."""
    group = parent / f"edgeft-{os.getpid()}"
    group.mkdir(exist_ok=True)
    try:
        if not (group / "cgroup.procs").exists():
            raise OSError(f"{group} is no control group")
        if limit_bytes is not None:
            (group / ("memory.limit_in_bytes" if version == V1 else "memory.max")).write_text(
                str(limit_bytes)
            )
            swap = group / ("memory.memsw.limit_in_bytes" if version == V1 else "memory.swap.max")
            if swap.exists():
                swap.write_text(str(limit_bytes) if version == V1 else "0")
        yield group
    finally:
        _remove(group)


def _remove(group: Path) -> None:
    """A group can't be removed before its last process is gone."""
    import time

    for _ in range(50):
        try:
            group.rmdir()
            return
        except OSError:
            time.sleep(0.1)


def smallest_limit(
    target: Target, rows: list[Row], peak_bytes: int, threads: int | None, context: int, log: Path, say: Callable[[str], None]
) -> dict[str, Any]:  # fmt: skip
    """{"bytes", "share_of_speed", "method", "tried"}, or {"unavailable": why}."""
    where = groups()
    if where is None:
        return {
            "unavailable": "no control group can be made here (root, or a delegated cgroup v2, is needed)"
        }
    version, parent = where

    def rate(limit_bytes: int | None) -> float:
        if target.path:
            drop_from_cache(target.path)
        try:
            with made(version, parent, limit_bytes) as group:
                with caller(target, log, threads, context, {"group": str(group)}) as (ask, _):
                    return _rate(ask, rows)
        except EnvironmentFault:
            return 0.0  # it did not load, or was killed

    tried: list[dict[str, Any]] = []
    unlimited: list[float] = []
    low, high = 0, round(1.3 * peak_bytes)
    while (high - low) / high > WITHIN and len(tried) < 12:
        limit = (low + high) // 2
        say(f"with {limit / 1e6:.0f} MB, and without a limit")
        try:
            unlimited.append(rate(None))  # each time anew: a box that slows down slows both
            found = rate(limit)
        except OSError as error:
            return {"unavailable": f"{version}: {error}"}
        if not unlimited[-1]:
            return {"unavailable": "it did not run in a control group of its own"}
        tried.append({"bytes": limit, "share_of_speed": found / unlimited[-1]})
        low, high = (low, limit) if tried[-1]["share_of_speed"] >= KEEP else (limit, high)
    kept = [t for t in tried if t["share_of_speed"] >= KEEP]
    if not kept:
        return {
            "unavailable": f"no limit up to {high / 1e6:.0f} MB kept {100 * KEEP:.0f} % of the speed",
            "tried": tried,
        }
    least = min(kept, key=lambda t: t["bytes"])
    return {
        **least,
        "method": f"{version}, swap left out",
        "keep": KEEP,
        "requests_per_s": statistics.median(unlimited),
        "tried": tried,
    }


def _rate(ask: Any, rows: list[Row]) -> float:
    """Requests a second of one shape: the median of REQUESTS, so that prefill counts as well as decode."""
    plan = speed.warm_up(ask, rows, (POINT,))
    times = [
        ask(speed.body_of(rows, n + 1, plan["chars"][0], plan["output_tokens"][0])).e2e_s
        for n in range(REQUESTS)
    ]
    return 1 / statistics.median(times)
