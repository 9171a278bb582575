"""What vLLM's reader of GPTQ configurations asks of a checkpoint, checked on its files. vLLM itself is not run.

The rules are those of vLLM's own source (github.com/vllm-project/vllm, Apache-2.0, read at commit 00161ce and at its
forks of 2026; no code is taken from it):
- model_executor/layers/quantization/gptq_marlin.py: `GPTQMarlinConfig.from_config` needs bits, group_size, desc_act and
  sym, and knows lm_head, dynamic and modules_in_block_to_quantize; TYPE_MAP has (4, sym) and (8, sym).
- …/utils/marlin_utils.py: MARLIN_SUPPORTED_GROUP_SIZES is -1, 32, 64, 128.
- …/gptq.py: `GPTQConfig.from_config` needs bits, group_size and desc_act, knows checkpoint_format (gptq, gptq_v2);
  bits are 2, 3, 4, 8; activations float16 alone; a layer's input is a multiple of the group, its output of the packing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

MARLIN_BITS = (4, 8)
MARLIN_GROUP_SIZES = (-1, 32, 64, 128)
BITS = (2, 3, 4, 8)
FORMATS = ("", "gptq", "gptq_v2")
KINDS = {"bits": int, "group_size": int, "desc_act": bool, "sym": bool}


def check(folder: Path) -> dict[str, Any]:
    """{"kernel": gptq_marlin, gptq or None, "problems": […], "loaded": False} of a checkpoint's folder.

    With the kernel `gptq` activations must be float16: `needs_dtype` says so where config.json has another.
    """
    from edgeft.compress.adapter import header_of
    from edgeft.files import read_json

    model = read_json(folder / "config.json")
    config = model.get("quantization_config") or {}
    problems = _config_problems(config)
    own = folder / "quantize_config.json"
    if own.is_file():
        other = read_json(own)
        problems += [
            f"{key} is {config.get(key)} in config.json and {other.get(key)} in quantize_config.json"
            for key in KINDS
            if config.get(key) != other.get(key)
        ]
    if problems:
        return {"kernel": None, "problems": problems, "loaded": False}
    kernel = kernel_of(config)
    shapes = {k: v["shape"] for file in folder.glob("*.safetensors") for k, v in header_of(file).items()}
    problems = _shape_problems(config, shapes, kernel)
    found: dict[str, Any] = {
        "kernel": kernel if not problems else None,
        "problems": problems,
        "loaded": False,
    }
    if kernel == "gptq" and model.get("dtype") != "float16":
        found["needs_dtype"] = "--dtype float16"
    return found


def kernel_of(config: dict[str, Any]) -> str:
    """gptq_marlin where its conditions hold, else gptq."""
    marlin = config["bits"] in MARLIN_BITS and config["sym"] and config["group_size"] in MARLIN_GROUP_SIZES
    return "gptq_marlin" if marlin else "gptq"


def _config_problems(config: dict[str, Any]) -> list[str]:
    found = (
        []
        if config.get("quant_method") == "gptq"
        else [f"quant_method is {config.get('quant_method')!r}, not 'gptq'"]
    )
    for key, kind in KINDS.items():
        if type(config.get(key)) is not kind:
            found.append(f"{key} is {config.get(key)!r}, and a {kind.__name__} is needed")
    if not found and config["bits"] not in BITS:
        found.append(f"bits is {config['bits']}; vLLM takes 2, 3, 4, 8")
    if (layout := config.get("checkpoint_format") or "") not in FORMATS:
        found.append(f"checkpoint_format is {layout!r}; vLLM knows gptq and gptq_v2")
    if config.get("lm_head") not in (None, False, True):
        found.append(f"lm_head is {config['lm_head']!r}, and a bool is needed")
    if not isinstance(config.get("dynamic") or {}, dict):
        found.append("dynamic is no mapping of patterns")
    return found


def _shape_problems(config: dict[str, Any], shapes: dict[str, list[int]], kernel: str) -> list[str]:
    """Tensors that are missing or of another shape than vLLM makes room for."""
    bits, found = config["bits"], []
    layers = [name.removesuffix(".qweight") for name in shapes if name.endswith(".qweight")]
    if not layers:
        return ["there is no tensor *.qweight"]
    for layer in layers:
        packed, outputs = shapes[f"{layer}.qweight"]
        width = packed * 32 // bits
        group = width if config["group_size"] == -1 else config["group_size"]
        # 3 bits: 32 values in three words, so that the whole of 32 must fit.
        multiple = 32 if bits == 3 else 32 // bits
        if width % group:
            found.append(f"{layer}: the width {width} is no multiple of the group {group}")
        if kernel == "gptq" and outputs % multiple:
            found.append(f"{layer}: {outputs} outputs are no multiple of {multiple}")
        wanted = {
            "scales": [width // group, outputs],
            "qzeros": [width // group, outputs * bits // 32],
            "g_idx": [width],
        }
        for name, shape in wanted.items():
            if shapes.get(f"{layer}.{name}") != shape:
                found.append(f"{layer}.{name} is {shapes.get(f'{layer}.{name}')}, and {shape} is needed")
    return found
