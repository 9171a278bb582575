"""A GGUF file in several parts, named and marked as llama.cpp's gguf-split does: NAME-00001-of-00003.gguf and so on.

Every part has split.no, split.count and split.tensors.count; the first has the model's metadata besides. llama.cpp is
given the first and finds the others. gguf-py's own writer does the splitting.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

UNITS = {"K": 10**3, "M": 10**6, "G": 10**9}  # as llama-gguf-split and upstream's converter count them
SMALLEST_BYTES = 10**6


def read_size(text: str) -> str:
    """A size as upstream writes it, 500M or 2G. Raises ValueError for what is none or below 1M."""
    word = text.strip().upper()
    if not word[:-1].isdigit() or word[-1] not in UNITS or size_bytes(word) < SMALLEST_BYTES:
        raise ValueError(text)
    return word


OPTION = (read_size, "a size of 1M or more, as 500M or 2G")


def size_bytes(text: str) -> int:
    """500M -> 500,000,000."""
    return int(text[:-1]) * UNITS[text[-1]]


def split(file: str, max_bytes: int) -> dict[str, Any]:
    """Put parts of at most `max_bytes` of tensors in place of a GGUF file. Runs in a child process.

    A tensor that is larger by itself gets a part of its own. Where one part would do, the file stays as it is.
    Returns the number of parts.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    source = Path(file)
    reader = GGUFReader(source)
    writer = GGUFWriter(
        source, str(reader.fields["general.architecture"].contents()), split_max_size=max_bytes
    )
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue  # the writer has its own
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub_type=inner)
    if "general.alignment" in reader.fields:
        writer.data_alignment = reader.alignment
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    parts = len(writer.tensors)
    if parts > 1:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        source.unlink()
    writer.close()
    return {"parts": parts}
