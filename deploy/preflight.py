"""Will it run there? Memory at the asked context and concurrency, disk, architecture: asked of a profile, and of the box itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeft.bench.roofline import shape_of
from edgeft.bench.targets import Target
from edgeft.errors import UsageError
from edgeft.profiles import Profile

PROXY_BYTES = 150e6  # the proxy's own process: Python, starlette, numpy
ENCODER_BYTES = 90e6  # a policy's sentence encoder in it, measured: 71 MB
ENGINE_BYTES = {
    "gguf": 130e6,
    "onnx": 250e6,
    "transformers": 900e6,
}  # an engine's process without its weights
SCRATCH = 0.05  # of the weights: buffers of computation
RAM_SHARE = 0.85  # what the system leaves where a profile names no budget
ARM = ("raspberry-pi", "jetson", "dgx-spark")
NO_LINUX = ("mac-",)
UNPACKED = 4.0  # an installed wheel over its own size


def memory_bytes(
    targets: Sequence[Target], context: int, slots: int, encoder: bool = False
) -> dict[str, Any]:
    """{id: {weights, cache, process, basis}, 'proxy', 'total'} in bytes. An estimate: weights, keys and values at the whole
    context for each slot, and processes. Where a file does not tell its shape, the cache counts as a tenth of the weights."""
    found: dict[str, Any] = {}
    total = proxy = PROXY_BYTES + ENCODER_BYTES * encoder
    for target in targets:
        weights, shape = float(target.size_bytes or 0), shape_of(target)
        cache = shape.kv_bytes_per_token * context * slots if shape else 0.1 * weights
        process = ENGINE_BYTES.get(target.engine, 500e6) + SCRATCH * weights
        basis = "the file's shape" if shape else "no shape in the file: a tenth of the weights for the cache"
        found[target.id] = {"weights": weights, "cache": cache, "process": process, "basis": basis}
        total += weights + cache + process
    return {**found, "proxy": proxy, "total": total}


def arch_of(profile: Profile) -> str:
    """amd64 or arm64. Raises UsageError for a box that runs no Linux."""
    if profile.id.startswith(NO_LINUX):
        raise UsageError(
            f"'{profile.id}' runs no systemd and no Linux wheels, so no bundle is made for it.",
            "pip install 'edgeft[gguf,serve]' there, then edgeft serve --policy policy/",
        )
    if profile.origin == "detected":
        import platform

        return "arm64" if platform.machine() in ("aarch64", "arm64") else "amd64"
    return "arm64" if profile.id.startswith(ARM) else "amd64"


def budget_bytes(profile: Profile) -> float | None:
    """What serving may take of the memory that the model lies in."""
    if gb := profile.limits.get("memory_budget_gb"):
        return gb * 1e9
    room = profile.ram_gb or profile.vram_gb
    return room * 1e9 * RAM_SHARE if room else None


def refuse_too_big(need: Mapping[str, Any], profile: Profile, context: int, slots: int) -> None:
    """Raise UsageError where the profile can't hold it, saying what would."""
    room = budget_bytes(profile)
    if room is None:
        raise UsageError(
            f"the profile '{profile.id}' says nothing of its memory.", "add ram_gb or memory_budget_gb to it"
        )
    if need["total"] > room:
        parts = [v for v in need.values() if isinstance(v, dict)]
        fixed = need["total"] - sum(p["cache"] for p in parts)
        cache = sum(p["cache"] for p in parts) / max(1, context)
        fits = int((room - fixed) / cache) if cache > 0 else 0
        hint = (
            f"--context {fits}"
            if fits >= 256
            else "a smaller artefact: edgeft compress … --fit SIZE, or a larger box"
        )
        raise UsageError(
            f"it needs about {need['total'] / 1e9:.2f} GB at a context of {context} and {slots} at once, "
            f"and '{profile.id}' has {room / 1e9:.2f} GB for it.",
            hint,
        )


def disk_bytes(files: Mapping[str, Path | bytes]) -> int:
    """Bytes that the box needs: the files, and packages unpacked."""
    sizes = {name: len(f) if isinstance(f, bytes) else f.stat().st_size for name, f in files.items()}
    wheels = sum(size for name, size in sizes.items() if name.endswith(".whl"))
    return int(sum(sizes.values()) + UNPACKED * wheels)


def faults(manifest: Mapping[str, Any], box: Mapping[str, Any]) -> list[str]:
    """Why a box (as box.sh tells it) can't run a bundle; empty where it can."""
    needs, found = manifest["needs"], []
    if box["machine"] != needs["machine"]:
        found.append(f"its machine is {box['machine']}, and the bundle is for {needs['machine']}")
    wanted = (
        f"{needs['memory_bytes'] / 1e9:.2f} GB are needed at a context of {manifest['config']['context']}"
    )
    room = box["unused_bytes"] + box["ours_bytes"]  # the running service gives way to the new one
    if box["memory_bytes"] < needs["memory_bytes"]:
        found.append(f"it has {box['memory_bytes'] / 1e9:.2f} GB of memory, and {wanted}")
    elif room < needs["memory_bytes"]:
        found.append(
            f"other programs leave {room / 1e9:.2f} of its {box['memory_bytes'] / 1e9:.2f} GB of memory, and {wanted}"
        )
    missing = needs["disk_bytes"] - box["stored_bytes"]
    if box["disk_free_bytes"] < missing:
        found.append(
            f"its disk has {box['disk_free_bytes'] / 1e9:.2f} GB free, and {missing / 1e9:.2f} GB are needed"
        )
    if box["python"] != needs["python"]:
        seen = f"its Python is {box['python']}" if box["python"] else "it has no python3 with venv"
        found.append(f"{seen}, and the wheels are for {needs['python']}")
    missing_libraries = [name for name in needs.get("libraries", ()) if name not in box["libraries"].split()]
    if missing_libraries and box["python"]:  # without Python they could not be looked for
        found.append(f"it lacks {', '.join(missing_libraries)} (apt-get install libstdc++6 libgomp1)")
    lacking = [flag for flag in needs["cpu_flags"] if flag not in box["cpu_flags"].split()]
    if lacking:
        found.append(f"its processor lacks {', '.join(lacking)}")
    return found
