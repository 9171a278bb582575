"""`edgeft compress --fit`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from edgeft import console
from edgeft.errors import UsageError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def bytes_of(text: str) -> int:
    """100MB, 95.5MiB, 1.2GB or a number of bytes. Raises UsageError."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([kmg]?i?)b?", text.strip().lower())
    if not found or found[2] not in UNITS:
        raise UsageError(f"--fit takes a size, and '{text}' is none.", "--fit 100MB, --fit 1.2GiB")
    return int(float(found[1]) * UNITS[found[2]])


def run(
    base: Path, sources: list[tuple[Path, float]], recipe: Any, size: str, min_retention: float | None,
    min_tps: float | None, profile: str | None,
) -> None:  # fmt: skip
    """Fit, and print the candidates."""
    from edgeft.compress.fit import Wanted, fit

    if profile:
        from edgeft.profiles import get_profile

        get_profile(profile)
    found = fit(base, sources, recipe, Wanted(bytes_of(size), min_retention, min_tps, profile))
    console.result(found)
    console.table(
        ["candidate", "MB", "bits/weight", "KLD", "retention", "tok/s", ""],
        [
            [
                row["id"],
                f"{row['size_bytes'] / 1e6:.1f}",
                f"{row['bits_per_weight']:.2f}",
                f"{row['kld_nats']:.4f}",
                "n/a" if row["retention"] is None else f"{row['retention']:.3f}",
                f"{row['tok_per_s']:.1f}",
                "chosen" if row["id"] == found["chosen"] else "",
            ]
            for row in found["candidates"]
        ],
    )
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
