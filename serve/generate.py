"""Let the plan's candidates answer: the queue, the engine, another one where the first fails, a judge where the policy drafts.

What comes out is a stream of chunks that begins only when there is something to say: until then any failure may be answered by
somebody else. Every call of an upstream is counted once, here, however many clients wait for it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from edgeft.router.cascade import judge, strongest_allowed
from edgeft.router.drafts import Draft
from edgeft.serve import counting
from edgeft.serve.admission import Busy
from edgeft.serve.answer import Answer, BrokenStream, Chunk, look
from edgeft.serve.choose import Plan, prefix_chain
from edgeft.serve.protocol import Asked, Refusal
from edgeft.serve.proxy import Proxy
from edgeft.serve.upstream import at_limit, not_ready

BACKOFF_S = 0.2
LONGEST_RETRY_S = 2.0  # a Retry-After over this is not waited for
ROUTE = "edgeft.route"  # a first item of the stream: who answers, and what was told meanwhile


async def produce(proxy: Proxy, plan: Plan, asked: Asked, key: str | None) -> AsyncGenerator[Chunk]:
    """The answer, kept under `key` where there is one. The first item is {ROUTE: id, "told": …}."""
    answer = Answer()
    async with aclosing(
        _drafted(proxy, plan, asked) if plan.draft else _first_able(proxy, plan, asked, plan.order)
    ) as chunks:
        async for chunk in chunks:
            if key and ROUTE not in chunk:
                answer.add(chunk)
            yield chunk
    if key and proxy.cache and answer.whole:
        # Somebody else's answer is kept under that one's key, except where a judge sent it on: then it is the answer of the pair.
        place = (
            key if plan.draft or plan.route == plan.order[0] else proxy.cache.key_for(asked, plan, plan.route)
        )
        await proxy.cache.put(place, answer, plan, plan.route)


async def _drafted(proxy: Proxy, plan: Plan, asked: Asked) -> AsyncGenerator[Chunk]:
    """The first candidate's whole answer where the judge keeps it; else the strongest's."""
    drafter = plan.order[0]
    assert plan.decision is not None
    fields: Mapping[str, Any] = asked.fields
    if proxy.upstreams[drafter].features.logprobs:
        fields = {**fields, "logprobs": True}
    kept: list[Chunk] = []
    answer, other = Answer(), None
    second = second_of(plan)
    beside = asyncio.create_task(_text_of(proxy, plan, asked, second)) if second else None
    try:
        async with aclosing(_once(proxy, plan, asked, drafter, fields)) as chunks:
            async for chunk in chunks:
                kept.append(chunk)
                answer.add(chunk)
        other = await beside if beside else None
    except (Refusal, Busy, BrokenStream) as error:
        if isinstance(error, Refusal) and not error.elsewhere:
            raise
        counting.fell_back(proxy, drafter, error)
        async with aclosing(_first_able(proxy, plan, asked, plan.order[1:] or plan.order)) as chunks:
            async for chunk in chunks:
                yield chunk
        return
    finally:
        if beside:
            beside.cancel()
            await asyncio.gather(beside, return_exceptions=True)
    schema = (asked.fields.get("response_format") or {}).get("json_schema", {}).get("schema")
    verdict = judge(plan.policy, plan.request, _draft_of(answer, other), plan.decision, schema)
    stronger = strongest_allowed(plan.policy, plan.decision)
    if verdict.keep or stronger is None:
        plan.route = drafter
        plan.told["reason"] = f"{plan.reason}; draft {verdict.reason}"
        yield {ROUTE: drafter, "told": plan.told}
        for chunk in kept:
            yield chunk if asked.fields.get("logprobs") else _without_logprobs(chunk)
        return
    counting.escalated(proxy, drafter, stronger)
    plan.told["reason"] = f"{plan.reason}; draft {verdict.reason}"
    rest = [name for name in plan.order if name not in (drafter, stronger)]
    async with aclosing(_first_able(proxy, plan, asked, (stronger, *rest, drafter))) as chunks:
        async for chunk in chunks:
            yield chunk


def second_of(plan: Plan) -> str | None:
    """The local candidate whose agreement the judge was fitted on, where it may see the request."""
    block = plan.policy.policy.features.get("cascade") or {}
    second = block.get("second")
    return second if second in plan.order[1:] else None


async def _text_of(proxy: Proxy, plan: Plan, asked: Asked, candidate_id: str) -> str | None:
    """What another candidate answers; None where it fails: the judge then goes without."""
    answer = Answer()
    try:
        async with aclosing(_once(proxy, plan, asked, candidate_id, asked.fields)) as chunks:
            async for chunk in chunks:
                answer.add(chunk)
    except (Refusal, Busy, BrokenStream):
        return None
    return answer.text


def _draft_of(answer: Answer, second: str | None) -> Draft:
    choice = answer.choices[0]
    entries = (choice.logprobs or {}).get("content") or []
    known = [
        e["logprob"] for e in entries if isinstance(e, dict) and isinstance(e.get("logprob"), int | float)
    ]
    mean = sum(known) / len(known) if known else None
    return Draft(answer.text, choice.finish_reason, mean, second)


def _without_logprobs(chunk: Chunk) -> Chunk:
    choices = [{k: v for k, v in c.items() if k != "logprobs"} for c in chunk.get("choices") or ()]
    return {**chunk, "choices": choices}


async def _first_able(
    proxy: Proxy, plan: Plan, asked: Asked, order: tuple[str, ...]
) -> AsyncGenerator[Chunk]:
    """The chunks of the first candidate that begins to answer. Raises what the first one said where none does."""
    failed: Refusal | Busy | BrokenStream | None = None
    for candidate_id in order:
        tries = 1 + proxy.config.model(candidate_id).retries
        for attempt in range(tries):
            source = _calls(proxy, plan, asked, candidate_id)
            early: list[Chunk] = []
            begun = False
            try:
                async with aclosing(source):
                    async for chunk in source:
                        if not begun:
                            early.append(chunk)
                            if not look(chunk)[0]:
                                continue
                            begun = True
                            plan.route = candidate_id
                            yield {ROUTE: candidate_id, "told": plan.told}
                            for held in early:
                                yield held
                            continue
                        yield chunk
                if not begun:  # an answer may be empty
                    if not any(look(held)[1] for held in early):
                        raise BrokenStream("it ended without a finish reason")
                    plan.route = candidate_id
                    yield {ROUTE: candidate_id, "told": plan.told}
                    for held in early:
                        yield held
                return
            except (Refusal, Busy, BrokenStream) as error:
                if begun or (isinstance(error, Refusal) and not error.elsewhere):
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


def _pause_s(error: Exception, attempt: int, last: bool) -> float | None:
    """How long to wait before the same candidate is asked again; None where that is of no use. A wait that the upstream asks for is
    kept only where nobody else is left."""
    if isinstance(error, Busy) or getattr(error, "status", 0) == 503:  # not ready, as we said ourselves
        return None
    wait = getattr(error, "retry_after_s", None)
    if wait is not None:
        return wait + 0.05 if last and wait <= LONGEST_RETRY_S else None  # the breaker is closed by then
    return BACKOFF_S * 2**attempt * random.uniform(0.5, 1.0)


async def _calls(proxy: Proxy, plan: Plan, asked: Asked, candidate_id: str) -> AsyncGenerator[Chunk]:
    """One call, or n of them at once where the engine gives one answer a call; usage is then their sum, the prompt counted once."""
    n = asked.n
    upstream = proxy.upstreams.get(candidate_id)
    if n == 1 or upstream is None or upstream.features.n:
        async with aclosing(_once(proxy, plan, asked, candidate_id, asked.fields)) as chunks:
            async for chunk in chunks:
                yield chunk
        return
    news: asyncio.Queue[Chunk | Exception | None] = asyncio.Queue()
    room = asyncio.Semaphore(upstream.slots)  # its calls queue behind each other, not before others'

    async def one(index: int) -> None:
        seed = {"seed": asked.fields["seed"] + index} if "seed" in asked.fields else {}
        fields = {k: v for k, v in asked.fields.items() if k != "n"} | seed
        try:
            async with room, aclosing(_once(proxy, plan, asked, candidate_id, fields)) as chunks:
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


async def _once(
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


def shared(proxy: Proxy, key: str | None, plan: Plan, asked: Asked) -> AsyncIterator[Chunk]:
    """The answer's chunks; equal requests that may share an answer make one call."""
    if key is None:
        return produce(proxy, plan, asked, None)
    return proxy.flights.stream(key, lambda: produce(proxy, plan, asked, key))
