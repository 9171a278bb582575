"""Lines of reports of `edgeft bench`, and of tables of one's own, as one shape."""

from __future__ import annotations

import csv
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from edgeft.errors import UsageError
from edgeft.router.features import content_text
from edgeft.types import BenchReport

BENCH = "edgeft bench dist/ --tasks rows.jsonl --out report/"


def results_of(place: Path) -> list[dict[str, Any]]:
    """The models that a report or a table knows, with what it says of them."""
    if place.is_file():
        served = ("litellm:", "openai:")
        return [{"id": n, "kind": "api" if n.startswith(served) else "table"} for n in _table_names(place)]
    if not (place / "report.json").is_file():
        raise UsageError(f"{place} holds no report.json.", BENCH)
    return BenchReport.load(place / "report.json").results


def items_of(place: Path) -> list[dict[str, Any]]:
    """Its answers, one a model and row. Raises UsageError naming the first line that is none."""
    if place.is_file():
        return _table_items(place)
    path = place / "items.jsonl"
    if not path.is_file():
        raise UsageError(f"{place} holds no items.jsonl.", BENCH)
    items = []
    for number, item in _json_lines(path):
        try:
            item["item_id"], item["model_id"], item["prompt_hash"], item["request"]
        except (KeyError, TypeError) as error:
            raise _not_an_item(path, number, error) from None
        items.append(item)
    return items


def _json_lines(path: Path) -> list[tuple[int, Any]]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                found.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise _not_an_item(path, number, error) from None
    return found


def _not_an_item(path: Path, number: int, error: Exception) -> UsageError:
    return UsageError(
        f"{path} line {number} is not an item of a report: {type(error).__name__} {error}.",
        f"sed -n {number}p {path}",
    )


def _table(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a CSV or JSONL table as flat dicts with their line numbers: see docs/routing.md for the columns."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return [(number, dict(row)) for number, row in enumerate(csv.DictReader(file), 2)]
    if path.suffix == ".jsonl":
        return _json_lines(path)
    raise UsageError(f"{path} is no folder of `edgeft bench`, and neither .csv nor .jsonl.", BENCH)


def _table_names(path: Path) -> list[str]:
    columns = dict.fromkeys(name for _, row in _table(path) for name in row)
    return [column.removesuffix(":score") for column in columns if column.endswith(":score")]


def _table_items(path: Path) -> list[dict[str, Any]]:
    items, names = [], _table_names(path)
    for number, row in _table(path):
        request = row.get("request")
        if not isinstance(request, str | list) or not request or not names:
            raise UsageError(
                f"{path} line {number}: a table needs the column 'request', and 'NAME:score' for every candidate.",
                "head -2 of it, beside docs/routing.md",
            )
        text = content_text(request)
        digest = sha256(text.encode(errors="surrogatepass")).hexdigest()
        for name in names:
            score = _number(row.get(f"{name}:score"), path, number, f"{name}:score")
            if score is not None and not 0 <= score <= 1:
                raise UsageError(
                    f"{path} line {number}: {name}:score is {score:g}, and 0 to 1 is needed.",
                    f"sed -n {number}p {path}",
                )
            items.append(
                {
                    "item_id": str(row.get("id") or f"{path.name}:{number}"), "model_id": name, "prompt_hash": digest, "request": text,
                    "score": score, "group": row.get("group"), "output": row.get(f"{name}:output"),
                    **{k: _number(row.get(f"{name}:{k}"), path, number, f"{name}:{k}") for k in ("output_tokens", "prompt_tokens", "e2e_s")},
                }
            )  # fmt: skip
    return items


def _number(value: Any, path: Path, number: int, name: str) -> float | None:
    if value in (None, ""):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UsageError(f"{path} line {number}: {name} is no number.", f"sed -n {number}p {path}") from None
