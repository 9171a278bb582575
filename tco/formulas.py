"""The arithmetic of cost, pure. Source of every formula: metrics.md, Cost.

Money in USD, time in months of 730 hours unless the name says otherwise, rates per year as fractions.
"""

from __future__ import annotations

import math

HOURS_PER_MONTH = 730.0
SECONDS_PER_MONTH = HOURS_PER_MONTH * 3600


def capital_recovery(rate: float, years: float) -> float:
    """CRF(r, n): the yearly payment that pays off 1 over `years` at `rate`; 1/n without interest."""
    if rate == 0:
        return 1 / years
    growth = (1 + rate) ** years
    return rate * growth / (growth - 1)


def hardware_usd_per_month(
    price_usd: float, residual_usd: float, rate: float, years: float, maintenance_per_year: float
) -> float:
    """One unit a month: (P - RV/(1+r)^n) * CRF(r,n)/12 + P*maintenance/12."""
    capital = (price_usd - residual_usd / (1 + rate) ** years) * capital_recovery(rate, years) / 12
    return capital + price_usd * maintenance_per_year / 12


def energy_kwh_per_month(units: int, load_w: float, idle_w: float, busy_share: float, pue: float) -> float:
    """units * [P_load*u + P_idle*(1-u)] W / 1000 * 730 h * PUE."""
    return units * (load_w * busy_share + idle_w * (1 - busy_share)) / 1000 * HOURS_PER_MONTH * pue


def requests_per_second(requests_per_month: float) -> float:
    """The mean over a month of 730 hours."""
    return requests_per_month / SECONDS_PER_MONTH


def units_needed(peak_rps: float, rps_per_unit: float, headroom: float, spares: int) -> int:
    """ceil(peak_rps / (rps_at_SLO * (1 - headroom))) + spares; never fewer than one box."""
    return max(1, math.ceil(round(peak_rps / (rps_per_unit * (1 - headroom)), 9))) + spares


def busy_share(requests_per_month: float, seconds_per_request: float, units: int) -> float:
    """u: the share of the month in which a unit works, the load spread evenly; 1 at most."""
    return min(1.0, requests_per_month * seconds_per_request / (SECONDS_PER_MONTH * units))


def api_usd_per_request(
    tokens_in: float, tokens_out: float, usd_per_mtok_in: float, usd_per_mtok_out: float
) -> float:
    """Tin*p_in + Tout*p_out, with prices in USD per million tokens."""
    return (tokens_in * usd_per_mtok_in + tokens_out * usd_per_mtok_out) / 1e6


def api_usd_per_month(requests_per_month: float, retry_share: float, usd_per_request: float) -> float:
    """Q * (1 + retry) * (Tin*p_in + Tout*p_out)."""
    return requests_per_month * (1 + retry_share) * usd_per_request


def per_thousand(usd_per_month: float, count_per_month: float) -> float | None:
    """USD per 1,000 of what a month serves; None where it serves none."""
    return usd_per_month / count_per_month * 1000 if count_per_month > 0 else None


def break_even_month(
    capex_usd: float, own_cash_usd_per_month: float, api_usd_per_month: float, last_month: int
) -> int | None:
    """The first month at whose end the sum of API cost passes capex + the sum of cash opex, by simulation.

    No capital recovery in the cash opex, or capex counts twice. None where it does not come by `last_month`.
    """
    own, api = capex_usd, 0.0
    for month in range(1, last_month + 1):
        own += own_cash_usd_per_month
        api += api_usd_per_month
        if api > own:
            return month
    return None


def scaled_seconds(seconds: float, decode_seconds: float, bandwidth_ratio: float) -> float:
    """A request's time where decoding is bound by memory bandwidth and the rest stays as it is.

    `bandwidth_ratio` is the other box's bandwidth over the measured one's.
    """
    decode_seconds = min(decode_seconds, seconds)
    return seconds - decode_seconds + decode_seconds / bandwidth_ratio
