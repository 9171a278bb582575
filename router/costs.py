"""What one more request costs at each candidate: tokens at a price, energy, and a price for the time it holds a box.

Marginal cost only (what is bought is sunk): tco accounts for the whole. A policy's unit is "usd" where every remote
candidate has a price; else "steps", the place in the order from cheapest to dearest, and then no ceiling or budget
in money can be set.

    usd = prompt/10^6 * p_in + output/10^6 * p_out                              (API)
        + e2e_s * (watts/1000/3600 * usd_per_kwh + usd_per_busy_s) + queue_s * usd_per_wait_s      (local)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeft.errors import UsageError

# watts and usd_per_kwh are None where nobody said: energy then counts as 0, and `notes` says so.
DEFAULTS: dict[str, Any] = {
    "unit": "steps",
    "watts": None,
    "usd_per_kwh": None,
    "usd_per_busy_s": 0.0,
    "usd_per_wait_s": 0.0,
    "notes": [],
}


def cost_of(
    settings: Mapping[str, Any], candidate: Mapping[str, Any], step: int, prompt_tokens: int, output_tokens: float, queue_s: float
) -> float:  # fmt: skip
    """Predicted marginal cost of one request in the policy's unit. `step` is the candidate's place in the order."""
    if settings.get("unit") != "usd":
        return float(step)
    price = candidate.get("price")
    usd = 0.0
    if price:
        usd += (prompt_tokens * price["usd_per_mtok_in"] + output_tokens * price["usd_per_mtok_out"]) / 1e6
    if not candidate.get("remote"):
        watts, kwh = settings.get("watts"), settings.get("usd_per_kwh")
        busy = seconds_of(candidate, prompt_tokens, output_tokens)
        rate = (watts / 3.6e6 * kwh if watts and kwh else 0.0) + (settings.get("usd_per_busy_s") or 0.0)
        usd += busy * rate + queue_s * (settings.get("usd_per_wait_s") or 0.0)
    return usd


def seconds_of(candidate: Mapping[str, Any], prompt_tokens: int, output_tokens: float) -> float:
    """Predicted seconds of an answer without its queue: from measured rates, else the measured mean, else 0."""
    per_output: float | None = candidate.get("s_per_output_token")
    if per_output is not None:
        before = candidate.get("ttft_s") or 0.0
        per_prompt = candidate.get("s_per_prompt_token") or 0.0
        return before + per_prompt * prompt_tokens + per_output * output_tokens
    return candidate.get("mean_e2e_s") or 0.0


def settle(
    settings: Mapping[str, Any], candidates: list[dict[str, Any]], unit: str | None = None
) -> dict[str, Any]:
    """The cost block of a new policy. Raises UsageError where money is asked for and a remote price is not known."""
    unknown = [c["id"] for c in candidates if c.get("remote") and not c.get("price")]
    if unit == "usd" and unknown:
        raise UsageError(
            f"the price of {', '.join(repr(name) for name in unknown)} is not known, so costs can't be told in USD.",
            f"--price '{unknown[0]}=IN,OUT' in USD per million tokens",
        )
    any_price = any(c.get("price") for c in candidates)
    chosen = unit or ("usd" if any_price and not unknown else "steps")
    found = {**DEFAULTS, **settings, "unit": chosen, "notes": []}
    if chosen == "usd" and not (found["watts"] and found["usd_per_kwh"]):
        found["notes"].append("energy of local candidates: not given, counted as 0 (assumed)")
    if chosen == "steps":
        found["notes"].append("prices not known: costs are the order from cheapest to dearest, not money")
    return found


def cheapest_first(candidates: list[dict[str, Any]], settings: Mapping[str, Any]) -> list[float]:
    """The cost of each candidate's mean request, to order them by; steps where money is unknown."""
    return [
        cost_of(
            settings, c, place, int(c.get("mean_prompt_tokens") or 0), c.get("mean_output_tokens") or 0.0, 0.0
        )
        for place, c in enumerate(candidates)
    ]
