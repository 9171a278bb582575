"""The importance matrix as a file: the mean of each layer's squared inputs, column by column, over calibration rows.

That is what llama.cpp's llama-imatrix collects, and the file is llama.cpp's own (a GGUF of type "imatrix"), so its
tools can use it. `moments.py` computes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHUNK_TOKENS = 1024
KEY = "edgeft.made_of"


def write(out: Path, sums: dict[str, Any], counts: dict[str, int], facts: dict[str, Any]) -> None:
    """llama.cpp's file: `NAME.in_sum2` [columns, 1] and `NAME.counts` [1, 1], both float32, and edgeft's own key."""
    import numpy as np
    from gguf import GGUFWriter

    from edgeft.files import publish

    partial = out.with_suffix(".part")
    writer = GGUFWriter(partial, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", facts["datasets"])
    writer.add_uint32("imatrix.chunk_count", facts["chunks"])
    writer.add_uint32("imatrix.chunk_size", CHUNK_TOKENS)
    writer.add_string(KEY, facts["key"])
    for name in sorted(sums):
        writer.add_tensor(f"{name}.in_sum2", sums[name].reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.array([[counts[name]]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    publish(partial, out)


def made_of(path: Path) -> str | None:
    """The key of a matrix that edgeft made; None for others."""
    from gguf import GGUFReader

    field = GGUFReader(path).fields.get(KEY)
    return str(field.contents()) if field else None


def read(path: Path) -> dict[str, Any]:
    """Tensor name -> mean of the squared inputs, float32 [columns]."""
    import numpy as np
    from gguf import GGUFReader

    found = {t.name: np.asarray(t.data, dtype=np.float32).reshape(-1) for t in GGUFReader(path).tensors}
    return {
        name.removesuffix(".in_sum2"): values
        / max(float(found[name.removesuffix(".in_sum2") + ".counts"][0]), 1.0)
        for name, values in found.items()
        if name.endswith(".in_sum2")
    }
