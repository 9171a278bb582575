"""Types of single tensors of a GGUF file: by class, as `ffn_down=q6_k`, or by name out of a list."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from edgeft.compress import blocks
from edgeft.errors import UsageError, unknown
from edgeft.files import read_json, sha256_json

TENSOR_TYPES = ("f32", "f16", "bf16", *blocks.LAYOUTS)
# What llama.cpp calls the tensors of a layer, and the two ends.
TENSOR_CLASSES = (
    "token_embd", "output", "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down",
    "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps",
)  # fmt: skip


class TensorTypes(dict[str, str]):
    """Tensor name -> type; a short hash where it is part of a name, `text` what `read_types` reads back."""

    def __str__(self) -> str:
        return sha256_json(self)[:8]

    @property
    def text(self) -> str:
        """name:type;name:type…"""
        return ";".join(f"{name}:{kind}" for name, kind in self.items())


def read_types(text: str) -> TensorTypes:
    """A JSON file of tensor name -> type, or the same as `name:type;name:type`.

    Raises UsageError for a type that is none, ValueError where it is neither.
    """
    inline = not Path(text).is_file()
    found = dict(pair.split(":", 1) for pair in text.split(";")) if inline else read_json(Path(text))
    for name, kind in found.items() if isinstance(found, dict) else [("the file", found)]:
        if kind not in TENSOR_TYPES:
            raise UsageError(f"types: {name} is to be {kind!r}, which is no type.", ", ".join(TENSOR_TYPES))
    return TensorTypes(sorted(found.items()))


def refuse_unmatched(options: dict[str, Any], names: Collection[str]) -> None:
    """Raise UsageError for a tensor or a class of tensors that is given a type and is not in the file."""
    for name in options.get("types", {}):
        if name not in names:
            raise unknown("types: the tensor", name, sorted(names), "gguf-dump FILE lists them")
    there = [c for c in TENSOR_CLASSES if any(re.search(_of_class(c), name) for name in names)]
    for word in TENSOR_CLASSES:
        if word in options and word not in there:
            raise UsageError(
                f"{word}={options[word]}: this model has no such tensor.", f"it has {', '.join(there)}"
            )


def _of_class(word: str) -> str:
    return rf"(^|[.]){word}[.]weight$"


def patterns(options: dict[str, Any]) -> list[list[str]]:
    """[regular expression over tensor names, type] of a format's options; the first that fits decides, as llama.cpp reads them."""
    single = [[f"^{name.replace('.', '[.]')}$", kind] for name, kind in options.get("types", {}).items()]
    classes = [[_of_class(name), options[name]] for name in TENSOR_CLASSES if name in options]
    return [*single, *classes]
