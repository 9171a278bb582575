"""Where a model computes: an NVIDIA GPU where there is one, else the CPU. An empty CUDA_VISIBLE_DEVICES keeps it on the CPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Any

CPU = "cpu"
ALL_LAYERS = 999


def torch_device() -> str:
    """'cuda' where this torch sees a GPU, else 'cpu'."""
    import torch

    return "cuda" if torch.cuda.is_available() else CPU


def name_of(device: str) -> str:
    """What to call torch's device in a report: the GPU's name, or 'cpu'."""
    import torch

    return torch.cuda.get_device_name(0) if device == "cuda" else CPU


def gpu_layers(options: dict[str, Any]) -> int:
    """Layers that llama.cpp puts on the GPU: the option's, else all where NVIDIA's driver is. A build without CUDA ignores it."""
    return int(options.get("gpu_layers", ALL_LAYERS if driver_seen() else 0))


def driver_seen() -> bool:
    """True where nvidia-smi is on the PATH and CUDA_VISIBLE_DEVICES does not hide every GPU."""
    return shutil.which("nvidia-smi") is not None and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")


def device_of(pid: int) -> str:
    """Where a process (and those under it) computes, by who holds GPU memory: the GPU's name or 'cpu'."""
    if not driver_seen():
        return CPU
    from edgeft.child import process_tree
    from edgeft.profiles.detection import gpu_facts

    gpus = gpu_facts({})
    return gpus[0]["name"] if gpus and vram_bytes([p.pid for p in process_tree(pid)]) else CPU


def vram_bytes(pids: list[int]) -> int | None:
    """GPU memory that these processes hold, as nvidia-smi sees it; None where it sees none of them (as in many containers)."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    rows = [line.split(",") for line in done.stdout.splitlines() if line.count(",") == 1]
    held = [
        int(mib) << 20
        for pid, mib in rows
        if pid.strip().isdigit() and int(pid) in pids and mib.strip().isdigit()
    ]
    return sum(held) if held else None
