"""ONNX by onnxruntime-genai's model builder: fused attention, KV cache, blockwise weights.

Tied embeddings are stored once, quantized, for both ends; untied ones are quantized as well. How exactly the CPU
multiplies (`accuracy_level`) is chosen by measuring: see onnx_accuracy.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.compress.formats import Spec, one_of, onnx_accuracy
from edgeft.errors import EnvironmentFault, UsageError
from edgeft.files import read_json, sha256_file

VARIANTS = ("int8", "int4", "fp32", "fp16")
BLOCKWISE = ("int8", "int4")
OPTIONS: dict[str, Any] = {
    "accuracy_level": one_of("auto", 0, 1, 4),
    "block_size": one_of(16, 32, 64, 128),
    "embedding": one_of("shared", "own"),
    "device": one_of("cpu", "cuda"),
}
NEEDS_ROWS: dict[str, str] = {}
ENGINE = "onnx"
RUNTIME = ("onnxruntime-genai", "onnxruntime-genai-cuda", "onnxruntime", "onnxruntime-gpu")
PACKAGES = (*RUNTIME, "onnx-ir", "torch", "transformers")
REQUIRES = {
    "onnxruntime_genai": "onnx",
    "onnx_ir": "compress",
    "torch": "compress",
    "transformers": "compress",
}


def refuse(spec: Spec, base: Path, plan: Any) -> None:
    """Raise UsageError for options that don't go together, EnvironmentFault for a device that is not here."""
    chosen = spec.options
    if spec.variant not in BLOCKWISE and (
        odd := [k for k in ("accuracy_level", "block_size") if k in chosen]
    ):
        raise UsageError(
            f"{spec}: {odd[0]} is for int4 and int8; {spec.variant} has no blocks.", "--to onnx:int4"
        )
    if spec.variant == "fp16" and chosen.get("device") == "cpu":
        raise UsageError(f"{spec}: fp16 runs on CUDA; a CPU computes in fp32.", "--to onnx:fp32")
    if device(spec) == "cuda" and (missing := cuda_missing()):
        raise EnvironmentFault(f"{spec} is made for CUDA, and {missing}.", "pip install 'edgeft[gpu]'")
    config = read_json(base / "config.json")
    tied = bool({**config, **plan.config}.get("tie_word_embeddings", False))
    if chosen.get("embedding") == "shared" and not tied:
        raise UsageError(
            f"{spec}: the head is not tied to the embedding, so they can't share.", "embedding=own"
        )
    width, block = config.get("hidden_size"), chosen.get("block_size", 32)
    if spec.variant == "int8" and width and width % block:
        fits = [str(size) for size in (16, 32, 64, 128) if width % size == 0]
        raise UsageError(
            f"{spec}: blocks of {block} don't divide the width {width}.", f"block_size={' or '.join(fits)}"
        )


def device(spec: Spec) -> str:
    """cpu or cuda: what was asked for, else what the variant needs."""
    return spec.options.get("device") or ("cuda" if spec.variant == "fp16" else "cpu")


def cuda_missing() -> str | None:
    """What this machine lacks to run ONNX on CUDA; None where it has all."""
    import onnxruntime
    import onnxruntime_genai

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "the onnxruntime here has no CUDAExecutionProvider (onnxruntime-gpu has it)"
    if not onnxruntime_genai.is_cuda_available():
        return "the onnxruntime-genai here has no CUDA (onnxruntime-genai-cuda has it, beside a driver)"
    return None


def settings(job: Any) -> dict[str, Any]:
    """What decides the result besides the merged model."""
    found: dict[str, Any] = {
        "execution_provider": device(job.spec),
        "extra_options": extra_options(job.spec, _tied(job)),
        "embedding": embedding(job),
    }
    if job.variant in BLOCKWISE:
        found["accuracy_level"] = accuracy_level(job.spec)
        if found["accuracy_level"] == "auto" and job.calibration:
            found["calibration_sha256"] = sha256_file(job.calibration)
    return found


def accuracy_level(spec: Spec) -> Any:
    """auto or the level asked for; CUDA has its own way of multiplying and takes none."""
    return spec.options.get("accuracy_level", "auto" if device(spec) == "cpu" else 0)


def _tied(job: Any) -> bool:
    return bool(read_json(job.merged / "config.json").get("tie_word_embeddings", False))


def embedding(job: Any) -> str:
    """shared: one table for both ends; own: a table for each."""
    return job.options.get("embedding") or ("shared" if _tied(job) else "own")


def extra_options(spec: Spec, tied: bool) -> list[str]:
    """The builder's options, KEY=VALUE."""
    found = []
    if spec.variant in BLOCKWISE:
        # The level is set in the finished graph: one build serves every level.
        found = [f"block_size={spec.options.get('block_size', 32)}", "accuracy_level=4"]
    if tied and spec.options.get("embedding") == "own":
        found.append("shared_embeddings=false")
    return found


def build(job: Any) -> dict[str, Any]:
    """Write the ONNX model with its genai_config and tokenizer; returns wall_s, peak_rss_bytes and checks."""
    where = device(job.spec)
    command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        str(job.merged),
        "-o",
        str(job.out),
    ]
    command += ["-p", job.variant, "-e", where, "-c", str(job.work / "onnx-cache")]
    if options := extra_options(job.spec, _tied(job)):
        command += ["--extra_options", *options]
    # Else the builder writes the commit of whatever repository its package lies in, as a .venv does, into the model.
    env = {"HF_HUB_OFFLINE": "1", "GIT_DIR": os.devnull}
    steps = [child.run(command, log=job.log, title="onnxruntime-genai's builder", env=env)]
    choices: dict[str, Any] = {}
    if job.variant in BLOCKWISE:
        if where == "cpu":
            steps.append(
                child.call(
                    "edgeft.compress.formats.onnx_embedding:quantize_embedding",
                    log=job.log,
                    title="quantizing the embedding",
                    folder=str(job.out),
                    tied=embedding(job) == "shared",
                    block=job.options.get("block_size", 32),
                )
            )
        level = accuracy_level(job.spec)
        if level == "auto":
            choices, spent = onnx_accuracy.choose(job)
            level, steps = choices["accuracy_level"]["chosen"], [*steps, *spent]
        steps.append(onnx_accuracy.set_level(job, level))
    return {
        "wall_s": sum(step["wall_s"] for step in steps),
        "peak_rss_bytes": max(step["peak_rss_bytes"] for step in steps),
        **({"checks": {"choices": choices}} if choices else {}),
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
