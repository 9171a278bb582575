"""The first candidate that begins to answer: tried again, then the next one, as long as nothing was said."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from edgeft.serve import counting
from edgeft.serve.admission import Busy
from edgeft.serve.answer import BrokenStream, Chunk, look
from edgeft.serve.calls import calls
from edgeft.serve.choose import Plan
from edgeft.serve.protocol import Asked, Refusal
from edgeft.serve.proxy import Proxy

BACKOFF_S = 0.2
LONGEST_RETRY_S = 2.0  # a Retry-After over this is not waited for
ROUTE = "edgeft.route"  # the first item of a whole stream: who answers, and what was told meanwhile


@dataclass(slots=True)
class Begun:
    """An answer that has begun: who gives it, what came so far, what is to come. Who holds it closes `rest`."""

    route: str
    early: list[Chunk]
    rest: AsyncGenerator[Chunk]


async def first_able(proxy: Proxy, plan: Plan, asked: Asked, order: tuple[str, ...]) -> Begun:
    """The answer of the first candidate that begins to give one. Raises what the first one said where none does."""
    failed: Refusal | Busy | BrokenStream | None = None
    try:
        for candidate_id in order:
            tries = 1 + proxy.config.model(candidate_id).retries
            for attempt in range(tries):
                source = calls(proxy, plan, asked, candidate_id)
                try:
                    begun = Begun(candidate_id, await _first(source), source)
                    plan.route = candidate_id
                    return begun
                except (Refusal, Busy, BrokenStream) as error:
                    if isinstance(error, Refusal) and not error.elsewhere:
                        plan.route = plan.route or candidate_id
                        raise
                    failed = failed or error
                    pause_s = _pause_s(error, attempt, candidate_id == order[-1])
                    if (
                        attempt + 1 < tries
                        and pause_s is not None
                        and proxy.breaker(candidate_id).open_for_s() <= pause_s
                    ):
                        await asyncio.sleep(pause_s)
                        continue
                    if candidate_id != order[-1]:
                        counting.fell_back(proxy, candidate_id, error)
                        plan.told["reason"] = f"{plan.reason}; {candidate_id} failed"
                    break
        plan.route = plan.route or order[0]
        assert failed is not None
        raise failed
    finally:
        del failed  # no circle, as in admission.py


async def _first(source: AsyncGenerator[Chunk]) -> list[Chunk]:
    """The chunks up to the first that says something, or all of an answer that is empty."""
    early: list[Chunk] = []
    finished = False
    try:
        async for chunk in source:
            early.append(chunk)
            said, ends = look(chunk)
            if said:
                return early
            finished = finished or ends
        if not finished:
            raise BrokenStream("it ended without a finish reason")
    except BaseException:  # also a client that left
        await source.aclose()
        raise
    return early


async def streamed(proxy: Proxy, plan: Plan, asked: Asked, order: tuple[str, ...]) -> AsyncGenerator[Chunk]:
    """The same as one stream that begins with {ROUTE: id, "told": …}."""
    begun = await first_able(proxy, plan, asked, order)
    async with aclosing(begun.rest):
        yield {ROUTE: begun.route, "told": plan.told}
        for chunk in begun.early:
            yield chunk
        async for chunk in begun.rest:
            yield chunk


def _pause_s(error: Exception, attempt: int, last: bool) -> float | None:
    """How long to wait before the same candidate is asked again; None where that is of no use. A wait that the upstream asks for is
    kept only where nobody else is left."""
    if isinstance(error, Busy) or getattr(error, "status", 0) in (
        503,
        504,
    ):  # not ready, as we said ourselves; or silent
        return None
    wait = getattr(error, "retry_after_s", None)
    if wait is not None:
        return wait + 0.05 if last and wait <= LONGEST_RETRY_S else None  # the breaker is closed by then
    return BACKOFF_S * 2**attempt * random.uniform(0.5, 1.0)
