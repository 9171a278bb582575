"""What the page shows: counts, times and money of this process since it started, in memory.

Knows routes, states and figures, never text of requests. One event loop, no locks. Memory does not grow with traffic:
latencies are the last 1,000 a route, minutes the last 60, and requests that run at most MOST_LIVE.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

LATENCIES = 1000  # kept a route
MINUTES = 60
SHARE_MINUTES = 15
MOST_LIVE = 4096
MOST_ROUTES = 64
SHOWN = 50  # of the live requests, the oldest
OTHER = "other"
CLIENT_LEFT = 499
OUTCOMES = ("local", "api", "cache", "refused", "failed", "left")
QUANTILES = (("p50", 0.50), ("p95", 0.95), ("p99", 0.99))


@dataclass(slots=True)
class _Request:
    """One that runs."""

    began_s: float
    stream: bool
    tenant: str | None
    route: str | None = None
    local: bool = False
    state: str = "arrived"


@dataclass(slots=True)
class _Counts:
    """What ended in a minute, or since the start."""

    local: int = 0
    api: int = 0
    cache: int = 0
    refused: int = 0
    failed: int = 0
    left: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    firsts: int = 0
    first_s: float = 0.0  # the sum of their TTFT
    priced: int = 0
    unpriced: int = 0
    spend_usd: float = 0.0
    always_api_usd: float = 0.0

    def shares(self) -> dict[str, float]:
        """Counts by outcome, their total, and the shares of local, api, cache and refused in it (0 where there is none)."""
        counts = {name: getattr(self, name) for name in OUTCOMES}
        total = sum(counts.values())
        return {
            **counts,
            "total": total,
            **{f"{name}_share": counts[name] / total if total else 0.0 for name in OUTCOMES},
        }


class _Latencies:
    """Seconds of a route's last answers."""

    __slots__ = ("e2e_s", "ttft_s")

    def __init__(self) -> None:
        self.ttft_s: deque[float] = deque(maxlen=LATENCIES)
        self.e2e_s: deque[float] = deque(maxlen=LATENCIES)


class Live:
    """The figures of one running proxy. `clock` is monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.started_s = clock()
        self.requests: OrderedDict[str, _Request] = OrderedDict()
        self.forgotten = 0  # more ran at a time than are kept; 0 in a proxy with admission
        self.latencies: dict[str, _Latencies] = {}
        self.total = _Counts()
        self.minutes: deque[_Counts] = deque([_Counts()], maxlen=MINUTES)
        self.minute = 0  # the number of the newest, since the start
        self.seconds = [0] * 60  # arrivals in each of the last 60 seconds
        self.second = 0

    def begin(self, request_id: str, stream: bool, tenant: str | None) -> None:
        """A request has arrived."""
        now = self.clock()
        self._turn(now)
        self.seconds[self.second % 60] += 1
        if len(self.requests) >= MOST_LIVE:
            self.requests.popitem(last=False)
            self.forgotten += 1
        self.requests[request_id] = _Request(now, stream, tenant)

    def routed(self, request_id: str, route: str, local: bool, stream: bool | None = None) -> None:
        """It goes to `route` (again: after a fallback or an escalation the last one counts) and waits for its answer."""
        if request := self.requests.get(request_id):
            request.route, request.local, request.state = route, local, "waiting"
            request.stream = request.stream if stream is None else stream

    def first(self, request_id: str) -> None:
        """Its first output is here; the TTFT counts from `begin`. Only the first call counts."""
        request = self.requests.get(request_id)
        if request is None or request.state == "answering":
            return
        request.state = "answering"
        now = self.clock()
        self._turn(now)
        took = now - request.began_s
        self._of(request.route or OTHER).ttft_s.append(took)
        minute = self.minutes[-1]
        minute.first_s += took
        minute.firsts += 1

    def end(
        self,
        request_id: str,
        status: int,
        *,
        cache: bool,
        prompt_tokens: int | None,
        output_tokens: int | None,
        cost_usd: float | None,
        always_api_usd: float | None,
    ) -> None:
        """It is over, with the HTTP status that it came to (499: the client left). `cache`: answered from the cache.

        Money counts where both figures are known, so that what is compared is of the same requests; what was answered and
        is not known counts as unpriced. An id that is not running (ended already) counts nothing.
        """
        request = self.requests.pop(request_id, None)
        if request is None:
            return
        now = self.clock()
        self._turn(now)
        if status < 400:
            outcome = "cache" if cache else "local" if request.local else "api"
            if not cache:
                self._of(request.route or OTHER).e2e_s.append(now - request.began_s)
        else:
            outcome = "left" if status == CLIENT_LEFT else "refused" if status < 500 else "failed"
        for counts in (self.total, self.minutes[-1]):
            setattr(counts, outcome, getattr(counts, outcome) + 1)
            counts.prompt_tokens += prompt_tokens or 0
            counts.output_tokens += output_tokens or 0
            if cost_usd is not None and always_api_usd is not None:
                counts.spend_usd += cost_usd
                counts.always_api_usd += always_api_usd
                counts.priced += 1
            elif status < 400:
                counts.unpriced += 1

    def snapshot(self, engines: list[dict[str, Any]], certificate: dict[str, Any] | None) -> dict[str, Any]:
        """Everything, as JSON's types. `engines` and `certificate` are passed on as they are: the page reads of an engine
        route, local, state, in_flight, slots, waiting and waiting_limit, of the certificate state and detail."""
        now = self.clock()
        self._turn(now)
        uptime_s = now - self.started_s
        recent = _sum(list(self.minutes)[-SHARE_MINUTES:])
        total, minutes = self.total, list(self.minutes)
        return {
            "uptime_s": round(uptime_s, 3),
            "requests_per_s": round(sum(self.seconds) / min(60.0, max(1.0, uptime_s)), 3),
            "live": self._live(now),
            "live_total": len(self.requests),
            "shares": {"last_15_min": recent.shares(), "since_start": total.shares()},
            "latency": {
                route: {"ttft_s": _quantiles(kept.ttft_s), "e2e_s": _quantiles(kept.e2e_s)}
                for route, kept in self.latencies.items()
            },
            "tokens": {"prompt": total.prompt_tokens, "output": total.output_tokens},
            "spend": {
                "basis": "list prices" if total.priced else "no prices known",
                "spend_usd": round(total.spend_usd, 9) if total.priced else None,
                "always_api_usd": round(total.always_api_usd, 9) if total.priced else None,
                "priced": total.priced,
                "unpriced": total.unpriced,
            },
            "minutes": {  # oldest first, the running minute last
                **{name: [getattr(m, name) for m in minutes] for name in OUTCOMES},
                "ttft_mean_s": [round(m.first_s / m.firsts, 6) if m.firsts else None for m in minutes],
                "spend_usd": [round(m.spend_usd, 9) for m in minutes],
                "always_api_usd": [round(m.always_api_usd, 9) for m in minutes],
            },
            "certificate": certificate,
            "engines": engines,
        }

    def _live(self, now: float) -> list[dict[str, Any]]:
        return [
            {
                "id": key,
                "route": r.route,
                "age_s": round(now - r.began_s, 3),
                "state": r.state,
                "stream": r.stream,
            }
            for key, r in islice(self.requests.items(), SHOWN)
        ]

    def _of(self, route: str) -> _Latencies:
        kept = self.latencies.get(route)
        if kept is None:
            if len(self.latencies) >= MOST_ROUTES:
                route = OTHER
            kept = self.latencies.setdefault(route, _Latencies())
        return kept

    def _turn(self, now: float) -> None:
        """Turn the wheels of seconds and minutes to now."""
        second = int(now - self.started_s)
        if second == self.second:
            return
        for passed in range(self.second + 1, min(second, self.second + 60) + 1):
            self.seconds[passed % 60] = 0
        self.second = second
        for _ in range(min(second // 60 - self.minute, MINUTES)):
            self.minutes.append(_Counts())
        self.minute = second // 60


def _sum(minutes: Sequence[_Counts]) -> _Counts:
    whole = _Counts()
    for minute in minutes:
        for name in OUTCOMES:
            setattr(whole, name, getattr(whole, name) + getattr(minute, name))
    return whole


def _quantiles(seconds: deque[float]) -> dict[str, Any]:
    """n, and by nearest rank the least value that a share q is at or below; None where there is none."""
    ordered, n = sorted(seconds), len(seconds)
    return {"n": n, **{name: round(ordered[math.ceil(q * n) - 1], 6) if n else None for name, q in QUANTILES}}
