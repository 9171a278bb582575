"""Reading what a bench wrote: report.json, items.jsonl, and one result named as FOLDER or FOLDER#ID."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from edgeft.bench.compare import Side
from edgeft.bench.schema import faults
from edgeft.errors import UsageError, unknown
from edgeft.types import BenchReport


def read_report(folder: Path) -> tuple[str, BenchReport, str]:
    """(text, value, sha256) of a folder's report.json. Raises UsageError where it is no report."""
    file = folder / "report.json"
    try:
        content = file.read_bytes()
        text = content.decode()
        value = json.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"there is no file {file}.", f"ls {folder}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} cannot be read: {error}.", f"python3 -m json.tool {file}") from None
    return text, checked(value, str(file)), hashlib.sha256(content).hexdigest()


def checked(value: Any, where: str) -> BenchReport:
    """A report from its JSON. Raises UsageError naming what is missing, or a result that stands there twice."""
    found = faults(value)
    if found:
        raise UsageError(f"{where} is no bench report: {found[0]}.", "edgeft bench … --out FOLDER makes one")
    ids = [result["id"] for result in value["results"]]
    twice = next((i for i in ids if ids.count(i) > 1), None)
    if twice is not None:
        raise UsageError(
            f"{where} has two results called '{twice}'.", "edgeft bench … --out FOLDER makes one"
        )
    return BenchReport(**{k: value[k] for k in BenchReport.__dataclass_fields__ if k in value})


def read_items(folder: Path) -> list[dict[str, Any]]:
    """The lines of a folder's items.jsonl; none where there is no such file. Raises UsageError for a broken line."""
    file = folder / "items.jsonl"
    if not file.is_file():
        return []
    lines = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            whole = "item_id" in value and "model_id" in value
        except (ValueError, TypeError, RecursionError):
            whole = False
        if not whole or not isinstance(value, dict):
            raise UsageError(f"{file} line {number} is no item.", f"sed -n {number}p {file}")
        lines.append(value)
    return lines


def sides(place: str) -> list[Side]:
    """Every result of FOLDER, or the one of FOLDER#ID."""
    folder, _, wanted = place.partition("#")
    _, report, digest = read_report(Path(folder))
    return chosen(folder, report, read_items(Path(folder)), digest, wanted or None)


def chosen(
    name: str, report: BenchReport, items: list[dict[str, Any]], digest: str, wanted: str | None
) -> list[Side]:
    """The sides of a report: all results, or the one called `wanted`. Raises UsageError where there is none."""
    ids = [result["id"] for result in report.results]
    if wanted is not None and wanted not in ids:
        raise unknown(
            f"{name}: the result", wanted, ids, f"edgeft bench compare {name}#{ids[0] if ids else 'ID'} …"
        )
    if not ids:
        raise UsageError(f"{name} has no results.", f"less {name}/report.json")
    lines: dict[str, list[dict[str, Any]]] = {}
    for line in items:
        lines.setdefault(line["model_id"], []).append(line)
    return [
        Side(f"{name}#{r['id']}", report, r, lines.get(r["id"], []), digest)
        for r in report.results
        if wanted in (None, r["id"])
    ]


def pairs(a: list[Side], b: list[Side]) -> list[tuple[Side, Side]]:
    """What is held against what: one against each of many, or results of the same id. A result never against itself."""
    one = len(a) == 1 or len(b) == 1
    found = [(x, y) for x in a for y in b if one or x.result["id"] == y.result["id"]]
    found = [(x, y) for x, y in found if _key(x) != _key(y)]
    if not found:
        known = ", ".join(s.name for s in [*a, *b][:8])
        raise UsageError(f"there is nothing to compare: {known}.", "edgeft bench compare FOLDER#ID FOLDER#ID")
    return found


def _key(side: Side) -> tuple[str | None, str]:
    return side.report_sha256, side.result["id"]
