"""GPTQ by gptqmodel: checkpoints that transformers loads with optimum, and vLLM by its configuration.

vLLM is not run here: its rules for config.json are checked (gptq_vllm), and artifact.json says that no more was done.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from edgeft import child, console
from edgeft.compress import autoround
from edgeft.compress.formats import Spec, one_of
from edgeft.device import torch_device
from edgeft.errors import UsageError

VARIANTS = ("2", "3", "4", "8")
GROUP_SIZES = (128, 64, 32)
CALIBRATION_ROWS = 32
FLAG = one_of(True, False)


def read_rows(text: str) -> int:
    """A number of rows. Raises ValueError below 1."""
    count = int(text)
    if count < 1:
        raise ValueError(text)
    return count


OPTIONS: dict[str, Any] = {
    "group_size": one_of(*reversed(GROUP_SIZES), -1),
    "act_order": FLAG,
    "sym": FLAG,
    "rows": (read_rows, "a number of rows, 1 or more"),
    **autoround.OPTIONS,
}
NEEDS_ROWS = dict.fromkeys(VARIANTS, "rows to calibrate on")
ENGINE = "transformers"
PACKAGES = ("gptqmodel", "optimum", "torch", "transformers")
REQUIRES = {"gptqmodel": "gptq", "optimum": "gptq", "torch": "gptq", "transformers": "gptq"}


def refuse(spec: Spec, base: Path, plan: Any) -> None:
    """Raise UsageError where the group size does not divide a width, or auto-round can't do what is asked."""
    autoround.refuse(spec)
    group_size(base, spec.options.get("group_size"))


def settings(job: Any) -> dict[str, Any]:
    """What decides the result besides the merged model."""
    from edgeft.files import sha256_file

    found = {
        "bits": int(job.variant),
        "group_size": group_size(job.merged, job.options.get("group_size")),
        "desc_act": job.options.get("act_order", False),
        "sym": job.options.get("sym", True),
        "calibration_sha256": sha256_file(job.calibration),
        "calibration_rows": job.options.get("rows", CALIBRATION_ROWS),
    }
    return {**found, **autoround.settings(job.options)}


def group_size(model: Path, asked: int | None = None) -> int:
    """The group size asked for, or the largest of 128, 64, 32 that divides the input width of every linear layer.

    -1 is one group a row. Raises UsageError where the width of a layer is no multiple.
    """
    from edgeft.compress.adapter import header_of

    widths = {
        entry["shape"][1]
        for file in model.glob("*.safetensors")
        for name, entry in header_of(file).items()
        if ".layers." in name and len(entry["shape"]) == 2
    }
    fits = [size for size in GROUP_SIZES if all(width % size == 0 for width in widths)]
    if asked == -1:
        return -1
    if asked and asked not in fits:
        raise UsageError(
            f"a group_size of {asked} does not divide the widths {sorted(widths)}.",
            f"group_size={' or '.join(map(str, [*reversed(fits), -1]))}",
        )
    if not fits:
        raise UsageError(
            f"no group size of 128, 64, 32 divides the widths {sorted(widths)}.",
            "group_size=-1, or gguf: or onnx:",
        )
    return asked or fits[0]


def build(job: Any) -> dict[str, Any]:
    """Write the GPTQ checkpoint; returns wall_s, peak_rss_bytes and checks (what vLLM's rules say of it)."""
    from edgeft.compress.formats import gptq_vllm

    made = _auto_round(job) if job.options.get("method") == autoround.METHOD else _gptqmodel(job)
    vllm = gptq_vllm.check(job.out)
    if vllm["problems"]:
        console.note(f"  vLLM would not load it as it is: {vllm['problems'][0]}")
    return {"wall_s": made["wall_s"], "peak_rss_bytes": made["peak_rss_bytes"], "checks": {"vllm": vllm}}


def _gptqmodel(job: Any) -> dict[str, Any]:
    decided = settings(job)
    return child.call(
        "edgeft.compress.formats.gptq:quantize",
        log=job.log,
        title="gptqmodel",
        # gptqmodel plans for at least two workers, whatever the number of cores.
        env={"GPTQMODEL_CPU_WORKERS": str(max(2, os.cpu_count() or 2)), "HF_HUB_OFFLINE": "1"},
        merged=str(job.merged),
        out=str(job.out),
        calibration=str(job.calibration),
        rows=decided["calibration_rows"],
        settings={k: v for k, v in decided.items() if not k.startswith("calibration")},
    )


def _auto_round(job: Any) -> dict[str, Any]:
    decided = settings(job)
    made = autoround.build(job, {key: decided[key] for key in ("bits", "group_size", "sym")}, "auto_gptq")
    (job.out / "quantization_config.json").unlink(missing_ok=True)  # config.json has the same
    return made


def calibration_rows(path: Path, count: int = CALIBRATION_ROWS) -> list[dict[str, Any]]:
    """The rows that GPTQ sees: evenly spread over the file, in its order."""
    from edgeft.rows import load_rows

    rows = load_rows(path)
    step = max(1, len(rows) // count)
    return rows[::step][:count]


def quantize(merged: str, out: str, calibration: str, rows: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Quantize a model folder on chat-templated rows. Runs in a child process."""
    import json
    import shutil

    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    from edgeft.tokenizer import load_tokenizer

    torch.manual_seed(0)
    device = torch_device()
    tokenizer = load_tokenizer(Path(merged))
    texts = [
        tokenizer.apply_chat_template(row["messages"], tokenize=False)
        for row in calibration_rows(Path(calibration), rows)
    ]
    # In float32: a CPU multiplies float16 so slowly that the whole takes 1.6 times as long.
    # Its own ordering within groups needs groups.
    ordering = {"act_group_aware": False} if settings["group_size"] == -1 else {}
    config = QuantizeConfig(**settings, **ordering, offload_to_disk=False)
    model = GPTQModel.load(merged, config, device=device, dtype=torch.float32)
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
