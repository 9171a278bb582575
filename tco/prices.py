"""List prices of API models, from the table that ships inside litellm. litellm itself is not imported."""

from __future__ import annotations

import importlib.util
import json
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edgeft.errors import EnvironmentFault, UsageError, missing_extra, nearest

TABLE = "model_prices_and_context_window_backup.json"
FRONTIER, SMALL = "gpt-5.5", "gpt-4o-mini"


def price_table() -> tuple[dict[str, Any], str]:
    """(model -> litellm's entry, as-of text). Raises EnvironmentFault where litellm is absent or broken."""
    spec = importlib.util.find_spec("litellm")
    if spec is None or spec.origin is None:
        raise missing_extra("litellm", "api")
    path = Path(spec.origin).parent / TABLE
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        installed = datetime.fromtimestamp(path.stat().st_mtime, UTC).date()
    except (OSError, ValueError) as error:
        raise EnvironmentFault(
            f"litellm's price table is not readable: {error}.", "pip install --force-reinstall litellm"
        ) from None
    try:
        release = version("litellm")
    except PackageNotFoundError:
        release = "of unknown version"
    return table, f"litellm {release}'s table (it bears no date; installed {installed})"


def list_price(model: str, table: dict[str, Any], as_of: str) -> dict[str, Any]:
    """{usd_per_mtok_in, usd_per_mtok_out, source, as_of, notes} of a model, in USD per million tokens.

    Tiers above a context length, cached and batch prices are left out. Raises UsageError where the
    model is not in the table or is not priced by the token.
    """
    name = model.removeprefix("litellm:")
    entry = table.get(name)
    if entry is None:
        best = nearest(name, table)
        tail = f" Did you mean '{best}'?" if best else ""
        raise UsageError(
            f"the model '{name}' is not in litellm's price table.{tail}",
            f"edgeft tco --api {best or SMALL} ...",
        )
    prices = [entry.get("input_cost_per_token"), entry.get("output_cost_per_token")]
    if any(isinstance(p, bool) or not isinstance(p, int | float) for p in prices):
        raise UsageError(
            f"litellm's price table has no price per token for '{name}'.", f"edgeft tco --api {SMALL} ..."
        )
    notes = []
    if entry.get("supports_reasoning"):
        notes.append("a reasoning model: tokens it thinks with are billed too, and are not counted here")
    if entry.get("deprecation_date"):
        notes.append(f"withdrawn on {entry['deprecation_date']}")
    return {
        "usd_per_mtok_in": round(prices[0] * 1e6, 9),
        "usd_per_mtok_out": round(prices[1] * 1e6, 9),
        "source": entry.get("source") or "litellm's table, which names no source",
        "as_of": as_of,
        "notes": notes,
    }
