"""Speed of running models, one stream each, measured in turns.

Artefacts are asked in rounds, there and back (A B C, C B A), so that a box that slows down slows all of them, and each is
started afresh several times, since a process keeps its noise for its life. Rounds of a process go on until the interval of
every median is as narrow as WITHIN, or until the target has had its share of the time, which the result says.

TTFT: request sent to first piece of text, on the client's side. Prefill tok/s = prompt tokens / TTFT with an empty
cache; decode tok/s = (n-1)/(e2e - TTFT); TPOT is its inverse; ITL: each gap between pieces of text.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable
from typing import Any

from edgeft.bench.callers import Caller
from edgeft.bench.energy import Meter
from edgeft.bench.journal import Journal
from edgeft.bench.pool import Pool, Running
from edgeft.bench.speed_figures import MAX_ROUNDS, Point, figures, point_figures, settled
from edgeft.bench.targets import Target
from edgeft.bench.watch import Watch
from edgeft.engines.client import Reply
from edgeft.errors import EnvironmentFault, UsageError
from edgeft.rows import Row, prompt_of

MIN_ROUNDS = 2
SLOW_S, MIN_TOKENS = 5.0, 8  # a target whose request would decode longer than this is asked for fewer tokens
CHARS_A_TOKEN = 4.5  # of English; the first answer tells what it really is


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
    repetitions: int, seconds: float, restarts: int, meter: Meter, say: Callable[[str], None],
) -> None:  # fmt: skip
    """Ask all targets in rounds and keep a `block` a round and target; `seconds` bounds the time of each.

    Each is started `restarts` times, all of them together, so that round i of two targets is of their processes of the same time.
    A block says its `round`, the `restart` it was asked for and the `process` it came from: a run that was killed goes on with
    new processes, and where memory is short they end sooner. A target that breaks gets an `error` and is asked no more.
    """
    number = 1 + max((b["round"] for t in targets for b in journal.all(t.id, "block")), default=-1)
    for restart in range(restarts):
        if restart:
            for target in targets:
                pool.end(target)
        while left := [
            t for t in targets if not done(journal, t, points, repetitions, seconds, restart, restarts)
        ]:
            for target in left if number % 2 == 0 else reversed(left):
                say(f"process {restart + 1} of {restarts}, round {number + 1}: {target.id}")
                try:
                    with pool.use(target) as running:
                        keep_start(journal, target, running.local)
                        process = len(journal.all(target.id, "start")) - 1
                        plan = _warmed(journal, target, running.ask, rows, points, process)
                        found = block(running, rows, points, plan, number, meter)
                        place = {"round": number, "restart": restart, "process": process}
                        journal.add(target.id, "block", {**place, **found})
                except EnvironmentFault as error:
                    journal.add(target.id, "error", error.message)
            number += 1


def _warmed(
    journal: Journal, target: Target, ask: Caller, rows: list[Row], points: tuple[Point, ...], process: int
) -> dict[str, Any]:
    """The target's plan, made by its first process; a later one is asked for each shape once, untimed, before its first block."""
    plan: dict[str, Any] | None = journal.last(target.id, "warm-up")
    if plan is None:
        plan = warm_up(ask, rows, points)
        journal.add(target.id, "warm-up", plan)
    elif all(b["process"] != process for b in journal.all(target.id, "block")):
        for chars in plan["chars"]:
            ask(body_of(rows, 0, chars, 2))
    return plan


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
            "engine_build": local.build, "device": local.device, "run_profile": local.run_profile,
        })  # fmt: skip


def done(
    journal: Journal, target: Target, points: tuple[Point, ...], repetitions: int, seconds: float, restart: int, restarts: int
) -> bool:  # fmt: skip
    """Has this restart of the target been asked enough: broken, settled, or out of its share of the time with enough rounds?"""
    if journal.last(target.id, "error"):
        return True
    blocks = [b for b in journal.all(target.id, "block") if b["restart"] <= restart]
    own = [{**b, "process": restart} for b in blocks if b["restart"] == restart]
    if len(own) < math.ceil(max(MIN_ROUNDS, repetitions) / restarts):
        return False
    share, spent = seconds * (restart + 1) / restarts, sum(b["wall_s"] for b in blocks)
    return len(own) >= MAX_ROUNDS // restarts or spent >= share or settled(figures(own, points))


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
