"""Energy of what was measured, with the method on every figure; without a meter it is not measured.

RAPL: the package's own counter (root only, absent on most virtual machines; leaves out board, disk and supply). NVML: the
GPUs' own counters of energy (Volta and later, with the package nvidia-ml-py), else their power as nvidia-smi samples it. Wall: a
meter's CSV of time and watts, which is the box as the bill sees it.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from edgeft.bench.stats import bootstrap
from edgeft.errors import UsageError
from edgeft.profiles.detection import gpu_facts

RAPL = Path("/sys/class/powercap")
WALL = "wall meter"
NVML_EVERY_MS = 100
MAX_GAP_S = 5.0  # between two samples of a wall meter that still belong together


def rapl_zones(root: Path = RAPL) -> list[Path]:
    """The packages whose energy counter this process may read."""
    zones = []
    for zone in sorted(root.glob("intel-rapl:[0-9]*")):
        if zone.name.count(":") == 1:  # a package; its parts are within it
            try:
                int((zone / "energy_uj").read_text())
                zones.append(zone)
            except (OSError, ValueError):
                continue
    return zones


class Meter:
    """What this box can tell of its energy while a block runs; `method` None where it can't."""

    def __init__(self, wall: Path | None = None, rapl_root: Path = RAPL) -> None:
        self.wall = read_wall(wall) if wall else None
        self.zones = [] if wall else rapl_zones(rapl_root)
        self.counters = None if wall else gpu_counters()
        self.gpu = None if wall or self.counters else shutil.which("nvidia-smi")
        methods = {
            WALL: wall, "RAPL package": self.zones, "NVML counter": self.counters, "NVML samples": self.gpu,
        }  # fmt: skip
        self.method = " + ".join(name for name, there in methods.items() if there) or None

    def start(self) -> dict[str, Any]:
        """Begin a span."""
        span: dict[str, Any] = {"monotonic_s": time.monotonic(), "uj": [_microjoules(z) for z in self.zones]}
        if self.counters:
            span["gpu_joules"] = self.counters()
        if self.gpu:
            span["gpu"] = subprocess.Popen(
                [self.gpu, "--query-gpu=power.draw", "--format=csv,noheader,nounits", f"-lms={NVML_EVERY_MS}"],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
        return span

    def stop(self, span: dict[str, Any]) -> float | None:
        """Joules since the span began; None where nothing says."""
        seconds = time.monotonic() - span["monotonic_s"]
        joules = None
        for zone, begun in zip(self.zones, span["uj"], strict=True):
            spent = _microjoules(zone) - begun
            if spent < 0:  # the counter wrapped
                spent += int((zone / "max_energy_range_uj").read_text())
            joules = (joules or 0.0) + spent / 1e6
        if self.counters:
            joules = (joules or 0.0) + self.counters() - span["gpu_joules"]
        if "gpu" in span:
            span["gpu"].terminate()
            watts = [float(w) for w in span["gpu"].communicate()[0].split() if _is_number(w)]
            if watts:
                joules = (joules or 0.0) + float(np.mean(watts)) * seconds * max(1, len(gpu_facts({}) or ()))
        return joules

    def wall_joules(self, begun_s: float, ended_s: float) -> float | None:
        """Joules by the wall meter between two times (Unix seconds); None where it has a gap there."""
        return joules_between(*self.wall, begun_s, ended_s) if self.wall else None


def gpu_counters() -> Callable[[], float] | None:
    """What tells the joules that all GPUs of this box have spent so far; None without NVML or where one has no counter.

    nvmlDeviceGetTotalEnergyConsumption gives millijoules since the driver was loaded; on an H100 it moved on ten times a second.
    """
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        gpus = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]

        def joules() -> float:
            return sum(nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) for gpu in gpus) / 1e3

        joules()
    except (ImportError, OSError):
        return None
    except nvml.NVMLError:
        return None
    return joules if gpus else None


def _microjoules(zone: Path) -> int:
    return int((zone / "energy_uj").read_text())


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def read_wall(path: Path) -> tuple[Any, Any]:
    """(Unix seconds, watts) of a CSV with the columns `time` (Unix seconds or ISO 8601) and `watts`.

    Raises UsageError naming the line that does not hold both.
    """
    if not path.is_file():
        raise UsageError(
            f"there is no file {path}.", "--power-csv meter.csv, with the columns time and watts"
        )
    times, watts = [], []
    with path.open(newline="", encoding="utf-8") as file:
        for number, line in enumerate(csv.DictReader(file), 2):
            try:
                times.append(_unix(line["time"]))
                watts.append(float(line["watts"]))
            except (KeyError, TypeError, ValueError):
                raise UsageError(
                    f"{path} line {number} has no time and watts: {dict(line)}",
                    "the first line must be: time,watts",
                ) from None
    if len(times) < 2:
        raise UsageError(
            f"{path} has {len(times)} samples.", "a sample a second or more often, over the whole run"
        )
    order = np.argsort(times)
    return np.asarray(times)[order], np.asarray(watts)[order]


def _unix(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text).timestamp()


def joules_between(times: Any, watts: Any, begun_s: float, ended_s: float) -> float | None:
    """The integral of power by trapezoids; None where samples are missing over more than MAX_GAP_S."""
    if times[0] > begun_s or times[-1] < ended_s:
        return None
    inside = (times > begun_s) & (times < ended_s)
    points = np.concatenate([[begun_s], times[inside], [ended_s]])
    near = times[(times >= begun_s - MAX_GAP_S) & (times <= ended_s + MAX_GAP_S)]
    if len(near) < 2 or np.diff(near).max() > MAX_GAP_S:
        return None
    return float(np.trapezoid(np.interp(points, times, watts), points))


def result(blocks: list[dict[str, Any]], meter: Meter) -> dict[str, Any] | None:
    """Joules an output token (prefill included), mean watts with its interval, and the method; None without a meter."""
    spans = []
    for block in blocks:
        joules = (
            block.get("joules")
            if meter.wall is None
            else meter.wall_joules(block["begun_s"], block["ended_s"])
        )
        if joules is not None:
            tokens = sum(r["output_tokens"] or 0 for r in block["requests"])
            spans.append((joules, block["wall_s"], tokens))
    if not spans or meter.method is None:
        return None
    joules, seconds, tokens = (np.asarray(column, dtype=float) for column in zip(*spans, strict=True))
    return {
        "method": meter.method,
        "joules_per_output_token": float(joules.sum() / tokens.sum()) if tokens.sum() else None,
        "mean_w": float(joules.sum() / seconds.sum()),
        "mean_w_ci95": bootstrap(joules / seconds, np.mean),
        "n": len(spans),
        "over": "the speed blocks, prefill included",
    }
