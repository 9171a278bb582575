"""One request and its reply over raw ASGI: the body with its limit, headers, events, errors in OpenAI's form, a client that leaves."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import Context
from typing import Any

import orjson

from edgeft.serve.answer import event
from edgeft.serve.protocol import Refusal
from edgeft.serve.refusals import told_s

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

DISCARDED_BYTES = 16 << 20  # read on and thrown away after a body that is too large
CLIENT_LEFT = 499
WATCHED_AFTER_S = 0.02  # at the earliest, twice that at the latest; most answers are there before


class ClientLeft(Exception):
    """The client went away before its request was whole."""


class Reply:
    """The response of one request as it is sent, and what is counted of it."""

    def __init__(self, send: Send, path: str = "") -> None:
        self.send, self.path = send, path
        self.stream = False
        self.request_id = os.urandom(16).hex()
        self.started_s = time.monotonic()
        self.headers = {"x-edgeft-request-id": self.request_id}
        self.route = "none"
        self.status = 0  # until the response has begun
        self.left = False  # the client went away
        self.done = False  # the last byte was sent
        # what a line of the log says
        self.tenant: str | None = None
        self.plan: Any = None
        self.answer: Any = None
        self.cache = "off"
        self.ttft_s: float | None = None
        self.cost_usd: float | None = None
        self.code: str | None = None

    def elapsed_s(self) -> float:
        """Since the request began to arrive."""
        return time.monotonic() - self.started_s

    async def begin(self, status: int, content_type: bytes, length: int | None = None) -> None:
        """Send status and headers."""
        self.status = status
        raw = [(b"content-type", content_type)]
        if length is not None:
            raw.append((b"content-length", b"%d" % length))
        raw += [(name.encode(), header(value)) for name, value in self.headers.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": raw})

    async def part(self, data: bytes, more: bool = True) -> None:
        """Send a part of the body."""
        self.done = not more
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def events(self, data: bytes, more: bool = True) -> None:
        """Send events, the status first where it has not been sent."""
        if not self.status:
            self.headers["cache-control"] = "no-cache"
            await self.begin(200, b"text/event-stream; charset=utf-8")
        self.done = not more
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def json(self, status: int, value: Any) -> None:
        """Send a whole JSON response."""
        data = orjson.dumps(value)
        await self.begin(status, b"application/json", len(data))
        await self.part(data, more=False)

    async def refuse(self, refusal: Refusal) -> None:
        """Send an error: as a response, or as the last event of a stream that has begun."""
        self.code = refusal.code or str(refusal.status)
        if self.status:
            await self.part(event(refusal.body), more=False)
            self.status = refusal.status  # for the metrics: the client has seen 200
            return
        if refusal.retry_after_s:
            wait_s = told_s(refusal.retry_after_s)
            self.headers["retry-after"] = str(math.ceil(wait_s))
            self.headers["retry-after-ms"] = str(
                math.ceil(1000 * wait_s)
            )  # OpenAI's clients read this one first
        if refusal.status == 413:
            self.headers["connection"] = "close"  # the rest of the body stays unread
        if refusal.status == 401:
            self.headers["www-authenticate"] = "Bearer"
        await self.json(refusal.status, refusal.body)


async def read_body(scope: Scope, receive: Receive, most: int) -> bytes:
    """The request's body. Raises Refusal (413) over `most` bytes, ClientLeft where it never ends."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientLeft
    body: bytes = message.get("body", b"")
    if not message.get("more_body") and len(body) <= most:
        return body
    too_large = _declared(scope) > most
    parts, size = [body], len(body)
    while True:
        if too_large := too_large or size > most:
            # Closing with bytes unread resets the connection, and the client would never see the 413:
            # read on for a while and keep nothing.
            parts.clear()
        if too_large and (not message.get("more_body") or size > DISCARDED_BYTES):
            raise Refusal(413, f"The body is over {most} bytes.", code="body_too_large")
        if not message.get("more_body"):
            return b"".join(parts)
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        part = message.get("body", b"")
        size += len(part)
        parts.append(part)


def _declared(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0


class Departures:
    """Watches for clients that leave while they wait. Requests that ended soon after they came are not watched, and one timer serves all:
    a task or a timer for each would cost as much as a tenth of a request."""

    def __init__(self) -> None:
        self.young: dict[asyncio.Task[Any], Callable[[], asyncio.Task[None]]] = {}  # came since the last look
        self.old: dict[asyncio.Task[Any], Callable[[], asyncio.Task[None]]] = {}
        self.watchers: dict[asyncio.Task[Any], asyncio.Task[None]] = {}
        self.timer: asyncio.TimerHandle | None = None
        self.loop: asyncio.AbstractEventLoop | None = None  # the timer's
        self.context = Context()  # not that of whichever request set it

    async def while_connected(self, receive: Receive, reply: Reply, work: Awaitable[None]) -> None:
        """Await the work; a client that leaves meanwhile cancels it, and `reply.left` then says so."""
        task = asyncio.current_task()
        assert task is not None

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            if not reply.done:
                reply.left = True
                task.cancel()

        self.young[task] = lambda: asyncio.ensure_future(watch())
        if self.timer is None or self.loop is not asyncio.get_running_loop():
            self._set_timer()
        try:
            await work
        except asyncio.CancelledError:
            if not reply.left:
                raise
            task.uncancel()
        finally:
            if self.young.pop(task, None) is None and self.old.pop(task, None) is None:
                self.watchers.pop(task).cancel()

    def _look(self) -> None:
        """Watch for those who have waited since the last look at least."""
        self.timer = None
        self.watchers |= {task: begin() for task, begin in self.old.items()}
        self.old, self.young = self.young, {}
        if self.old:
            self._set_timer()

    def _set_timer(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.timer = self.loop.call_later(WATCHED_AFTER_S, self._look, context=self.context)


def bearer(scope: Scope) -> str | None:
    """The key in the Authorization header, or None."""
    for name, value in scope["headers"]:
        if name == b"authorization":
            word, _, key = value.partition(b" ")
            return key.strip().decode("latin-1") if word.lower() == b"bearer" else None
    return None


def header(value: str) -> bytes:
    """A header's value: printable ASCII."""
    if value.isascii() and value.isprintable():
        return value.encode()
    return "".join(c if " " <= c <= "~" else "?" for c in value).encode()
