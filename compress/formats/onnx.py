"""ONNX by onnxruntime-genai's model builder: fused attention, KV cache, blockwise weights.

Tied embeddings are stored once, quantized, for both ends; untied ones are quantized as well.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.files import read_json

VARIANTS = ("int8", "int4", "fp32")
OPTIONS: dict[str, Any] = {}
NEEDS_ROWS: dict[str, str] = {}
ENGINE = "onnx"
PACKAGES = ("onnxruntime-genai", "onnxruntime", "onnx-ir", "torch", "transformers")
REQUIRES = {
    "onnxruntime_genai": "onnx",
    "onnx_ir": "compress",
    "torch": "compress",
    "transformers": "compress",
}


def settings(job: Any) -> dict[str, Any]:
    """What decides the result besides the merged model."""
    return {"execution_provider": "cpu", "extra_options": extra_options(job.variant)}


def extra_options(variant: str) -> list[str]:
    """The builder's options for a variant, KEY=VALUE."""
    return [] if variant == "fp32" else ["block_size=32", "accuracy_level=4"]


def build(job: Any) -> dict[str, float]:
    """Write the ONNX model with its genai_config and tokenizer; returns wall_s and peak_rss_bytes."""
    command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        str(job.merged),
        "-o",
        str(job.out),
    ]
    command += ["-p", job.variant, "-e", "cpu", "-c", str(job.work / "onnx-cache")]
    if options := extra_options(job.variant):
        command += ["--extra_options", *options]
    spent = child.run(command, log=job.log, title="onnxruntime-genai's builder", env={"HF_HUB_OFFLINE": "1"})
    if job.variant != "int8":
        return spent
    second = child.call(
        "edgeft.compress.formats.onnx_embedding:quantize_embedding",
        log=job.log,
        title="quantizing the embedding",
        folder=str(job.out),
        tied=read_json(job.merged / "config.json").get("tie_word_embeddings", False),
    )
    return {
        "wall_s": spent["wall_s"] + second["wall_s"],
        "peak_rss_bytes": max(spent["peak_rss_bytes"], second["peak_rss_bytes"]),
    }


def inspect(job: Any) -> dict[str, Any]:
    """Weights by what they are stored as, read from the graph."""
    return child.call(
        "edgeft.compress.formats.onnx:read_types",
        log=job.work / "inspect.log",
        title="reading the ONNX file",
        folder=str(job.out),
    )


def read_types(folder: str) -> dict[str, Any]:
    """Tensors and parameters by stored type. Runs in a child process; the weights themselves are not loaded."""
    import onnx

    model = onnx.load(str(Path(folder, "model.onnx")), load_external_data=False)
    blocks = {}
    for node in model.graph.node:
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            bits = next((a.i for a in node.attribute if a.name == "bits"), 4)
            packed = node.input[1] if node.op_type == "MatMulNBits" else node.input[0]
            blocks[packed] = int(bits)
    types: dict[str, dict[str, int]] = {}
    total_bytes = 0
    for tensor in model.graph.initializer:
        count = 1
        for size in tensor.dims:
            count *= size
        width = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        name = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
        if name in ("int4", "uint4"):
            held, size_bytes, label = count, (count + 1) // 2, name
        elif tensor.name in blocks:
            held, size_bytes, label = (
                count * 8 // blocks[tensor.name],
                count,
                f"int{blocks[tensor.name]} blocks",
            )
        else:
            held, size_bytes, label = count, count * width, name
        kind = types.setdefault(label, {"tensors": 0, "parameters": 0})
        kind["tensors"] += 1
        kind["parameters"] += held
        total_bytes += size_bytes
    return {"tensor_types": types, "tensor_bytes": total_bytes, "fallback_share": None}
