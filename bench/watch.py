"""What disturbs a measurement: other work, a hypervisor that takes the core, swapping, throttling, a clock that jumps."""

from __future__ import annotations

import os
import time
from typing import Any

from edgeft import child
from edgeft.profiles.sensors import swap_and_steal, throttle_state, throttled

BUSY_CORES = 0.10  # of other processes, over the time measured
STEAL_SHARE = 0.02  # of the cores
JUMP_S = 0.5


class Watch:
    """Looks at the box when made, and again when `flags` is asked."""

    def __init__(self, pid: int | None) -> None:
        self.pid = pid
        self.before = self._look()

    def _look(self) -> dict[str, Any]:
        return {
            "monotonic_s": time.monotonic(), "clock_s": time.time(), "own_s": own_seconds(self.pid),
            "box": swap_and_steal(), "sensors": throttle_state(),
        }  # fmt: skip

    def flags(self) -> list[dict[str, str]]:
        """What was seen since: `what` (busy, steal, swap, throttle, clock) and `detail` in words."""
        return judge(self.before, self._look(), os.cpu_count() or 1)


def judge(before: dict[str, Any], after: dict[str, Any], cores: int) -> list[dict[str, str]]:
    """The flags of two looks at the box."""
    found: list[dict[str, str]] = []
    wall = after["monotonic_s"] - before["monotonic_s"]
    box = {key: (after["box"].get(key) or 0) - (before["box"].get(key) or 0) for key in after["box"]}
    if wall > 0:
        others = (box.get("busy_s", 0) - (after["own_s"] - before["own_s"])) / wall
        if others > BUSY_CORES:
            found.append({"what": "busy", "detail": f"other processes used {others:.1f} cores"})
        if (steal := box.get("steal_s", 0) / wall / cores) > STEAL_SHARE:
            found.append({"what": "steal", "detail": f"the hypervisor kept {100 * steal:.0f} % of the cores"})
    pages = box.get("swap_in_pages", 0) + box.get("swap_out_pages", 0)
    if pages:
        found.append({"what": "swap", "detail": f"{pages} pages were swapped"})
    for words in throttled(before["sensors"], after["sensors"]):
        found.append({"what": "throttle", "detail": words})
    jump = after["clock_s"] - before["clock_s"] - wall
    if abs(jump) > JUMP_S:
        found.append(
            {"what": "clock", "detail": f"the wall clock jumped by {jump:+.1f} s (times here are monotonic)"}
        )
    return found


def own_seconds(pid: int | None) -> float:
    """CPU seconds of this process and of the engine's tree."""
    import psutil

    total = sum(os.times()[:2])
    for process in child.process_tree(pid) if pid else []:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total
