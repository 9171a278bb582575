"""The counters of `edgeft serve`: where requests went, what the cache answered, how long the first token took."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from edgeft.errors import EnvironmentFault, UsageError

LINE = re.compile(r"^(edgeft_\w+)(?:\{([^}]*)\})? ([0-9.eE+-]+|\+Inf|NaN)$")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
HINT = "curl -s http://127.0.0.1:8080/metrics > metrics.txt, from a proxy that has served real requests"
Samples = list[tuple[str, dict[str, str], float]]


def read_counters(place: str) -> Samples:
    """(name, labels, value) of every sample of a file in Prometheus' form, or of a running proxy's /metrics.

    Raises UsageError where there is no such file or nothing of edgeft's in it, EnvironmentFault where the proxy does not answer.
    """
    if place.startswith(("http://", "https://")):
        import httpx

        try:
            answer = httpx.get(
                place if place.endswith("/metrics") else f"{place.rstrip('/')}/metrics", timeout=10
            )
            answer.raise_for_status()
            text = answer.text
        except httpx.HTTPError as error:
            raise EnvironmentFault(
                f"{place} gives no counters: {error}.", "edgeft serve --policy policy/"
            ) from None
    else:
        path = Path(place)
        if not path.is_file():
            raise UsageError(f"there is no file {place}.", HINT)
        text = path.read_text(encoding="utf-8", errors="replace")
    found = []
    for line in text.splitlines():
        if hit := LINE.match(line.strip()):
            found.append((hit[1], dict(LABEL.findall(hit[2] or "")), float(hit[3].replace("+Inf", "inf"))))
    if not any(name == "edgeft_requests_total" for name, _, _ in found):
        raise UsageError(f"{place} holds no counters of edgeft serve.", HINT)
    return found


def shares(samples: Samples, local_id: str | None) -> dict[str, Any]:
    """{answer_cache_share, local_share, escalated_share, n_looked, n_served, routes} of what was answered well (status 200).

    `local_id` is the route that counts as local; None: every route whose id names no API. A share is None where nothing was
    counted. Hits of the caches are no requests to a candidate. `local_share` is what was tried locally, drafts that a judge sent on
    among it; `escalated_share` is the share of those.
    """

    def is_local(route: str) -> bool:
        return route == local_id if local_id else not route.startswith(("openai:", "litellm:"))

    looked = {
        k: sum(v for n, labels, v in samples if n == "edgeft_cache_total" and labels.get("result") == k)
        for k in ("hit", "semantic", "miss")
    }
    routes: dict[str, float] = {}
    for name, labels, value in samples:
        if name == "edgeft_requests_total" and labels.get("status") == "200":
            routes[labels.get("route", "")] = routes.get(labels.get("route", ""), 0.0) + value
    escalated = sum(
        v
        for n, labels, v in samples
        if n == "edgeft_escalations_total"
        and is_local(labels.get("from", ""))
        and not is_local(labels.get("to", ""))
    )
    tried = sum(v for r, v in routes.items() if is_local(r)) + escalated
    served, asked = sum(routes.values()), sum(looked.values())
    return {
        "answer_cache_share": (looked["hit"] + looked["semantic"]) / served if served else None,
        "local_share": min(1.0, tried / served) if served else None,
        "escalated_share": min(1.0, escalated / tried) if tried else None,
        "n_looked": asked,
        "n_served": served,
        "routes": routes,
    }


def ttft_quantile_s(samples: Samples, share: float = 0.95) -> tuple[float, float, float] | None:
    """(seconds, the bucket's lower and upper bound) within which so many first tokens came, every route together; None where nothing
    was counted or the answer lies beyond the last bound.

    Linear within the bucket, as Prometheus' histogram_quantile. Answers that the proxy's caches gave have no first token and are not in it.
    """
    below: dict[float, float] = {}
    for name, labels, value in samples:
        if name == "edgeft_ttft_seconds_bucket" and "le" in labels:
            bound = float(labels["le"].replace("+Inf", "inf"))
            below[bound] = below.get(bound, 0.0) + value
    bounds = sorted(below)
    wanted = share * below.get(float("inf"), 0.0)
    if not wanted:
        return None
    at = next(i for i, bound in enumerate(bounds) if below[bound] >= wanted)
    high = bounds[at]
    if high == float("inf"):
        return None
    low, before = (bounds[at - 1], below[bounds[at - 1]]) if at else (0.0, 0.0)
    return low + (high - low) * (wanted - before) / (below[high] - before), low, high
