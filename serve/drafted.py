"""A local draft that is judged before a byte of it is sent: kept, or answered by the strongest that is allowed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from typing import Any

from edgeft.router.cascade import Verdict, enough, judge, strongest_allowed
from edgeft.router.drafts import Draft
from edgeft.serve import counting
from edgeft.serve.admission import Busy
from edgeft.serve.answer import Answer, BrokenStream, Chunk
from edgeft.serve.calls import once
from edgeft.serve.choose import Plan
from edgeft.serve.failover import ROUTE, streamed
from edgeft.serve.protocol import Asked, Refusal
from edgeft.serve.proxy import Proxy


async def drafted(proxy: Proxy, plan: Plan, asked: Asked) -> AsyncGenerator[Chunk]:
    """The first candidate's answer where the judge keeps it; else the strongest's. A judge that reads the first tokens alone decides when
    they are here: the rest of a draft that is kept goes on as it comes, of one that is not, nothing more is made."""
    drafter = plan.order[0]
    policy, decision = plan.policy, plan.decision
    assert decision is not None
    schema = (asked.fields.get("response_format") or {}).get("json_schema", {}).get("schema")
    fields: Mapping[str, Any] = asked.fields
    upstream = proxy.upstreams.get(drafter)
    if upstream is not None and upstream.features.logprobs:
        fields = {**fields, "logprobs": True}
    kept: list[Chunk] = []
    answer = Answer()
    verdict: Verdict | None = None
    second = second_of(plan)
    beside = asyncio.create_task(_text_of(proxy, plan, asked, second)) if second else None
    try:
        async with aclosing(once(proxy, plan, asked, drafter, fields)) as chunks:
            async for chunk in chunks:
                if verdict is not None:
                    yield _as_asked(asked, chunk)
                    continue
                kept.append(chunk)
                answer.add(chunk)
                if schema is None and enough(policy, answer.text):
                    verdict = judge(policy, plan.request, Draft(answer.text, complete=False), decision)
                    if not verdict.keep:
                        break
                    for held in _kept(plan, drafter, verdict, kept):
                        yield held if ROUTE in held else _as_asked(asked, held)
        if verdict is not None and verdict.keep:
            return
        if verdict is None:
            other = await beside if beside else None
            verdict = judge(policy, plan.request, _draft_of(answer, other), decision, schema)
    except (Refusal, Busy, BrokenStream) as error:
        if verdict is not None or (isinstance(error, Refusal) and not error.elsewhere):
            raise
        counting.fell_back(proxy, drafter, error)
    finally:
        if beside:
            beside.cancel()
            await asyncio.gather(beside, return_exceptions=True)
    plan.told["judged"] = verdict is not None
    stronger = strongest_allowed(policy, decision)
    if verdict is not None and (verdict.keep or stronger is None):
        for held in _kept(plan, drafter, verdict, kept):
            yield held if ROUTE in held else _as_asked(asked, held)
        return
    order = plan.order[1:] or plan.order
    if verdict is not None and stronger is not None:
        counting.escalated(proxy, drafter, stronger)
        plan.told["reason"] = f"{plan.reason}; draft {verdict.reason}"
        order = (stronger, *(name for name in plan.order if name not in (drafter, stronger)), drafter)
    async with aclosing(streamed(proxy, plan, asked, order)) as chunks:
        async for chunk in chunks:
            yield chunk


def _kept(plan: Plan, drafter: str, verdict: Verdict, chunks: list[Chunk]) -> Iterator[Chunk]:
    """Who answers, and the draft so far."""
    plan.route = drafter
    plan.told["judged"] = True
    plan.told["reason"] = f"{plan.reason}; draft {verdict.reason}"
    yield {ROUTE: drafter, "told": plan.told}
    yield from chunks


def _as_asked(asked: Asked, chunk: Chunk) -> Chunk:
    """A chunk without the log-probabilities that the judge alone wanted."""
    return chunk if asked.fields.get("logprobs") else _without_logprobs(chunk)


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
