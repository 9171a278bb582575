"""What the page shows, counted by hand on a clock of the test's own."""

from __future__ import annotations

import json

import psutil
import pytest

from edgeft.serve import live
from edgeft.serve.live import Live


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def finish(shown: Live, key: str, status: int = 200, **more) -> None:
    known = {
        "cache": False,
        "prompt_tokens": 10,
        "output_tokens": 5,
        "cost_usd": None,
        "always_api_usd": None,
    }
    shown.end(key, status, **{**known, **more})


def counts(snapshot: dict, span: str = "since_start") -> dict:
    names = (*live.OUTCOMES, "total")
    return {name: n for name in names if (n := snapshot["shares"][span][name])}


def test_a_request_from_arrival_to_end(clock):
    shown = Live(clock)
    shown.begin("a", True, "t")
    clock.now += 0.25
    (one,) = shown.snapshot([], None)["live"]
    assert one == {"id": "a", "route": None, "age_s": 0.25, "state": "arrived", "stream": True}
    shown.routed("a", "weak", True)
    assert shown.snapshot([], None)["live"][0]["state"] == "waiting"
    shown.first("a")
    clock.now += 0.75
    shown.first("a")  # every chunk may call it
    assert shown.snapshot([], None)["live"][0] == {
        "id": "a", "route": "weak", "age_s": 1.0, "state": "answering", "stream": True,
    }  # fmt: skip
    finish(shown, "a")
    finish(shown, "a")  # again: counts nothing
    found = shown.snapshot([{"route": "weak"}], {"state": "valid"})
    assert found["live"] == [] and counts(found) == {"local": 1, "total": 1}
    assert found["latency"]["weak"]["ttft_s"] == {"n": 1, "p50": 0.25, "p95": 0.25, "p99": 0.25}
    assert found["latency"]["weak"]["e2e_s"]["p50"] == 1.0
    assert found["tokens"] == {"prompt": 10, "output": 5}
    assert found["engines"] == [{"route": "weak"}] and found["certificate"] == {"state": "valid"}
    assert found["minutes"]["ttft_mean_s"] == [0.25]
    assert json.loads(json.dumps(found)) == found


def test_every_outcome_has_its_place(clock):
    shown = Live(clock)
    cases = [
        ("local", True, 200, False), ("api", False, 200, False), ("cache", False, 200, True), ("refused", True, 429, False),
        ("refused", True, 401, False), ("failed", True, 502, False), ("left", True, 499, False),
    ]  # fmt: skip
    for i, (_, local, status, cache) in enumerate(cases):
        shown.begin(str(i), False, None)
        shown.routed(str(i), "r", local)
        finish(shown, str(i), status, cache=cache)
    found = shown.snapshot([], None)
    assert counts(found) == {
        "local": 1,
        "api": 1,
        "cache": 1,
        "refused": 2,
        "failed": 1,
        "left": 1,
        "total": 7,
    }
    shares = found["shares"]["since_start"]
    assert shares["refused_share"] == 2 / 7 and sum(
        shares[f"{n}_share"] for n in live.OUTCOMES
    ) == pytest.approx(1)
    assert found["latency"]["r"]["e2e_s"]["n"] == 2, "hits, refusals and faults are no latency of the route"


def test_quantiles_are_of_the_last_thousand_by_nearest_rank(clock):
    shown = Live(clock)
    for i in range(1, 1501):
        shown.begin("x", True, None)
        shown.routed("x", "r", True)
        clock.now += i / 1000
        shown.first("x")
        finish(shown, "x")
    assert shown.snapshot([], None)["latency"]["r"]["ttft_s"] == {
        "n": 1000,
        "p50": 1.0,
        "p95": 1.45,
        "p99": 1.49,
    }


def test_money_compares_the_same_requests(clock):
    shown = Live(clock)
    assert shown.snapshot([], None)["spend"]["basis"] == "no prices known"
    for key, cost, always in (("a", 0.0, 0.002), ("b", 0.003, 0.003), ("c", 0.5, None), ("d", None, None)):
        shown.begin(key, False, None)
        finish(shown, key, cost_usd=cost, always_api_usd=always)
    shown.begin("refused", False, None)
    finish(shown, "refused", 429)
    assert shown.snapshot([], None)["spend"] == {
        "basis": "list prices, local answers at 0", "spend_usd": 0.003, "always_api_usd": 0.005, "priced": 2, "unpriced": 2,
    }  # fmt: skip


def test_a_local_answer_without_a_price_costs_nothing_at_list_prices(clock):
    shown = Live(clock)
    for key, local, status in (("a", True, 200), ("b", False, 200), ("c", True, 502)):
        shown.begin(key, False, None)
        shown.routed(key, "r", local)
        finish(shown, key, status, always_api_usd=0.002)
    spend = shown.snapshot([], None)["spend"]
    assert (spend["spend_usd"], spend["always_api_usd"], spend["priced"], spend["unpriced"]) == (
        0,
        0.002,
        1,
        1,
    )


def test_rates_minutes_and_the_last_quarter_of_an_hour(clock):
    shown = Live(clock)
    for _ in range(90 * 60):  # one a second, for an hour and a half
        shown.begin("x", False, None)
        finish(shown, "x")
        clock.now += 1
    clock.now -= 0.5
    found = shown.snapshot([], None)
    assert found["requests_per_s"] == 1.0
    assert found["minutes"]["api"] == [60] * 60
    assert counts(found, "last_15_min") == {"api": 900, "total": 900}
    assert counts(found) == {"api": 5400, "total": 5400}
    clock.now += 600
    found = shown.snapshot([], None)
    assert found["requests_per_s"] == 0 and found["minutes"]["api"][-10:] == [0] * 10
    assert counts(found, "last_15_min")["total"] == 300
    clock.now += 86400
    found = shown.snapshot([], None)
    assert found["minutes"]["api"] == [0] * 60 and counts(found)["total"] == 5400


def test_the_first_seconds_are_a_rate_too(clock):
    shown = Live(clock)
    for i in range(20):
        shown.begin(str(i), False, None)
    clock.now += 10
    assert shown.snapshot([], None)["requests_per_s"] == 2.0


def test_memory_is_bounded_over_a_million_calls(clock):
    shown, process = Live(clock), psutil.Process()

    def calls(first: int, last: int) -> None:
        for i in range(first, last):
            key, route = f"{i:032x}", f"route-{i % 500}"
            shown.begin(key, bool(i % 2), "tenant")
            shown.routed(key, route, True)
            shown.first(key)
            if i % 10:  # one in ten never ends
                finish(shown, key, 200 if i % 3 else 429, cost_usd=0.001, always_api_usd=0.002)
            clock.now += 0.05

    calls(0, 70_000)  # until all that is kept is full
    before = process.memory_info().rss
    calls(70_000, 257_000)
    assert process.memory_info().rss - before < 4_000_000
    assert len(shown.requests) <= live.MOST_LIVE and shown.forgotten > 20_000
    assert len(shown.latencies) <= live.MOST_ROUTES + 1 and len(shown.minutes) == live.MINUTES
    found = shown.snapshot([], None)
    assert len(found["live"]) == live.SHOWN and found["live_total"] == len(shown.requests) > 4000
    assert len(json.dumps(found)) < 60_000
    assert counts(found)["total"] == 257_000 - 25_700
