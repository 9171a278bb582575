"""What vLLM's reader of GPTQ checkpoints asks for, checked on the files. vLLM itself is not run here.

The rules are those of vLLM 0.26.0's own source (github.com/vllm-project/vllm, Apache-2.0; no code is taken from it):
- model_executor/layers/quantization/auto_gptq.py: `AutoGPTQConfig.from_config` needs bits, group_size, desc_act and sym, and
  knows lm_head, dynamic and modules_in_block_to_quantize; TYPE_MAP has (4, symmetric) and (8, symmetric) alone.
- …/utils/marlin_utils.py: MARLIN_SUPPORTED_GROUP_SIZES is -1, 32, 64, 128.
- model_executor/kernels/linear/mixed_precision: Marlin fills widths up, but not with act order, which leaves Exllama: float16 alone.
On an H100 it loaded a 4-bit checkpoint and refused one of 3 bits, as these rules say (docs/hardware-runs). Releases before had a
slower kernel for 2, 3, 4 and 8 bits, symmetric or not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

VLLM = "0.26.0"
BITS = (4, 8)
GROUP_SIZES = (-1, 32, 64, 128)
TILE = (128, 64)  # inputs and outputs
FORMATS = ("", "gptq", "gptq_v2")
KINDS = {"bits": int, "group_size": int, "desc_act": bool, "sym": bool}


def check(folder: Path) -> dict[str, Any]:
    """{"vllm": whose rules, "kernel": marlin, exllama or None, "problems": […], "loaded": False} of a checkpoint's folder.

    `needs_dtype` is there where config.json has another than the kernel computes in.
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
        return {"vllm": VLLM, "kernel": None, "problems": problems, "loaded": False}
    shapes = {k: v["shape"] for file in folder.glob("*.safetensors") for k, v in header_of(file).items()}
    problems = _shape_problems(config, shapes)
    kernel = None if problems else _kernel(config, shapes)
    found = {"vllm": VLLM, "kernel": kernel, "problems": problems, "loaded": False}
    if kernel == "exllama" and model.get("dtype") != "float16":
        found["needs_dtype"] = "--dtype float16"
    return found


def _kernel(config: dict[str, Any], shapes: dict[str, list[int]]) -> str:
    """marlin, or exllama where act order meets widths that Marlin's tiles do not divide."""
    ordered = config["desc_act"] and config["group_size"] != -1
    packed = [shape for name, shape in shapes.items() if name.endswith(".qweight")]
    fits = all(
        rows * 32 // config["bits"] % TILE[0] == 0 and outputs % TILE[1] == 0 for rows, outputs in packed
    )
    return "marlin" if fits or not ordered else "exllama"


def _config_problems(config: dict[str, Any]) -> list[str]:
    found = (
        []
        if config.get("quant_method") == "gptq"
        else [f"quant_method is {config.get('quant_method')!r}, not 'gptq'"]
    )
    for key, kind in KINDS.items():
        if type(config.get(key)) is not kind:
            found.append(f"{key} is {config.get(key)!r}, and a {kind.__name__} is needed")
    if not found:
        if config["bits"] not in BITS:
            found.append(f"bits is {config['bits']}; vLLM {VLLM} takes 4 and 8")
        if not config["sym"]:
            found.append(f"sym is false; vLLM {VLLM} takes symmetric alone")
        if config["group_size"] not in GROUP_SIZES:
            found.append(f"group_size is {config['group_size']}; vLLM {VLLM} takes -1, 32, 64, 128")
    if (layout := config.get("checkpoint_format") or "") not in FORMATS:
        found.append(f"checkpoint_format is {layout!r}; vLLM knows gptq and gptq_v2")
    if config.get("lm_head") not in (None, False, True):
        found.append(f"lm_head is {config['lm_head']!r}, and a bool is needed")
    if not isinstance(config.get("dynamic") or {}, dict):
        found.append("dynamic is no mapping of patterns")
    return found


def _shape_problems(config: dict[str, Any], shapes: dict[str, list[int]]) -> list[str]:
    """Tensors that are missing or of another shape than vLLM makes room for."""
    bits, found = config["bits"], []
    layers = [name.removesuffix(".qweight") for name in shapes if name.endswith(".qweight")]
    if not layers:
        return ["there is no tensor *.qweight"]
    for layer in layers:
        packed, outputs = shapes[f"{layer}.qweight"]
        width = packed * 32 // bits
        group = width if config["group_size"] == -1 else config["group_size"]
        if width % group:
            found.append(f"{layer}: the width {width} is no multiple of the group {group}")
        wanted = {
            "scales": [width // group, outputs],
            "qzeros": [width // group, outputs * bits // 32],
            "g_idx": [width],
        }
        for name, shape in wanted.items():
            if shapes.get(f"{layer}.{name}") != shape:
                found.append(f"{layer}.{name} is {shapes.get(f'{layer}.{name}')}, and {shape} is needed")
    return found
