"""The base alone as GGUF: what an adapter is loaded beside, and what an adapter's gain is measured against."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.compress.converter import convert, installed_version
from edgeft.compress.formats import gguf

OF_BASE = True
GATED = False  # there is no adapter in it whose gain could be kept
VARIANTS = (*gguf.CONVERTED, *gguf.QUANTIZED)
OPTIONS: dict[str, Any] = {}
NEEDS_ROWS: dict[str, str] = {}
ENGINE = "gguf"
PACKAGES = gguf.PACKAGES
REQUIRES = gguf.REQUIRES


def settings(job: Any) -> dict[str, Any]:
    """What decides the result besides the base."""
    return {
        "converter": f"llama-cpp-python {installed_version()}",
        "model_name": name_of(job),
        "imatrix": None,
    }


def name_of(job: Any) -> str:
    """The base's own name, without the adapters'."""
    from edgeft.compress.artifacts import default_name

    return default_name(job.base, [])


def build(job: Any) -> dict[str, Any]:
    """Write the GGUF file of the base; returns wall_s and peak_rss_bytes."""
    name = name_of(job)
    target = job.out / f"{name}-{job.variant}.gguf"
    if job.variant in gguf.CONVERTED:
        return convert(job.base, target, job.variant, name, job.log)
    # In the base's own precision, since a quantization of a quantization is worse than either.
    source = job.work / f"{job.spec.id}.part"
    kind = precision_of(job.base)
    try:
        first = convert(job.base, source, kind, name, job.log)
        second = child.call(
            "edgeft.compress.formats.gguf:quantize",
            log=job.log,
            title="llama_model_quantize",
            source=str(source),
            target=str(target),
            variant=job.variant,
            threads=job.threads,
        )
    finally:
        source.unlink(missing_ok=True)
    return {
        "wall_s": first["wall_s"] + second["wall_s"],
        "peak_rss_bytes": max(first["peak_rss_bytes"], second["peak_rss_bytes"]),
    }


def precision_of(model: Path) -> str:
    """The widest of f32, bf16, f16 among a model folder's weights."""
    from edgeft.compress.adapter import header_of

    kinds = {entry["dtype"] for file in model.glob("*.safetensors") for entry in header_of(file).values()}
    return "f32" if "F32" in kinds else "bf16" if "BF16" in kinds else "f16"


def inspect(job: Any) -> dict[str, Any]:
    """Tensors and parameters by type, read from the file."""
    return gguf.inspect(replace(job, spec=replace(job.spec, format="gguf")))
