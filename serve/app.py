"""The proxy as an ASGI application: routes a request, asks the cache, streams the answer.

Starlette for the paths alone; the chat endpoint speaks ASGI itself. Requests' text stands in no log
and no metric.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import aclosing, asynccontextmanager
from datetime import datetime
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edgeft.router import LoadedPolicy, NoCandidate, decide, from_openai, removed_for
from edgeft.serve import sse
from edgeft.serve.admission import Admission, Busy
from edgeft.serve.cache import AnswerCache, key_of
from edgeft.serve.metrics import Metrics
from edgeft.serve.protocol import MAX_BODY_BYTES, ChatRequest, Refusal, parse
from edgeft.serve.sse import Answer, BrokenStream, Head
from edgeft.serve.upstream import Upstream

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

AUTO = "auto"
WAITING = 32
LOADING_RETRY_S = 2
DISCARDED_BYTES = 16 * MAX_BODY_BYTES
CLIENT_LEFT = 499
log = logging.getLogger("edgeft.serve")


class ClientLeft(Exception):
    """The client went away before its request was whole."""


class Proxy:
    """What one running proxy holds. `upstreams` may fill up after the start, as models load."""

    def __init__(
        self, policy: LoadedPolicy, upstreams: dict[str, Upstream], cache: AnswerCache | None, waiting: int
    ) -> None:
        self.policy, self.upstreams, self.cache, self.waiting = policy, upstreams, cache, waiting
        self.metrics = Metrics()
        self.admissions: dict[str, Admission] = {}

    def state_of(self, candidate_id: str) -> str:
        """loading, ready or ended."""
        upstream = self.upstreams.get(candidate_id)
        if upstream is None:
            return "loading"
        return "ready" if upstream.alive() else "ended"

    def admission(self, candidate_id: str) -> Admission:
        """The slots and the queue of a candidate."""
        if candidate_id not in self.admissions:
            self.admissions[candidate_id] = Admission(self.upstreams[candidate_id].slots, self.waiting)
        return self.admissions[candidate_id]

    def choose(self, request: ChatRequest) -> tuple[str, dict[str, str]]:
        """(candidate's id, headers that say why). Raises Refusal (404) for a model that is not served, (403) for one that
        the policy keeps from this request."""
        asked = from_openai(request.fields)
        if request.model == AUTO:
            try:
                decision = decide(self.policy, asked)
            except NoCandidate as nobody:
                raise Refusal(403 if nobody.private else 400, nobody.message, code="no_candidate") from None
            return decision.choice, {
                "x-edgeft-route": decision.choice,
                "x-edgeft-reason": decision.reason,
                "x-edgeft-gain": f"{decision.predicted_gain:.4f}",
            }
        if request.model in self.policy.candidates:
            if why := removed_for(self.policy, asked).get(request.model):
                raise Refusal(
                    403,
                    f"The model '{request.model}' may not take this request ({why}).",
                    code="no_candidate",
                )
            return request.model, {
                "x-edgeft-route": request.model,
                "x-edgeft-reason": "pinned by the request",
            }
        known = ", ".join(f"'{name}'" for name in (AUTO, *self.policy.candidates))
        raise Refusal(
            404,
            f"The model '{request.model[:100]}' is not served. Known: {known}.",
            param="model",
            code="model_not_found",
        )

    async def aclose(self) -> None:
        """End what stands behind."""
        for upstream in self.upstreams.values():
            await upstream.aclose()
        if self.cache:
            self.cache.close()


def create_app(
    policy: LoadedPolicy,
    upstreams: dict[str, Upstream],
    cache: AnswerCache | None = None,
    *,
    waiting: int = WAITING,
) -> Starlette:
    """The application. `upstreams` maps candidates' ids to what answers for them; it may be filled later, and
    until then requests get 503. `waiting` is how many requests may queue for each. Closes upstreams and
    cache when it ends.
    """
    proxy = Proxy(policy, upstreams, cache, waiting)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await proxy.aclose()

    async def models(_: Request) -> Response:
        created = int(datetime.fromisoformat(policy.policy.created_at).timestamp())
        names = (AUTO, *policy.candidates)
        data = [{"id": n, "object": "model", "created": created, "owned_by": "edgeft"} for n in names]
        return JSONResponse({"object": "list", "data": data})

    async def live(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(_: Request) -> Response:
        states = {name: proxy.state_of(name) for name in policy.candidates}
        whole = set(states.values()) == {"ready"}
        body = {"status": "ready" if whole else "not ready", "models": states}
        return JSONResponse(body, 200 if whole else 503)

    async def metrics(_: Request) -> Response:
        for name, admission in proxy.admissions.items():
            proxy.metrics.in_flight.labels(name).set(admission.in_flight)
            proxy.metrics.waiting.labels(name).set(len(admission.queue))
        return Response(proxy.metrics.text(), media_type="text/plain; version=0.0.4")

    async def no_such_path(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        refusal = Refusal(error.status_code, f"{error.detail}: see docs/serving.md for the paths.")
        return JSONResponse(refusal.body, error.status_code, headers=error.headers)

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", ChatEndpoint(proxy), methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", live),
            Route("/health/live", live),
            Route("/health/ready", ready),
            Route("/metrics", metrics),
        ],
        lifespan=lifespan,
        exception_handlers={HTTPException: no_such_path},
    )
    app.state.proxy = proxy
    return app


class Reply:
    """The response of one request as it is sent, and what the metrics need to know of it."""

    def __init__(self, send: Send) -> None:
        self.send = send
        self.request_id = uuid.uuid4().hex
        self.started_s = time.monotonic()
        self.headers = {"x-edgeft-request-id": self.request_id}
        self.route = "none"
        self.status = 0  # until the response has begun

    def elapsed_s(self) -> float:
        """Since the request began to arrive."""
        return time.monotonic() - self.started_s

    async def begin(self, status: int, **headers: str) -> None:
        """Send status and headers."""
        self.status = status
        pairs = {**self.headers, **{name.replace("_", "-"): value for name, value in headers.items()}}
        raw = [(name.encode(), _header(value)) for name, value in pairs.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": raw})

    async def part(self, data: bytes, more: bool = True) -> None:
        """Send a part of the body."""
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def events(self, *data: bytes) -> None:
        """Send events, the status first where it has not been sent."""
        if not self.status:
            await self.begin(200, content_type="text/event-stream; charset=utf-8", cache_control="no-cache")
        for one in data:
            if one:
                await self.part(one)

    async def json(self, status: int, value: dict[str, Any], **headers: str) -> None:
        """Send a whole JSON response."""
        data = orjson.dumps(value)
        await self.begin(status, content_type="application/json", content_length=str(len(data)), **headers)
        await self.part(data, more=False)

    async def refuse(self, refusal: Refusal) -> None:
        """Send an error: as a response, or as the last event of a stream that has begun."""
        if self.status:
            await self.part(sse.event(refusal.body), more=False)
            self.status = refusal.status  # for the metrics: the client has seen 200
            return
        extra = {"retry_after": str(refusal.retry_after_s)} if refusal.retry_after_s else {}
        if refusal.status == 413:
            extra["connection"] = "close"  # the rest of the body stays unread
        await self.json(refusal.status, refusal.body, **extra)


class ChatEndpoint:
    """POST /v1/chat/completions as raw ASGI."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send)
        status = CLIENT_LEFT
        try:
            if await self._until_client_leaves(scope, receive, reply):
                status = reply.status
        finally:
            self.proxy.metrics.requests.labels(reply.route, str(status)).inc()
            self.proxy.metrics.duration_s.labels(reply.route).observe(reply.elapsed_s())

    async def _until_client_leaves(self, scope: Scope, receive: Receive, reply: Reply) -> bool:
        """Answer the request; False where the client left first, and then the work has been stopped."""
        try:
            body = await read_body(scope, receive)
        except ClientLeft:
            return False
        except Refusal as refusal:
            await reply.refuse(refusal)
            return True
        work = asyncio.create_task(self._guarded(body, reply))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            return work.done()
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _guarded(self, body: bytes, reply: Reply) -> None:
        """Answer, with every failure told in OpenAI's form."""
        try:
            await self._answer(parse(body), reply)
        except Refusal as refusal:
            await reply.refuse(refusal)
        except Busy as busy:
            message = f"Too many requests wait for '{reply.route}'. Try again in {busy.retry_after_s} s."
            wait = busy.retry_after_s
            await reply.refuse(
                Refusal(429, message, kind="rate_limit_error", code="queue_full", retry_after_s=wait)
            )
        except BrokenStream as error:
            log.warning("%s: the answer of %s broke off: %s", reply.request_id, reply.route, error)
            await reply.refuse(Refusal(502, f"The model's answer broke off: {error}.", kind="upstream_error"))
        except Exception as error:
            log.error("%s: %s", reply.request_id, type(error).__name__)  # its message may quote the request
            await reply.refuse(
                Refusal(500, f"A fault of edgeft's ({type(error).__name__}).", kind="server_error")
            )

    async def _answer(self, request: ChatRequest, reply: Reply) -> None:
        proxy, metrics = self.proxy, self.proxy.metrics
        candidate_id, why = proxy.choose(request)
        reply.route = candidate_id
        reply.headers |= {**why, "x-edgeft-cache": "off"}
        head = Head(f"chatcmpl-{reply.request_id}", candidate_id)
        key = None
        if proxy.cache and request.repeatable:
            key = key_of(
                candidate_id, proxy.policy.candidates[candidate_id]["artifact_sha256"], request.fields
            )
            kept = proxy.cache.get(key)
            reply.headers["x-edgeft-cache"] = "hit" if kept else "miss"
            metrics.cache.labels(reply.headers["x-edgeft-cache"]).inc()
            if kept:
                await _send_whole(reply, request, head, kept)
                return
        answer = await self._generate(candidate_id, request, reply, head)
        if proxy.cache and key:
            proxy.cache.put(key, answer)
        if request.stream:
            last = sse.usage_event(head, answer) if request.include_usage else b""
            await reply.events(last)
            await reply.part(sse.DONE, more=False)
        else:
            await _send_whole(reply, request, head, answer)

    async def _generate(self, candidate_id: str, request: ChatRequest, reply: Reply, head: Head) -> Answer:
        """Let the candidate answer, passing its chunks on as they come where the client streams."""
        proxy, metrics = self.proxy, self.proxy.metrics
        if (state := proxy.state_of(candidate_id)) != "ready":
            raise Refusal(
                503,
                f"The model '{candidate_id}' is not ready ({state}).",
                kind="server_error",
                code=f"model_{state}",
                retry_after_s=LOADING_RETRY_S,
            )
        answer, silent = Answer(), True
        async with (
            proxy.admission(candidate_id).slot(),
            aclosing(proxy.upstreams[candidate_id].stream(request.fields)) as chunks,
        ):
            async for chunk in chunks:
                answer.add(chunk)
                if silent and sse.has_output(chunk):
                    silent = False
                    metrics.ttft_s.labels(candidate_id).observe(reply.elapsed_s())
                if request.stream:
                    await reply.events(sse.forward(head, chunk, first=not reply.status))
        if answer.finish_reason is None:
            raise BrokenStream("it ended without a finish reason")
        if answer.usage:
            tokens = metrics.tokens
            tokens.labels(candidate_id, "in").inc(answer.usage.get("prompt_tokens") or 0)
            tokens.labels(candidate_id, "out").inc(answer.usage.get("completion_tokens") or 0)
        else:
            metrics.unresolved.labels(candidate_id).inc()
        return answer


async def _send_whole(reply: Reply, request: ChatRequest, head: Head, answer: Answer) -> None:
    """Send an answer that is complete, in the form that the client asked for."""
    if request.stream:
        await reply.events(b"".join(sse.replay(head, answer, request.include_usage)))
        await reply.part(b"", more=False)
    else:
        await reply.json(200, sse.completion(head, answer))


async def read_body(scope: Scope, receive: Receive) -> bytes:
    """The request's body. Raises Refusal (413) over MAX_BODY_BYTES, ClientLeft where it never ends."""
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    too_large = declared.isdigit() and int(declared) > MAX_BODY_BYTES
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        part = message.get("body", b"")
        size += len(part)
        too_large = too_large or size > MAX_BODY_BYTES
        if too_large:
            # Closing with bytes unread resets the connection, and the client would never see the 413:
            # read on for a while and keep nothing.
            parts.clear()
        else:
            parts.append(part)
        if too_large and (not message.get("more_body") or size > DISCARDED_BYTES):
            raise Refusal(413, f"The body is over {MAX_BODY_BYTES} bytes.", code="body_too_large")
        if not message.get("more_body"):
            return b"".join(parts)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _header(value: str) -> bytes:
    """A header's value: printable ASCII."""
    return "".join(c if " " <= c <= "~" else "?" for c in value).encode()
