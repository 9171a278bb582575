"""What `--fit` chooses by: each candidate's size, KLD, retention and speed against what was wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft import console
from edgeft.compress import gate
from edgeft.compress.recipe import Recipe
from edgeft.errors import UsageError
from edgeft.rows import load_rows
from edgeft.types import Artifact

SPEED_RUNS, SPEED_TOKENS, SPEED_PROMPT_TOKENS = 3, 32, 64


@dataclass(frozen=True)
class Wanted:
    """What has to hold: bytes of all files, adapter-gain retention (a share), decode tok/s of one stream."""

    size_bytes: int
    min_retention: float | None = None
    min_tok_per_s: float | None = None
    profile: str | None = None  # a box that is not this one: its tok/s is predicted, not measured


def row_of(artifact: Artifact, out: Path, wanted: Wanted, recipe: Recipe) -> dict[str, Any]:
    """A candidate's line: size, the gate's figures on the rows to choose on, tok/s."""
    checks = {line["check"]: line for line in artifact.checks[gate.NAME].get("checks", [])}
    kld, kept = checks.get(f"kld {gate.OWN}", {}), checks.get("retention", {})
    speed, how = tok_per_s(artifact, out, wanted, recipe)
    return {
        "id": artifact.id,
        "size_bytes": artifact.size_bytes,
        "bits_per_weight": artifact.bits_per_weight,
        "kld_nats": kld.get("seen"),
        "kld_ci95": kld.get("ci95"),
        "retention": kept.get("seen"),
        "retention_ci95": kept.get("ci95"),
        "tok_per_s": speed,
        "tok_per_s_is": how,
    }


def tok_per_s(artifact: Artifact, out: Path, wanted: Wanted, recipe: Recipe) -> tuple[float, str]:
    """(decode tok/s of one stream, measured here or predicted for the profile).

    The prediction is the profile's bandwidth over the file's bytes, which is the most that memory allows.
    """
    if wanted.profile:
        bandwidth = bandwidth_of(wanted.profile)
        return bandwidth * 1e9 / artifact.size_bytes, f"at most, predicted from {wanted.profile}'s bandwidth"
    from edgeft.bench import speed
    from edgeft.bench.callers import caller
    from edgeft.bench.targets import find

    assert recipe.eval
    with console.step(f"timing {artifact.id}"):
        (target,) = find([out / artifact.id], [])
        with caller(target, out / ".work" / "fit-speed.log", recipe.threads, 1024) as (ask, _):
            rows = load_rows(recipe.eval)
            found = speed.alone(ask, rows, speed.Point(SPEED_PROMPT_TOKENS, SPEED_TOKENS), SPEED_RUNS)
    return found["decode_tok_per_s"]["p50"], "measured here"


def bandwidth_of(profile: str) -> float:
    """GB/s that tok/s is predicted from. Raises UsageError for a profile that is not known or has none."""
    from edgeft.profiles import get_profile

    bandwidth = get_profile(profile).usable_bandwidth_gb_per_s
    if bandwidth is None:
        raise UsageError(
            f"the profile {profile} has no bandwidth, which --fit predicts tok/s from.",
            "edgeft profiles list; name another",
        )
    return bandwidth


def choose(rows: Sequence[dict[str, Any]], wanted: Wanted) -> dict[str, Any] | None:
    """The candidate of least KLD that holds what is wanted."""
    held = [row for row in rows if not broken(row, wanted)]
    return min(held, key=lambda row: (row["kld_nats"], row["size_bytes"]), default=None)


def broken(row: dict[str, Any], wanted: Wanted) -> list[str]:
    """What a candidate does not hold, in words."""
    found = []
    if row["size_bytes"] > wanted.size_bytes:
        found.append(f"{row['size_bytes'] / 1e6:.1f} MB")
    if row["kld_nats"] is None:
        found.append("KLD not measured")
    if wanted.min_retention is not None and (
        row["retention"] is None or row["retention"] < wanted.min_retention
    ):
        found.append(
            "retention not measured" if row["retention"] is None else f"retention {row['retention']:.3f}"
        )
    if wanted.min_tok_per_s is not None and row["tok_per_s"] < wanted.min_tok_per_s:
        found.append(f"{row['tok_per_s']:.1f} tok/s")
    return found
