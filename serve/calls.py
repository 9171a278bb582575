"""One call of one candidate: its breaker, its process, its queue, its slot. Counted once, here, however many clients wait for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from edgeft.serve import counting
from edgeft.serve.answer import BrokenStream, Chunk, look
from edgeft.serve.choose import Plan, prefix_chain
from edgeft.serve.prefixes import Slots
from edgeft.serve.protocol import Asked, Refusal
from edgeft.serve.proxy import Proxy
from edgeft.serve.refusals import at_limit, not_ready
from edgeft.serve.upstream import Upstream


def calls(proxy: Proxy, plan: Plan, asked: Asked, candidate_id: str) -> AsyncGenerator[Chunk]:
    """One call, or n of them at once where the engine gives one answer a call."""
    upstream = proxy.upstreams.get(candidate_id)
    if asked.n == 1 or upstream is None or upstream.features.n:
        return once(proxy, plan, asked, candidate_id, asked.fields)
    return several(proxy, plan, asked, candidate_id, upstream)


async def several(
    proxy: Proxy, plan: Plan, asked: Asked, candidate_id: str, upstream: Upstream
) -> AsyncGenerator[Chunk]:
    """n calls at once; usage is their sum."""
    n = asked.n
    news: asyncio.Queue[Chunk | Exception | None] = asyncio.Queue()
    room = asyncio.Semaphore(upstream.slots)  # its calls queue behind each other, not before others'

    async def one(index: int) -> None:
        seed = {"seed": asked.fields["seed"] + index} if "seed" in asked.fields else {}
        fields = {k: v for k, v in asked.fields.items() if k != "n"} | seed
        try:
            async with room, aclosing(once(proxy, plan, asked, candidate_id, fields)) as chunks:
                async for chunk in chunks:
                    choices = [{**c, "index": index} for c in chunk.get("choices") or ()]
                    news.put_nowait({**chunk, "choices": choices})
            news.put_nowait(None)
        except Exception as error:
            news.put_nowait(error)

    tasks = [asyncio.create_task(one(index)) for index in range(n)]
    total: dict[str, Any] | None = None
    told = 0
    try:
        while tasks and told < n:
            item = await news.get()
            if isinstance(item, Exception):
                try:
                    raise item
                finally:
                    del item  # no circle, as in admission.py
            if item is None:
                told += 1
                continue
            if usage := item.pop("usage", None):
                total = _summed(total, usage)
            if item["choices"]:
                yield item
        if total:
            yield {"choices": [], "usage": total}
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _summed(total: dict[str, Any] | None, usage: Mapping[str, Any]) -> dict[str, Any]:
    if total is None:
        return {k: usage.get(k) or 0 for k in ("prompt_tokens", "completion_tokens", "total_tokens")}
    return {name: count + (usage.get(name) or 0) for name, count in total.items()}


async def once(
    proxy: Proxy, plan: Plan, asked: Asked, candidate_id: str, fields: Mapping[str, Any]
) -> AsyncGenerator[Chunk]:
    """One call of one candidate: its breaker, its process, its queue, its slot. Raises Refusal, Busy or BrokenStream."""
    upstream, breaker = proxy.upstreams.get(candidate_id), proxy.breaker(candidate_id)
    if upstream is None:
        raise not_ready(candidate_id, "loading")
    if pause_s := breaker.open_for_s():
        raise at_limit(pause_s) if breaker.at_limit else not_ready(candidate_id, "paused", pause_s)
    admission = proxy.admission(candidate_id)
    promised_s = proxy.promised_s(candidate_id, asked)
    usage: Mapping[str, Any] | None = None
    finished, begun, taken = False, False, True
    async with admission.slot(plan.prompt_tokens, promised_s) as turn, upstream.hold():
        turn.begin()
        if breaker.generation != (process := getattr(upstream, "generation", 0)):
            breaker.good()  # what failed was another process
            breaker.generation = process
        if pause_s := breaker.open_for_s():  # it opened while this one waited
            raise not_ready(candidate_id, "paused", pause_s)
        slots, slot, extra = _placed(upstream, plan, asked)
        breaker.begin()
        try:
            async with aclosing(upstream.stream(asked.kind, fields, asked.stream, extra)) as chunks:
                async for chunk in chunks:
                    if chunk.get("usage"):
                        usage = chunk["usage"]
                    said, ends = look(chunk)
                    finished = finished or ends
                    if said and not begun:
                        begun = True
                        admission.first(plan.prompt_tokens, time.monotonic() - turn.began_s)
                        counting.first(proxy, candidate_id, plan)
                    yield chunk
            if not finished:
                raise BrokenStream("it ended without a finish reason")
            breaker.good()
            turn.done()
        except Refusal as refusal:
            taken = refusal.status == 504  # it was silent, and may have worked
            if refusal.elsewhere:
                breaker.bad(refusal.retry_after_s, refusal.status == 429)
            else:
                breaker.good()
            raise
        except BrokenStream:
            if hasattr(upstream, "again"):  # several replicas: one that died says nothing of the others
                breaker.neither()
            else:
                breaker.bad()
            raise
        except BaseException:  # the client left
            breaker.neither()
            raise
        finally:
            if slots is not None and slot is not None:
                slots.give(slot, filled=begun or finished)
            counting.used(proxy, candidate_id, plan, usage, taken)


def _placed(
    upstream: Upstream, plan: Plan, asked: Asked
) -> tuple[Slots | None, int | None, Mapping[str, Any]]:
    """(the engine's slots, which of them, the engine's own fields): whether what lies in the slot may be used, which adapter."""
    slots: Slots | None = getattr(upstream, "prefixes", None)
    if slots is None or not upstream.features.id_slot:
        return None, None, upstream.fields(plan.adapter, None, False)
    chain = plan.chain = plan.chain or prefix_chain(asked)
    slot, mine = slots.take(plan.tenant, plan.adapter, chain)
    return slots, slot, upstream.fields(plan.adapter, slot, mine)
