"""A figure as a scenario writes it: a number, or a map of value, range and what it rests on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import date
from typing import Any

from edgeft.errors import UsageError, unknown
from edgeft.tco.cells import ASSUMED, LIST_PRICE, MEASURED
from edgeft.tco.figures import Figure
from edgeft.tco.inputs import INPUTS

PRICE_DAYS = 366  # a price by hand that is older has expired
FIGURE = ("value", "range", "why", "source", "as_of", "measured")


def written(key: str, name: str, value: Any, file: str, today: date) -> Figure:
    """A figure as a scenario writes it: a number, or a map of value, range and what it rests on."""
    i, where = INPUTS[name], f"'{key}'"
    if not isinstance(value, dict):
        return Figure(
            key,
            number(value, where, file, i),
            None,
            ASSUMED,
            "the scenario, without a range",
            i.bounds,
        )
    known(value, FIGURE, f"{key}: the key", file)
    amount = number(value.get("value"), where, file, i)
    ends: Any = None
    if value.get("range") is not None:
        pair = value["range"]
        if not isinstance(pair, list) or len(pair) != 2:
            raise UsageError(
                f"the range of {where} in {file} is {pair!r}, not [P10, P90].", "range: [80, 120]"
            )
        ends = tuple(number(end, f"the range of {where}", file, i, whole=False) for end in pair)
        if not ends[0] <= amount <= ends[1]:
            raise UsageError(
                f"the range of {where} in {file} is {pair}, which does not hold its value {amount:g}.",
                "P10 below the value, P90 above it",
            )
    if value.get("measured"):
        return Figure(key, amount, ends, MEASURED, f"{value['measured']}, as the scenario says", i.bounds)
    if value.get("source"):
        return _priced(key, amount, ends, value, i.bounds, file, today)
    return Figure(
        key, amount, ends, ASSUMED, str(value.get("why") or "the scenario, without a reason"), i.bounds
    )


def _priced(
    key: str, number: float, ends: Any, value: Mapping[str, Any], bounds: Any, file: str, today: date
) -> Figure:
    """A list price: it needs its date, and has none left when that is too long ago."""
    as_of = value.get("as_of")
    if as_of is None:
        raise UsageError(f"'{key}' in {file} has a source and no date.", "as_of: 2026-11-25")
    if not isinstance(as_of, date):
        raise UsageError(f"'as_of' of '{key}' in {file} is {as_of!r}, not a date.", "as_of: 2026-11-25")
    text = f"{value['source']}, as of {as_of}"
    if (today - as_of).days > PRICE_DAYS:
        return Figure(key, None, None, LIST_PRICE, f"{key} has expired: {text}", bounds)
    return Figure(key, number, ends, LIST_PRICE, text, bounds)


def known(value: Mapping[Any, Any], allowed: tuple[str, ...], kind: str, where: str) -> None:
    """Raise UsageError for a key that is not allowed, with the nearest one that is."""
    for key in value:
        if key not in allowed:
            raise unknown(kind, str(key), allowed, f"edit {where}; docs/tco.md lists what it may hold")


def number(value: Any, what: str, where: str, i: Any, whole: bool = True) -> float:
    """A number within the input's bounds. Raises UsageError that says what was seen."""
    low, high = i.bounds
    good = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and not math.isnan(value)
        and abs(value) != math.inf
    )
    if not good or not low <= value <= high or (whole and i.whole and value != int(value)):
        need = "a whole number" if i.whole else "a number"
        span = f"of {low:g} or more" if high == math.inf else f"from {low:g} to {high:g}"
        raise UsageError(
            f"{what} in {where} is {value!r}, and {need} {span} is needed.",
            f"{i.about}: change it to such a number",
        )
    return float(value)
