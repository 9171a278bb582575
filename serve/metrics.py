"""What the proxy counts, in Prometheus' form, in a registry of its own."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Counters and histograms of one proxy. Labels hold ids and statuses, never text of requests."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter(
            "edgeft_requests",
            "Chat requests by candidate and HTTP status (499: client left).",
            ("route", "status"),
            registry=own,
        )
        self.duration_s = Histogram(
            "edgeft_request_duration_seconds",
            "From request to last byte.",
            ("route",),
            buckets=SECONDS,
            registry=own,
        )
        self.ttft_s = Histogram(
            "edgeft_ttft_seconds",
            "From request to the first output of the engine, waiting included.",
            ("route",),
            buckets=SECONDS,
            registry=own,
        )
        self.cache = Counter("edgeft_cache", "Look-ups in the exact cache.", ("result",), registry=own)
        self.tokens = Counter(
            "edgeft_tokens",
            "Tokens as the engine counted them; hits not included.",
            ("route", "direction"),
            registry=own,
        )
        self.unresolved = Counter(
            "edgeft_usage_unresolved", "Answers whose engine told no usage.", ("route",), registry=own
        )
        self.in_flight = Gauge("edgeft_in_flight", "Requests in the engine.", ("route",), registry=own)
        self.waiting = Gauge("edgeft_waiting", "Requests in the queue.", ("route",), registry=own)

    def first(self, route: str, seconds: float) -> None:
        """The first output of an engine."""
        self.ttft_s.labels(route).observe(seconds)

    def finished(self, route: str, status: int, seconds: float) -> None:
        """A request is over."""
        self.requests.labels(route, str(status)).inc()
        self.duration_s.labels(route).observe(seconds)

    def cache_lookup(self, result: str) -> None:
        self.cache.labels(result).inc()

    def tokens_used(self, route: str, prompt: int, output: int, cached: int) -> None:
        self.tokens.labels(route, "in").inc(prompt)
        self.tokens.labels(route, "out").inc(output)

    def unresolved_usage(self, route: str) -> None:
        self.unresolved.labels(route).inc()

    def cost(self, route: str, usd: float) -> None: ...
    def always_api(self, usd: float) -> None: ...
    def fell_back(self, route: str, why: str) -> None: ...
    def escalated(self, route: str, to: str, why: str) -> None: ...
    def refused(self, code: str) -> None: ...
    def moment(self, proxy: Any) -> None:
        for name, admission in proxy.admissions.items():
            self.in_flight.labels(name).set(admission.in_flight)
            self.waiting.labels(name).set(len(admission.queue))

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
