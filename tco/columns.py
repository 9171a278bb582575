"""What a column costs, by its kind: pure functions of its figures. Source of the formulas: metrics.md, Cost.

Each takes Values and gives numbers or arrays of draws. A figure that nobody gave raises MissingFigure, never counts as zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgeft.tco import formulas
from edgeft.tco.figures import Values
from edgeft.tco.formulas import SECONDS_PER_MONTH, Number
from edgeft.tco.inputs import API, CLOUD, FLEET, OWN, ROUTED

Of = Callable[[Values], Number]


def reached(v: Values) -> Number:
    """Requests a month that edgeft's own answer cache leaves."""
    return v["requests_per_month"] * (1 - v["answer_cache_share"])


def nothing(v: Values) -> Number:
    """Zero: a kind that has none of it."""
    return 0.0


# An API


def api_tokens_in(v: Values) -> Number:
    """Prompt tokens a request by its own tokenizer."""
    return v["tokens_in"] * v["tokenizer_factor"]


def api_tokens_out(v: Values) -> Number:
    """Answer tokens a request: its own wordiness, and what it thinks with."""
    return v["tokens_out"] * v["verbosity_factor"] + v["reasoning_tokens"]


def api_prices(v: Values) -> tuple[Number, Number, Number, Number]:
    """(in, read, write, out) in USD per million tokens: the long-context price where the prompt is above its length."""
    usd_in, usd_out = v["usd_per_mtok_in"], v["usd_per_mtok_out"]
    above = api_tokens_in(v) > v["long_context_tokens"]
    if np.any(above):
        usd_in = np.where(above, v["usd_per_mtok_in_long"], usd_in)[()]
        usd_out = np.where(above, v["usd_per_mtok_out_long"], usd_out)[()]
    read = v["usd_per_mtok_read"] if np.any(np.asarray(v["prompt_cached_share"]) > 0) else 0.0
    write = v["usd_per_mtok_write"] if np.any(np.asarray(v["prompt_written_share"]) > 0) else 0.0
    return usd_in, read, write, usd_out


def api_split(v: Values) -> tuple[Number, Number]:
    """USD a request for its prompt and for its answer, retries included, at today's prices."""
    usd_in, read, write, usd_out = api_prices(v)
    tokens, cached, written = api_tokens_in(v), v["prompt_cached_share"], v["prompt_written_share"]
    fresh = tokens * np.maximum(0.0, 1 - cached - written)
    again = 1 + v["retry_share"]
    prompt = formulas.api_usd_per_request(fresh, tokens * cached, tokens * written, 0, usd_in, read, write, 0)
    return again * prompt, again * formulas.api_usd_per_request(0, 0, 0, api_tokens_out(v), 0, 0, 0, usd_out)


def api_spend(v: Values) -> Number:
    """USD a month to the provider at today's prices."""
    prompt, answer = api_split(v)
    return reached(v) * (prompt + answer)


# Machines


def rate_per_unit(v: Values) -> Number:
    """Requests a second of one box within the limits: one at a time, times what a concurrency sweep gained."""
    return v["concurrency_gain"] / v["request_s"]


def units(v: Values) -> Number:
    """Boxes for the peak, with headroom and spares; a fleet has one a site at least."""
    peak = formulas.requests_per_second(reached(v)) * v["peak_factor"]
    needed = formulas.units_needed(peak, rate_per_unit(v), v["headroom"], 0)
    if "sites" in v.figures:
        needed = np.maximum(needed, v["sites"])
    return needed + v["spares"]


def busy(v: Values) -> Number:
    """u: the share of the month in which a box works."""
    return formulas.busy_share(reached(v), 1 / rate_per_unit(v), units(v))


def kwh(v: Values) -> Number:
    """Energy a month at the wall."""
    load, idle = v["power_load_w"] + v["host_w"], v["power_idle_w"] + v["host_w"]
    return formulas.energy_kwh_per_month(units(v), load, idle, busy(v), v["pue"])


def idle_usd(v: Values) -> Number:
    """Electricity a month that flows without a request."""
    idle = v["power_idle_w"] + v["host_w"]
    return formulas.energy_kwh_per_month(units(v), 0, idle, 0, v["pue"]) * v["usd_per_kwh"]


def working_usd(v: Values) -> Number:
    """Electricity a month that requests add to idling."""
    hours = reached(v) / rate_per_unit(v) / 3600
    watts = v["power_load_w"] - v["power_idle_w"]
    return watts / 1000 * hours * v["pue"] * v["usd_per_kwh"]


def price_per_unit(v: Values) -> Number:
    """A box with the computer around it."""
    return v["price_usd"] + v["host_usd"]


def hardware(v: Values) -> Number:
    """USD for all boxes."""
    return units(v) * price_per_unit(v)


def capital(v: Values) -> Number:
    """Capital recovery a month, maintenance not included."""
    price = price_per_unit(v)
    each = formulas.hardware_usd_per_month(
        price, price * v["residual_share"], v["interest_per_year"], v["lifetime_years"], 0
    )
    return units(v) * each


def keeping(v: Values) -> Number:
    """USD a month that bought boxes ask for whatever they do: maintenance, room, visits."""
    visits = v["visits_per_unit_year"] / 12 * v["usd_per_visit"]
    upkeep = price_per_unit(v) * v["maintenance_per_year"] / 12
    return units(v) * (upkeep + v["hosting_usd_per_unit_month"] + visits)


def rent(v: Values) -> Number:
    """USD a month for rented machines."""
    return units(v) * v["usd_per_unit_hour"] * v["hours_per_month"] * (1 + v["rework_share"])


# Every column


def running(v: Values) -> Number:
    """USD a month for staff, storage and the like."""
    staff = v["staff_hours_per_month"] * v["usd_per_staff_hour"]
    return staff + v["storage_gb"] * v["usd_per_gb_month"] + v["other_usd_per_month"]


def preparation(v: Values) -> Number:
    """USD before the first request: data, training, quantizing and evaluating."""
    return v["data_usd"] + version(v)


def version(v: Values) -> Number:
    """USD for each new version of the model."""
    return v["training_usd"] + v["requantize_usd"]


def spread(v: Values) -> Number:
    """Preparation a month: data over the months that are looked at, a version over its life."""
    return v["data_usd"] / v["months"] + version(v) / v["version_months"]


# The routed mix: own machines sized for what is tried there, and the API for the rest


def local(v: Values) -> Values:
    """The local part: its requests are what the cache leaves times the share tried locally."""
    tried = reached(v) * v["local_share"]
    return v.part("local", requests_per_month=tried, answer_cache_share=0.0)


def remote(v: Values) -> Values:
    """The API part: what goes there at once, and what was escalated, which pays twice."""
    tried = v["local_share"]
    sent = reached(v) * ((1 - tried) + tried * v["escalated_share"])
    return v.part("remote", requests_per_month=sent, answer_cache_share=0.0)


def of_local(function: str) -> Of:
    """A figure of the routed column that its local part alone has."""
    return lambda v: _of_kind(v, "local", function)(local(v))


def _of_kind(v: Values, part: str, function: str) -> Of:
    kind = CLOUD if "usd_per_unit_hour" in v.parts[part].figures else OWN
    return getattr(KINDS[kind], function)


@dataclass(frozen=True)
class Kind:
    """The figures of a kind of column. `steady` is cash a month at any volume that the units carry; `energy` and `spend` grow
    with requests, and `spend` follows the provider's prices. `capital` is no cash."""

    upfront_hardware: Of
    steady: Of
    energy: Of
    spend: Of
    capital: Of
    units: Of | None = None
    kwh: Of | None = None
    busy: Of | None = None


KINDS: dict[str, Kind] = {
    API: Kind(nothing, running, nothing, api_spend, nothing),
    OWN: Kind(hardware, lambda v: running(v) + keeping(v) + idle_usd(v), working_usd, nothing, capital, units, kwh, busy),
    CLOUD: Kind(nothing, lambda v: running(v) + rent(v), nothing, nothing, nothing, units, kwh, busy),
}  # fmt: skip
KINDS[FLEET] = KINDS[OWN]
KINDS[ROUTED] = Kind(
    upfront_hardware=of_local("upfront_hardware"),
    # its own figures are the mix's; staff, storage and preparation stand with the local part
    steady=lambda v: running(v) + of_local("steady")(v),
    energy=of_local("energy"),
    spend=lambda v: api_spend(remote(v)),
    capital=of_local("capital"),
    units=of_local("units"),
    kwh=of_local("kwh"),
    busy=of_local("busy"),
)


def monthly(kind: str, v: Values) -> Number:
    """All a month costs at today's prices: cash, capital recovery, preparation spread."""
    k = KINDS[kind]
    return k.steady(v) + k.energy(v) + k.spend(v) + k.capital(v) + all_spread(kind, v)


def all_spread(kind: str, v: Values) -> Number:
    """Preparation a month, of the local part as well where there is one."""
    return spread(v) + (spread(v.part("local")) if kind == ROUTED else 0.0)


def all_preparation(kind: str, v: Values) -> Number:
    """Preparation before the first request, of the local part as well."""
    return preparation(v) + (preparation(v.part("local")) if kind == ROUTED else 0.0)


def upfront(kind: str, v: Values) -> Number:
    """USD before the first request."""
    return KINDS[kind].upfront_hardware(v) + all_preparation(kind, v)


def split(kind: str, v: Values) -> tuple[Number, Number]:
    """USD a month for prompts and for answers. Machines: by the time before and after the first token; an API by its prices,
    and what is not by the token shared out alike."""
    if kind == ROUTED:
        there = remote(v)
        prompt, answer = api_split(there)
        sent = there["requests_per_month"]
        own = monthly(kind, v) - api_spend(there)
        first = v.part("local")["prefill_share"]
        return own * first + sent * prompt, own * (1 - first) + sent * answer
    whole = monthly(kind, v)
    if kind == API:
        prompt, answer = api_split(v)
        with np.errstate(invalid="ignore", divide="ignore"):
            first = np.where(prompt + answer > 0, prompt / (prompt + answer), 0.5)[()]
    else:
        first = v["prefill_share"]
    return whole * first, whole * (1 - first)


def falls(kind: str, v: Values) -> Number:
    """How much the prices behind `spend` fall a year."""
    if kind == API:
        return v["price_fall_per_year"]
    return v.part("remote")["price_fall_per_year"] if kind == ROUTED else 0.0


def hourly_capacity(kind: str, v: Values) -> tuple[float, float]:
    """(requests a month that one unit may carry with peak and headroom, the fewest working units)."""
    of = v.part("local") if kind == ROUTED else v
    carried = rate_per_unit(of) * (1 - of["headroom"]) / v["peak_factor"] * SECONDS_PER_MONTH
    return carried, of["sites"] if "sites" in of.figures else 1.0
