"""What this box is. A figure that can't be read is None, and `reasons` says why; nothing is guessed.

Reads /proc and /sys on Linux, sysctl on macOS, nvidia-smi where there is one.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgeft.profiles import sensors
from edgeft.profiles.gpu import measured as gpu_measured
from edgeft.profiles.loader import FIGURES, GEMM

CPUINFO = Path("/proc/cpuinfo")
CPU_FOLDER = Path("/sys/devices/system/cpu")
X86 = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "f16c", "fma")
ARM = {  # our name -> the kernel's
    "neon": "asimd", "fp16": "asimdhp", "dotprod": "asimddp", "i8mm": "i8mm", "bf16": "bf16", "sve": "sve",
}  # fmt: skip
MACOS = {
    "neon": "AdvSIMD", "fp16": "arm.FEAT_FP16", "dotprod": "arm.FEAT_DotProd", "i8mm": "arm.FEAT_I8MM",
    "bf16": "arm.FEAT_BF16",
}  # fmt: skip


def detect(measure: bool = True) -> dict[str, Any]:
    """This box as a dict whose top keys are a profile's own (`id`, `ram_gb`, `bandwidth_gb_per_s`, …).

    With `measure` reads memory and multiplies matrices, in under 20 s; without, takes no time to
    speak of and leaves those figures None. The id is made of CPU, cores and memory, so the same box
    gets the same id. `kind` is cpu: what is measured is what edgeft's CPU engines use.
    """
    reasons: dict[str, str] = {}
    cpu, memory, gpu = cpu_facts(reasons), memory_facts(reasons), gpu_facts(reasons)
    bandwidth = gemm = None
    before = sensors.throttle_state()
    if measure:
        bandwidth, gemm = _measure(cpu, memory, reasons)
        if gpu:
            gpu[0] |= gpu_measured(reasons)
    else:
        reasons.update(dict.fromkeys(("bandwidth_gb_per_s", *GEMM), "not asked for: detect(measure=False)"))
    ram_gb = round(memory["total_bytes"] / 1e9, 1) if memory["total_bytes"] else None
    cores = cpu["usable_cores"]
    now = datetime.now(UTC).isoformat(timespec="seconds")
    box: dict[str, Any] = {
        "id": box_id(cpu["model"], cores, ram_gb),
        "name": f"{cpu['model'] or platform.machine()}, {cores} cores"
        + (f", {ram_gb:.0f} GB" if ram_gb else ""),
        "kind": "cpu",
        "ram_gb": ram_gb,
        "vram_gb": gpu[0]["vram_gb"] if gpu else None,
        "bandwidth_gb_per_s": bandwidth["gb_per_s"] if bandwidth else None,
        **{key: gemm[key]["rate"] if gemm else None for key in GEMM},
        "as_of": now[:10],
        "source": "edgeft profiles detect",
        "limits": {},
        "detected_at": now,
        "cpu": cpu,
        "memory": memory,
        "disk": {"path": str(Path.cwd()), "free_bytes": shutil.disk_usage(Path.cwd()).free},
        "os": {
            "system": platform.system(),
            "kernel": platform.release(),
            "machine": platform.machine(),
            "name": _os_name(),
        },
        "virtualized": virtualized(reasons),
        "gpu": gpu,
        "bandwidth": bandwidth,
        "gemm": gemm,
        "throttling": throttling(before, reasons),
        "thermal_c": thermal_sensors(reasons),
        "load_average_1m": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    basis = {key: "measured" for key in FIGURES if box.get(key) is not None}
    return {**box, "basis": basis, "reasons": reasons}


def box_id(model: str | None, cores: int, ram_gb: float | None) -> str:
    """An id that the same box gets again, as `detected-amd-epyc-2c-25gb`."""
    words = re.sub(
        r"\((r|tm)\)|\bcpu\b|@.*|\b\d+-core processor\b", " ", (model or platform.machine()).lower()
    )
    slug = "-".join(re.findall(r"[a-z0-9]+", words))[:40].strip("-") or "unknown"
    return f"detected-{slug}-{cores}c" + (f"-{ram_gb:.0f}gb" if ram_gb else "")


def as_profile(box: dict[str, Any]) -> dict[str, Any]:
    """The keys of a detected box that a profile file holds, ready for YAML."""
    value = {key: box[key] for key in ("id", "name", "kind", *FIGURES) if box.get(key) is not None}
    methods = {"Bandwidth": box.get("bandwidth"), **{key: (box.get("gemm") or {}).get(key) for key in GEMM}}
    notes = "".join(f"{what}: {by['method']}. " for what, by in methods.items() if by and by["method"])
    return {
        **value,
        "basis": box["basis"],
        "as_of": box["as_of"],
        "source": box["source"],
        "notes": notes + "power_idle_w, power_load_w and price_usd are not known until you add them.",
    }


def need_gpu() -> None:
    """Raise UsageError where there is no GPU, before anything is measured."""
    from edgeft.errors import UsageError

    reasons: dict[str, str] = {}
    if not gpu_facts(reasons):
        raise UsageError(f"there is no GPU: {reasons.get('gpu')}.", "edgeft profiles detect")


def gpu_profile(box: dict[str, Any]) -> dict[str, Any]:
    """The keys of a profile file for a detected box's first GPU, which `need_gpu` has found."""
    gpu = box["gpu"][0]
    figures = {key: gpu[key] for key in FIGURES if gpu.get(key) is not None}
    slug = "-".join(re.findall(r"[a-z0-9]+", gpu["name"].lower()))
    notes = "".join(f"{key}: {method}. " for key, method in gpu.get("methods", {}).items())
    return {
        "id": f"detected-{slug}",
        "name": gpu["name"],
        "kind": "gpu",
        **figures,
        "basis": dict.fromkeys(figures, "measured"),
        "as_of": box["as_of"],
        "source": box["source"],
        "notes": notes + "power_idle_w, power_load_w and price_usd are not known until you add them.",
    }


def _measure(cpu: dict[str, Any], memory: dict[str, Any], reasons: dict[str, str]) -> tuple[Any, Any]:
    try:
        from edgeft.profiles.gemm import gemm_rates
        from edgeft.profiles.probes import read_bandwidth

        bandwidth = read_bandwidth(
            cpu["usable_cores"], cpu["last_level_cache_bytes"], memory["available_bytes"]
        )
        gemm = gemm_rates(cpu["usable_cores"])
    except ImportError as error:
        reasons.update(dict.fromkeys(("bandwidth_gb_per_s", *GEMM), f"this needs {error.name}"))
        return None, None
    found = {"bandwidth_gb_per_s": bandwidth, **gemm}
    reasons.update({key: value["reason"] for key, value in found.items() if value["reason"]})
    return bandwidth, gemm


def throttling(before: dict[str, Any], reasons: dict[str, str]) -> dict[str, Any] | None:
    """The sensors of throttling, what they saw since the state `before`, and what they say now."""
    state = sensors.throttle_state()
    if not state["sensors"]:
        reasons["throttling"] = "no sensor of it shows itself, as in most virtual machines"
        return None
    return {"sensors": state["sensors"], "seen": sensors.throttled(before, state), "state": state}


def cpu_facts(reasons: dict[str, str]) -> dict[str, Any]:
    """Model, cores, instruction sets, caches and governor of the CPU."""
    physical = None
    try:
        import psutil

        physical = psutil.cpu_count(logical=False)
    except ImportError:
        pass
    if physical is None:
        reasons["cpu.physical_cores"] = "psutil can't tell"
    caches = _caches(reasons)
    return {
        "model": _cpu_model(reasons),
        "physical_cores": physical,
        "logical_cores": os.cpu_count() or 1,
        "usable_cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        "isa": instruction_sets(reasons),
        "caches": caches,
        "last_level_cache_bytes": _last_level(caches),
        "governor": _governor(reasons),
    }


def instruction_sets(reasons: dict[str, str]) -> dict[str, bool] | None:
    """The instruction sets that matter for inference on this architecture, each with whether it is there."""
    machine = platform.machine().lower()
    arm = machine in ("aarch64", "arm64")
    if CPUINFO.exists():
        flags = set(_cpuinfo("flags" if not arm else "Features").split())
        if flags:
            wanted = ARM if arm else {name: name for name in X86}
            return {name: flag in flags for name, flag in wanted.items()}
    if sys.platform == "darwin" and arm:
        return {name: _sysctl(f"hw.optional.{key}") == "1" for name, key in MACOS.items()}
    reasons["cpu.isa"] = f"no list of CPU flags on {platform.system()} {machine}"
    return None


def _cpu_model(reasons: dict[str, str]) -> str | None:
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string")
    device_tree = Path("/proc/device-tree/model")
    model = _cpuinfo("model name") or _cpuinfo("Model") or (_read(device_tree) or "").strip("\0 ")
    if not model:
        reasons["cpu.model"] = "neither /proc/cpuinfo nor the device tree names it"
    return model or None


def _cpuinfo(key: str) -> str:
    """The first value of a key of /proc/cpuinfo."""
    found = re.search(rf"^{re.escape(key)}\s*:\s*(.*)$", _read(CPUINFO) or "", re.MULTILINE)
    return found.group(1).strip() if found else ""


def _caches(reasons: dict[str, str]) -> list[dict[str, Any]]:
    """Level, type, bytes and count of each kind of cache; the CPUs that share one tell instances apart."""
    seen: dict[tuple[int, str, int], set[str]] = {}
    for index in CPU_FOLDER.glob("cpu[0-9]*/cache/index*"):
        size, shared = _read(index / "size"), _read(index / "shared_cpu_list")
        level, kind = _read(index / "level"), _read(index / "type")
        if size and shared and level and kind:
            units = {"K": 1024, "M": 1024**2, "G": 1024**3}
            byte_count = int(size[:-1]) * units[size[-1]] if size[-1] in units else int(size)
            seen.setdefault((int(level), kind, byte_count), set()).add(shared)
    if not seen:
        reasons["cpu.caches"] = f"{CPU_FOLDER}/cpu*/cache says nothing"
    return [{"level": n, "type": k, "bytes": b, "count": len(s)} for (n, k, b), s in sorted(seen.items())]


def _last_level(caches: list[dict[str, Any]]) -> int | None:
    """Bytes of the last level over all its instances."""
    if not caches:
        return None
    last = max(c["level"] for c in caches)
    return sum(c["bytes"] * c["count"] for c in caches if c["level"] == last)


def _governor(reasons: dict[str, str]) -> str | None:
    governor = _read(CPU_FOLDER / "cpu0/cpufreq/scaling_governor")
    if governor is None:
        reasons["cpu.governor"] = "no cpufreq here, as in most virtual machines"
    return governor


def memory_facts(reasons: dict[str, str]) -> dict[str, Any]:
    """Bytes of memory: total, available, and the control group's limit where it is below the total."""
    try:
        import psutil

        memory = psutil.virtual_memory()
    except ImportError:
        reasons["memory"] = "this needs psutil"
        return {"total_bytes": None, "available_bytes": None, "cgroup_limit_bytes": None}
    limit = None
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _read(Path(path))
        if text and text.isdigit() and int(text) < memory.total:
            limit = int(text)
    return {
        "total_bytes": memory.total,
        "available_bytes": min(memory.available, limit or memory.available),
        "cgroup_limit_bytes": limit,
    }


def gpu_facts(reasons: dict[str, str]) -> list[dict[str, Any]] | None:
    """NVIDIA GPUs by nvidia-smi: name, VRAM (10**9 bytes), driver, power limit, compute capability. Else None."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        reasons["gpu"] = "nvidia-smi is not on the PATH; GPUs of other makers are not looked for"
        return None
    keys = ["name", "memory.total", "driver_version", "power.limit", "compute_cap"]
    try:
        done = _query(tool, keys)
        if done.returncode != 0 and "compute_cap" in done.stdout + done.stderr:
            reasons["gpu.compute_capability"] = "this nvidia-smi does not know compute_cap"
            done = _query(tool, keys[:-1])
    except (OSError, subprocess.TimeoutExpired) as error:
        reasons["gpu"] = f"nvidia-smi did not answer: {error}"
        return None
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    rows = [row for row in rows if len(row) in (len(keys), len(keys) - 1)]
    if done.returncode != 0 or not rows:
        reasons["gpu"] = (
            f"nvidia-smi failed (exit {done.returncode}): {(done.stdout + done.stderr).strip()[:200]}"
        )
        return None
    return [
        {
            "name": name,
            "vram_gb": _scaled(mib, 1.048576e-3),
            "driver": driver,
            "power_limit_w": _scaled(watts, 1),
            "compute_capability": more[0] if more and _scaled(more[0], 1) is not None else None,
        }
        for name, mib, driver, watts, *more in rows
    ]


def _query(tool: str, keys: list[str]) -> subprocess.CompletedProcess[str]:
    query = [tool, f"--query-gpu={','.join(keys)}", "--format=csv,noheader,nounits"]
    return subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)


def _scaled(text: str, factor: float) -> float | None:
    try:
        return round(float(text) * factor, 1)
    except ValueError:
        return None


def virtualized(reasons: dict[str, str]) -> bool | None:
    """Whether a hypervisor shows itself to the CPU (x86 on Linux), else None."""
    flags = _cpuinfo("flags").split()
    if flags:
        return "hypervisor" in flags
    reasons["virtualized"] = "only x86 on Linux shows it"
    return None


def thermal_sensors(reasons: dict[str, str]) -> dict[str, float] | None:
    """Temperatures in degrees Celsius by sensor."""
    try:
        import psutil

        found = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    except (ImportError, OSError):
        found = {}
    if not found:
        reasons["thermal_c"] = "no sensor shows itself"
        return None
    return {
        f"{chip}{i if i else ''} {s.label}".strip(): s.current
        for chip, many in found.items()
        for i, s in enumerate(many)
    }


def _os_name() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.platform()


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _sysctl(key: str) -> str | None:
    try:
        done = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, timeout=2, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
