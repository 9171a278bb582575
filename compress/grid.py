"""Do a base's weights sit on a coarse grid?

A model dequantized from a 4-bit file holds at most 16 different values in each block of its rows. A format of about that
width can find the same grid again and round every weight back to where it was before the adapter was added.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from edgeft.compress.adapter import header_of

TENSORS, ROWS, BLOCK = 8, 32, 32
LAYER = re.compile(r"\.\d+\.")  # a matrix of a layer: embeddings are often of another type
# A weight's bits as integers: whether two are the same needs no arithmetic.
WIDTHS = {"F64": np.uint64, "F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}
# 32 values on a grid of 32 levels are about 20 different ones; of a 16-bit float more than 28.
FIVE_BITS_MEDIAN = 24
# Blocks of 32 that place their levels between the block's own extremes find an affine grid exactly.
SAME_BLOCKS = ("q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl")


def grid_of(base: Path) -> dict[str, Any] | None:
    """`bits` of the grid that most sampled matrices sit on, with what was seen; None where they sit on none.

    Samples TENSORS matrices, ROWS rows each; reads some MB.
    """
    found = [
        (name, bits, median)
        for file, name, entry, start in _sample(base)
        for bits, median in [_bits(_blocks(file, entry, start))]
    ]
    coarse = [item for item in found if item[1]]
    if not found or len(coarse) * 2 <= len(found):
        return None
    return {
        "bits": max(int(bits or 0) for _, bits, _ in coarse),
        "matrices_on_a_grid": len(coarse),
        "matrices_sampled": len(found),
        "distinct_values_in_a_block": float(np.median([median for _, _, median in coarse])),
        "block": BLOCK,
    }


def risky(grid: dict[str, Any], specs: list[Any]) -> list[str]:
    """Of the asked formats those about as wide as the grid or narrower, the ones with its very blocks first."""
    from edgeft.compress.gate_limits import bits_of

    near = [spec for spec in specs if bits_of(spec.variant) <= grid["bits"] + 1]
    return [str(spec) for spec in sorted(near, key=lambda spec: spec.variant not in SAME_BLOCKS)]


def warning(grid: dict[str, Any], specs: list[Any]) -> str | None:
    """What `compress` says beforehand, or None where no asked format is near the grid."""
    near = risky(grid, specs)
    if not near:
        return None
    return (
        f"the base's weights sit on a {grid['bits']}-bit grid ({grid['distinct_values_in_a_block']:.0f} different values in a block of "
        f"{BLOCK}): it was dequantized from a quantized file. A format about as wide may round the adapter away; risky: {', '.join(near)}"
    )


def _sample(base: Path) -> list[tuple[Path, str, dict[str, Any], int]]:
    """(file, name, header entry, where the data begins) of matrices, evenly spread over the model."""
    found = []
    for file in sorted(base.glob("*.safetensors")):
        with file.open("rb") as opened:
            start = 8 + int.from_bytes(opened.read(8), "little")
        for name, entry in header_of(file).items():
            shape = entry["shape"]
            if len(shape) == 2 and entry["dtype"] in WIDTHS and shape[1] >= BLOCK and LAYER.search(name):
                found.append((file, name, entry, start))
    found.sort(key=lambda item: item[1])
    return [found[i * len(found) // TENSORS] for i in range(TENSORS)] if len(found) > TENSORS else found


def _blocks(file: Path, entry: dict[str, Any], start: int) -> Any:
    """Blocks of BLOCK neighbours in some rows of a matrix, as integers [blocks, BLOCK]."""
    rows, columns = entry["shape"]
    mapped = np.memmap(file, WIDTHS[entry["dtype"]], "r", start + entry["data_offsets"][0], (rows, columns))
    picked = np.asarray(mapped[:: max(1, rows // ROWS)][:ROWS, : columns - columns % BLOCK])
    return picked.reshape(-1, BLOCK)


def _bits(blocks: Any) -> tuple[int | None, float]:
    """(the bits of the grid that blocks sit on or None, the median number of distinct values in a block)."""
    ordered = np.sort(blocks, axis=1)
    distinct = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)
    most, median = float(np.percentile(distinct, 90)), float(np.median(distinct))
    for bits in (1, 2, 3, 4):
        if most <= 2**bits:
            return bits, median
    return (5 if median <= FIVE_BITS_MEDIAN else None), median
