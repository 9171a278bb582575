"""What this machine has and what it lacks, without importing anything heavy.

Packages are looked up by their metadata alone; what edgeft asks for is read from its own.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from edgeft.errors import EdgeftError
from edgeft.home import cache_dir

MODULES = {"pyyaml": "yaml"}  # where the module is not called as the package is
NOT_LISTED = ("dev", "all")
LOW_DISK_BYTES = 10e9  # models, environments and artefacts of a small model
LOW_RAM_BYTES = 2 * 2**30  # what every format but GPTQ stays under for a 135M model


def examine() -> list[dict[str, str]]:
    """Every check as {check, state, seen, hint}; state is ok, missing or warning, hint what to type."""
    return [_python(), *core_packages(), *_machine(), *_tools(), *extra_packages()]


def broken_core(rows: list[dict[str, str]]) -> list[str]:
    """The checks of core packages that are not ok."""
    return [
        r["check"].removeprefix("core: ")
        for r in rows
        if r["check"].startswith("core: ") and r["state"] != "ok"
    ]


def _row(check: str, state: str, seen: str, hint: str = "") -> dict[str, str]:
    return {"check": check, "state": state, "seen": seen, "hint": hint}


def _python() -> dict[str, str]:
    good = sys.version_info >= (3, 11)
    seen = f"{platform.python_version()} at {sys.executable}"
    return _row("python", "ok" if good else "missing", seen, "" if good else "install Python 3.11 or newer")


def core_packages() -> list[dict[str, str]]:
    """The packages that edgeft can't run without: there, new enough, and findable."""
    rows = []
    if not _requirements(None):
        rows.append(_row("core: edgeft", "missing", "its metadata is not installed", "pip install edgeft"))
    for name, wanted, _ in _requirements(None):
        state, seen = _package(name, wanted)
        if state == "ok" and importlib.util.find_spec(MODULES.get(name.lower(), name)) is None:
            state, seen = "missing", f"{seen}, and its files are gone"
        hint = "" if state == "ok" else f"pip install --force-reinstall '{name}{wanted}'"
        rows.append(_row(f"core: {name}", "missing" if state != "ok" else "ok", seen, hint))
    return rows


def extra_packages() -> list[dict[str, str]]:
    """The packages of the extras, each once, with the extras that want it."""
    found: dict[str, tuple[str, list[str]]] = {}
    for name, wanted, extra in _requirements("*"):
        if extra in NOT_LISTED or (extra == "gpu" and shutil.which("nvidia-smi") is None):
            continue
        found.setdefault(name, (wanted, []))[1].append(str(extra))
    rows = []
    for name, (wanted, extras) in found.items():
        state, seen = _package(name, wanted)
        hint = "" if state == "ok" else f"pip install 'edgeft[{extras[0]}]'"
        rows.append(_row(f"{extras[0]}: {name}", state, seen, hint))
    return rows


def _requirements(extra: str | None) -> list[tuple[str, str, str | None]]:
    """(package, version wanted, extra) of edgeft's own metadata: the core's for None, else all extras'."""
    try:
        lines = requires("edgeft") or []
    except PackageNotFoundError:
        return []
    found = []
    for line in lines:
        requirement, _, marker = line.partition(";")
        parts = re.match(r"\s*([A-Za-z0-9._-]+)\s*(\[[^]]*\])?\s*\(?([^)]*)\)?", requirement)
        of = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
        if parts and not parts.group(2) and (of is None) == (extra is None):
            found.append((parts.group(1), parts.group(3).strip(), of.group(1) if of else None))
    return found


def _package(name: str, wanted: str) -> tuple[str, str]:
    """(state, version seen) of a package against a specifier like '>=2,<3'."""
    try:
        seen = version(name)
    except PackageNotFoundError:
        return "missing", "not installed"
    if not _satisfies(seen, wanted):
        return "warning", f"{seen}, and {wanted} is wanted"
    return "ok", seen


def _satisfies(seen: str, wanted: str) -> bool:
    """Whether the numbers of a version meet a specifier made of >=, ==, < and <=."""
    tests = {
        ">=": lambda a, b: a >= b,
        "==": lambda a, b: a == b,
        "<=": lambda a, b: a <= b,
        "<": lambda a, b: a < b,
    }
    for operator, number in re.findall(r"(>=|==|<=|<)\s*([\d.]+)", wanted):
        a, b = _numbers(seen), _numbers(number)
        width = max(len(a), len(b))
        if not tests[operator](a + [0] * (width - len(a)), b + [0] * (width - len(b))):
            return False
    return True


def _numbers(text: str) -> list[int]:
    release = re.match(r"\d+(\.\d+)*", text)
    return [int(part) for part in release.group().split(".")] if release else [0]


def _machine() -> list[dict[str, str]]:
    from edgeft.profiles import detection

    reasons: dict[str, str] = {}
    cpu, memory = detection.cpu_facts(reasons), detection.memory_facts(reasons)
    isa: dict[str, bool] | None = cpu["isa"]
    needed = "neon" if isa and "neon" in isa else "avx2"
    weak = isa is not None and not isa[needed]
    names = ", ".join(n for n, there in (isa or {}).items() if there) or reasons.get(
        "cpu.isa", "none of note"
    )
    rows = [
        _row("CPU", "ok", f"{cpu['model'] or 'model not known'}, {cpu['usable_cores']} usable cores"),
        _row(
            "instruction sets",
            "warning" if weak else "ok",
            names,
            f"expect slow inference without {needed}" if weak else "",
        ),
    ]
    total, available = memory["total_bytes"], memory["available_bytes"]
    if total is None:
        rows.append(_row("RAM", "warning", f"not known: {reasons['memory']}", "pip install psutil"))
    else:
        low = available < LOW_RAM_BYTES
        seen = f"{total / 1e9:.1f} GB, {available / 1e9:.1f} GB available"
        rows.append(
            _row(
                "RAM",
                "warning" if low else "ok",
                seen,
                "close other programs, or use a smaller model" if low else "",
            )
        )
    place = cache_dir()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    low = free < LOW_DISK_BYTES
    rows.append(
        _row(
            "disk",
            "warning" if low else "ok",
            f"{free / 1e9:.1f} GB free at {place}",
            f"df -h {place}" if low else "",
        )
    )
    return [*rows, _gpu(detection)]


def _gpu(detection: Any) -> dict[str, str]:
    reasons: dict[str, str] = {}
    gpus = detection.gpu_facts(reasons)
    if gpus:
        return _row(
            "GPU", "ok", "; ".join(f"{g['name']}, {g['vram_gb']} GB, driver {g['driver']}" for g in gpus)
        )
    if shutil.which("nvidia-smi"):
        return _row("GPU", "warning", reasons["gpu"], "nvidia-smi")
    return _row("GPU", "ok", "none seen (nvidia-smi is not on the PATH); none is needed")


def _tools() -> list[dict[str, str]]:
    rows = []
    built = _package("llama-cpp-python", "")[0] == "ok"
    for tool, names in (("C++ compiler", ("c++", "g++", "clang++")), ("cmake", ("cmake",))):
        path = next((found for name in names if (found := shutil.which(name))), None)
        seen = path or "not found; only building llama-cpp-python uses it"
        if tool == "cmake" and not path:
            seen += ", and pip brings one for that"
        needed = tool == "C++ compiler" and not path and not built
        rows.append(_row(tool, "warning" if needed else "ok", seen, "apt-get install g++" if needed else ""))
    return [*rows, _converter()]


def _converter() -> dict[str, str]:
    try:
        from edgeft.compress import converter

        folder = converter.location()
    except (EdgeftError, ImportError) as error:
        hint = getattr(error, "hint", "pip install 'edgeft[compress]'")
        return _row("GGUF converter", "missing", getattr(error, "message", str(error)), hint)
    if (folder / converter.SCRIPT).is_file():
        return _row("GGUF converter", "ok", str(folder))
    return _row("GGUF converter", "warning", f"not at {folder}", "fetched on first use: edgeft compress")
