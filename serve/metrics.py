"""What the proxy counts, in Prometheus' form, in a registry of its own: one method an event.

Finding a labelled child costs more than counting with it, so children are kept in dicts; label values beyond MOST_CHILDREN
a metric become "other", whoever chose them. Labels hold ids, codes and statuses, never text of requests.
"""

from __future__ import annotations

import platform
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from edgeft import __version__

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
MOST_CHILDREN = 500
OTHER = "other"


class Children:
    """A metric's children by their label values."""

    def __init__(self, metric: Any) -> None:
        self.metric = metric
        self.known: dict[tuple[str, ...], Any] = {}

    def of(self, *labels: str) -> Any:
        """The child of these values."""
        child = self.known.get(labels)
        if child is None:
            if len(self.known) >= MOST_CHILDREN:
                labels = (OTHER,) * len(labels)
            child = self.known[labels] = self.metric.labels(*labels)
        return child


class Metrics:
    """Counters, gauges and histograms of one proxy."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter(
            "requests", "Requests by candidate and HTTP status (499: client left).", "route", "status"
        )
        self.duration_s = self._histogram("request_duration_seconds", "From request to last byte.")
        self.ttft_s = self._histogram(
            "ttft_seconds", "From request to the first output of the engine, waiting included."
        )
        self.cache = self._counter("cache", "Look-ups in the exact cache.", "result")
        self.tokens = self._counter(
            "tokens", "Tokens as the engine counted them; hits not included.", "route", "direction"
        )
        self.cached_tokens = self._counter(
            "cached_tokens", "Of the tokens in, those that the engine did not have to read again.", "route"
        )
        self.unresolved = self._counter("usage_unresolved", "Answers whose engine told no usage.", "route")
        self.cost_usd = self._counter("cost_usd", "Cost of answers at list prices.", "route")
        self.always_api_usd = self._counter(
            "always_api_usd", "What the same answers would have cost at the strongest API candidate."
        )
        self.escalations = self._counter(
            "escalations", "Drafts that went on to a stronger candidate.", "from", "to", "why"
        )
        self.fallbacks = self._counter(
            "fallbacks", "Requests tried again at another candidate after a fault."
        )
        self.refusals = self._counter("refused", "Requests refused, by the error's code.", "code")
        self.in_flight = self._gauge("in_flight", "Requests in the engine.", "route")
        self.waiting = self._gauge("waiting", "Requests in the queue.", "route")
        self.states = self._gauge("engine_state", "1 for the state that a candidate is in.", "route", "state")
        self.suspended = self._gauge(
            "certificate_suspended", "1 while the policy's certificate is suspended."
        )
        Info("edgeft_build", "What runs.", registry=self.registry).info(
            {"version": __version__, "python": platform.python_version()}
        )
        self._requests, self._duration_s, self._ttft_s = map(
            Children, (self.requests, self.duration_s, self.ttft_s)
        )
        self._cache, self._tokens, self._cached = map(Children, (self.cache, self.tokens, self.cached_tokens))
        self._unresolved, self._cost = Children(self.unresolved), Children(self.cost_usd)
        self._escalations, self._refusals = Children(self.escalations), Children(self.refusals)
        self._state: dict[str, str] = {}

    def finished(self, route: str, status: int, seconds: float) -> None:
        """A request is over; `seconds` since it arrived."""
        self._requests.of(route, str(status)).inc()
        self._duration_s.of(route).observe(seconds)

    def first(self, route: str, seconds: float) -> None:
        """The engine's first output, `seconds` after the request arrived."""
        self._ttft_s.of(route).observe(seconds)

    def looked_up(self, result: str) -> None:
        """The exact cache was asked: hit or miss."""
        self._cache.of(result).inc()

    def tokens_used(self, route: str, prompt: int, output: int, cached: int = 0) -> None:
        """Tokens of an answer as the engine told them; `cached` of the prompt's."""
        self._tokens.of(route, "in").inc(prompt)
        self._tokens.of(route, "out").inc(output)
        if cached:
            self._cached.of(route).inc(cached)

    def usage_unresolved(self, route: str) -> None:
        """An answer whose engine told no usage."""
        self._unresolved.of(route).inc()

    def paid(self, route: str, cost_usd: float | None, always_api_usd: float | None) -> None:
        """What an answer cost and would have cost; None where no price is known."""
        if cost_usd is not None:
            self._cost.of(route).inc(cost_usd)
        if always_api_usd is not None:
            self.always_api_usd.inc(always_api_usd)

    def escalated(self, weaker: str, stronger: str, why: str) -> None:
        """A draft was not good enough; `why` is one of a few words."""
        self._escalations.of(weaker, stronger, why).inc()

    def fell_back(self) -> None:
        """A request is tried at another candidate after a fault."""
        self.fallbacks.inc()

    def refused(self, code: str) -> None:
        """A request was refused with this code."""
        self._refusals.of(code).inc()

    def queued(self, route: str, in_flight: int, waiting: int) -> None:
        """How full a candidate is; set when asked for, not at every request."""
        self.in_flight.labels(route).set(in_flight)
        self.waiting.labels(route).set(waiting)

    def engine_state(self, route: str, state: str) -> None:
        """The state that a candidate is in now; the one before becomes 0."""
        before = self._state.get(route)
        if before is not None and before != state:
            self.states.labels(route, before).set(0)
        self.states.labels(route, state).set(1)
        self._state[route] = state

    def certificate_suspended(self, suspended: bool) -> None:
        """Whether the certificate is suspended."""
        self.suspended.set(suspended)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, told: str, *labels: str) -> Counter:
        return Counter(f"edgeft_{name}", told, labels, registry=self.registry)

    def _gauge(self, name: str, told: str, *labels: str) -> Gauge:
        return Gauge(f"edgeft_{name}", told, labels, registry=self.registry)

    def _histogram(self, name: str, told: str) -> Histogram:
        return Histogram(f"edgeft_{name}", told, ("route",), buckets=SECONDS, registry=self.registry)
