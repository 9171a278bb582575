"""The paths that generate: each turns a body into a checked request, and the answer into its own form of reply."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

from edgeft.serve import answer as forms
from edgeft.serve import counting
from edgeft.serve.admission import Busy
from edgeft.serve.answer import Answer, BrokenStream, Chunk, Head
from edgeft.serve.choose import Plan, choose, conversation_hash
from edgeft.serve.generate import ROUTE, opened
from edgeft.serve.http import ClientLeft, Departures, Receive, Reply, Scope, Send, bearer, read_body
from edgeft.serve.logs import request_id
from edgeft.serve.protocol import CHAT, Asked, Kind, Refusal, parse
from edgeft.serve.proxy import Proxy

log = logging.getLogger("edgeft.serve")
KEPT = ("hit", "semantic")
Handler = Callable[[Proxy, bytes, Reply], Awaitable[None]]
Tell = Callable[[Chunk], Awaitable[None]]


class Endpoint:
    """POST of one path, as raw ASGI: key, body, work that a leaving client stops, errors, counting."""

    def __init__(self, proxy: Proxy, handle: Handler) -> None:
        self.proxy, self.handle = proxy, handle
        self.departures = Departures()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply, proxy = Reply(send, scope["path"]), self.proxy
        request_id.set(reply.request_id)
        if proxy.live:
            proxy.live.begin(reply.request_id, False, None)
        try:
            try:
                reply.tenant = tenant_of(proxy, scope)
                body = await read_body(scope, receive, proxy.config.limits.body_bytes)
            except ClientLeft:
                reply.left = True
                return
            except Refusal as refusal:
                await reply.refuse(refusal)
                return
            await self.departures.while_connected(receive, reply, guarded(proxy, self.handle, body, reply))
        finally:
            counting.finished(proxy, reply)


def tenant_of(proxy: Proxy, scope: Scope) -> str | None:
    """The tenant of the request's key; None where nobody needs one. Raises Refusal (401)."""
    if proxy.keys is None:
        return None
    presented = bearer(scope)
    key = proxy.keys.tenant_of(presented) if presented else None
    if key is not None:
        return str(key.tenant)
    if proxy.config.keys.required:
        said = "The API key is not known." if presented else "An API key is needed: Authorization: Bearer …"
        raise Refusal(401, said, kind="authentication_error", code="invalid_api_key")
    return None  # clients send some key to everybody


async def guarded(proxy: Proxy, handle: Handler, body: bytes, reply: Reply) -> None:
    """Answer, with every failure told in OpenAI's form."""
    try:
        await handle(proxy, body, reply)
    except Refusal as refusal:
        await reply.refuse(refusal)
    except Busy as busy:
        wait = busy.retry_after_s
        said = (
            f"Too many requests wait for '{reply.route}'."
            if busy.why == "queue_full"
            else f"'{reply.route}' would not begin to answer in the time that is promised."
        )
        await reply.refuse(
            Refusal(
                429,
                f"{said} Try again in about {math.ceil(wait)} s.",
                kind="rate_limit_error",
                code=busy.why,
                retry_after_s=wait,
            )
        )
    except BrokenStream as error:
        log.warning("%s: the answer of %s broke off: %s", reply.request_id, reply.route, error)
        await reply.refuse(
            Refusal(
                502, f"The model's answer broke off: {error}.", kind="upstream_error", code="broken_stream"
            )
        )
    except Exception as error:
        log.error("%s: %s", reply.request_id, type(error).__name__)  # its message may quote the request
        log.debug("%s", reply.request_id, exc_info=True)
        await reply.refuse(
            Refusal(500, f"A fault of edgeft's ({type(error).__name__}).", kind="server_error", code="fault")
        )


def generating(kind: Kind) -> Handler:
    """The handler of /v1/chat/completions or /v1/completions."""

    async def handle(proxy: Proxy, body: bytes, reply: Reply) -> None:
        asked = parse(body, kind)
        head = Head(kind, kind.id_prefix + reply.request_id, "")
        if asked.stream:
            await stream(proxy, asked, reply, head)
        else:
            answer = await whole(proxy, asked, reply)
            head.model = reply.route
            await reply.json(200, forms.completion(head, answer))

    return handle


async def answered(proxy: Proxy, asked: Asked, reply: Reply, tell: Tell | None = None) -> Answer:
    """The answer from cache or candidates; routes, sets the reply's headers. `tell` gets {ROUTE: id} and then each chunk as it comes, but
    of an answer that was kept only the former: the rest of it lies in `reply.answer`."""
    reply.stream = asked.stream
    plan = await choose(proxy, asked, reply.tenant)
    plan.told["started_s"] = reply.started_s
    reply.plan, reply.route = plan, plan.order[0]
    reply.answer = answer = Answer()
    key = proxy.cache.key(asked, plan) if proxy.cache else None
    looked = await look_up(proxy, asked, plan, key) if key else MISSED
    reply.cache = looked.result
    if looked.kept:
        answer, plan.route = looked.kept
        reply.answer = answer
        told(proxy, reply, plan)
        if tell:
            await tell({ROUTE: plan.route})
        return answer
    if proxy.live:
        proxy.live.routed(reply.request_id, plan.order[0], local(plan, plan.order[0]), asked.stream)
    try:
        begun = await opened(proxy, key, plan, asked)
        plan.route = begun.route
        async with aclosing(begun.rest):
            told(proxy, reply, plan)
            reply.ttft_s = reply.elapsed_s()
            if proxy.live:
                if plan.route != plan.order[0]:
                    proxy.live.routed(reply.request_id, plan.route, local(plan, plan.route))
                proxy.live.first(reply.request_id)
            if tell:
                await tell({ROUTE: plan.route})
            for chunk in begun.early:
                answer.add(chunk)
                if tell:
                    await tell(chunk)
            async for chunk in begun.rest:
                answer.add(chunk)
                if tell:
                    await tell(chunk)
    except (Refusal, Busy, BrokenStream):
        told(proxy, reply, plan)
        raise
    if not answer.whole:
        raise BrokenStream("it ended without a finish reason")
    if looked.audited:
        proxy.semantic.saw(looked.audited, answer)
    elif looked.place and key:
        await proxy.semantic.add(looked.place, key)
    if asked.kind is CHAT and plan.decision is not None and plan.policy.policy.rule.get("sticky", True):
        said = [*asked.messages, answer.choices[0].message]
        proxy.remember(conversation_hash(reply.tenant, said), plan.route)
    return answer


@dataclass(frozen=True)
class Looked:
    """What the caches said: off, miss, hit or semantic; an answer of the last kind may be asked again to audit it."""

    result: str = "off"
    kept: tuple[Answer, str] | None = None
    place: tuple[str, str] | None = None
    audited: Answer | None = None


MISSED = Looked()


async def look_up(proxy: Proxy, asked: Asked, plan: Plan, key: str) -> Looked:
    """The exact cache, then the semantic one where there is one."""
    assert proxy.cache is not None
    kept = await proxy.cache.get(key)
    found = Looked("hit" if kept else "miss", kept)
    if not kept and proxy.semantic and (place := proxy.semantic.place(asked, plan)):
        found = Looked("miss", place=place)
        same = await proxy.semantic.find(place)
        if same and (kept := await proxy.cache.get(same)):
            again = proxy.semantic.asked_again()
            found = Looked("miss", place=place, audited=kept[0]) if again else Looked("semantic", kept)
    proxy.metrics.looked_up(found.result)
    return found


def local(plan: Plan, candidate_id: str) -> bool:
    """Whether a candidate is on this box."""
    return not plan.policy.candidates[candidate_id].get("remote", True)


def told(proxy: Proxy, reply: Reply, plan: Plan) -> None:
    """The headers, now that it is known who answers."""
    reply.route = plan.route or plan.order[0]
    reply.headers |= plan.headers()
    reply.headers["x-edgeft-cache"] = reply.cache


async def whole(proxy: Proxy, asked: Asked, reply: Reply) -> Answer:
    """The answer in one piece."""
    answer = await answered(proxy, asked, reply)
    if reply.plan.told.get("cost_usd") is not None:
        reply.headers["x-edgeft-cost-usd"] = f"{reply.plan.told['cost_usd']:.8f}"
    if reply.cache in KEPT:
        reply.headers["x-edgeft-cost-usd"] = "0"
    return answer


async def stream(proxy: Proxy, asked: Asked, reply: Reply, head: Head) -> None:
    """The answer as events."""

    async def tell(chunk: Chunk) -> None:
        if ROUTE in chunk:
            head.model = chunk[ROUTE]
            if reply.cache in KEPT:
                await reply.events(
                    b"".join(forms.replay(head, reply.answer, asked.include_usage)), more=False
                )
        elif data := forms.forward(head, chunk):
            await reply.events(data)

    await answered(proxy, asked, reply, tell)
    if not reply.done:
        last = forms.usage_event(head, reply.answer) if asked.include_usage else b""
        await reply.events(last + forms.DONE, more=False)
