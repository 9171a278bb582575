"""`edgeft compress --fit`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft import console
from edgeft.errors import GateError, UsageError

if TYPE_CHECKING:
    from edgeft.compress.fit import Wanted

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
FRONTIER_LINES = 10


def bytes_of(text: str) -> int:
    """100MB, 95.5MiB, 1.2GB or a number of bytes, more than none. Raises UsageError."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([kmg]?i?)b?", text.strip().lower())
    size_bytes = int(float(found[1]) * UNITS[found[2]]) if found and found[2] in UNITS else 0
    if size_bytes < 1:
        raise UsageError(f"--fit takes a size, and '{text}' is none.", "--fit 100MB, --fit 1.2GiB")
    return size_bytes


def wanted_of(size: str, min_retention: float | None, min_tps: float | None, profile: str | None) -> Wanted:
    """What the words ask for. Raises UsageError for a wrong size."""
    from edgeft.compress.fit import Wanted

    return Wanted(bytes_of(size), min_retention, min_tps, profile)


def run(base: Path, sources: list[tuple[Path, float]], recipe: Any, wanted: Wanted) -> None:
    """Fit, and print the candidates and the frontier, also where none of them will do."""
    from edgeft.compress.fit import fit

    try:
        found = fit(base, sources, recipe, wanted)
    except GateError as error:
        if "fit" in error.details:
            _show(error.details["fit"])
        raise
    _show(found)
    lines = [line for line in found["report"]["checks"] if line.get("seen") is not None]
    console.table(
        ["the chosen one, on rows it was not chosen by", "figure", "95 %"],
        [
            [line["check"], f"{line['seen']:.4f}", " to ".join(f"{e:.4f}" for e in line.get("ci95") or [])]
            for line in lines
        ],
    )
    console.note(
        f"  tok/s: {found['candidates'][0]['tok_per_s_is']}; the frontier is in {recipe.out / 'fit.svg'}"
    )


def _show(found: Mapping[str, Any]) -> None:
    console.result(found)
    console.table(
        ["candidate", "MB", "bits/weight", "KLD", "retention", "tok/s", ""],
        [
            [
                row["id"],
                f"{row['size_bytes'] / 1e6:.1f}",
                f"{row['bits_per_weight']:.2f}",
                "n/a" if row["kld_nats"] is None else f"{row['kld_nats']:.4f}",
                "n/a" if row["retention"] is None else f"{row['retention']:.3f}",
                f"{row['tok_per_s']:.1f}",
                "chosen" if row["id"] == found["chosen"] else "",
            ]
            for row in found["candidates"]
        ],
    )
    console.table(
        ["frontier: MB", "estimated KL", "bits/weight"],
        [
            [
                f"{point['size_bytes'] / 1e6:.1f}",
                f"{point['estimated_kl_nats']:.4f}",
                f"{point['bits_per_weight']:.2f}",
            ]
            for point in thinned(found["frontier"])
        ],
    )


def thinned(points: Sequence[Any], lines: int = FRONTIER_LINES) -> list[Any]:
    """About so many points, evenly spread, the first and the last among them."""
    if len(points) <= lines:
        return list(points)
    return [points[index * (len(points) - 1) // (lines - 1)] for index in range(lines)]
