"""How fast an NVIDIA GPU reads its memory and multiplies matrices, by torch in a child of its own."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgeft.errors import EdgeftError
from edgeft.profiles.gemm import best_rate
from edgeft.profiles.loader import GEMM

TIMEOUT_S = 15.0
SIZES = (1024, 2048, 4096, 8192)
READ_BYTES = 4 << 30  # many times the largest last-level cache; a quarter of what is free where that is less
PASSES = 20


def measured(reasons: dict[str, str]) -> dict[str, Any]:
    """What the first GPU gives: bandwidth_gb_per_s, the figures of GEMM and `methods`; empty, with a reason, where nothing can tell."""
    from edgeft import child

    if find_spec("torch") is None:
        reasons["gpu.bandwidth_gb_per_s"] = "torch is not installed"
        return {}
    try:
        with tempfile.TemporaryDirectory(prefix="edgeft-") as scratch:
            found = child.call(
                "edgeft.profiles.gpu:rates", log=Path(scratch, "log"), title="measuring the GPU",
                timeout_s=TIMEOUT_S, budget_s=0.3,
            )  # fmt: skip
    except EdgeftError as error:
        reasons["gpu.bandwidth_gb_per_s"] = error.message
        return {}
    reasons.update(found["reasons"])
    return {key: found[key] for key in ("bandwidth_gb_per_s", *GEMM, "methods") if key in found}


def rates(budget_s: float) -> dict[str, Any]:
    """Bandwidth (10**9 bytes a second, read and written bytes counted) and GEMM rates of torch's first GPU. Runs in a child.

    `budget_s` bounds the passes of one figure.
    """
    import torch

    if not torch.cuda.is_available():
        return {"reasons": {"gpu.bandwidth_gb_per_s": f"torch {torch.__version__} sees no GPU"}}
    found: dict[str, Any] = {"methods": {}, "reasons": {}}
    with torch.inference_mode():
        rate, kernel = bandwidth(torch, budget_s)
        found["bandwidth_gb_per_s"] = round(rate, 1)
        found["methods"]["bandwidth_gb_per_s"] = (
            f"best of 3 torch kernels on the GPU, second-fastest pass ({kernel})"
        )
        for key, name in GEMM.items():
            try:
                rate, n = best_rate(multiplier_of(torch, name), budget_s, SIZES)
            except RuntimeError as error:
                found["reasons"][f"gpu.{key}"] = f"torch multiplies no {name} there: {error}"[:200]
                continue
            found[key] = round(rate, 1)
            found["methods"][key] = (
                f"second-fastest pass of torch {torch.__version__} on the GPU, {name} of random numbers, n = {n}"
            )
    return found


def bandwidth(torch: Any, budget_s: float) -> tuple[float, str]:
    """(10**9 bytes a second, kernel) of the best of three kernels by its second-fastest pass."""
    count = min(READ_BYTES, torch.cuda.mem_get_info()[0] // 4) // 4
    source = torch.rand(count, device="cuda")
    target = torch.empty_like(source)
    kernels: dict[str, tuple[int, Callable[[], Any]]] = {
        "sum of float32": (4, source.sum),
        "copy of float32": (8, lambda: target.copy_(source)),
        "scaling of float32": (8, lambda: torch.mul(source, 2.0, out=target)),
    }
    best = {}
    for name, (bytes_each, kernel) in kernels.items():
        kernel()
        passes: list[float] = []
        until = time.perf_counter() + budget_s
        while len(passes) < 3 or (len(passes) < PASSES and time.perf_counter() < until):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            kernel()
            torch.cuda.synchronize()
            passes.append(time.perf_counter() - begun)
        best[name] = count * bytes_each / sorted(passes)[1] / 1e9
    winner = max(best, key=lambda name: best[name])
    return best[winner], winner


def multiplier_of(torch: Any, name: str) -> Callable[[int], Callable[[], Any]]:
    """What multiplies two n x n matrices of random numbers once and waits for it; float32 without TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False

    def multiplier(n: int) -> Callable[[], Any]:
        if name == "int8":
            a = torch.randint(-128, 128, (n, n), device="cuda", dtype=torch.int8)
        else:
            a = torch.randn((n, n), device="cuda", dtype=getattr(torch, name))
        multiply = torch._int_mm if name == "int8" else torch.matmul
        other = a.t()  # cuBLAS's fast way with int8 wants the second matrix by columns
        multiply(a, other)

        def once() -> None:
            multiply(a, other)
            torch.cuda.synchronize()

        torch.cuda.synchronize()
        return once

    return multiplier
