"""How fast this box multiplies matrices, in the precisions that the engines use.

numpy multiplies here. torch and onnxruntime do it in children of their own, so that the caller imports
neither, and one that is broken takes nothing with it. Of several rates in one precision the best stands.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgeft.errors import EdgeftError
from edgeft.profiles.loader import GEMM

SIZES = (256, 512, 1024, 2048)
PASSES = 8  # at most so many of one size
# What else can multiply, and how long importing it and multiplying may take: `detect` stays under 20 s.
RUNTIMES = {"torch": 11.0, "onnxruntime": 3.0}
UINT8, INT8, INT32 = 2, 3, 6  # TensorProto.DataType of onnx.proto
Found = dict[str, dict[str, Any]]


def gemm_rates(threads: int, budget_s: float = 0.6) -> Found:
    """For each figure of GEMM its `rate` (10**9 operations a second) and `method`, else None and a `reason`.

    `budget_s` bounds the passes of one precision in one runtime.
    """
    found, reasons = [numpy_rates(budget_s)], []
    for package, timeout_s in RUNTIMES.items():
        if find_spec(package) is None:
            reasons.append(f"{package} is not installed")
            continue
        try:
            found.append(_in_child(package, timeout_s, threads, budget_s))
        except EdgeftError as error:
            reasons.append(error.message)
    return {key: best_of([one[key] for one in found if key in one], reasons) for key in GEMM}


def best_of(found: list[dict[str, Any]], reasons: list[str]) -> dict[str, Any]:
    """The fastest of what several runtimes found, or all the reasons why there is none."""
    rates = [one for one in found if one["rate"] is not None]
    if rates:
        return max(rates, key=lambda one: one["rate"])
    return _absent("; ".join([*(one["reason"] for one in found), *reasons]))


def numpy_rates(budget_s: float) -> Found:
    """float32 by numpy's BLAS, on the threads that it takes by itself."""
    import numpy as np

    def multiplier(n: int) -> Callable[[], Any]:
        a, out = np.full((n, n), 0.5, dtype=np.float32), np.empty((n, n), dtype=np.float32)
        return lambda: np.matmul(a, a, out=out)

    rate, n = best_rate(multiplier, budget_s)
    return {"gemm_f32_gflop_per_s": _rated(rate, f"numpy float32 matmul, n = {n}, BLAS {_blas()}")}


def torch_rates(threads: int, budget_s: float) -> Found:
    """All four precisions by torch on the CPU; int8 by `torch._int_mm`, which gives int32."""
    import torch

    torch.set_num_threads(threads)
    found: Found = {}
    for key, name in GEMM.items():
        multiply = torch._int_mm if name == "int8" else torch.matmul

        def multiplier(n: int, name: str = name, multiply: Any = multiply) -> Callable[[], Any]:
            a = torch.ones((n, n), dtype=getattr(torch, name))
            return lambda: multiply(a, a)

        try:
            with torch.inference_mode():
                rate, n = best_rate(multiplier, budget_s)
        except (RuntimeError, NotImplementedError) as error:
            found[key] = _absent(f"torch {torch.__version__} multiplies no {name} here: {error}"[:200])
            continue
        by = (
            f"torch {torch.__version__} {multiply.__name__.lstrip('_')} of {name}, n = {n}, {threads} threads"
        )
        found[key] = _rated(rate, by)
    return found


def onnxruntime_rates(threads: int, budget_s: float) -> Found:
    """int8 by ONNX Runtime's MatMulInteger on the CPU: uint8 by constant int8, which gives int32."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads

    def multiplier(n: int) -> Callable[[], Any]:
        session = onnxruntime.InferenceSession(
            integer_product(n), options, providers=["CPUExecutionProvider"]
        )
        a = np.ones((n, n), dtype=np.uint8)
        return lambda: session.run(None, {"a": a})

    rate, n = best_rate(multiplier, budget_s)
    by = f"onnxruntime {onnxruntime.__version__} MatMulInteger of uint8 by int8, n = {n}, {threads} threads"
    return {"gemm_int8_gop_per_s": _rated(rate, by)}


def best_rate(
    multiplier: Callable[[int], Callable[[], Any]], budget_s: float, sizes: tuple[int, ...] = ()
) -> tuple[float, int]:
    """(10**9 operations a second, n) of the best n's second-fastest pass, by 2 n**3 / time; one alone can be a slip.

    `multiplier(n)` gives what multiplies two n x n matrices once. n grows while two more passes fit the budget.
    """
    sizes = sizes or SIZES
    best, best_n = 0.0, sizes[0]
    until = time.perf_counter() + budget_s
    for n in sizes:
        work = 2 * n**3 / 1e9
        if best and time.perf_counter() + 2 * work / best > until:
            break
        multiply = multiplier(n)
        rates: list[float] = []
        while len(rates) < PASSES and (not rates or time.perf_counter() < until):
            begun = time.perf_counter()
            multiply()
            rates.append(work / (time.perf_counter() - begun))
        confirmed = sorted(rates)[-2:][0]
        if confirmed > best:
            best, best_n = confirmed, n
    return best, best_n


def integer_product(n: int) -> bytes:
    """An ONNX model that multiplies `a` (uint8, n x n) by ones (int8), written without the package onnx.

    Field numbers are those of onnx.proto; boxes that only run a model have onnxruntime alone.
    """
    shape = message((1, message((1, n))), (1, message((1, n))))

    def value(name: bytes, kind: int) -> bytes:  # ValueInfoProto
        return message((1, name), (2, message((1, message((1, kind), (2, shape))))))

    ones = message((1, n), (1, n), (2, INT8), (8, b"b"), (9, b"\1" * (n * n)))  # TensorProto
    node = message((1, b"a"), (1, b"b"), (2, b"c"), (4, b"MatMulInteger"))  # NodeProto
    graph = message((1, node), (2, b"gemm"), (5, ones), (11, value(b"a", UINT8)), (12, value(b"c", INT32)))
    return message((1, 8), (7, graph), (8, message((1, b""), (2, 13))))  # IR version 8, operator set 13


def message(*fields: tuple[int, int | bytes]) -> bytes:
    """A protocol buffers message of (field number, integer or bytes), as protobuf.dev's "Encoding" has it."""
    parts = []
    for number, value in fields:
        if isinstance(value, int):
            parts.append(_varint(number << 3) + _varint(value))
        else:
            parts.append(_varint(number << 3 | 2) + _varint(len(value)) + value)
    return b"".join(parts)


def _varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])


def _in_child(package: str, timeout_s: float, threads: int, budget_s: float) -> Found:
    from edgeft import child

    with tempfile.TemporaryDirectory(prefix="edgeft-") as scratch:
        found = child.call(
            f"edgeft.profiles.gemm:{package}_rates",
            log=Path(scratch, "log"),
            title=f"multiplying matrices with {package}",
            timeout_s=timeout_s,
            threads=threads,
            budget_s=budget_s,
        )
    return {key: value for key, value in found.items() if key in GEMM}


def _rated(rate: float, by: str) -> dict[str, Any]:
    return {"rate": round(rate, 1), "method": f"second-fastest pass of {by}", "reason": None}


def _absent(reason: str) -> dict[str, Any]:
    return {"rate": None, "method": None, "reason": reason}


def _blas() -> str:
    import numpy as np

    try:
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        return f"{blas['name']} {blas['version']}"
    except (KeyError, TypeError):
        return "not known"
