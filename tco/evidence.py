"""From what edgeft measured and what is published to figures: reports, serve's counters, policies, profiles, price tables.

Each function gives figures by the formulas' names. The id's first word is the column; what nothing says is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeft.profiles import Profile
from edgeft.tco import formulas
from edgeft.tco.cells import ASSUMED, LIST_PRICE, MEASURED
from edgeft.tco.figures import Z90, Figure, from_ci95
from edgeft.tco.inputs import INPUTS
from edgeft.tco.measured import Measured
from edgeft.types import BenchReport

Figures = dict[str, Figure]
# A card's computer, where the profile is of the card alone: a share of the card's price, and watts.
HOST_PRICE_SHARE = (0.15, 0.3, 0.6)
HOST_W = (40.0, 80.0, 200.0)
SCALED = (0.8, 1.5)  # P10 and P90 of a time that was scaled from another box, over what scaling gave


def figure(column: str, name: str, value: float | None, tag: str, text: str, ends: Any = None) -> Figure:
    """A figure of a column, its range held within what the input may be."""
    low, high = INPUTS[name].bounds
    held = None if ends is None else (min(max(ends[0], low), high), min(max(ends[1], low), high))
    return Figure(f"{column}.{name}" if column else name, value, held, tag, text, (low, high))


def workload_of(column: str, m: Measured) -> Figures:
    """Tokens a request as a report counted them."""
    found = {}
    for name, value in (("tokens_in", m.tokens_in), ("tokens_out", m.tokens_out)):
        if value is not None:
            found[name] = figure(column, name, value, MEASURED, f"mean of {m.e2e_n} requests; {m.run}")
    return found


def quality_of(column: str, m: Measured) -> Figures:
    """Share solved with its interval."""
    if m.correct_share is None:
        return {}
    text = f"{m.correct_share:.1%} of {m.correct_n} tasks; {m.run}"
    return {
        "correct_share": figure(
            column, "correct_share", m.correct_share, MEASURED, text, from_ci95(m.correct_share, m.ci95)
        )
    }


def machine_of(column: str, m: Measured, report: BenchReport, box: Profile | None) -> Figures:
    """Speed of an artefact on a box: measured where the report is of that box, else scaled and assumed."""
    found = quality_of(column, m)
    seconds, here = m.e2e_s or 0.0, report.profile.get("id", "an unnamed box")
    if box is None or here == box.id:
        text = f"mean of {m.e2e_n} requests; {m.run}"
        if box is not None and "detected_at" not in report.profile:
            text += f"; that the box was {here} is what bench was told"
        error = (m.e2e_error_s or 0.0) * Z90
        ends = (seconds - error, seconds + error) if error else None
        found["request_s"] = figure(column, "request_s", seconds, MEASURED, text, ends)
        if m.ttft_p95_s is not None:
            text = f"by the client, one request at a time; {m.run}"
            found["ttft_p95_s"] = figure(column, "ttft_p95_s", m.ttft_p95_s, MEASURED, text)
        if m.energy and m.energy.get("mean_w") and "wall" in m.energy["method"]:
            found["power_load_w"] = figure(
                column, "power_load_w", m.energy["mean_w"], MEASURED, f"{m.energy['method']}; {m.run}",
                from_ci95(m.energy["mean_w"], m.energy.get("mean_w_ci95")),
            )  # fmt: skip
    else:
        seconds, text = _scaled(m, report, box)
        ends = (seconds * SCALED[0], seconds * SCALED[1])
        found["request_s"] = figure(column, "request_s", seconds, ASSUMED, f"{text}; {m.run}", ends)
    if m.gain is not None:
        tag, text = (MEASURED, "") if box is None or here == box.id else (ASSUMED, f"as on {here}: ")
        found["concurrency_gain"] = figure(
            column, "concurrency_gain", m.gain, tag, f"{text}{m.gain_text}; {m.run}"
        )
    elif m.gain_text:
        found["concurrency_gain"] = figure(
            column, "concurrency_gain", None, ASSUMED, f"{m.gain_text}; {m.run}"
        )
    else:
        text = "one request at a time, a lower bound: the report has no concurrency sweep (edgeft bench --load 1,2,4,8)"
        found["concurrency_gain"] = figure(column, "concurrency_gain", 1.0, ASSUMED, text)
    if m.prefill_share is not None:
        tag, text = (MEASURED, "") if box is None or here == box.id else (ASSUMED, f"as on {here}: ")
        found["prefill_share"] = figure(
            column, "prefill_share", m.prefill_share, tag, f"{text}median TTFT over median time; {m.run}"
        )
    return found


def _scaled(m: Measured, report: BenchReport, box: Profile) -> tuple[float, str]:
    """(seconds a request on a box that was not measured, how that was found)."""
    seconds, here = m.e2e_s or 0.0, report.profile.get("id", "an unnamed box")
    text = f"measured on {here}, not on {box.id}"
    there = report.profile.get("bandwidth_measured_gb_per_s") or report.profile.get("bandwidth_gb_per_s")
    usable = box.usable_bandwidth_gb_per_s
    if there and usable and m.decode_tok_per_s:
        decode = (m.tokens_out or 0) / m.decode_tok_per_s
        seconds = formulas.scaled_seconds(seconds, decode, usable / there)
        return seconds, f"{text}; decoding scaled by memory bandwidth, {usable:g} over {there:g} GB/s"
    return seconds, f"{text}; taken as it is, since memory bandwidth is not known of both boxes"


def profile_of(column: str, p: Profile) -> Figures:
    """Price and watts of a box. A range counts by its middle, its ends as P10 and P90."""
    found, where = {}, f"profile {p.id}, {{}}, as of {p.as_of}: {p.source}"
    if p.price_usd:
        low, high = p.price_usd
        firm = low == high and p.basis.get("price_usd") == "published"
        text, ends = where.format(p.basis.get("price_usd", "estimate")), (low, high) if low != high else None
        found["price_usd"] = figure(
            column, "price_usd", (low + high) / 2, LIST_PRICE if firm else ASSUMED, text, ends
        )
    else:
        found["price_usd"] = figure(column, "price_usd", None, ASSUMED, f"profile '{p.id}' has no price_usd")
    for name in ("power_load_w", "power_idle_w"):
        watts, basis = getattr(p, name), p.basis.get(name, "estimate")
        tag = MEASURED if basis == "measured" else ASSUMED
        text = where.format(basis) if watts is not None else f"profile '{p.id}' has no {name}"
        ends = None if watts is None or tag == MEASURED else (0.75 * watts, 1.25 * watts)
        found[name] = figure(column, name, watts, tag, text, ends)
    if p.kind == "gpu":
        card = found["price_usd"].value
        low, mid, high = HOST_PRICE_SHARE
        if card is not None:
            found["host_usd"] = figure(
                column, "host_usd", mid * card, ASSUMED, f"'{p.id}' is the card alone; a share of its price",
                (low * card, high * card),
            )  # fmt: skip
        found["host_w"] = figure(
            column, "host_w", HOST_W[1], ASSUMED, f"'{p.id}' is the card alone", (HOST_W[0], HOST_W[2])
        )
    return found


def price_of(column: str, price: Mapping[str, Any]) -> Figures:
    """List prices with their source and date."""
    notes = "".join(f"; {note}" for note in price.get("notes") or ())
    text = f"{price.get('source') or 'no source named'}, as of {price.get('as_of') or 'no date'}{notes}"
    names = ("usd_per_mtok_in", "usd_per_mtok_out", "usd_per_mtok_read", "usd_per_mtok_write",
             "long_context_tokens", "usd_per_mtok_in_long", "usd_per_mtok_out_long")  # fmt: skip
    return {
        n: figure(column, n, float(price[n]), LIST_PRICE, text) for n in names if price.get(n) is not None
    }


def rival_of(column: str, m: Measured) -> Figures:
    """What a report measured of an API model: its own tokens, so no factors; its quality; its first token."""
    found = {**workload_of(column, m), **quality_of(column, m)}
    if "tokens_in" in found and "tokens_out" in found:
        text = "its own tokens were counted"
        for name in ("tokenizer_factor", "verbosity_factor"):
            found[name] = figure(column, name, 1.0, MEASURED, f"{text}; {m.run}")
    if m.ttft_p95_s is not None:
        found["ttft_p95_s"] = figure(column, "ttft_p95_s", m.ttft_p95_s, MEASURED, f"by the client; {m.run}")
    return found


def policy_of(column: str, folder: Path) -> Figures:
    """A routed mix as the policy's fitting found it on rows that the threshold had not seen."""
    from edgeft.types import Policy

    fitted = Policy.load(folder / "policy.json").fitted
    got = fitted["figures"]
    run = f"policy {folder.name}, {got['n']} items ({fitted.get('figures_of', 'fitting')})"
    mean, ends = got["policy"]["mean"], got["policy"]["ci95"]
    return {
        "local_share": figure(column, "local_share", 1 - got["share_strong"], MEASURED, run),
        "correct_share": figure(
            column, "correct_share", mean, MEASURED, f"mean score; {run}", from_ci95(mean, ends)
        ),
    }


def counters_of(column: str, place: str, local_id: str | None) -> Figures:
    """A routed mix as a running proxy counted it; it wins over the policy's own estimate."""
    from edgeft.tco.counters import read_counters, shares, ttft_quantile_s

    samples = read_counters(place)
    got = shares(samples, local_id)
    run = f"counters of {place}, {got['n_served']:,.0f} answers"
    found = {
        name: figure(column, name, got[name], MEASURED, run)
        for name in ("answer_cache_share", "local_share", "escalated_share")
        if got[name] is not None
    }
    if seen := ttft_quantile_s(samples):
        text = f"of engines' answers, waiting and drafts included, between {seen[1]:g} and {seen[2]:g} s by its histogram; {run}"
        found["ttft_p95_s"] = figure(column, "ttft_p95_s", seen[0], MEASURED, text)
    return found
