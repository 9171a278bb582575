"""The guide's cost claims in the shipped scenarios: what they give, and what would have to be true. Prints one JSON line.

Every figure of those scenarios is assumed or a list price, so what is printed is that as well. The share of exact repeats is counted
in banking77 where ../shared/data is there.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from edgeft.tco import tabulate
from edgeft.tco.scenario import Scenario, read_scenario
from edgeft.tco.shipped import shipped

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "banking77"
DRAWS = 10_000


def against(name: str, rival: str, local: str, **changed: float) -> Scenario:
    """A shipped scenario with two columns held against each other."""
    from dataclasses import replace

    return replace(read_scenario(shipped(name), changed), rival=rival, local=local)


def summary(scenario: Scenario) -> dict[str, Any]:
    """The figures of a comparison that claims are about."""
    table = tabulate(scenario, DRAWS)
    local, rival = (table.cells[n] for n in (table.local, table.rival) if n)
    cost, other = local["total_usd"].value or 0.0, rival["total_usd"].value or 0.0
    return {
        "rival_usd_per_month": round(other), "local_usd_per_month": round(cost), "local_over_rival": round(cost / other, 3),
        "solved": [local["correct_share"].value, rival["correct_share"].value], "tag": local["total_usd"].tag,
        "break_even_month": local["break_even_month"].text, "break_even_requests": local["break_even_requests"].text,
        "must": table.must[table.local or ""], "upfront_usd": local["upfront_usd"].value,
    }  # fmt: skip


def repeats() -> dict[str, Any] | None:
    """Questions of banking77 (train, then dev) that were asked before, word for word, case and outer space apart."""
    if not DATA.is_dir():
        return None
    seen, again, count = set(), 0, 0
    for part in ("train", "dev"):
        with (DATA / f"{part}.csv").open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                text = " ".join(row["text"].split()).lower()
                again, count = again + (text in seen), count + 1
                seen.add(text)
    return {"questions": count, "asked_before": again, "share": round(again / count, 4)}


def main() -> None:
    """Print everything."""
    desk = "support-desk"
    api = tabulate(against(desk, "frontier", "on-prem"), 100).cells["frontier"]
    by_request = (api["variable_usd"].value or 0.0) / 1e6
    volume = (45_000 - (api["fixed_usd"].value or 0.0)) / by_request
    found: dict[str, Any] = {
        "desk, own server against frontier": summary(against(desk, "frontier", "on-prem")),
        "desk, own server against small": summary(against(desk, "small", "on-prem")),
        "desk at 45,000 USD a month of frontier": {"requests_per_month": round(volume)}
        | summary(against(desk, "frontier", "on-prem", requests_per_month=volume)),
        "the same, routed": summary(against(desk, "frontier", "routed", requests_per_month=volume)),
        "the same, routed, 80 % from the cache": summary(
            against(
                desk, "frontier", "routed", requests_per_month=volume, **{"routed.answer_cache_share": 0.8}
            )
        ),
        "the same, frontier with 80 % from the cache": summary(
            against(
                desk, "frontier", "on-prem", requests_per_month=volume, **{"frontier.answer_cache_share": 0.8}
            )
        )["rival_usd_per_month"],
        "insurer, own server against frontier batch": summary(
            against("insurer-documents", "frontier-batch", "on-prem")
        ),
        "insurer, own server against small batch": summary(
            against("insurer-documents", "small-batch", "on-prem")
        ),
        "fleet against frontier": summary(against("edge-fleet", "frontier", "fleet")),
        "fleet against small": summary(against("edge-fleet", "small", "fleet")),
        "exact repeats in banking77": repeats(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
