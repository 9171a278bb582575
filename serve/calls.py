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
from edgeft.serve.protocol import Asked, Refusal
from edgeft.serve.proxy import Proxy
from edgeft.serve.refusals import at_limit, not_ready


async def calls(proxy: Proxy, plan: Plan, asked: Asked, candidate_id: str) -> AsyncGenerator[Chunk]:
    """One call, or n of them at once where the engine gives one answer a call; usage is then their sum, the prompt counted once."""
    n = asked.n
    upstream = proxy.upstreams.get(candidate_id)
    if n == 1 or upstream is None or upstream.features.n:
        async with aclosing(once(proxy, plan, asked, candidate_id, asked.fields)) as chunks:
            async for chunk in chunks:
                yield chunk
        return
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
                raise item
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
    more = usage.get("completion_tokens") or 0
    return {
        **total,
        "completion_tokens": total["completion_tokens"] + more,
        "total_tokens": total["total_tokens"] + more,
    }


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
    if busy := admission.refuse(plan.prompt_tokens, promised_s):
        raise busy
    usage: Mapping[str, Any] | None = None
    finished, begun, taken = False, False, True
    async with upstream.hold(), admission.slot(plan.prompt_tokens, promised_s):
        slot, extra = _placed(proxy, plan, asked, candidate_id)
        started_s = time.monotonic()
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
                        admission.first(plan.prompt_tokens, time.monotonic() - started_s)
                        counting.first(proxy, candidate_id, plan)
                    yield chunk
            if not finished:
                raise BrokenStream("it ended without a finish reason")
            breaker.good()
        except Refusal as refusal:
            taken = False
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
            if slot is not None:
                proxy.prefix_slots(candidate_id).give(slot)
            counting.used(proxy, candidate_id, plan, usage, taken)


def _placed(
    proxy: Proxy, plan: Plan, asked: Asked, candidate_id: str
) -> tuple[int | None, Mapping[str, Any]]:
    """(slot, the engine's own fields): which slot of a local engine, whether what lies there may be used, which adapter."""
    upstream = proxy.upstreams[candidate_id]
    if not upstream.features.id_slot:
        return None, upstream.fields(plan.adapter, None, False)
    chain = plan.chain = plan.chain or prefix_chain(asked)
    slot, mine = proxy.prefix_slots(candidate_id).take(plan.tenant, plan.adapter, chain)
    return slot, upstream.fields(plan.adapter, slot, mine)
