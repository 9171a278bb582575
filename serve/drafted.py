"""A local draft that is judged before a byte of it is sent: kept, or answered by the strongest that is allowed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from edgeft.router.cascade import judge, strongest_allowed
from edgeft.router.drafts import Draft
from edgeft.serve import counting
from edgeft.serve.admission import Busy
from edgeft.serve.answer import Answer, BrokenStream, Chunk
from edgeft.serve.calls import once
from edgeft.serve.choose import Plan
from edgeft.serve.failover import ROUTE, first_able
from edgeft.serve.protocol import Asked, Refusal
from edgeft.serve.proxy import Proxy


async def drafted(proxy: Proxy, plan: Plan, asked: Asked) -> AsyncGenerator[Chunk]:
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
        async with aclosing(once(proxy, plan, asked, drafter, fields)) as chunks:
            async for chunk in chunks:
                kept.append(chunk)
                answer.add(chunk)
        other = await beside if beside else None
    except (Refusal, Busy, BrokenStream) as error:
        if isinstance(error, Refusal) and not error.elsewhere:
            raise
        counting.fell_back(proxy, drafter, error)
        async with aclosing(first_able(proxy, plan, asked, plan.order[1:] or plan.order)) as chunks:
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
    async with aclosing(first_able(proxy, plan, asked, (stronger, *rest, drafter))) as chunks:
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
        async with aclosing(once(proxy, plan, asked, candidate_id, asked.fields)) as chunks:
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
