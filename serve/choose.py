"""From a checked request to a plan: who is asked, who instead, and what is told of it. Decides nothing itself: the policy does."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from edgeft.router import LoadedPolicy, NoCandidate, Request, State, decide, from_openai, removed_for
from edgeft.router.cascade import drafts, strongest_allowed
from edgeft.router.costs import seconds_of
from edgeft.router.heads import Features, read
from edgeft.router.privacy import why_private
from edgeft.serve.prefixes import chain_of
from edgeft.serve.protocol import CHAT, Asked, Refusal
from edgeft.serve.proxy import AUTO, Proxy
from edgeft.serve.refusals import not_ready
from edgeft.types import Decision

MOST_TEXTS = 256
LIMITS = ("floor", "max_cost", "max_latency_s")


@dataclass
class Plan:
    """What will be done with one request. `route` is who answers in the end."""

    policy: LoadedPolicy
    order: tuple[str, ...]
    tenant: str | None
    prompt_tokens: int  # estimated
    private: bool
    reason: str
    request: Request
    decision: Decision | None = None  # None: the request pinned a model
    features: Features | None = None  # of the request's text, where it was decided
    draft: bool = False  # the first one's answer is judged before it is sent
    chain: tuple[bytes, ...] = ()
    adapter: str | None = None
    adapter_facts: Mapping[str, str] = field(
        default_factory=dict
    )  # candidate -> what its adapter of this name is
    route: str = ""
    told: dict[str, Any] = field(default_factory=dict)  # what happened later: fallbacks, the judge's verdict

    def headers(self) -> dict[str, str]:
        """x-edgeft-* of the reply."""
        found = {
            "x-edgeft-route": self.route or self.order[0],
            "x-edgeft-reason": self.told.get("reason", self.reason),
        }
        if self.decision is not None:
            found["x-edgeft-gain"] = f"{self.decision.predicted_gain:.4f}"
            found["x-edgeft-certificate"] = certificate_state(self.policy, self.decision)
            if self.policy.policy.cost.get("unit") == "usd":
                cost = self.decision.costs.get(found["x-edgeft-route"], self.decision.cost)
                found["x-edgeft-cost-usd"] = f"{cost:.8f}"
        return found


def certificate_state(policy: LoadedPolicy, decision: Decision) -> str:
    """none, void, valid (this decision is the certified rule's) or not-applied."""
    held = policy.certificate
    if held is None:
        return "none"
    if held.get("void"):
        return "void"
    return "valid" if decision.certified else "not-applied"


async def choose(proxy: Proxy, asked: Asked, tenant: str | None) -> Plan:
    """The plan for a request. Raises Refusal (404) for a model that is not served, (403) for one that may not take a private request,
    (400) where nobody can take it or it is longer than is allowed."""
    policy, adapter = proxy.policy, asked.options.get("adapter")
    previous = None
    if asked.kind is CHAT and policy.policy.rule.get("sticky", True) and (said := last_said(asked.messages)):
        before = proxy.conversations.get(conversation_hash(tenant, asked.messages[:said]))
        previous = before if before in policy.candidates else None
    request = request_of(asked, tenant, previous)
    tokens = request.tokens
    most = proxy.config.limits.prompt_tokens
    if most is not None and tokens > most:
        raise Refusal(
            400,
            f"The prompt has about {tokens} tokens; {most} are allowed.",
            param="messages",
            code="prompt_too_long",
        )
    unable = unable_for(proxy, asked, tokens)
    facts = {} if adapter is None else facts_of(proxy, adapter)
    state = proxy.moment(frozenset(unable))
    common: dict[str, Any] = {
        "policy": policy, "tenant": tenant, "prompt_tokens": tokens, "request": request, "adapter": adapter, "adapter_facts": facts,
    }  # fmt: skip
    if asked.model == AUTO:
        share = policy.policy.rule.get("explore")
        known = await known_of(proxy, policy, request.text)
        features = known.features
        try:
            decision = known.again(request, state) if not share else None
            if decision is None:
                decision = decide(policy, request, random.random() if share else 1.0, state, features)
                known.decided = (request, state, decision)
        except NoCandidate as nobody:
            for name, reason in nobody.removed.items():
                if reason == "not available" and name not in unable:  # it could and may: later
                    raise not_ready(
                        name, proxy.state_of(name), proxy.breaker(name).open_for_s() or 2.0
                    ) from None
            if nobody.private:
                raise Refusal(403, nobody.message, code="no_candidate") from None
            reasons = "; ".join(
                f"'{name}': {unable.get(name, reason)}" for name, reason in nobody.removed.items()
            )
            raise Refusal(
                400, f"No candidate can take the request ({reasons}).", code="no_candidate"
            ) from None
        order = (decision.choice, *decision.fallbacks)
        return Plan(
            features=features, order=order, private=decision.private, reason=decision.reason, decision=decision,
            draft=asked.n == 1 and drafts(policy, decision) and not too_slow(policy, decision, request), **common,
        )  # fmt: skip
    if asked.model in policy.candidates:
        removed = removed_for(policy, request)
        if (why := removed.get(asked.model)) is not None:
            raise Refusal(
                403, f"The model '{asked.model}' may not take this request ({why}).", code="no_candidate"
            )
        if (why := unable.get(asked.model)) is not None:
            raise Refusal(
                400, f"The model '{asked.model}' can't take this request ({why}).", code="no_candidate"
            )
        private = why_private(policy.policy.privacy, request) is not None
        return Plan(order=(asked.model,), private=private, reason="pinned by the request", **common)
    names = ", ".join(f"'{name}'" for name in (AUTO, *policy.candidates))
    raise Refusal(
        404,
        f"The model '{asked.model[:100]}' is not served. Known: {names}.",
        param="model",
        code="model_not_found",
    )


@dataclass
class Known:
    """What was computed of a text: it is asked again when its answer comes from the cache. In memory alone."""

    policy: LoadedPolicy
    features: Features
    decided: tuple[Request, State, Decision] | None = None

    def again(self, request: Request, state: State) -> Decision | None:
        """The decision of the same request at the same moment: deciding is pure."""
        if self.decided is not None and self.decided[0] == request and self.decided[1] == state:
            return self.decided[2]
        return None


async def known_of(proxy: Proxy, policy: LoadedPolicy, text: str) -> Known:
    """What is known of a text, or read now; of the last few hundred texts, kept."""
    known: Known | None = proxy.texts.get(text)
    if known is None or known.policy is not policy:
        # A sentence encoder takes milliseconds: not in the event loop.
        fresh = await asyncio.to_thread(read, policy, text) if policy.encoder else read(policy, text)
        known = proxy.texts[text] = Known(policy, fresh)
        if len(proxy.texts) > MOST_TEXTS:
            proxy.texts.popitem(last=False)
    return known


def facts_of(proxy: Proxy, adapter: str) -> dict[str, str]:
    """Candidate -> what its adapter of this name is."""
    return {
        name: found
        for name, upstream in proxy.upstreams.items()
        if (found := getattr(upstream, "adapter_facts", {}).get(adapter))
    }


def request_of(asked: Asked, tenant: str | None, previous: str | None = None) -> Request:
    """The request as the router reads it, its tokens counted or estimated once. `previous` answered the conversation before."""
    own = asked.options
    known: dict[str, Any] = {"tenant": tenant, "previous": previous}
    if own:
        known |= {name: own[name] for name in LIMITS if name in own}
        known |= {"tags": frozenset(own.get("tags", ())), "private": bool(own.get("private"))}
    if isinstance(prompt := asked.fields.get("prompt"), list):
        known["prompt_tokens"] = len(prompt)
    body = asked.fields if asked.kind is CHAT else {**asked.fields, "messages": asked.messages}
    return from_openai(body, **known)


def unable_for(proxy: Proxy, asked: Asked, tokens: int) -> dict[str, str]:
    """Candidate -> what it lacks for this request."""
    fields, found = asked.fields, {}
    adapter = asked.options.get("adapter")
    for name, upstream in proxy.upstreams.items():
        can = upstream.features
        room = getattr(upstream, "context_tokens", None)
        if asked.kind is not CHAT and not can.completions:
            found[name] = "no completions"
        elif fields.get("tools") and not can.tools:
            found[name] = "no tools"
        elif (
            "response_format" in fields
            and fields["response_format"].get("type") != "text"
            and not can.json_schema
        ):
            found[name] = "no response_format"
        elif fields.get("logprobs") and not can.logprobs:
            found[name] = "no logprobs"
        elif adapter is not None and adapter not in can.adapters:
            found[name] = "no such adapter"
        elif room is not None and tokens > 2 * room:  # an estimate: only what is far too long is known to be
            found[name] = f"context of {room} tokens"
    return found


def too_slow(policy: LoadedPolicy, decision: Decision, request: Request) -> bool:
    """True where a draft and then the strongest would break the request's or the policy's latency limit: no draft then."""
    limit = (
        request.max_latency_s
        if request.max_latency_s is not None
        else policy.policy.rule.get("max_latency_s")
    )
    strongest = strongest_allowed(policy, decision)
    if limit is None or strongest is None:
        return False
    both = [policy.candidates[name] for name in (decision.choice, strongest)]
    return sum(seconds_of(c, request.tokens, c.get("mean_output_tokens") or 0.0) for c in both) > limit


def last_said(messages: Sequence[Mapping[str, Any]]) -> int:
    """How many messages stand up to the last one of an assistant; 0 where there is none."""
    return next((i for i in range(len(messages), 0, -1) if messages[i - 1].get("role") == "assistant"), 0)


def conversation_hash(tenant: str | None, messages: Sequence[Mapping[str, Any]]) -> int:
    """A conversation by what was said in it so far: of this process alone, as Python's hashes are."""
    said = [(m.get("role"), _hashable(m.get("content"))) for m in messages]
    return hash((tenant, *said))


def _hashable(content: Any) -> Any:
    return content if content is None or isinstance(content, str) else orjson.dumps(content)


def prefix_chain(asked: Asked) -> tuple[bytes, ...]:
    """For the slots of a local engine."""
    return chain_of(asked.messages, asked.fields.get("tools"))
