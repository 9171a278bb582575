"""LoRA adapters added to their base: one weight at a time, in float32, rounded once.

`plan` reads headers alone and finds everything that could go wrong before a byte is written;
`merge` streams the base's safetensors into files of the same names. The largest thing in memory is
one weight.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.compress.adapter import Adapter, Change, ends_of, header_of, read_adapter
from edgeft.compress.merge_base import is_rounded, rounded
from edgeft.errors import UsageError
from edgeft.files import read_json, write_json
from edgeft.pull import ORIGIN, check_model_folder, safetensors_header

SKIPPED = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.onnx", "*.gguf", "*.safetensors.index.json", ".*", ORIGIN, "README.md",
)  # fmt: skip
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", *TEMPLATE_FILES,
)  # fmt: skip
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

Source = tuple[Path, float]  # an adapter's folder and its share


@dataclass(frozen=True)
class Output:
    """One tensor of the merged model: `source` of the base with each adapter's changes."""

    name: str
    dtype: str
    shape: list[int]
    source: str
    parts: list[tuple[Adapter, list[Change]]]

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        count = 1
        for size in self.shape:
            count *= size
        return count * BYTES[self.dtype]


@dataclass(frozen=True)
class Plan:
    """The merged model's files, tensor by tensor, and what changes in config.json."""

    files: dict[str, list[Output]]
    config: dict[str, Any]
    adapters: list[Adapter]
    tied: str | None  # None: the base has a head of its own; kept, or untied and why


def plan(base: Path, adapters: Sequence[Source] = ()) -> Plan:
    """What merging will write.

    Raises UsageError for a folder that is no model or no adapter, a quantized base, a corrupt file, a tensor that
    fits nothing (both shapes named), or a kind of adapter that is not merged.
    """
    check_model_folder(base)
    config = read_json(base / "config.json")
    if config.get("quantization_config"):
        raise UsageError(
            f"{base} is quantized ({config['quantization_config'].get('quant_method')}), and merging into it would ruin it.",
            "name the 16-bit base that it was made from",
        )
    per_file = {file.name: header_of(file) for file in sorted(base.glob("*.safetensors"))}
    weights = {name: entry for header in per_file.values() for name, entry in header.items()}
    read = [read_adapter(folder, base, weights, share) for folder, share in adapters]
    parts: dict[str, list[tuple[Adapter, list[Change]]]] = {}
    for adapter in read:
        for weight, changes in adapter.changes.items():
            parts.setdefault(weight, []).append((adapter, changes))
    new_head, tied = _head(weights, parts)
    files: dict[str, list[Output]] = {}
    for name, header in per_file.items():
        ordered = sorted(header.items(), key=lambda e: e[1]["data_offsets"][0])
        files[name] = [_output(k, k, e, parts.get(k, [])) for k, e in ordered]
        if new_head and (embedding := ends_of(weights)[0]) in header:
            files[name].append(
                _output(ends_of(weights)[1], str(embedding), header[str(embedding)], new_head[0])
            )
    return Plan(files, _config_changes(files, weights, tied), read, tied)


def _output(
    name: str, source: str, entry: dict[str, Any], parts: list[tuple[Adapter, list[Change]]]
) -> Output:
    shape = list(entry["shape"])
    for adapter, changes in parts:
        for change in changes:
            if change.kind == "whole":
                grown = header_of(adapter.file)[change.tensors[0]]["shape"]
                if grown != shape and len(parts) > 1:
                    raise UsageError(
                        f"{adapter.folder} grows the vocabulary, which can't be combined with other adapters.",
                        "merge it alone, or train the others on its result",
                    )
                shape = list(grown)
    return Output(name, entry["dtype"], shape, source, parts)


def _head(
    weights: dict[str, Any], parts: dict[str, list[tuple[Adapter, list[Change]]]]
) -> tuple[list[list[tuple[Adapter, list[Change]]]], str | None]:
    """([what changes a head that is written out], what became of a tied head).

    The rule is what the live adapter computes: a head that shares the embedding's weight does not see a LoRA of the
    embedding unless the adapter says so (`ensure_weight_tying`), nor the other way round.
    """
    embedding, head = ends_of(weights)
    if head in weights or embedding is None:
        return [], None
    at_head, at_embedding = parts.pop(head, []), parts.get(embedding, [])
    ties = all(a.config.get("ensure_weight_tying") for a, _ in (*at_head, *at_embedding))
    if at_head and at_embedding and (ties or _same_whole(at_head, at_embedding)):
        return [], "kept"
    if at_head:
        return [at_head], "untied: the adapter changes the head"
    grown = any(c.kind == "whole" and header_of(a.file)[c.tensors[0]]["shape"] != weights[embedding]["shape"]
                for a, changes in at_embedding for c in changes)  # fmt: skip
    only_rows = all(c.kind == "rows" for _, changes in at_embedding for c in changes)
    if at_embedding and not (ties or grown or only_rows):
        return [[]], "untied: the adapter changes the embedding, and the head keeps the base's"
    return [], "kept"


def _same_whole(
    at_head: list[tuple[Adapter, list[Change]]], at_embedding: list[tuple[Adapter, list[Change]]]
) -> bool:
    """Whether one adapter brings the same whole weight for both ends, byte for byte."""
    if len(at_head) != 1 or len(at_embedding) != 1:
        return False
    (adapter, one), (_, other) = at_head[0], at_embedding[0]
    if [c.kind for c in (*one, *other)] != ["whole", "whole"]:
        return False
    header = header_of(adapter.file)
    first, second = (header[c.tensors[0]] for c in (one[0], other[0]))
    if (first["dtype"], first["shape"]) != (second["dtype"], second["shape"]):
        return False
    with adapter.file.open("rb") as a, adapter.file.open("rb") as b:
        start = 8 + int.from_bytes(a.read(8), "little")
        a.seek(start + first["data_offsets"][0])
        b.seek(start + second["data_offsets"][0])
        left = first["data_offsets"][1] - first["data_offsets"][0]
        while left > 0:
            size = min(left, 1 << 24)
            if a.read(size) != b.read(size):
                return False
            left -= size
    return True


def _config_changes(
    files: dict[str, list[Output]], weights: dict[str, Any], tied: str | None
) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    embedding = ends_of(weights)[0]
    for outputs in files.values():
        for output in outputs:
            if output.name == embedding and output.shape != weights[embedding]["shape"]:
                changes["vocab_size"] = output.shape[0]
    if tied and tied != "kept":
        changes["tie_word_embeddings"] = False
    return changes


def merge(base: str, adapters: list[list[Any]], out: str, merge_base: str = "16bit") -> dict[str, Any]:
    """Write base + adapters ([folder, share] each) into the folder `out`. Runs in a child process.

    `merge_base`: 16bit, or how 4-bit training rounded the base's weights (edgeft.compress.merge_base).
    Returns how many weights changed, the largest change, the model's parameters and types, and what became of a tied head.
    Raises UsageError where a merged weight is not finite.
    """
    source, target = Path(base), Path(out)
    planned = plan(source, [(Path(folder), share) for folder, share in adapters])
    used: set[tuple[Path, str]] = set()
    changed, largest = 0, 0.0
    types: dict[str, dict[str, int]] = {}
    for name, outputs in planned.files.items():
        for count, most in _stream(source / name, target / name, outputs, planned.adapters, used, merge_base):
            changed, largest = changed + count, max(largest, most)
        for output in outputs:
            kind = types.setdefault(output.dtype.lower(), {"tensors": 0, "parameters": 0})
            kind["tensors"] += 1
            kind["parameters"] += output.size_bytes // BYTES[output.dtype]
    _index(source, target, planned.files)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*SKIPPED), dirs_exist_ok=True)
    if planned.config:
        write_json(target / "config.json", {**read_json(source / "config.json"), **planned.config})
    for folder, _ in adapters:
        _take_tokenizer(Path(folder), target)
    return {
        "weights_changed": changed,
        "largest_change": largest,
        "tensor_types": types,
        "parameters": sum(t["parameters"] for t in types.values()),
        "adapter_tensors_used": len(used),
        "tied_head": planned.tied,
    }


def _take_tokenizer(adapter: Path, target: Path) -> None:
    """Put the tokenizer files that an adapter brings in place of the base's.

    A chat template stands in a file of its own or in tokenizer_config.json. transformers goes by the file where both
    are there and llama.cpp's converter by the other: what the adapter did not bring is taken out.
    """
    brought = [name for name in TOKENIZER_FILES if (adapter / name).is_file()]
    for name in brought:
        shutil.copy(adapter / name, target / name)
    config = target / "tokenizer_config.json"
    held = read_json(config) if config.is_file() else {}
    if set(brought) & set(TEMPLATE_FILES):
        for name in set(TEMPLATE_FILES) - set(brought):
            (target / name).unlink(missing_ok=True)
        if held.pop("chat_template", None) is not None:
            write_json(config, held)
    elif config.name in brought and "chat_template" in held:
        for name in TEMPLATE_FILES:
            (target / name).unlink(missing_ok=True)


def _index(source: Path, target: Path, files: dict[str, list[Output]]) -> None:
    """The index of a model in several files, written anew: names and sizes may have changed."""
    for index in source.glob("*.safetensors.index.json"):
        outputs = [(name, output) for name, listed in files.items() for output in listed]
        write_json(
            target / index.name,
            {
                **read_json(index),
                "metadata": {"total_size": sum(output.size_bytes for _, output in outputs)},
                "weight_map": {
                    output.name: name for name, output in sorted(outputs, key=lambda e: e[1].name)
                },
            },
        )


def _stream(
    source: Path,
    target: Path,
    outputs: list[Output],
    adapters: list[Adapter],
    used: set[tuple[Path, str]],
    merge_base: str,
) -> list[tuple[int, float]]:
    """Write one safetensors file, its header first; (changed, largest change) a tensor."""
    import torch
    from safetensors import safe_open

    header: dict[str, Any] = {
        "__metadata__": safetensors_header(source).get("__metadata__", {"format": "pt"})
    }
    offset = 0
    for output in outputs:
        header[output.name] = {
            "dtype": output.dtype, "shape": output.shape, "data_offsets": [offset, offset + output.size_bytes],
        }  # fmt: skip
        offset += output.size_bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    found = []
    transposed = any(adapter.config.get("fan_in_fan_out") for adapter in adapters)
    with ExitStack() as stack, target.open("wb") as out:
        base = stack.enter_context(safe_open(source, "pt"))
        opened = {a.folder: stack.enter_context(safe_open(a.file, "pt")) for a in adapters}
        out.write(len(raw).to_bytes(8, "little") + raw)
        for output in outputs:
            weight = base.get_tensor(output.source)
            dtype = weight.dtype
            if merge_base != "16bit" and is_rounded(output.source, weight.shape):
                weight = rounded(weight, merge_base, transposed)
            if output.parts:
                before = weight.float()

                def take(adapter: Adapter, name: str) -> Any:
                    used.add((adapter.folder, name))
                    return opened[adapter.folder].get_tensor(name).float()

                after = _changed(before, output.parts, take)
                if after.shape == before.shape:
                    found.append((1, float((after - before).abs().max())))
                else:
                    found.append((1, 0.0))
                weight = after
                del before, after
            weight = weight.to(dtype)
            if weight.is_floating_point() and not torch.isfinite(weight).all():
                raise UsageError(
                    f"{output.name} has NaN or Inf after merging.",
                    "check the adapter: did its training diverge?",
                )
            out.write(memoryview(weight.contiguous().view(-1).view(torch.uint8).numpy()))
        out.flush()
        os.fsync(out.fileno())
    return found


def _changed(
    before: Any, parts: list[tuple[Adapter, list[Change]]], take: Callable[[Adapter, str], Any]
) -> Any:
    """A weight in float32 with the changes of all adapters: W + sum of share * (adapter's W - W)."""
    if len(parts) == 1 and parts[0][0].share == 1.0:
        adapter, changes = parts[0]
        return _applied(before, changes, lambda name: take(adapter, name))
    after = before.clone()
    for adapter, changes in parts:
        made = _applied(before, changes, lambda name, adapter=adapter: take(adapter, name))  # type: ignore[misc]
        after += adapter.share * (made - before)
    return after


def _applied(weight: Any, changes: list[Change], take: Callable[[str], Any]) -> Any:
    """A weight in float32 with one adapter's changes, in order."""
    import torch

    for change in changes:
        if change.kind == "whole":
            weight = take(change.tensors[0])
        elif change.kind == "rows":
            weight = weight.clone()
            weight[list(change.rows)] = take(change.tensors[0])
        elif change.kind == "add":
            weight = weight + change.scale * take(change.tensors[0])
        else:
            a, b = (take(name) for name in change.tensors)
            turned = change.transposed or change.embedding
            added = change.scale * ((b @ a).T if turned else b @ a)
            weight = weight + added
            if change.magnitude:
                # DoRA (arXiv 2402.09353): each output's vector gets the trained length.
                length = torch.linalg.norm(weight, dim=0 if turned else 1)
                factor = take(change.magnitude).flatten() / length
                weight = weight * (factor if turned else factor[:, None])
    return weight
