"""A peft LoRA adapter: which of its tensors change which weight of the base, and how. Headers alone are read here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeft.errors import UsageError
from edgeft.files import read_json
from edgeft.pull import safetensors_header

PREFIX = "base_model.model."
# What peft can train and this can't merge, by the key of adapter_config.json.
NOT_MERGED = {
    "use_qalora": "QALoRA", "target_parameters": "LoRA on single parameters (experts)", "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA, which can't be merged by its nature", "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing", "velora_config": "VeLoRA", "monteclora_config": "MonteCLoRA", "kasa_config": "KaSA",
}  # fmt: skip
# Initializations that change the base itself: what was trained stands on a base that is not the one on disk.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Change:
    """What an adapter does to one weight.

    kind `whole`: takes its place; `rows`: some rows take the place of the base's; `low_rank`: scale * B @ A is added
    (DoRA rescales by `magnitude`); `add`: scale * tensor is added.
    """

    weight: str
    kind: str
    tensors: tuple[str, ...]  # whole, rows, add: one; low_rank: (A, B)
    scale: float = 1.0
    transposed: bool = False  # the base stores [in, out]
    embedding: bool = False  # A is [rank, rows], B [width, rank]; the change is (B @ A).T
    magnitude: str | None = None
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """One adapter with all it changes, by weight, in the order of being applied."""

    folder: Path
    config: dict[str, Any]
    share: float = 1.0
    changes: dict[str, list[Change]] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        """Its tensors."""
        return self.folder / "adapter_model.safetensors"


def header_of(file: Path) -> dict[str, Any]:
    """Tensor name -> {dtype, shape, data_offsets} of a safetensors file."""
    return {k: v for k, v in safetensors_header(file).items() if k != "__metadata__"}


def read_adapter(folder: Path, base: Path, weights: dict[str, Any], share: float = 1.0) -> Adapter:
    """Match every tensor of an adapter with a weight of the base (`weights`: its headers by name).

    Raises UsageError for a folder that is no adapter, a kind that is not merged, a tensor that fits nothing (shapes
    named) or is left over.
    """
    config, tensors = _read(folder)
    left = dict(tensors)
    changes: dict[str, list[Change]] = {}
    embedding, head = ends_of(weights)

    def add(change: Change) -> None:
        order = ("whole", "rows", "low_rank", "add")
        if change.kind in {c.kind for c in changes.get(change.weight, [])}:
            raise UsageError(
                f"{folder} changes {change.weight} twice in the same way.",
                f"check {folder}: was it saved whole?",
            )
        changes.setdefault(change.weight, []).append(change)
        changes[change.weight].sort(key=lambda c: order.index(c.kind))
        for name in (*change.tensors, *([change.magnitude] if change.magnitude else [])):
            left.pop(name)

    for name in sorted(tensors):
        if name not in left:
            continue
        make = next((make for pattern, make in KINDS if re.search(pattern, name)), None)
        if make is None:
            continue
        for change in make(name, tensors, config):
            if config.get("use_dora") and change.kind == "low_rank" and change.magnitude is None:
                raise UsageError(
                    f"{folder} says DoRA and has no magnitude for {change.weight}.", "was it saved whole?"
                )
            _check(change, tensors, weights, embedding if change.weight == head else None, folder, base)
            add(change)
    if left:
        raise UsageError(
            f"{len(left)} tensor(s) of the adapter fit nothing in {base.name} (first: {sorted(left)[0]}).",
            f"was it trained with peft, on this base? see {folder / 'adapter_config.json'}",
        )
    if not changes:
        raise UsageError(f"{folder} has no LoRA weights.", f"ls -l {folder}")
    return Adapter(folder, config, share, changes)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(adapter_config.json, safetensors header)."""
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}.", f"ls {folder.parent}")
    file = folder / "adapter_model.safetensors"
    if not (folder / "adapter_config.json").is_file() or not file.is_file():
        raise UsageError(
            f"{folder} is no adapter: it needs adapter_config.json and adapter_model.safetensors.",
            f"ls {folder}",
        )
    config = read_json(folder / "adapter_config.json")
    if not isinstance(config, dict):
        raise UsageError(
            f"{folder / 'adapter_config.json'} holds no map of words.", f"less {folder}/adapter_config.json"
        )
    if config.get("peft_type") != "LORA":
        raise UsageError(
            f"{folder} is a {config.get('peft_type')} adapter; only LORA is merged.", "train a LoRA"
        )
    for key, name in NOT_MERGED.items():
        if config.get(key):
            raise UsageError(f"{folder} uses {name} ({key}), which is not merged.", f"train without {key}")
    _refuse_numbers(folder / "adapter_config.json", config)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGES_BASE):
        raise UsageError(
            f"{folder} was started with {start}, which changes the base's own weights.",
            "save it with path_initial_model_for_weight_conversion, as peft's documentation of that method says",
        )
    return config, header_of(file)


def _refuse_numbers(file: Path, config: dict[str, Any]) -> None:
    """Raise UsageError for a rank that is no whole number from 1 up, or an alpha that is no number, patterns included."""
    for key, patterns, least in (("r", "rank_pattern", 1), ("lora_alpha", "alpha_pattern", -math.inf)):
        by_module = config.get(patterns) or {}
        for value in (config.get(key), *(by_module.values() if isinstance(by_module, dict) else [by_module])):
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < least or (key == "r" and value != int(value)):
                wanted = "a whole number from 1 up" if key == "r" else "a number"
                raise UsageError(f"{file}: {key} is {value!r}, and {wanted} is wanted.", f"less {file}")


def ends_of(weights: dict[str, Any]) -> tuple[str | None, str]:
    """(name of the input embedding, name of the head) of a model; a tied head is not in `weights`."""
    embedding = next(
        (n for n in weights if n.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight"))), None
    )
    head = next((n for n in weights if n.endswith(("lm_head.weight", "embed_out.weight"))), "lm_head.weight")
    return embedding, head


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


def _module(name: str, end: str) -> str:
    """The base's module that a tensor belongs to."""
    return name.removeprefix(PREFIX).removesuffix(end)


def _linear(name: str, tensors: dict[str, Any], config: dict[str, Any]) -> list[Change]:
    module, pair = _module(name, ".lora_A.weight"), name.replace(".lora_A.", ".lora_B.")
    _both(name, pair, tensors)
    stem = name.removesuffix(".lora_A.weight")
    scale = scale_of(config, module)
    found = [
        Change(f"{module}.weight", "low_rank", (name, pair), scale, transposed=bool(config.get("fan_in_fan_out")),
               magnitude=_magnitude(stem, tensors))
    ]  # fmt: skip
    if f"{stem}.lora_B.bias" in tensors:
        found.append(Change(f"{module}.bias", "add", (f"{stem}.lora_B.bias",), scale))
    return found


def _embedding(name: str, tensors: dict[str, Any], config: dict[str, Any]) -> list[Change]:
    module, pair = _module(name, ".lora_embedding_A"), name.replace(".lora_embedding_A", ".lora_embedding_B")
    _both(name, pair, tensors)
    magnitude = _magnitude(name.removesuffix(".lora_embedding_A"), tensors)
    return [
        Change(
            f"{module}.weight",
            "low_rank",
            (name, pair),
            scale_of(config, module),
            embedding=True,
            magnitude=magnitude,
        )
    ]


def _rows(name: str, tensors: dict[str, Any], config: dict[str, Any]) -> list[Change]:
    module = re.sub(r"\.token_adapter\.trainable_tokens_delta$", "", name.removeprefix(PREFIX))
    listed = config.get("trainable_token_indices") or []
    if isinstance(listed, dict):
        listed = next((v for k, v in listed.items() if module == k or module.endswith(f".{k}")), [])
    return [Change(f"{module}.weight", "rows", (name,), rows=tuple(listed))]


def _whole(name: str, tensors: dict[str, Any], config: dict[str, Any]) -> list[Change]:
    weight = re.sub(r"\.(base_layer|modules_to_save(\.default)?)\.", ".", name.removeprefix(PREFIX))
    return [Change(weight, "whole", (name,))]


def _both(name: str, pair: str, tensors: dict[str, Any]) -> None:
    if pair not in tensors:
        raise UsageError(f"the adapter has {name} and no {pair}.", "was it saved whole?")


def _magnitude(stem: str, tensors: dict[str, Any]) -> str | None:
    names = (f"{stem}.lora_magnitude_vector", f"{stem}.lora_magnitude_vector.weight")
    return next((name for name in names if name in tensors), None)


# How a tensor's name tells what it is; the first that fits decides. The tensors that go with it are consumed with it.
KINDS: tuple[tuple[str, Callable[..., list[Change]]], ...] = (
    (r"\.lora_A\.weight$", _linear),
    (r"\.lora_embedding_A$", _embedding),
    (r"\.trainable_tokens_delta$", _rows),
    (r"^(?!.*\.lora_).*\.(weight|bias)$", _whole),
)


def _check(
    change: Change,
    tensors: dict[str, Any],
    weights: dict[str, Any],
    tied_to: str | None,
    folder: Path,
    base: Path,
) -> None:
    """Shapes of a change against the base's; a tied head has its embedding's."""
    other = f"was the adapter trained on another model? see {folder / 'adapter_config.json'}"
    known = weights.get(change.weight) or (weights.get(tied_to) if tied_to else None)
    if known is None:
        raise UsageError(f"the adapter changes {change.weight}, which {base.name} does not have.", other)
    wanted, shapes = list(known["shape"]), [tensors[name]["shape"] for name in change.tensors]
    if change.kind == "low_rank":
        (rank_a, columns), (rows, rank_b) = shapes
        made = [columns, rows] if change.transposed or change.embedding else [rows, columns]
        fits = rank_a == rank_b and made == wanted
    elif change.kind == "rows":
        made = [*shapes[0][:1], *wanted[1:]]
        fits = shapes[0] == [len(change.rows), *wanted[1:]] and all(0 <= r < wanted[0] for r in change.rows)
    else:
        made = shapes[0]
        # A grown vocabulary: more rows of the same width.
        ends = ends_of(weights)
        fits = made == wanted or (change.weight in ends and made[1:] == wanted[1:] and made[0] > wanted[0])
    if not fits:
        raise UsageError(
            f"the adapter is for another base: {change.weight} is {wanted} in {base.name} and {made} in the adapter.",
            other,
        )
