"""What a quantized GGUF file will weigh, to the byte, before it is made: the quantizer's dry run says each tensor's type."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

ALIGNMENT = 32  # bytes; GGUF's default, which llama.cpp's converter keeps


def tensor_bytes(kind: str, shape: list[int]) -> int:
    """Bytes of a tensor of `shape` (columns first, as GGUF has it) in a type, padding left out.

    Raises ValueError where the columns do not fill the type's blocks.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    values, size_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]]
    if shape[0] % values:
        raise ValueError(f"{shape[0]} columns are no multiple of {values}, the block of {kind}")
    return math.prod(shape) // values * size_bytes


def file_bytes(source: Mapping[str, Any], types: Mapping[str, str]) -> int:
    """Bytes of the file: `source` as `read_source` gives it, each tensor in its type of `types`."""
    sizes = (tensor_bytes(types[name], shape) for name, shape in source["shapes"].items())
    return int(source["header_bytes"]) + sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def read_source(source: str) -> dict[str, Any]:
    """Of an unquantized GGUF file: header_bytes, shapes and types (tensor name -> shape, columns first; its type)."""
    from edgeft.gguf_file import Tensors

    reader = Tensors(source)
    return {
        "header_bytes": int(reader.data_offset),
        "shapes": {t.name: [int(n) for n in t.shape] for t in reader.tensors},
        "types": {t.name: t.tensor_type.name.lower() for t in reader.tensors},
    }


def dry_run(source: str, variants: list[str]) -> dict[str, Any]:
    """The types that llama.cpp would give every tensor, per variant; nothing is written. Runs in a child process.

    Returns `source` as `read_source` gives it and `types`: variant -> tensor name -> type; a variant that llama.cpp
    refuses is left out.
    """
    import ctypes

    import llama_cpp

    from edgeft.compress.formats.gguf import ftype_name

    held = read_source(source)
    found: dict[str, dict[str, str]] = {}
    lines: list[str] = []
    callback = llama_cpp.llama_log_callback(
        lambda _level, text, _data: lines.append(text.decode(errors="replace"))
    )
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    for variant in variants:
        lines.clear()
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype, parameters.dry_run = getattr(llama_cpp, ftype_name(variant)), True
        if llama_cpp.llama_model_quantize(source.encode(), b"", ctypes.byref(parameters)) == 0:
            found[variant] = {**held["types"], **planned_types("".join(lines))}
    return {"source": held, "types": found}


def planned_types(log: str) -> dict[str, str]:
    """Tensor name -> type out of a dry run's log; tensors that are copied stand there without one."""
    pattern = re.compile(r"^\[ *\d+/ *\d+\] (\S+) .*-> +[\d.]+ MiB \((\w+)\)", re.MULTILINE)
    return {name: kind.lower() for name, kind in pattern.findall(log)}
