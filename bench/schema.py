"""The published JSON schema of report.json, and the check that needs nothing installed."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any


def schema() -> dict[str, Any]:
    """`report.schema.json` (JSON Schema 2020-12)."""
    return json.loads(files("edgeft.bench").joinpath("report.schema.json").read_text(encoding="utf-8"))


def faults(value: Any) -> list[str]:
    """What makes a value no report: its schema's name and the required keys and their types, without jsonschema.

    A few lines of the schema are read (`required`, `type`, `const`, `properties`, `items`, `$ref`), so both checks agree
    on what they share.
    """
    whole = schema()
    return list(_faults(value, whole, whole, "report"))


KINDS: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}


def _faults(value: Any, rule: dict[str, Any], whole: dict[str, Any], where: str) -> Any:
    if "$ref" in rule:
        rule = whole["$defs"][rule["$ref"].rpartition("/")[2]]
    if "const" in rule and value != rule["const"]:
        yield f"{where} is {value!r} and not {rule['const']!r}"
    kinds = rule.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    fits = [isinstance(value, KINDS[k]) and (k == "boolean" or not isinstance(value, bool)) for k in kinds]
    if kinds and not any(fits):
        yield f"{where} is of the type {type(value).__name__} and not {' or '.join(kinds)}"
        return
    if isinstance(value, dict):
        yield from (f"{where} has no '{key}'" for key in rule.get("required", []) if key not in value)
        for key, inner in rule.get("properties", {}).items():
            if key in value:
                yield from _faults(value[key], inner, whole, f"{where}.{key}")
    if isinstance(value, list) and "items" in rule:
        for index, entry in enumerate(value):
            yield from _faults(entry, rule["items"], whole, f"{where}[{index}]")
