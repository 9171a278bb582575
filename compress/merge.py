"""A LoRA adapter added to its base: one weight at a time, in float32, rounded once.

`plan` reads headers alone and finds everything that could go wrong before a byte is written;
`write` streams the base's safetensors into the same files with the adapter added. The largest
thing in memory is one weight.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeft.errors import UsageError
from edgeft.pull import ORIGIN, check_model_folder, safetensors_header

PREFIX = "base_model.model."
NOT_YET = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "lora_bias": "a LoRA bias",
    "trainable_token_indices": "trained tokens",
}
SKIPPED = (
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.onnx",
    "*.gguf",
    "*.safetensors.index.json",
    ".*",
    ORIGIN,
)
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


@dataclass(frozen=True)
class Delta:
    """What the adapter adds to one weight: scale * B @ A, transposed where the base stores [in, out]."""

    weight: str
    a: str
    b: str
    scale: float
    transposed: bool


def plan(base: Path, adapter: Path | None) -> list[Delta]:
    """Match every tensor of the adapter with a weight of the base.

    Raises UsageError for a folder that is no model or no adapter, a corrupt file, a tensor that fits
    nothing (both shapes named), or a kind of adapter that is not merged yet.
    """
    check_model_folder(base)
    if adapter is None:
        return []
    config, tensors = read_adapter(adapter)
    weights = {
        name: entry for file in sorted(base.glob("*.safetensors")) for name, entry in header_of(file).items()
    }
    deltas, left = [], set(tensors)
    for name in sorted(tensors):
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        pair = name.replace(".lora_A.", ".lora_B.")
        if pair not in tensors:
            raise UsageError(
                f"the adapter has {name} and no {pair}.", f"check {adapter}: was it saved whole?"
            )
        delta = Delta(
            f"{module}.weight", name, pair, scale_of(config, module), bool(config.get("fan_in_fan_out"))
        )
        _check_shapes(delta, tensors, weights, adapter, base)
        deltas.append(delta)
        left -= {name, pair}
    if left:
        raise UsageError(
            f"{len(left)} tensor(s) of the adapter fit nothing in {base.name} (first: {sorted(left)[0]}).",
            "only LoRA and rsLoRA weights of linear layers are merged so far",
        )
    if not deltas:
        raise UsageError(f"{adapter} has no LoRA weights.", f"ls -l {adapter}")
    return deltas


def read_adapter(adapter: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(adapter_config.json, safetensors header) of a peft adapter folder."""
    if not adapter.is_dir():
        raise UsageError(f"there is no folder {adapter}.", f"ls {adapter.parent}")
    file = adapter / "adapter_model.safetensors"
    if not (adapter / "adapter_config.json").is_file() or not file.is_file():
        raise UsageError(
            f"{adapter} is no adapter: it needs adapter_config.json and adapter_model.safetensors.",
            f"ls {adapter}",
        )
    config = json.loads((adapter / "adapter_config.json").read_text())
    if config.get("peft_type") != "LORA":
        raise UsageError(
            f"{adapter} is a {config.get('peft_type')} adapter; only LORA is merged so far.", "train a LoRA"
        )
    for key, name in NOT_YET.items():
        if config.get(key):
            raise UsageError(
                f"{adapter} uses {name} ({key}), which is not merged so far.", f"train without {key}"
            )
    return config, header_of(file)


def header_of(file: Path) -> dict[str, Any]:
    """Tensor name -> {dtype, shape, data_offsets} of a safetensors file."""
    return {k: v for k, v in safetensors_header(file).items() if k != "__metadata__"}


def scale_of(config: dict[str, Any], module: str) -> float:
    """alpha/r, or alpha/sqrt(r) with rsLoRA (arXiv 2312.03732), with peft's per-module patterns."""
    rank = _pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _check_shapes(
    delta: Delta, tensors: dict[str, Any], weights: dict[str, Any], adapter: Path, base: Path
) -> None:
    other = f"was the adapter trained on another model? see {adapter / 'adapter_config.json'}"
    if delta.weight not in weights:
        raise UsageError(f"the adapter changes {delta.weight}, which {base.name} does not have.", other)
    a, b = tensors[delta.a]["shape"], tensors[delta.b]["shape"]
    made = [b[0], a[1]]
    if delta.transposed:
        made.reverse()
    wanted = weights[delta.weight]["shape"]
    if made != wanted or a[0] != b[1]:
        raise UsageError(
            f"the adapter is for another base: {delta.weight} is {wanted} in {base.name} and {made} in the adapter.",
            other,
        )


def merge(base: str, adapter: str | None, out: str) -> dict[str, Any]:
    """Write base + adapter into the folder `out`. Runs in a child process.

    Returns how many weights changed, the largest change, and the model's parameters and types.
    Raises UsageError where a merged weight is not finite.
    """
    source, target = Path(base), Path(out)
    deltas = {d.weight: d for d in plan(source, Path(adapter) if adapter else None)}
    adapter_file = Path(adapter, "adapter_model.safetensors") if adapter else None
    changed, largest = 0, 0.0
    types: dict[str, dict[str, int]] = {}
    for file in sorted(source.glob("*.safetensors")):
        counts = _stream(file, target / file.name, deltas, adapter_file, types)
        changed, largest = changed + counts[0], max(largest, counts[1])
    for index in source.glob("*.safetensors.index.json"):
        shutil.copy(index, target / index.name)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*SKIPPED), dirs_exist_ok=True)
    if adapter and Path(adapter, "tokenizer_config.json").is_file():
        for name in TOKENIZER_FILES:
            if Path(adapter, name).is_file():
                shutil.copy(Path(adapter, name), target / name)
    return {
        "weights_changed": changed,
        "largest_change": largest,
        "tensor_types": types,
        "parameters": sum(t["parameters"] for t in types.values()),
        "deltas": [asdict(d) for d in deltas.values()][:1],
    }


def _stream(
    source: Path,
    target: Path,
    deltas: dict[str, Delta],
    adapter_file: Path | None,
    types: dict[str, dict[str, int]],
) -> tuple[int, float]:
    """Copy one safetensors file, adding the adapter; the header is the base's own, so offsets hold."""
    import torch
    from safetensors import safe_open

    header = safetensors_header(source)
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    entries = sorted(
        ((k, v) for k, v in header.items() if k != "__metadata__"), key=lambda e: e[1]["data_offsets"][0]
    )
    adapter = safe_open(adapter_file, "pt") if adapter_file else None
    changed, largest = 0, 0.0
    with safe_open(source, "pt") as base, target.open("wb") as out:
        out.write(len(raw).to_bytes(8, "little") + raw)
        for name, entry in entries:
            weight = base.get_tensor(name)
            kind = types.setdefault(entry["dtype"].lower(), {"tensors": 0, "parameters": 0})
            kind["tensors"] += 1
            kind["parameters"] += weight.numel()
            if name in deltas and adapter is not None:
                delta = deltas[name]
                a, b = adapter.get_tensor(delta.a).float(), adapter.get_tensor(delta.b).float()
                added = delta.scale * (b @ a)
                merged = weight.float() + (added.T if delta.transposed else added)
                changed += 1
                largest = max(largest, added.abs().max().item())
                weight = merged.to(weight.dtype)
            if weight.is_floating_point() and not torch.isfinite(weight).all():
                raise UsageError(
                    f"{name} has NaN or Inf after merging.", "check the adapter: did its training diverge?"
                )
            out.write(memoryview(weight.contiguous().view(torch.uint8).numpy().reshape(-1)))
        out.flush()
        os.fsync(out.fileno())
    return changed, largest
