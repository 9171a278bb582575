"""List prices of API models, from the table that litellm ships; dated by litellm's version."""

from __future__ import annotations

from typing import Any


def list_price(model: str) -> dict[str, Any] | None:
    """USD per million tokens in and out, or None where the table does not know the model."""
    import litellm

    entry = litellm.model_cost.get(model) or litellm.model_cost.get(model.split("/", 1)[-1])
    if not entry or entry.get("input_cost_per_token") is None:
        return None
    from importlib.metadata import version

    return {
        "usd_per_mtok_in": 1e6 * entry["input_cost_per_token"],
        "usd_per_mtok_out": 1e6 * (entry.get("output_cost_per_token") or 0.0),
        "source": "litellm's price table",
        "as_of": f"litellm {version('litellm')}",
    }
