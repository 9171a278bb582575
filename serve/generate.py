"""The answer of a plan's candidates as a stream of chunks: drafted or not, kept in the cache, shared by equal requests.

It begins only when there is something to say: until then any failure may be answered by somebody else.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from edgeft.serve.answer import Answer, Chunk
from edgeft.serve.choose import Plan
from edgeft.serve.drafted import drafted
from edgeft.serve.failover import ROUTE, first_able
from edgeft.serve.protocol import Asked
from edgeft.serve.proxy import Proxy

__all__ = ["ROUTE", "shared"]


def produce(proxy: Proxy, plan: Plan, asked: Asked) -> AsyncGenerator[Chunk]:
    """The answer. The first item is {ROUTE: id, "told": …}."""
    return drafted(proxy, plan, asked) if plan.draft else first_able(proxy, plan, asked, plan.order)


async def kept(proxy: Proxy, plan: Plan, asked: Asked, key: str) -> AsyncGenerator[Chunk]:
    """The answer, which is then put into the cache."""
    answer = Answer()
    async with aclosing(produce(proxy, plan, asked)) as chunks:
        async for chunk in chunks:
            if ROUTE not in chunk:
                answer.add(chunk)
            yield chunk
    if proxy.cache and answer.whole:
        # Somebody else's answer is kept under that one's key, except where a judge sent it on: then it is the answer of the pair.
        place: str | None = key
        if plan.draft:
            place = key if plan.told.get("judged") else None
        elif plan.route != plan.order[0]:
            place = proxy.cache.key_for(asked, plan, plan.route)
        if place:
            await proxy.cache.put(place, answer, plan, plan.route)


def shared(proxy: Proxy, key: str | None, plan: Plan, asked: Asked) -> AsyncIterator[Chunk]:
    """The answer's chunks; equal requests that may share an answer make one call."""
    if key is None:
        return produce(proxy, plan, asked)
    return proxy.flights.stream(key, lambda: kept(proxy, plan, asked, key))
