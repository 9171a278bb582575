"""Many requests at once: closed-loop levels, then arrivals by a Poisson process; where the box bends.

Closed loop: n clients, each asking again as soon as it is answered. Open loop: requests come when they come, and waiting counts
from the moment each should have been sent, so a queue is not left out of its own latency (coordinated omission).
Goodput: requests a second that held the TTFT and TPOT limits. Knee: the fewest clients that give NEAR of the best throughput.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from edgeft.bench.callers import Caller
from edgeft.bench.speed import body_of
from edgeft.bench.stats import summary
from edgeft.engines.client import Reply
from edgeft.errors import EnvironmentFault, UsageError
from edgeft.rows import Row

NEAR = 0.95
OPEN_SHARES = (0.5, 0.7, 0.9)  # of the best closed-loop rate
MAX_IN_FLIGHT = 256
PROMPT_CHARS, OUTPUT_TOKENS = 600, 32


def read_levels(text: str | None) -> tuple[int, ...]:
    """'1,2,4,8' as numbers of clients. Raises UsageError naming the word that is none."""
    words = text.split(",") if text else []
    for word in words:
        if not word.strip().isdigit() or not 1 <= int(word) <= MAX_IN_FLIGHT:
            raise UsageError(f"'{word}' is no number of clients from 1 to {MAX_IN_FLIGHT}.", "--load 1,2,4,8")
    return tuple(sorted({int(word) for word in words}))


def sweep(
    ask: Caller,
    rows: list[Row],
    levels: list[int],
    seconds: float,
    limits: dict[str, float],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Closed-loop levels and Poisson arrivals at shares of the best rate, `seconds` each."""
    closed = []
    for level in levels:
        say(f"{level} at once")
        closed.append({"clients": level, **judged(closed_loop(ask, rows, level, seconds), limits)})
    best = max(closed, key=lambda c: c["requests_per_s"])
    if not best["requests_per_s"]:
        raise EnvironmentFault("no request under load was answered.", "less report/.work/*.log")
    arrivals = []
    for share in OPEN_SHARES:
        rate = share * best["requests_per_s"]
        say(f"arrivals at {100 * share:.0f} % of {best['requests_per_s']:.2f}/s")
        arrivals.append(
            {
                "asked_per_s": rate,
                "share_of_best": share,
                **judged(open_loop(ask, rows, rate, seconds), limits),
            }
        )
    return {
        "closed": closed,
        "open": arrivals,
        "knee_clients": knee(closed),
        "limits": {k: limits[k] for k in ("ttft_s", "tpot_s") if k in limits},
        "prompt_chars": PROMPT_CHARS,
        "output_tokens": OUTPUT_TOKENS,
        "seconds": seconds,
        "formulas": {
            "goodput_per_s": "requests a second within the TTFT and TPOT limits",
            "knee_clients": f"the fewest clients with {100 * NEAR:.0f} % of the best throughput",
            "open": "latency from the intended moment of sending; exponential gaps, seeded",
        },
    }


def knee(closed: list[dict[str, Any]]) -> int:
    """The fewest clients that give NEAR of the best output tokens a second."""
    best = max(c["output_tok_per_s"] for c in closed)
    return int(min(c["clients"] for c in closed if c["output_tok_per_s"] >= NEAR * best))


def closed_loop(ask: Caller, rows: list[Row], clients: int, seconds: float) -> dict[str, Any]:
    """`clients` threads that ask until the time is up; what was begun is finished, and the time goes on until then."""
    found: list[dict[str, Any]] = []
    lock, started = threading.Lock(), time.monotonic()

    def client(number: int) -> None:
        turn = 0
        while turn == 0 or time.monotonic() - started < seconds:
            entry = timed(ask, rows, number + clients * turn, time.monotonic())
            with lock:
                found.append(entry)
            turn += 1

    with ThreadPoolExecutor(clients) as pool:
        for future in [pool.submit(client, number) for number in range(clients)]:
            future.result()
    return {"requests": found, "wall_s": time.monotonic() - started}


def open_loop(ask: Caller, rows: list[Row], rate: float, seconds: float, seed: int = 0) -> dict[str, Any]:
    """Requests at the moments of a Poisson process of `rate` a second (exponential gaps, seeded)."""
    chance = np.random.default_rng(seed)
    count = max(3, round(rate * seconds))
    moments = np.cumsum(chance.exponential(1 / rate, count))
    started = time.monotonic()
    with ThreadPoolExecutor(min(count, MAX_IN_FLIGHT)) as pool:
        waiting = []
        for number, moment in enumerate(moments):
            time.sleep(max(0.0, started + moment - time.monotonic()))
            waiting.append(pool.submit(timed, ask, rows, number, started + float(moment)))
        found = [future.result() for future in waiting]
    return {"requests": found, "wall_s": time.monotonic() - started}


def timed(ask: Caller, rows: list[Row], number: int, due: float) -> dict[str, Any]:
    """One request; its times count from `due` (monotonic seconds)."""
    late = time.monotonic() - due
    try:
        reply: Reply = ask(body_of(rows, number, PROMPT_CHARS, OUTPUT_TOKENS))
    except EnvironmentFault as error:
        return {"error": error.message, "ttft_s": None, "e2e_s": None, "tpot_s": None, "output_tokens": 0}
    rate = reply.decode_tok_per_s
    return {
        "error": None, "ttft_s": round(late + reply.ttft_s, 6), "e2e_s": round(late + reply.e2e_s, 6),
        "tpot_s": round(1 / rate, 6) if rate else None, "output_tokens": reply.output_tokens or 0,
    }  # fmt: skip


def judged(run: dict[str, Any], limits: dict[str, float]) -> dict[str, Any]:
    """Throughput, goodput and latencies of a run."""
    whole = [r for r in run["requests"] if r["error"] is None]
    good = [r for r in whole if holds(r, limits)]
    wall = run["wall_s"]
    return {
        "requests": len(run["requests"]),
        "failed": len(run["requests"]) - len(whole),
        "requests_per_s": len(whole) / wall,
        "output_tok_per_s": sum(r["output_tokens"] for r in whole) / wall,
        "goodput_per_s": len(good) / wall,
        "good_share": len(good) / len(run["requests"]),
        "ttft_s": summary([r["ttft_s"] for r in whole]) if whole else None,
        "tpot_s": summary([r["tpot_s"] for r in whole if r["tpot_s"]])
        if any(r["tpot_s"] for r in whole)
        else None,
        "e2e_s": summary([r["e2e_s"] for r in whole]) if whole else None,
        "wall_s": wall,
    }


def holds(request: dict[str, Any], limits: dict[str, float]) -> bool:
    """Within the TTFT and TPOT limits that are set?"""
    return all(
        request[name] is None or request[name] <= limits[name]
        for name in ("ttft_s", "tpot_s")
        if name in limits
    )
