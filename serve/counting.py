"""What is counted, shown on the page and written to the log, at the moments when it happens. Never the text of a request."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from edgeft.serve.admission import Busy
from edgeft.serve.choose import Plan
from edgeft.serve.http import CLIENT_LEFT, Reply
from edgeft.serve.logs import now
from edgeft.serve.proxy import Proxy
from edgeft.serve.state import certificate_of

log = logging.getLogger("edgeft.serve")


def first(proxy: Proxy, candidate_id: str, plan: Plan) -> None:
    """An engine's first output."""
    proxy.metrics.first(candidate_id, time.monotonic() - plan.told.get("started_s", time.monotonic()))


def used(proxy: Proxy, candidate_id: str, plan: Plan, usage: Mapping[str, Any] | None, taken: bool) -> None:
    """A call of an upstream has ended. Its own count of tokens, or unresolved: nothing is guessed."""
    if usage is None:
        if taken:
            proxy.metrics.usage_unresolved(candidate_id)
        return
    prompt, output = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    proxy.metrics.tokens_used(candidate_id, prompt, output, cached)
    usd = price_of(plan, candidate_id, prompt, output)
    if usd is not None:
        proxy.metrics.paid(candidate_id, usd, None)
        plan.told["cost_usd"] = plan.told.get("cost_usd", 0.0) + usd


def price_of(plan: Plan, candidate_id: str, prompt_tokens: int, output_tokens: int) -> float | None:
    """USD at the policy's list price; None where it has none."""
    price = plan.policy.candidates[candidate_id].get("price")
    if not price:
        return None
    return float(prompt_tokens * price["usd_per_mtok_in"] + output_tokens * price["usd_per_mtok_out"]) / 1e6


def always_api_usd(plan: Plan, prompt_tokens: int, output_tokens: int) -> float | None:
    """What the same tokens would cost at the strongest remote candidate with a price; None where there is none."""
    for candidate in reversed(plan.policy.policy.candidates):
        if candidate.get("remote") and candidate.get("price"):
            return price_of(plan, candidate["id"], prompt_tokens, output_tokens)
    return None


def fell_back(proxy: Proxy, candidate_id: str, error: Exception) -> None:
    """A candidate failed before it said anything, and another one is asked."""
    why = error.why if isinstance(error, Busy) else getattr(error, "code", None) or "broken_stream"
    log.info("%s failed (%s): another one is asked", candidate_id, why)
    proxy.metrics.fell_back()


def escalated(proxy: Proxy, drafter: str, stronger: str) -> None:
    """A judge sent a draft on."""
    proxy.metrics.escalated(drafter, stronger, "judge")


def finished(proxy: Proxy, reply: Reply) -> None:
    """A request is over, however it ended."""
    status = CLIENT_LEFT if reply.left else reply.status
    seconds = reply.elapsed_s()
    proxy.metrics.finished(reply.route, status, seconds)
    if reply.code:
        proxy.metrics.refused(reply.code)
    usage = (reply.answer.usage if reply.answer else None) or {}
    prompt, output = usage.get("prompt_tokens"), usage.get("completion_tokens")
    plan: Plan | None = reply.plan
    always = always_api_usd(plan, prompt or 0, output or 0) if plan and usage and status == 200 else None
    hit = reply.cache in ("hit", "semantic")
    cost = 0.0 if hit else plan.told.get("cost_usd") if plan else None
    if always is not None:
        proxy.metrics.paid(reply.route, None, always)
    if proxy.live:
        proxy.live.end(
            reply.request_id,
            status,
            cache=hit,
            prompt_tokens=prompt,
            output_tokens=output,
            cost_usd=cost,
            always_api_usd=always,
        )
    if plan is not None and plan.decision and plan.features and proxy.watch and plan.policy is proxy.policy:
        proxy.watch.saw(plan.decision, plan.request, plan.features, cost)
    if proxy.decisions and plan is not None:
        proxy.decisions.write(
            now(), reply.request_id, plan, status, latency_s=_round(seconds), ttft_s=_round(reply.ttft_s), prompt_tokens=prompt,
            output_tokens=output, cost_usd=cost, cache=reply.cache,
        )  # fmt: skip
    if proxy.log:
        told = reply.headers
        proxy.log.write(
            reply.request_id, status=status, e2e_s=seconds, path=reply.path, tenant=reply.tenant, route=reply.route,
            reason=told.get("x-edgeft-reason"), ttft_s=reply.ttft_s, stream=reply.stream, cache=reply.cache,
            certificate=told.get("x-edgeft-certificate"), prompt_tokens=prompt, output_tokens=output,
            cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"), cost_usd=cost, code=reply.code,
        )  # fmt: skip


def _round(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def moment(proxy: Proxy) -> None:
    """What is not counted but is so now: queues, states, the certificate."""
    for name, admission in proxy.admissions.items():
        proxy.metrics.queued(name, admission.in_flight, len(admission.queue))
    for name in proxy.policy.candidates:
        proxy.metrics.engine_state(name, proxy.state_of(name))
    held = certificate_of(proxy)
    if held is not None:
        proxy.metrics.certificate_suspended(held["state"] != "valid")
