"""What a measurement was taken with: enough to tell two reports apart."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = (
    "edgeft", "xllamacpp", "llama-cpp-python", "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai", "onnxruntime-genai-cuda",
    "torch", "transformers", "gptqmodel",
    "optimum", "litellm", "numpy",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Python, packages, kernel, load average (1 min), allowed cores, and whether a hypervisor shows itself (None: not known)."""
    from edgeft.profiles.detection import virtualized

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "machine": platform.machine(),
        "packages": versions,
        "allowed_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "virtual_machine": virtualized({}),
        "load_average_1min": os.getloadavg()[0],
    }
