"""GPTQ by gptqmodel: checkpoints that transformers loads with optimum, and vLLM by its configuration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.errors import UsageError

VARIANTS = ("2", "3", "4", "8")
OPTIONS: dict[str, Any] = {}
NEEDS_ROWS = dict.fromkeys(VARIANTS, "rows to calibrate on")
ENGINE = "transformers"
PACKAGES = ("gptqmodel", "optimum", "torch", "transformers")
REQUIRES = {"gptqmodel": "gptq", "optimum": "gptq", "torch": "gptq", "transformers": "gptq"}
GROUP_SIZES = (128, 64, 32)
CALIBRATION_ROWS = 32


def settings(job: Any) -> dict[str, Any]:
    """What decides the result besides the merged model."""
    from edgeft.files import sha256_file

    return {
        "bits": int(job.variant),
        "group_size": group_size(job.merged),
        "desc_act": False,
        "sym": True,
        "calibration_sha256": sha256_file(job.calibration),
        "calibration_rows": CALIBRATION_ROWS,
    }


def group_size(merged: Path) -> int:
    """The largest of 128, 64, 32 that divides the input width of every linear layer."""
    from edgeft.compress.adapter import header_of

    widths = {
        entry["shape"][1]
        for file in merged.glob("*.safetensors")
        for name, entry in header_of(file).items()
        if ".layers." in name and len(entry["shape"]) == 2
    }
    for size in GROUP_SIZES:
        if all(width % size == 0 for width in widths):
            return size
    raise UsageError(
        f"no group size of 128, 64, 32 divides the widths {sorted(widths)}.", "use gguf: or onnx:"
    )


def build(job: Any) -> dict[str, float]:
    """Write the GPTQ checkpoint; returns wall_s and peak_rss_bytes."""
    made = child.call(
        "edgeft.compress.formats.gptq:quantize",
        log=job.log,
        title="gptqmodel",
        # gptqmodel plans for at least two workers, whatever the number of cores.
        env={"GPTQMODEL_CPU_WORKERS": str(max(2, os.cpu_count() or 2)), "HF_HUB_OFFLINE": "1"},
        merged=str(job.merged),
        out=str(job.out),
        calibration=str(job.calibration),
        settings={k: v for k, v in settings(job).items() if not k.startswith("calibration")},
    )
    return {"wall_s": made["wall_s"], "peak_rss_bytes": made["peak_rss_bytes"]}


def calibration_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that GPTQ sees: evenly spread over the file, in its order."""
    from edgeft.rows import load_rows

    rows = load_rows(path)
    step = max(1, len(rows) // CALIBRATION_ROWS)
    return rows[::step][:CALIBRATION_ROWS]


def quantize(merged: str, out: str, calibration: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Quantize a model folder on chat-templated rows. Runs in a child process."""
    import json
    import shutil

    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    from edgeft.tokenizer import load_tokenizer

    torch.manual_seed(0)
    tokenizer = load_tokenizer(Path(merged))
    texts = [
        tokenizer.apply_chat_template(row["messages"], tokenize=False)
        for row in calibration_rows(Path(calibration))
    ]
    # In float32: a CPU multiplies float16 so slowly that the whole takes 1.6 times as long.
    config = QuantizeConfig(**settings, offload_to_disk=False)
    model = GPTQModel.load(merged, config, device="cpu", dtype=torch.float32)
    model.quantize(texts, batch_size=8)
    model.save(out)
    restore_dtype(Path(out), json.loads(Path(merged, "config.json").read_text()).get("dtype") or "float16")
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "special_tokens_map.json",
        "generation_config.json",
    ):
        if Path(merged, name).is_file():
            shutil.copy(Path(merged, name), Path(out, name))
    return {}


def restore_dtype(folder: Path, name: str) -> None:
    """Store what was not quantized as the merged model has it, in the files and in config.json."""
    import torch
    from safetensors.torch import load_file, save_file

    from edgeft.files import read_json, write_json

    for file in folder.glob("*.safetensors"):
        tensors = {
            key: value.to(getattr(torch, name)) if value.dtype == torch.float32 else value
            for key, value in load_file(file).items()
        }
        save_file(tensors, file, metadata={"format": "pt"})
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "dtype": name})


def inspect(job: Any) -> dict[str, Any]:
    """Weights by what they are stored as, read from the safetensors headers."""
    from edgeft.compress.adapter import header_of
    from edgeft.files import read_json

    bits = read_json(job.out / "config.json")["quantization_config"]["bits"]
    types: dict[str, dict[str, int]] = {}
    total_bytes = 0
    for file in job.out.glob("*.safetensors"):
        for name, entry in header_of(file).items():
            count = 1
            for size in entry["shape"]:
                count *= size
            start, end = entry["data_offsets"]
            total_bytes += end - start
            if name.endswith(".qweight"):
                label, count = f"gptq-int{bits}", count * 32 // bits
            else:
                label = entry["dtype"].lower()
            kind = types.setdefault(label, {"tensors": 0, "parameters": 0})
            kind["tensors"] += 1
            kind["parameters"] += count
    return {"tensor_types": types, "tensor_bytes": total_bytes, "fallback_share": None}
