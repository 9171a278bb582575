"""The arithmetic of cost, pure. Source of every formula: metrics.md, Cost.

Money in USD, time in months of 730 hours unless the name says otherwise, rates per year as fractions. Every function takes
numbers or numpy arrays of one shape (one entry a draw) and gives the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

HOURS_PER_MONTH = 730.0
SECONDS_PER_MONTH = HOURS_PER_MONTH * 3600
Number = Any  # a float, or an array with one entry a draw


def capital_recovery(rate: Number, years: Number) -> Number:
    """CRF(r, n): the yearly payment that pays off 1 over `years` at `rate`; 1/n without interest."""
    growth = (1 + np.asarray(rate, float)) ** years
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(growth == 1, 1 / np.asarray(years, float), rate * growth / (growth - 1))[()]


def hardware_usd_per_month(
    price_usd: Number, residual_usd: Number, rate: Number, years: Number, maintenance_per_year: Number
) -> Number:
    """One unit a month: (P - RV/(1+r)^n) * CRF(r,n)/12 + P*maintenance/12."""
    capital = (price_usd - residual_usd / (1 + rate) ** years) * capital_recovery(rate, years) / 12
    return capital + price_usd * maintenance_per_year / 12


def energy_kwh_per_month(
    units: Number, load_w: Number, idle_w: Number, busy_share: Number, pue: Number
) -> Number:
    """units * [P_load*u + P_idle*(1-u)] W / 1000 * 730 h * PUE."""
    return units * (load_w * busy_share + idle_w * (1 - busy_share)) / 1000 * HOURS_PER_MONTH * pue


def requests_per_second(requests_per_month: Number) -> Number:
    """The mean over a month of 730 hours."""
    return requests_per_month / SECONDS_PER_MONTH


def units_needed(peak_rps: Number, rps_per_unit: Number, headroom: Number, spares: Number) -> Number:
    """ceil(peak_rps / (rps_at_SLO * (1 - headroom))) + spares; never fewer than one box."""
    exact = np.round(peak_rps / (rps_per_unit * (1 - headroom)), 9)  # a rounding error buys no box
    return np.maximum(1, np.ceil(exact)) + spares


def busy_share(requests_per_month: Number, seconds_per_request: Number, units: Number) -> Number:
    """u: the share of the month in which a unit works, the load spread evenly; 1 at most."""
    return np.minimum(1.0, requests_per_month * seconds_per_request / (SECONDS_PER_MONTH * units))


def api_usd_per_request(
    fresh: Number, read: Number, written: Number, out: Number,
    usd_in: Number, usd_read: Number, usd_write: Number, usd_out: Number,
) -> Number:  # fmt: skip
    """Tfresh*p_in + Tread*p_read + Twrite*p_write + Tout*p_out, prices in USD per million tokens."""
    return (fresh * usd_in + read * usd_read + written * usd_write + out * usd_out) / 1e6


def api_usd_per_month(requests_per_month: Number, retry_share: Number, usd_per_request: Number) -> Number:
    """Q * (1 + retry) * USD a request, at today's prices."""
    return requests_per_month * (1 + retry_share) * usd_per_request


def price_factor(fall_per_year: Number, month: float) -> Number:
    """(1 - fall)^(t/12): prices `month` months from now over today's."""
    return (1 - fall_per_year) ** (month / 12)


def growth_factor(growth_per_month: Number, month: float) -> Number:
    """(1 + g)^(m-1): the requests of month m over those of the first."""
    return (1 + growth_per_month) ** (month - 1)


def discount(rate: Number, month: float) -> Number:
    """(1 + r)^(-t/12): what a dollar in `month` months is worth today."""
    return (1 + rate) ** (-month / 12)


def per_thousand(usd: Number, count: Number) -> Number:
    """USD per 1,000 of what a month serves; infinite where it serves none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return usd / np.asarray(count, float) * 1000


def break_even_volume(
    fixed_usd: float, usd_per_unit: float, capacity: float, saved_usd: float, spares: float = 0
) -> float | None:
    """The fewest requests a month at which hardware that grows by whole units is no dearer than paying for each request.

    fixed_usd: a month whatever the number of units; usd_per_unit: a month of one; capacity: requests a month that one may
    carry; saved_usd: what a request costs elsewhere less what it costs here beyond the units. k units carry (k - spares)*capacity
    and break even at (fixed + k*unit)/saved, so the first k at which they can carry that. None where no number of units does.
    """
    if saved_usd <= 0 or saved_usd * capacity <= usd_per_unit:
        return None
    units = (fixed_usd + spares * usd_per_unit) / (saved_usd * capacity - usd_per_unit)
    working = max(1.0, float(np.ceil(round(units, 9))))
    return (fixed_usd + (working + spares) * usd_per_unit) / saved_usd


def scaled_seconds(seconds: float, decode_seconds: float, bandwidth_ratio: float) -> float:
    """A request's time where decoding is bound by memory bandwidth and the rest stays as it is.

    `bandwidth_ratio` is the other box's bandwidth over the measured one's.
    """
    decode_seconds = min(decode_seconds, seconds)
    return seconds - decode_seconds + decode_seconds / bandwidth_ratio
