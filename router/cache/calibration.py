"""From pairs of questions to the file that lets the semantic cache be used: a threshold that keeps wrong hits within a budget."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from edgeft.errors import UsageError
from edgeft.files import read_json, sha256_file, write_json
from edgeft.router.cache.semantic import calibrate, pairs_likeness, passed_guards

SCHEMA = "edgeft/semantic-cache@1"
AGAIN = "edgeft route cache-calibrate PAIRS.jsonl --encoder DIR --out semantic.json"


def calibrate_file(pairs: Path, encoder: Path, budget: float, delta: float, out: Path) -> dict[str, Any]:
    """Calibrate on JSON lines {"one", "two", "same": true or false} and write the file.

    Raises UsageError for a line of another shape, Inconclusive where no threshold holds on so many pairs: nothing is written then.
    """
    from edgeft.router.embedding import load_encoder, read_spec

    spec = read_spec(encoder)
    rows = read_pairs(pairs)
    encode = load_encoder(spec)
    texts = sorted({text for one, two, _ in rows for text in (one, two)})
    vectors = {text: encode(text) for text in texts}
    likeness = pairs_likeness(
        np.array([vectors[one] for one, _, _ in rows]), np.array([vectors[two] for _, two, _ in rows])
    )
    right = np.array([same for *_, same in rows])
    found = calibrate(likeness, right, passed_guards([(one, two) for one, two, _ in rows]), budget, delta)
    value = {
        "schema": SCHEMA, "date": datetime.now(UTC).isoformat(timespec="seconds"), "encoder": spec, **asdict(found),
        "pairs": len(rows), "pairs_same": int(right.sum()), "pairs_sha256": sha256_file(pairs),
    }  # fmt: skip
    write_json(out, value)
    return value


def read_pairs(path: Path) -> list[tuple[str, str, bool]]:
    """(one, two, same) of each line. Raises UsageError naming the first wrong one."""
    if not path.is_file():
        raise UsageError(f"there is no file {path}.", AGAIN)
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            one, two, same = value["one"], value["two"], value["same"]
            if not (isinstance(one, str) and isinstance(two, str) and isinstance(same, bool)):
                raise TypeError
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UsageError(
                f'{path} line {number} is not {{"one": …, "two": …, "same": true or false}}.',
                f"sed -n {number}p {path}",
            ) from None
        rows.append((one, two, same))
    if len({same for *_, same in rows}) < 2:
        raise UsageError(f"{path} needs pairs that mean the same and pairs that don't.", AGAIN)
    return rows


def read(path: Path) -> dict[str, Any]:
    """A file that `calibrate_file` wrote. Raises UsageError for any other."""
    value: dict[str, Any] = read_json(path)
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        raise UsageError(f"{path} is no calibration of the semantic cache.", AGAIN)
    return value
