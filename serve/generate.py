"""The answer of a plan's candidates: drafted or not, kept in the cache, shared by equal requests.

It begins only when there is something to say: until then any failure may be answered by somebody else.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from edgeft.serve.answer import Answer, Chunk
from edgeft.serve.choose import Plan
from edgeft.serve.drafted import drafted
from edgeft.serve.failover import ROUTE, Begun, first_able, streamed
from edgeft.serve.protocol import Asked
from edgeft.serve.proxy import Proxy

__all__ = ["ROUTE", "opened"]


async def opened(proxy: Proxy, key: str | None, plan: Plan, asked: Asked) -> Begun:
    """The answer, begun. Equal requests that may share an answer make one call; `key` is None where they may not."""
    if key is not None:
        source = proxy.flights.stream(key, lambda: kept(proxy, plan, asked, key))
    elif plan.draft:
        source = drafted(proxy, plan, asked)
    else:
        return await first_able(proxy, plan, asked, plan.order)
    try:
        first = await anext(source)
    except BaseException:
        await source.aclose()
        raise
    plan.told |= first["told"]  # by whoever makes the call
    return Begun(first[ROUTE], [], source)


async def kept(proxy: Proxy, plan: Plan, asked: Asked, key: str) -> AsyncGenerator[Chunk]:
    """The answer, which is then put into the cache. The first item is {ROUTE: id, "told": …}."""
    answer = Answer()
    source = drafted(proxy, plan, asked) if plan.draft else streamed(proxy, plan, asked, plan.order)
    async with aclosing(source) as chunks:
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
