"""List prices of API models, from the table that ships inside litellm. litellm itself is not imported."""

from __future__ import annotations

import importlib.util
import json
from datetime import date
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edgeft.errors import EnvironmentFault, UsageError, missing_extra, nearest

TABLE = "model_prices_and_context_window_backup.json"
FRONTIER, SMALL = "gpt-5.5", "gpt-4o-mini"
BATCH = "_batches"
# litellm's names of what a token costs, and ours
FIELDS = {
    "usd_per_mtok_in": "input_cost_per_token",
    "usd_per_mtok_out": "output_cost_per_token",
    "usd_per_mtok_read": "cache_read_input_token_cost",
    "usd_per_mtok_write": "cache_creation_input_token_cost",
}


@cache
def price_table() -> tuple[dict[str, Any], str]:
    """(model -> litellm's entry, as-of text). Raises EnvironmentFault where litellm is absent or broken."""
    spec = importlib.util.find_spec("litellm")
    if spec is None or spec.origin is None:
        raise missing_extra("litellm", "api")
    path = Path(spec.origin).parent / TABLE
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EnvironmentFault(
            f"litellm's price table is not readable: {error}.", "pip install --force-reinstall litellm"
        ) from None
    try:
        release = version("litellm")
    except PackageNotFoundError:
        release = "of unknown version"
    return table, f"litellm {release}'s table, which bears no date"


def list_price(
    model: str, table: dict[str, Any], as_of: str, batch: bool = False, today: date | None = None
) -> dict[str, Any]:
    """{usd_per_mtok_in, …_out, …_read, …_write, long_context_tokens, …_in_long, …_out_long, source, as_of, notes} of a model.

    USD per million tokens; a key of long context is absent where the table has none. What is read from or written to a prompt
    cache costs the plain price where the table names no other. Raises UsageError where the model is not in the table, is not
    priced by the token, has no batch price where one is asked for, or was withdrawn before `today`.
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
    end = BATCH if batch else ""
    found = {ours: _per_million(entry, theirs + end) for ours, theirs in FIELDS.items()}
    if found["usd_per_mtok_in"] is None or found["usd_per_mtok_out"] is None:
        what = "batch price" if batch else "price per token"
        raise UsageError(
            f"litellm's price table has no {what} for '{name}'.", f"edgeft tco --api {SMALL} ..."
        )
    notes = []
    if found["usd_per_mtok_read"] is None:
        notes.append("no price for cached prompts, so the plain one")
    for key in ("usd_per_mtok_read", "usd_per_mtok_write"):
        found[key] = found["usd_per_mtok_in"] if found[key] is None else found[key]
    if entry.get("supports_reasoning"):
        notes.append("a reasoning model: tokens it thinks with are billed too; give 'reasoning_tokens'")
    if gone := entry.get("deprecation_date"):
        if date.fromisoformat(gone) < (today or date.today()):
            raise UsageError(
                f"the model '{name}' was withdrawn on {gone}, so its price has expired.",
                f"name another model, as {SMALL}, or give its prices by hand",
            )
        notes.append(f"withdrawn on {gone}")
    return {
        **found,
        **_long_context(entry, end),
        "source": entry.get("source") or "litellm's table, which names no source",
        "as_of": as_of,
        "notes": notes,
    }


def _per_million(entry: dict[str, Any], key: str) -> float | None:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return round(value * 1e6, 9)


def _long_context(entry: dict[str, Any], end: str) -> dict[str, float]:
    """The price above a context length, where the table has one: `input_cost_per_token_above_272k_tokens`."""
    for key in entry:
        start, _, rest = key.partition("_above_")
        if start == "input_cost_per_token" and rest.endswith(f"k_tokens{end}"):
            length = rest.removesuffix(f"k_tokens{end}")
            out = _per_million(entry, f"output_cost_per_token_above_{length}k_tokens{end}")
            usd_in = _per_million(entry, key)
            if length.isdigit() and usd_in is not None and out is not None:
                return {
                    "long_context_tokens": 1000.0 * int(length),
                    "usd_per_mtok_in_long": usd_in,
                    "usd_per_mtok_out_long": out,
                }
    return {}
