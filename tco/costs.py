"""What a month of N requests costs: an own box with a measured artefact against API models at list price.

Every figure is a Cell that knows what it rests on. Rendering is elsewhere, and so is the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeft.errors import UsageError, unknown
from edgeft.profiles import Profile
from edgeft.tco import formulas
from edgeft.tco.cells import ASSUMED, LIST_PRICE, MEASURED, NOT_KNOWN, Cell, derived, not_known, usd
from edgeft.tco.measured import Measured, api_models, api_name, choose
from edgeft.tco.prices import FRONTIER, SMALL, list_price, price_table
from edgeft.types import BenchReport

# name -> (value, what it is). Everything here can be set with --assume NAME=VALUE.
DEFAULTS: dict[str, tuple[float, str]] = {
    "lifetime_years": (3, "years until the box is replaced"),
    "interest_per_year": (0.08, "cost of capital"),
    "residual_share": (0, "share of the price that the box brings at the end"),
    "maintenance_per_year": (0.05, "share of the price a year"),
    "peak_factor": (4, "requests at the peak over the mean of the month"),
    "headroom": (0.3, "share of a box kept free at the peak"),
    "spares": (0, "boxes standing by, switched on"),
    "pue": (1, "energy at the wall over energy of the box; a server room has 1.2 to 1.6"),
    "retry_share": (0, "API requests sent twice"),
    "other_usd_per_month": (0, "own: hosting, staff, licences, updates of the model"),
}
ROWS = {
    "tokens_in": "prompt tokens a request",
    "tokens_out": "answer tokens a request",
    "usd_per_mtok_in": "USD per 1M prompt tokens",
    "usd_per_mtok_out": "USD per 1M answer tokens",
    "e2e_s": "seconds a request, one at a time",
    "units": "boxes",
    "busy_share": "time busy",
    "upfront_usd": "upfront",
    "hardware_usd": "hardware a month",
    "energy_kwh": "energy a month",
    "energy_usd": "energy cost a month",
    "total_usd": "total a month",
    "usd_per_1k_requests": "per 1,000 requests",
    "correct_share": "solved correctly",
    "usd_per_1k_correct": "per 1,000 solved correctly",
    "break_even": "own box pays off after",
}
Column = dict[str, Cell]


def assumptions(changed: Mapping[str, float]) -> dict[str, float]:
    """The assumed values with some changed. Raises UsageError for a name or a value that can't be."""
    values = {name: value for name, (value, _) in DEFAULTS.items()}
    for name, value in changed.items():
        if name not in values:
            raise unknown("the assumption", name, values, f"edgeft tco --assume {next(iter(values))}=4 ...")
        values[name] = value
    for name, value in values.items():
        not_negative(f"--assume {name}", value, DEFAULTS[name][0])
    for name, top in (("headroom", 0.99), ("residual_share", 1)):
        if values[name] > top:
            raise UsageError(
                f"--assume {name} is {values[name]:g}, and at most {top:g} is possible.",
                f"--assume {name}=0.3",
            )
    for name, low in (("lifetime_years", 0.1), ("peak_factor", 1), ("pue", 1)):
        if values[name] < low:
            raise UsageError(
                f"--assume {name} is {values[name]:g}, and at least {low:g} is needed.", f"--assume {name}=3"
            )
    if values["spares"] != int(values["spares"]):
        raise UsageError(f"--assume spares is {values['spares']:g}, not a whole number.", "--assume spares=1")
    return values


def not_negative(name: str, value: float, example: float) -> None:
    """Raises UsageError where a number is below zero, infinite or none."""
    if not 0 <= value < float("inf"):
        joint = "=" if name.startswith("--assume") else " "
        raise UsageError(
            f"{name} is {value:g}, and a number of zero or more is needed.",
            f"edgeft tco {name}{joint}{example:g} ...",
        )


def compare(
    report: BenchReport,
    profile: Profile,
    *,
    model: str | None = None,
    apis: tuple[str, ...] = (),
    requests_per_month: float = 100_000,
    usd_per_kwh: float = 0.15,
    assume: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The whole comparison as a dict: `verdict` (sentences, the answer first), `own`, `apis`,
    `assumptions`, `runs`, `notes`.

    `own` and each of `apis` is a column. It maps the keys of ROWS to Cells; a row without
    meaning for a column is absent.

    Raises UsageError for negative numbers, unknown models and reports without tasks, EnvironmentFault
    where litellm is needed and not installed.
    """
    not_negative("--requests-per-month", requests_per_month, 100_000)
    not_negative("--usd-per-kwh", usd_per_kwh, 0.15)
    values = {
        **assumptions(assume or {}),
        "requests_per_month": requests_per_month,
        "usd_per_kwh": usd_per_kwh,
    }
    chosen = choose(report, model)
    notes: list[str] = []
    own = own_column(chosen, report, profile, values, notes)
    rivals = {
        name: api_column(name, price, there, chosen, values, notes)
        for name, price, there in rival_prices(report, apis)
    }
    for column in rivals.values():
        column["break_even"] = break_even(own, column, values)
    runs = list(
        dict.fromkeys(cell.run for column in (own, *rivals.values()) for cell in column.values() if cell.run)
    )
    return {
        "profile": profile.id,
        "artifact": chosen.id,
        "requests_per_month": requests_per_month,
        "verdict": verdict(own, rivals, chosen, profile),
        "own": own,
        "apis": rivals,
        "assumptions": _listed(values, profile, own),
        "runs": runs,
        "notes": notes,
    }


def rival_prices(
    report: BenchReport, apis: tuple[str, ...]
) -> list[tuple[str, dict[str, Any], Measured | None]]:
    """(name, price, what the report measured of it) of each model asked for, else of the default ones."""
    measured = api_models(report)
    names = [api_name(name) for name in apis]
    if not names:
        names = [*(name for name, m in measured.items() if m.price), FRONTIER, SMALL]
    found, table = [], None
    for name in dict.fromkeys(names):
        there = measured.get(name)
        price = there.price if there else None
        if price is None:
            table = table or price_table()
            price = list_price(name, *table)
        found.append((name, price, there))
    return found


def own_column(
    m: Measured, report: BenchReport, p: Profile, v: Mapping[str, float], notes: list[str]
) -> Column:
    """The own box: capital recovery plus maintenance (metrics.md), energy by idle and load power."""
    requests = v["requests_per_month"]
    seconds = request_seconds(m, report, p, notes)
    value = seconds.value or 0.0
    peak = formulas.requests_per_second(requests) * v["peak_factor"]
    units = formulas.units_needed(peak, 1 / value, v["headroom"], int(v["spares"]))
    busy = formulas.busy_share(requests, value, units)
    column: Column = {
        "tokens_in": Cell(m.tokens_in, f"{m.tokens_in:,.1f}", (MEASURED,), run=m.run),
        "tokens_out": Cell(m.tokens_out, f"{m.tokens_out:,.1f}", (MEASURED,), run=m.run),
        "e2e_s": seconds,
        "units": derived(
            units, str(units), [seconds], ASSUMED, note="from one request at a time: no concurrency sweep yet"
        ),
        "busy_share": derived(busy, f"{busy:.1%}", [seconds], ASSUMED),
    }
    column["upfront_usd"] = upfront(p, units, column["units"])
    unit_price = _price(p)
    monthly = units * formulas.hardware_usd_per_month(
        unit_price or 0, (unit_price or 0) * v["residual_share"], v["interest_per_year"], v["lifetime_years"],
        v["maintenance_per_year"],
    )  # fmt: skip
    column["hardware_usd"] = derived(monthly, usd(monthly), [column["upfront_usd"]], ASSUMED)
    column["energy_kwh"] = energy(p, units, busy, v["pue"], column["busy_share"])
    cost = (column["energy_kwh"].value or 0) * v["usd_per_kwh"]
    column["energy_usd"] = derived(cost, usd(cost), [column["energy_kwh"]], ASSUMED)
    total = monthly + cost + v["other_usd_per_month"]
    column["total_usd"] = derived(total, usd(total), [column["hardware_usd"], column["energy_usd"]], ASSUMED)
    if p.kind == "gpu":
        notes.append(
            f"Price and power of '{p.id}' are the card's alone: the computer it sits in comes on top."
        )
    if (
        (limit := p.limits.get("ttft_s"))
        and m.ttft_p95_s
        and m.ttft_p95_s > limit
        and seconds.tag == MEASURED
    ):
        notes.append(f"First token at p95 takes {m.ttft_p95_s:.2f} s; the profile's goal is {limit:g} s.")
    return column | per_result(column["total_usd"], requests, m)


def request_seconds(m: Measured, report: BenchReport, p: Profile, notes: list[str]) -> Cell:
    """Seconds a request takes on the profile's box: measured only where the report comes from that box."""
    seconds = m.e2e_s or 0.0
    box = report.profile.get("id", "an unnamed box")
    if box == p.id:
        if "detected_at" not in report.profile:
            notes.append(f"That the report was measured on {p.id} is what bench was told; it did not look.")
        return Cell(seconds, f"{seconds:.3f} s", (MEASURED,), f"mean of {m.e2e_n} requests", m.run)
    note = f"measured on {box}, not on {p.id}"
    there = report.profile.get("bandwidth_gb_per_s")
    if there and p.bandwidth_gb_per_s and m.decode_tok_per_s:
        ratio = p.bandwidth_gb_per_s / there
        decode = (m.tokens_out or 0) / m.decode_tok_per_s
        seconds = formulas.scaled_seconds(seconds, decode, ratio)
        note += f"; decoding scaled by memory bandwidth, {p.bandwidth_gb_per_s:g} over {there:g} GB/s"
    else:
        note += "; taken as it is, since memory bandwidth is not known of both boxes"
    notes.append(f"Speed is {note}. Measure it there: edgeft bench on that box.")
    return Cell(seconds, f"{seconds:.3f} s", (ASSUMED,), note, m.run)


def _price(p: Profile) -> float | None:
    """The middle of the price range."""
    return None if p.price_usd is None else sum(p.price_usd) / 2


def upfront(p: Profile, units: int, units_cell: Cell) -> Cell:
    """The price of all boxes: assumed where it is a range or an estimate."""
    price = _price(p)
    if price is None:
        return not_known(f"profile '{p.id}' has no price_usd")
    low, high = p.price_usd or (0, 0)
    firm = low == high and p.basis.get("price_usd") == "published"
    text = usd(units * price)
    note = f"{p.basis.get('price_usd', 'estimate')}, as of {p.as_of}" + (
        f", middle of {low:g} to {high:g}" if low != high else ""
    )
    return derived(units * price, text, [units_cell], LIST_PRICE if firm else ASSUMED, note=note)


def energy(p: Profile, units: int, busy: float, pue: float, busy_cell: Cell) -> Cell:
    """kWh a month from the profile's idle and load watts: an assumption, since nothing metered it."""
    missing = [key for key in ("power_load_w", "power_idle_w") if getattr(p, key) is None]
    if missing or p.power_load_w is None or p.power_idle_w is None:
        return not_known(f"profile '{p.id}' has no {' and no '.join(missing)}")
    kwh = formulas.energy_kwh_per_month(units, p.power_load_w, p.power_idle_w, busy, pue)
    note = f"{p.power_load_w:g} W busy, {p.power_idle_w:g} W idle by the profile; not metered"
    return derived(kwh, f"{kwh:,.1f} kWh", [busy_cell], ASSUMED, note=note)


def api_column(
    name: str,
    price: dict[str, Any],
    there: Measured | None,
    own: Measured,
    v: Mapping[str, float],
    notes: list[str],
) -> Column:
    """An API model at its list price; its own tokens where the report has them, else the artefact's."""
    has_tokens = there is not None and there.tokens_in is not None and there.tokens_out is not None
    source = there if there is not None and has_tokens else own
    words = (MEASURED,) if has_tokens else (ASSUMED,)
    note = (
        ""
        if has_tokens
        else f"as measured of {own.id}; {name}'s own tokenizer and wordiness are not measured"
    )
    tokens_in, tokens_out = source.tokens_in or 0.0, source.tokens_out or 0.0
    quoted = f"{price.get('source') or 'no source named'}, as of {price.get('as_of') or 'no date'}"
    p_in, p_out = float(price["usd_per_mtok_in"]), float(price["usd_per_mtok_out"])
    column: Column = {
        "tokens_in": Cell(tokens_in, f"{tokens_in:,.1f}", words, note, source.run),
        "tokens_out": Cell(tokens_out, f"{tokens_out:,.1f}", words, note, source.run),
        "usd_per_mtok_in": Cell(p_in, usd(p_in), (LIST_PRICE,), quoted),
        "usd_per_mtok_out": Cell(p_out, usd(p_out), (LIST_PRICE,), quoted),
    }
    each = formulas.api_usd_per_request(tokens_in, tokens_out, p_in, p_out)
    total = formulas.api_usd_per_month(v["requests_per_month"], v["retry_share"], each)
    parts = list(column.values())
    column["upfront_usd"] = Cell(0.0, usd(0), (LIST_PRICE,), "pay as you go")
    column["total_usd"] = derived(total, usd(total), parts, ASSUMED)
    notes.append(f"{name}: {quoted}.")
    notes += [f"{name}: {text}." for text in price.get("notes", [])]
    return column | per_result(column["total_usd"], v["requests_per_month"], there)


def per_result(total: Cell, requests: float, m: Measured | None) -> Column:
    """The rows per 1,000 requests and per 1,000 solved, with the accuracy between them."""
    each = formulas.per_thousand(total.value or 0, requests)
    per_1k = derived(each, usd(each), [total]) if each is not None else not_known("no requests a month")
    if m is None or m.correct_share is None:
        missing = Cell(None, "not measured", (NOT_KNOWN,))
        return {"usd_per_1k_requests": per_1k, "correct_share": missing, "usd_per_1k_correct": missing}
    interval = f" ({m.ci95[0]:.1%} to {m.ci95[1]:.1%})" if m.ci95 else ""
    share = Cell(
        m.correct_share, f"{m.correct_share:.1%}{interval}", (MEASURED,), f"of {m.correct_n} tasks", m.run
    )
    solved = formulas.per_thousand(total.value or 0, requests * m.correct_share)
    per_solved = (
        derived(solved, usd(solved), [total, share]) if solved is not None else not_known("none is solved")
    )
    return {"usd_per_1k_requests": per_1k, "correct_share": share, "usd_per_1k_correct": per_solved}


def break_even(own: Column, api: Column, v: Mapping[str, float]) -> Cell:
    """The month in which buying has paid off, within the life of the box."""
    last = int(v["lifetime_years"] * 12)
    capex, hardware, cost = own["upfront_usd"], own["energy_usd"], api["total_usd"]
    maintenance = (capex.value or 0) * v["maintenance_per_year"] / 12
    cash = maintenance + (hardware.value or 0) + v["other_usd_per_month"]
    month = formulas.break_even_month(capex.value or 0, cash, cost.value or 0, last)
    text = f"month {month}" if month else f"never in its {last} months"
    return derived(month, text, [capex, hardware, cost], ASSUMED)


def verdict(own: Column, rivals: Mapping[str, Column], m: Measured, p: Profile) -> list[str]:
    """Sentences, the answer first: an API that is cheaper is named before anything else."""
    mine = own["total_usd"]
    prices = sorted((column["total_usd"].value or 0.0, name) for name, column in rivals.items())
    label = f"{m.id} on {p.id}"
    if mine.value is None:
        bare = mine.text.removeprefix("not known: ")
        listed = ", ".join(f"{name} {usd(cost)}" for cost, name in prices)
        return [f"The cost of the own box is not known: {bare}.", f"A month by API: {listed}."]
    cheaper = [(cost, name) for cost, name in prices if cost < mine.value]
    dearer = [(cost, name) for cost, name in prices if cost >= mine.value]
    lines = []
    if cheaper:
        who = ", ".join(f"{name} at {usd(cost)} a month" for cost, name in cheaper)
        lines.append(f"The API is cheaper: {who}, against {usd(mine.value)} for {label}.")
    if dearer:
        who = ", ".join(f"{name} at {usd(cost)} a month" for cost, name in dearer)
        own_box = f"The own box is cheaper: {usd(mine.value)} a month for {label}, against {who}."
        lines.append(f"Dearer than the own box: {who}." if cheaper else own_box)
    if own["e2e_s"].tag == ASSUMED:
        lines.append(f"The speed on {p.id} is assumed: {own['e2e_s'].note}.")
    if any(column["correct_share"].value is None for column in rivals.values()):
        lines.append("Price alone: what an API marked 'not measured' gets right was not measured.")
    return lines


def _listed(v: Mapping[str, float], p: Profile, own: Column) -> list[dict[str, Any]]:
    """What was assumed, with its value, for under the table."""
    asked = {"requests_per_month": "requests a month", "usd_per_kwh": "price of electricity"}
    about = {**asked, **{name: text for name, (_, text) in DEFAULTS.items()}}
    found: list[dict[str, Any]] = [
        {"name": name, "value": v[name], "about": text} for name, text in about.items()
    ]
    if p.price_usd:
        found.append({"name": "price_usd", "value": _price(p), "about": own["upfront_usd"].note})
    for key in ("power_load_w", "power_idle_w"):
        if (watts := getattr(p, key)) is not None:
            found.append({"name": key, "value": watts, "about": f"{p.basis[key]}, profile '{p.id}'"})
    return found
