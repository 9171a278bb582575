"""Speed of running models, one stream each, measured in turns.

Artefacts are asked in rounds, there and back (A B C, C B A), so that a box that slows down slows all of them. Rounds go on
until the interval of every median is as narrow as WITHIN, or until the target has had its time, which the result says.

TTFT: request sent to first piece of text, on the client's side. Prefill tok/s = prompt tokens / TTFT with an empty
cache; decode tok/s = (n-1)/(e2e - TTFT); TPOT is its inverse; ITL: each gap between pieces of text.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeft.bench.callers import Caller
from edgeft.bench.energy import Meter
from edgeft.bench.journal import Journal
from edgeft.bench.pool import Pool, Running
from edgeft.bench.stats import summary
from edgeft.bench.targets import Target
from edgeft.bench.watch import Watch
from edgeft.engines.client import Reply
from edgeft.errors import EnvironmentFault, UsageError
from edgeft.rows import Row, prompt_of

WITHIN = 0.05  # half the width of the 95 % interval of the median, as a share of the median
MIN_ROUNDS, MAX_ROUNDS = 2, 50
SLOW_S, MIN_TOKENS = 5.0, 8  # a target whose request would decode longer than this is asked for fewer tokens
CHARS_A_TOKEN = 4.5  # of English; the first answer tells what it really is


@dataclass(frozen=True)
class Point:
    """A shape of request: `prompt_tokens` in (about: the engine's own count is kept), `output_tokens` out (forced)."""

    prompt_tokens: int
    output_tokens: int

    def __str__(self) -> str:
        return f"{self.prompt_tokens}x{self.output_tokens}"


def read_points(text: str) -> tuple[Point, ...]:
    """'128x64,512x16' as points. Raises UsageError naming the word that is not one."""
    points = []
    for word in text.split(","):
        found = re.fullmatch(r"(\d+)x(\d+)", word.strip())
        if not found or int(found[1]) < 8 or int(found[2]) < 2:
            raise UsageError(
                f"'{word}' is not PROMPTxOUTPUT in tokens, of 8 and 2 or more.",
                "--speed-points 128x64,512x16",
            )
        points.append(Point(int(found[1]), int(found[2])))
    return tuple(points)


def measure(
    targets: list[Target], pool: Pool, journal: Journal, rows: list[Row], points: tuple[Point, ...],
    repetitions: int, seconds: float, meter: Meter, say: Callable[[str], None],
) -> None:  # fmt: skip
    """Ask all targets in rounds and keep a `block` a round and target; `seconds` bounds the time of each.

    A target that breaks gets an `error` in the journal and is asked no more.
    """
    for number in range(MAX_ROUNDS):
        left = [t for t in targets if not done(journal, t, points, repetitions, seconds)]
        if not left:
            return
        for target in left if number % 2 == 0 else reversed(left):
            taken = journal.all(target.id, "block")
            say(f"round {len(taken) + 1}: {target.id}")
            try:
                with pool.use(target) as running:
                    keep_start(journal, target, running.local)
                    if not taken:
                        journal.add(target.id, "warm-up", warm_up(running.ask, rows, points))
                    plan = journal.all(target.id, "warm-up")[0]
                    journal.add(target.id, "block", block(running, rows, points, plan, len(taken), meter))
            except EnvironmentFault as error:
                journal.add(target.id, "error", error.message)


def alone(ask: Caller, rows: list[Row], point: Point, runs: int) -> dict[str, Any]:
    """The figures of one model and one shape of request, after a warm-up."""
    plan = warm_up(ask, rows, (point,))
    shape = (plan["chars"][0], plan["output_tokens"][0])
    return point_figures(point, [raw(ask(body_of(rows, number + 1, *shape))) for number in range(runs)])


def keep_start(journal: Journal, target: Target, local: Any) -> None:
    """Keep what starting cost, once a start."""
    if local and (journal.last(target.id, "start") or {}).get("pid") != local.pid:
        journal.add(target.id, "start", {
            "pid": local.pid, "cold_start_s": local.cold_start_s, "load_s": local.load_s, "load_mode": local.load_mode,
            "engine_build": local.build, "run_profile": local.run_profile,
        })  # fmt: skip


def done(
    journal: Journal, target: Target, points: tuple[Point, ...], repetitions: int, seconds: float
) -> bool:
    """Has the target been asked enough: broken, settled, or out of time with enough rounds?"""
    if journal.last(target.id, "error"):
        return True
    blocks = journal.all(target.id, "block")
    if len(blocks) < max(MIN_ROUNDS, repetitions):
        return False
    spent = sum(b["wall_s"] for b in blocks)
    return len(blocks) >= MAX_ROUNDS or spent >= seconds or settled(figures(blocks, points))


def warm_up(ask: Caller, rows: list[Row], points: tuple[Point, ...]) -> dict[str, Any]:
    """One untimed request of each shape: how many characters make the tokens asked for, and how many can be waited for."""
    plan: dict[str, Any] = {"first_request_s": None, "chars": [], "output_tokens": []}
    wrapped = 0
    for point in points:
        chars = round(point.prompt_tokens * CHARS_A_TOKEN)
        reply = ask(body_of(rows, 0, chars, min(point.output_tokens, MIN_TOKENS)))
        if plan["first_request_s"] is None:
            plan["first_request_s"] = reply.e2e_s
            wrapped = ask(body_of(rows, 0, 1, 2)).prompt_tokens or 0  # what the chat template adds
        if reply.prompt_tokens and reply.prompt_tokens > wrapped:
            chars = round(chars * max(4, point.prompt_tokens - wrapped) / (reply.prompt_tokens - wrapped))
        rate = reply.decode_tok_per_s
        room = int(rate * SLOW_S) if rate else point.output_tokens
        plan["chars"].append(chars)
        plan["output_tokens"].append(min(point.output_tokens, max(MIN_TOKENS, room)))
    return plan


def block(
    running: Running,
    rows: list[Row],
    points: tuple[Point, ...],
    plan: dict[str, Any],
    number: int,
    meter: Meter,
) -> dict[str, Any]:
    """One timed request of each shape: raw times, what disturbed them, and the energy where there is a meter."""
    running.ask(body_of(rows, number, 40, 4))  # wakes the threads and fills the caches that others emptied
    watch = Watch(running.local.pid if running.local else None)
    span, begun, started = meter.start(), time.time(), time.monotonic()
    requests = []
    for index in range(len(points)):
        reply = running.ask(
            body_of(rows, number * len(points) + index + 1, plan["chars"][index], plan["output_tokens"][index])
        )  # fmt: skip
        requests.append(raw(reply))
    wall, joules, ended = time.monotonic() - started, meter.stop(span), time.time()
    return {
        "requests": requests, "wall_s": wall, "joules": joules, "begun_s": begun, "ended_s": ended, "flags": watch.flags(),
    }  # fmt: skip


def body_of(rows: list[Row], start: int, chars: int, output_tokens: int) -> dict[str, Any]:
    """A request of a shape: texts of rows, beginning at another row for each `start`; the answer's length is forced."""
    return {
        "messages": [{"role": "user", "content": long_prompt(rows, start, chars)}],
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
    }


def long_prompt(rows: list[Row], start: int, chars: int) -> str:
    """Texts of rows joined to `chars` characters."""
    texts = [prompt_of(row)[-1]["content"] for row in rows]
    joined, index = "", start * 7
    while len(joined) < chars:
        joined += texts[index % len(texts)] + " "
        index += 1
    return joined[:chars]


def raw(reply: Reply) -> dict[str, Any]:
    """What is kept of a timed request, seconds to the microsecond."""
    return {
        "prompt_tokens": reply.prompt_tokens,
        "output_tokens": reply.output_tokens,
        "ttft_s": round(reply.ttft_s, 6),
        "e2e_s": round(reply.e2e_s, 6),
        "itl_s": [round(b - a, 6) for a, b in itertools.pairwise(reply.chunk_s)],
        "decode_tok_per_s": reply.decode_tok_per_s,
    }


def figures(blocks: list[dict[str, Any]], points: tuple[Point, ...]) -> list[dict[str, Any]]:
    """For each point the summaries over all blocks."""
    return [point_figures(point, [b["requests"][i] for b in blocks]) for i, point in enumerate(points)]


def point_figures(point: Point, requests: list[dict[str, Any]]) -> dict[str, Any]:
    """Summaries of the requests of one shape; `round` says which round each sample is of."""
    decode = [r["decode_tok_per_s"] for r in requests if r["decode_tok_per_s"]]
    prefill = [r["prompt_tokens"] / r["ttft_s"] for r in requests if r["prompt_tokens"]]
    gaps = [gap for r in requests for gap in r["itl_s"]]
    return {
        "asked": {"prompt_tokens": point.prompt_tokens, "output_tokens": point.output_tokens},
        "prompt_tokens": [r["prompt_tokens"] for r in requests],
        "output_tokens": [r["output_tokens"] for r in requests],
        "ttft_s": summary([r["ttft_s"] for r in requests]),
        "prefill_tok_per_s": summary(prefill) if prefill else None,
        "decode_tok_per_s": summary(decode) if decode else None,
        "tpot_s": summary([1 / d for d in decode]) if decode else None,
        "itl_s": spread_of(gaps) if gaps else None,
        "round": list(range(len(requests))),
    }


def spread_of(gaps: list[float]) -> dict[str, Any]:
    """Percentiles of the gaps between pieces of text, the samples kept; they hang together, so no interval is given."""
    return {
        **{f"p{q}": float(np.percentile(gaps, q)) for q in (50, 90, 95, 99)},
        "n": len(gaps),
        "samples": gaps,
    }


def settled(found: list[dict[str, Any]]) -> bool:
    """Are the intervals of all medians (TTFT and decode rate, every shape) within WITHIN?"""
    return all(half_width(s) <= WITHIN for s in _medians(found))


def half_width(found: dict[str, Any]) -> float:
    """Half the interval of the median over the median; no interval of fewer than five samples is believed."""
    low, high = found["p50_ci95"]
    return (high - low) / 2 / found["p50"] if found["p50"] and found["n"] >= 5 else float("inf")


def _medians(found: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for point in found:
        for name in ("ttft_s", "decode_tok_per_s"):
            if point[name]:
                yield point[name]


def result(
    journal: Journal, target: Target, points: tuple[Point, ...], seconds: float
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """(the `speed` entry of a report, what disturbed it). The first point's figures stand at the top as well."""
    blocks = journal.all(target.id, "block")
    if not blocks:
        return None, []
    plan = journal.all(target.id, "warm-up")[0]
    found = figures(blocks, points)
    widest = max((half_width(s) for s in _medians(found)), default=float("inf"))
    is_settled = widest <= WITHIN
    shortened = [o for o, p in zip(plan["output_tokens"], points, strict=True) if o < p.output_tokens]
    flags = [{**flag, "round": i} for i, b in enumerate(blocks) for flag in b["flags"]]
    return {
        **{k: v for k, v in found[0].items() if k not in ("asked", "round")},
        "points": found,
        "rounds": len(blocks),
        "first_request_s": plan["first_request_s"],
        "settled": is_settled,
        "widest_interval": widest if widest != float("inf") else None,
        "why": f"all medians within {100 * WITHIN:.0f} %"
        if is_settled
        else f"{MAX_ROUNDS} rounds were over"
        if len(blocks) >= MAX_ROUNDS
        else f"{seconds:.0f} s a model were up",
        "shortened_to_tokens": min(shortened) if shortened else None,
        "side": "client",
    }, flags
