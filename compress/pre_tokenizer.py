"""Does llama.cpp's converter know how a tokenizer cuts text? Asked before the merge: it says so itself only after.

It tells pre-tokenizers of byte-level BPE apart by a hash of the ids that one text becomes (get_vocab_base_pre in its
conversion/base.py), and gives up on one that it does not list.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from edgeft.compress.tokenizers import brought
from edgeft.errors import UsageError

SOURCE, FUNCTION, TEXT = "conversion/base.py", "get_vocab_base_pre", "chktxt"
# Whose converters fall back to that function for every byte-level BPE.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite")
HASH_LENGTH = 64  # of a SHA-256 in hexadecimal


def refuse(base: Path, adapters: Sequence[Path], converter: Path) -> None:
    """Raise UsageError where the converter in the folder `converter` would refuse the tokenizer that the merged model will have.

    Says nothing of what it can't judge: other kinds of tokenizer, other architectures, a converter that is not there yet.
    """
    source = converter / SOURCE
    file = brought(base, adapters)
    if file is None or not source.is_file() or not judged(base, file):
        return
    asked = asked_by(source.read_text(encoding="utf-8"))
    if asked is None:
        return
    text, known = asked
    digest = hash_of(file, text)
    if digest not in known:
        raise UsageError(
            f"llama.cpp's converter does not know how {file} cuts text (its hash {digest[:12]}…, {len(known)} are known).",
            "--to onnx:int8 or gptq:4, or a newer llama.cpp by EDGEFT_CONVERTER",
        )


def judged(base: Path, file: Path) -> bool:
    """True for byte-level BPE of an architecture whose converter asks for the hash."""
    try:
        architecture = json.loads((base / "config.json").read_text(encoding="utf-8")).get("model_type")
        model = json.loads(file.read_text(encoding="utf-8"))["model"]
        plain = model.get("type") == "BPE" and not model.get("byte_fallback")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return plain and architecture in ARCHITECTURES and not (base / "tokenizer.model").is_file()


def asked_by(source: str) -> tuple[str, set[str]] | None:
    """(the text that is hashed, the hashes that are known) of the converter's source; None where it is written another way."""
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef) and function.name == FUNCTION:
            texts = [
                node.value.value
                for node in ast.walk(function)
                if isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name)
                and node.targets[0].id == TEXT
                and isinstance(node.value, ast.Constant)
            ]
            constants = (node.value for node in ast.walk(function) if isinstance(node, ast.Constant))
            known = {c for c in constants if isinstance(c, str) and len(c) == HASH_LENGTH}
            return (str(texts[0]), known) if texts and known else None
    return None


def hash_of(file: Path, text: str) -> str:
    """What the converter would compute of a tokenizer.json."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return hashlib.sha256(str(tokenizer.encode(text).ids).encode()).hexdigest()
