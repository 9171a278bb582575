"""About how much memory a model will take, before it is loaded."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from edgeft.engines import GGUF

MB = 1_000_000
# What a process takes beside weights and context: imports and buffers. Assumed; what was measured replaces it after the first load.
FIXED_BYTES = {
    "gguf": 200 * MB, "llama_server": 150 * MB, "llama_cpp": 200 * MB, "onnx": 250 * MB, "transformers": 900 * MB,
}  # fmt: skip
SMOOTHED = "edgeft.smoothed"  # in a GGUF file's header: its channels were evened out, so that adapters of the plain model do not fit
ASSUMED_KV_BYTES = 64 << 10  # a token, where neither the file nor config.json says the shape
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


def estimated_bytes(path: Path, engine: str, tokens: int) -> int:
    """Weights on the disk, keys and values of `tokens` (all slots together) and what the engine takes beside."""
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    weights = sum(f.stat().st_size for f in files)
    if engine in GGUF:
        from edgeft.engines.gguf import model_and_adapter

        model = model_and_adapter(path)[0]
        weights += 0 if model in files else model.stat().st_size
        per_token = gguf_kv_bytes(model)
    else:
        per_token = config_kv_bytes(path, 4 if engine == "transformers" else 2)
    return int(weights + tokens * per_token + FIXED_BYTES.get(engine, 500 * MB))


def config_kv_bytes(folder: Path, bytes_each: int) -> int:
    """Bytes of keys and values a token, by a folder's config.json: 2 × layers × heads × head's width."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        heads = config["num_attention_heads"]
        width = config.get("head_dim") or config["hidden_size"] // heads
        return int(
            2
            * config["num_hidden_layers"]
            * (config.get("num_key_value_heads") or heads)
            * width
            * bytes_each
        )
    except (OSError, ValueError, KeyError, TypeError):
        return ASSUMED_KV_BYTES


def gguf_kv_bytes(file: Path) -> int:
    """The same by a GGUF file's header, keys and values as float16."""
    try:
        facts = gguf_facts(file)
        kind = facts["general.architecture"]
        heads = facts[f"{kind}.attention.head_count"]
        kv_heads = facts.get(f"{kind}.attention.head_count_kv", heads)
        width = facts[f"{kind}.embedding_length"] // heads
        key, value = (facts.get(f"{kind}.attention.{name}_length", width) for name in ("key", "value"))
        return int(facts[f"{kind}.block_count"] * kv_heads * (key + value) * 2)
    except (OSError, ValueError, KeyError, TypeError, struct.error, UnicodeDecodeError):
        return ASSUMED_KV_BYTES


def gguf_facts(file: Path) -> dict[str, Any]:
    """The header's numbers and texts, arrays left out (GGUF 2 and 3, little-endian; ggml's docs/gguf.md)."""
    with file.open("rb") as data:

        def number(kind: int) -> Any:
            return struct.unpack(f"<{FORMATS[kind]}", data.read(SIZES[kind]))[0]

        def skip_or_read(kind: int) -> Any:
            if kind == STRING:
                return data.read(number(10)).decode()
            if kind == ARRAY:
                inner, count = number(4), number(10)
                if inner in SIZES:
                    data.seek(SIZES[inner] * count, 1)
                else:
                    for _ in range(count):
                        skip_or_read(inner)
                return None
            return number(kind)

        if data.read(4) != b"GGUF" or number(4) not in (2, 3):
            raise ValueError(f"{file} is no GGUF file")
        number(10)  # tensors
        count, found = number(10), {}
        for _ in range(count):
            name = skip_or_read(STRING)
            value = skip_or_read(number(4))
            if value is not None:
                found[name] = value
        return found
