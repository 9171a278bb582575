"""What slows a box down while it is measured: heat, weak power, swapping, and other work.

Cheap enough to ask before and after each block of a benchmark: reads of /proc and /sys. Only a GPU, and a
Raspberry Pi whose kernel does not show the firmware's word, cost a process (tens of ms, a few ms).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

# raspberrypi.com/documentation/computers/os.html, `vcgencmd get_throttled`; bit n + 16: "has occurred since boot".
PI_BITS = {
    0: "under-voltage",
    1: "the CPU's frequency was capped",
    2: "the CPU was throttled",
    3: "the soft temperature limit was active",
}
# NVML's nvmlClocksThrottleReasons; those left out are no throttling (idle, clocks that somebody set).
GPU_BITS = {
    0x4: "held at its power limit",
    0x8: "slowed down by hardware (heat, power or current)",
    0x20: "slowed down by the driver for heat",
    0x40: "slowed down by hardware for heat",
    0x80: "slowed down by the power supply's brake signal",
}
# Cooling devices that slow something down; fans do not.
SLOWING = re.compile(r"cpufreq|cpuidle|devfreq|processor|powerclamp|throttle", re.IGNORECASE)
# Their highest frequency is a boost that all cores together never reach, so being below it says nothing.
BOOSTING = ("intel", "amd", "acpi", "pcc")


def throttle_state(root: Path = Path("/"), tools: bool = True) -> dict[str, Any]:
    """What this box's sensors of throttling say now; compare two states with `throttled`.

    `sensors` names those found: with an empty list nothing is known, which is not the same as "not throttled".
    `tools` False leaves out nvidia-smi and vcgencmd, and with them every process. Keys of sensors not found are None.
    """
    cpu = root / "sys/devices/system/cpu"
    events = {
        kind: _total(cpu.glob(f"cpu[0-9]*/thermal_throttle/{kind}_throttle_count"))
        for kind in ("core", "package")
    }
    state: dict[str, Any] = {
        "throttle_events": None if events["core"] is None and events["package"] is None else events,
        "pi_bits": pi_bits(root, tools),
        "cooling": _cooling(root),
        "cpufreq": _cpufreq(cpu),
        "gpu": gpu_state() if tools else None,
        "temperature_c": _hottest(root),
    }
    found = ("throttle_events", "pi_bits", "cooling", "cpufreq", "gpu")
    return {"sensors": [name for name in found if state[name] is not None], **state}


def throttled(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """In words, what slowed the box down between two states; empty where the sensors there are saw nothing.

    Counters and the firmware's "has occurred" bits tell what happened in between; the others tell how things stood
    at one end. A bit that was set before can't be seen to be set again.
    """
    return [*_events(before, after), *_pi(before, after), *_cooled(before, after), *_clock(before, after),
            *_gpus(before, after)]  # fmt: skip


def swap_and_steal(root: Path = Path("/")) -> dict[str, float | None]:
    """What else went on, since boot: take the difference of two. None where the kernel does not tell.

    Pages swapped in and out, page faults that read a disk, seconds that the hypervisor gave to others (`steal_s`), and
    `busy_s`: seconds of all processes, the caller's too, in user, nice and system time over all CPUs (proc(5)).
    """
    counts = dict(re.findall(r"^(\w+) (\d+)$", _text(root / "proc/vmstat") or "", re.MULTILINE))
    ticks = re.search(r"^cpu\s+([\d ]+)$", _text(root / "proc/stat") or "", re.MULTILINE)
    numbers = (
        [int(n) for n in ticks[1].split()] if ticks else []
    )  # user nice system idle iowait irq softirq steal
    second = os.sysconf("SC_CLK_TCK") if numbers else 1
    return {
        "swap_in_pages": _number(counts.get("pswpin")),
        "swap_out_pages": _number(counts.get("pswpout")),
        "major_faults": _number(counts.get("pgmajfault")),
        "steal_s": numbers[7] / second if len(numbers) > 7 else None,
        "busy_s": sum(numbers[:3]) / second if numbers else None,
    }


def pi_bits(root: Path, tools: bool) -> int | None:
    """The firmware's throttling bits of a Raspberry Pi; None on other boxes."""
    for path in (root / "sys/devices/platform").glob("soc*/*firmware/get_throttled"):
        if (bits := _hex(_text(path))) is not None:
            return bits
    tool = shutil.which("vcgencmd") if tools else None
    return _hex((_output([tool, "get_throttled"]) or "").partition("=")[2]) if tool else None


def gpu_state() -> list[dict[str, Any]] | None:
    """Of each NVIDIA GPU the active throttle reasons (NVML's bits) and degrees Celsius; None without an answer."""
    tool = shutil.which("nvidia-smi")
    # The first name is being retired for the second one.
    for name in ("clocks_throttle_reasons", "clocks_event_reasons") if tool else ():
        query = [str(tool), f"--query-gpu={name}.active,temperature.gpu", "--format=csv,noheader,nounits"]
        rows = [line.split(",") for line in (_output(query) or "").splitlines() if line.count(",") == 1]
        found = [{"bits": _hex(bits), "temperature_c": _number(celsius)} for bits, celsius in rows]
        if any(gpu["bits"] is not None for gpu in found):
            return found
    return None


def _events(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    words = []
    for kind, count in (after["throttle_events"] or {}).items():
        earlier = (before["throttle_events"] or {}).get(kind)
        if count is not None and earlier is not None and count > earlier:
            words.append(
                f"the CPU throttled for heat: {count - earlier} {kind} events more, over all its CPUs"
            )
    return words


def _pi(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    old, new = before["pi_bits"], after["pi_bits"]
    if old is None or new is None:
        return []
    happened = (old | new) & 0xF | (new & ~old) >> 16
    return [f"the firmware says: {what}" for bit, what in PI_BITS.items() if happened >> bit & 1]


def _cooled(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    steps = {
        name: max(step, (before["cooling"] or {}).get(name, 0))
        for name, step in (after["cooling"] or {}).items()
    }
    return [f"the kernel cooled by {name} (step {step})" for name, step in steps.items() if step > 0]


def _clock(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    old, new = before["cpufreq"], after["cpufreq"]
    if old is None or new is None:
        return []
    caps = {core["max_mhz"]: core["cap_mhz"] for core in old["cores"]}
    steady = new["governor"] == "performance" and not new["driver"].startswith(BOOSTING)
    words = []
    for core in new["cores"]:
        cap, earlier = core["cap_mhz"], caps.get(core["max_mhz"])
        if earlier is not None and cap < earlier:
            words.append(f"the CPU's frequency was capped at {cap:g} MHz, from {earlier:g}")
        elif steady and core["mhz"] < 0.9 * cap:
            words.append(
                f"the CPU runs at {core['mhz']:g} of {cap:g} MHz, though its governor is performance"
            )
    return words


def _gpus(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    words = []
    for index, gpu in enumerate(after["gpu"] or []):
        earlier = (before["gpu"] or [])[index : index + 1]
        bits = (gpu["bits"] or 0) | (earlier[0]["bits"] or 0 if earlier else 0)
        words += [f"GPU {index} was {what}" for bit, what in GPU_BITS.items() if bits & bit]
    return words


def _cooling(root: Path) -> dict[str, int] | None:
    """The step of each cooling device that slows something down; zero is full speed."""
    found = {}
    for folder in sorted((root / "sys/class/thermal").glob("cooling_device*")):
        kind, step = _text(folder / "type"), _number(_text(folder / "cur_state"))
        if kind and step is not None and SLOWING.search(kind):
            found[f"{kind} {folder.name.removeprefix('cooling_device')}"] = int(step)
    return found or None


def _cpufreq(cpu: Path) -> dict[str, Any] | None:
    """Driver and governor; for each kind of core (by its highest MHz) the slowest one's MHz now and as capped."""
    policies = list(cpu.glob("cpufreq/policy[0-9]*"))
    cores: dict[float, dict[str, float]] = {}
    for policy in policies:
        now, cap, highest = (
            _number(_text(policy / name))
            for name in ("scaling_cur_freq", "scaling_max_freq", "cpuinfo_max_freq")
        )
        if now and cap and highest:
            core = cores.setdefault(
                highest, {"max_mhz": highest / 1e3, "cap_mhz": cap / 1e3, "mhz": now / 1e3}
            )
            core["cap_mhz"], core["mhz"] = min(core["cap_mhz"], cap / 1e3), min(core["mhz"], now / 1e3)
    if not cores:
        return None
    driver, governor = (_text(policies[0] / f"scaling_{name}") or "" for name in ("driver", "governor"))
    return {"driver": driver, "governor": governor, "cores": [cores[highest] for highest in sorted(cores)]}


def _hottest(root: Path) -> float | None:
    zones = (_number(_text(path)) for path in (root / "sys/class/thermal").glob("thermal_zone*/temp"))
    return max((zone / 1000 for zone in zones if zone is not None), default=None)


def _total(paths: Any) -> int | None:
    counts = [int(count) for path in paths if (count := _number(_text(path))) is not None]
    return sum(counts) if counts else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _number(text: str | None) -> int | None:
    try:
        return int(text or "")
    except ValueError:
        return None


def _hex(text: str | None) -> int | None:
    try:
        return int((text or "").strip(), 16)
    except ValueError:
        return None


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
