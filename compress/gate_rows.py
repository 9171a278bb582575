"""The rows that the gate asks: of --eval, or a part of the calibration rows that calibration then does not see."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from edgeft.files import sha256_json, write_jsonl
from edgeft.rows import Row, load_rows, refuse_seen, row_hash

KIND = "select"
KEPT_ASIDE = 0.25  # of the calibration rows


@dataclass(frozen=True)
class GateRows:
    """Rows of kind `select`, where they come from, and what is left to calibrate on."""

    rows: list[Row]
    source: str | None  # how the manifest calls them
    why_none: str = ""
    calibrating: list[Row] | None = None  # None: the calibration file as it is

    @property
    def hashes(self) -> list[str]:
        """What a manifest records of the rows."""
        return [row_hash(row) for row in self.rows]


def choose(
    evaluation: Path | None, calibration: Path | None, seen: dict[str, list[str]], allow_seen_rows: bool
) -> GateRows:
    """The gate's rows. `seen`: kind of step -> hashes of the rows that the adapters saw.

    Raises UsageError for rows of --eval that training or calibration saw.
    """
    others = {kind: hashes for kind, hashes in seen.items() if kind != KIND}
    if evaluation:
        rows = load_rows(evaluation)
        if not allow_seen_rows:
            if calibration:
                used = [row_hash(row) for row in load_rows(calibration)]
                others["calibrate"] = [*others.get("calibrate", []), *used]
            refuse_seen(rows, others, "gate", evaluation)
        return GateRows(rows, f"--eval {evaluation.name}")
    if calibration is None:
        return GateRows([], None, "no rows were given: --eval rows.jsonl, or --calibration to keep a part of")
    rows = load_rows(calibration)
    aside = kept_aside(rows)
    known = set() if allow_seen_rows else {digest for hashes in others.values() for digest in hashes}
    fresh = [row for row in aside if row_hash(row) not in known]
    taken = {row_hash(row) for row in fresh}
    left = [row for row in rows if row_hash(row) not in taken]
    if not fresh or not left:
        why = (
            "the adapter has seen all of the calibration rows"
            if aside
            else "there are too few calibration rows to keep a part of"
        )
        return GateRows([], None, f"{why}; --eval rows.jsonl gives others")
    return GateRows(
        fresh, f"{len(fresh)} of {len(rows)} rows of --calibration {calibration.name}, kept aside", "", left
    )


def kept_aside(rows: list[Row]) -> list[Row]:
    """About a quarter of the rows, by hash; near-duplicates stay on one side, and the file's order does not matter."""
    return [row for row, name in zip(rows, cluster_names(rows), strict=True) if _place(name) < KEPT_ASIDE]


def cluster_names(rows: list[Row]) -> list[str]:
    """For each row the least hash among its near-duplicates: rows of one name belong on one side."""
    from edgeft.tune.rows import near_duplicate_clusters

    clusters = near_duplicate_clusters([str(row["messages"][-2]["content"]) for row in rows])
    first: dict[int, str] = {}
    for row, cluster in zip(rows, clusters, strict=True):
        first[cluster] = min(first.get(cluster, "~"), row_hash(row))
    return [first[cluster] for cluster in clusters]


def _place(text: str) -> float:
    """A text's fixed place between 0 and 1."""
    return int.from_bytes(hashlib.sha256(f"gate {text}".encode()).digest()[:8], "big") / 2**64


def calibration_file(found: GateRows, calibration: Path | None, work: Path) -> Path | None:
    """The file to calibrate on: the one given, or what is left of it, written under a name made of its content."""
    if calibration is None or found.calibrating is None:
        return calibration
    key = sha256_json([row_hash(row) for row in found.calibrating])[:16]
    target = work / f"calibrate-{key}" / calibration.name
    if not target.is_file():
        write_jsonl(target, found.calibrating)
    return target.resolve()
