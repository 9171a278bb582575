"""Payments month by month, and what follows from them: cumulative cost, net present value, break-even."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeft.tco import columns, formulas
from edgeft.tco.columns import KINDS
from edgeft.tco.figures import Values
from edgeft.tco.formulas import Number
from edgeft.tco.inputs import BOXES, ROUTED


def payments(kind: str, v: Values) -> Any:
    """Cash that leaves, USD, array [months + 1, draws]: row 0 before the first request, row m at the end of month m.

    Requests of month m are Q*(1+g)^(m-1), API prices those of m - 1 months from now. Boxes that the next month needs are bought at
    the end of this one; a box is bought again when its life is over, against what the old one brings; a version of the model is made
    again when its life is over. No capital recovery, or hardware counts twice.
    """
    k, months = KINDS[kind], int(v["months"])
    fall, rows = columns.falls(kind, v), [columns.upfront(kind, v)]
    batches, life, rest = _hardware(kind, v)
    version, version_life = _versions(kind, v)
    for month in range(1, months + 1):
        now = in_month(v, month)
        if month == 1 or now is not v:
            steady, energy, spend = k.steady(now), k.energy(now), k.spend(now)
        paid = steady + energy + spend * formulas.price_factor(fall, month - 1)
        if month < months:
            for begun, price in batches:
                if begun and begun == month:
                    paid = paid + price
                elif begun < month:
                    paid = paid + _due(month - begun, life) * price * (1 - rest)
            for cost, every in zip(version, version_life, strict=True):
                paid = paid + _due(month, every) * cost
        rows.append(paid)
    return np.stack(np.broadcast_arrays(*rows)).astype(float)


def in_month(v: Values, month: int) -> Values:
    """The figures with the requests of a month, the first of which is 1; `v` itself where nothing grows."""
    growth = v["growth_per_month"]
    if not np.any(growth):
        return v
    return v.but(requests_per_month=v["requests_per_month"] * formulas.growth_factor(growth, month))


def _hardware(kind: str, v: Values) -> tuple[list[tuple[int, Number]], Number, Number]:
    """([(month at whose end they are bought, USD)], months of their life, share that an old one brings); none where none is bought."""
    of = columns.local(v) if kind == ROUTED else v
    if "price_usd" not in of.figures or kind not in (*BOXES, ROUTED):
        return [], float("inf"), 0.0
    owned = KINDS[kind].upfront_hardware(v)
    batches = [(0, owned)]
    for month in range(1, int(v["months"])) if np.any(v["growth_per_month"]) else ():
        needed = KINDS[kind].upfront_hardware(in_month(v, month + 1))
        if np.any(needed != owned):
            batches.append((month, needed - owned))
        owned = needed
    return batches, of["lifetime_years"] * 12, of["residual_share"]


def _versions(kind: str, v: Values) -> tuple[list[Number], list[Number]]:
    parts = [v, v.part("local")] if kind == ROUTED else [v]
    return [columns.version(p) for p in parts], [p["version_months"] for p in parts]


def _due(month: int, every: Number) -> Number:
    """1 where a span of `every` months ends in this month, else 0."""
    return (
        np.floor(month / np.asarray(every, float)) > np.floor((month - 1) / np.asarray(every, float))
    ) * 1.0


def left_over(kind: str, v: Values) -> Number:
    """What the boxes are still worth at the end: in a straight line from their price to what they bring when old."""
    batches, life, rest = _hardware(kind, v)
    ages = [np.mod(v["months"] - begun - 1e-9, life) for begun, _ in batches]
    return sum(
        (price * (1 - (1 - rest) * age / life) for (_, price), age in zip(batches, ages, strict=True)), 0.0
    )


def net_present_cost(kind: str, v: Values, paid: Any | None = None) -> Number:
    """Payments less what is left over, in today's money; the NPV is its negative."""
    paid = payments(kind, v) if paid is None else paid
    rate, months = v["interest_per_year"], len(paid) - 1
    factors = np.stack(np.broadcast_arrays(*[formulas.discount(rate, m) for m in range(months + 1)]))
    if factors.ndim < paid.ndim:
        factors = factors[:, None]
    return (paid * factors).sum(0) - left_over(kind, v) * formulas.discount(rate, months)


def break_even_month(own: Any, rival: Any) -> Number:
    """The first month at whose end the rival has cost more in all, per draw; infinite where none is. Arrays [months + 1, …]."""
    passed = np.cumsum(rival, 0) > np.cumsum(own, 0)
    passed[0] = False
    return np.where(passed.any(0), passed.argmax(0), np.inf)[()]


def break_even_requests(kind: str, v: Values, rival: Number, rival_fixed: Number) -> float | None:
    """The fewest requests a month at which a column of machines costs no more than the rival, at today's prices.

    `rival` is the rival's cost of one request, `rival_fixed` what it asks a month whatever the requests. None: at no volume.
    """
    k = KINDS[kind]
    count, asked = float(k.units(v)), v["requests_per_month"]  # type: ignore[misc]
    of = columns.local(v) if kind == ROUTED else v
    tried = of["requests_per_month"] / asked if asked else 0.0
    carried, fewest = columns.hourly_capacity(kind, v)
    whole = columns.monthly(kind, v)
    by_request = (k.energy(v) + k.spend(v)) / asked if asked else 0.0
    by_unit = _per_unit(kind, of)
    fixed = whole - by_request * asked - by_unit * count - rival_fixed
    if not tried:
        return None
    kept = 1 - v["answer_cache_share"] if kind != ROUTED else 1.0
    capacity = carried / tried / kept
    saved, spares = rival - by_request, of["spares"]
    found = formulas.break_even_volume(max(fixed, 0.0), by_unit, capacity, saved, spares)
    if fewest > 1 and saved > 0:  # a fleet's boxes stand there whatever the volume
        least = (max(fixed, 0.0) + (fewest + spares) * by_unit) / saved
        return least if least <= fewest * capacity else found
    return found


def _per_unit(kind: str, of: Values) -> float:
    """USD a month that one more box costs, whatever it does."""
    if "usd_per_unit_hour" in of.figures:
        return columns.rent(of) / columns.units(of)
    count = columns.units(of)
    return (columns.capital(of) + columns.keeping(of) + columns.idle_usd(of)) / count
