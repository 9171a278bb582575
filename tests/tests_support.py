"""Functions that tests run in child processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def dump_logits(engine: str, folder: str, ids: list[list[int]], out: str, **more: Any) -> dict[str, Any]:
    """Write an engine's logits of `ids` to an .npz file, one array a row; `more` are options of the engine's."""
    import numpy as np

    from edgeft.engines import engine as module_of

    found = module_of(engine).logits(Path(folder), ids, {"threads": 2, "context": 512, "exact": True, **more})
    np.savez(out, **{str(i): values for i, values in enumerate(found)})
    return {}
