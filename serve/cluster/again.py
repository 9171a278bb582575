"""Ask again where an answer failed before it began: ASGI, for Ray's HTTP proxies, in front of the proxy's replicas.

When a replica of the proxy dies with its node, Ray's HTTP proxy on another node ends the call without a response, which its server
would tell the client as a 500. Nothing has reached the client then, so the request may be run again, on another replica.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

TRIES = 4
HEADER = b"x-edgeft-again"  # how often, where a request was asked again
KEPT_BYTES = 2 << 20  # of a body; a longer one is not asked again
log = logging.getLogger("edgeft.serve")


class Again:
    """Middleware. A response that took more than one try says so in a header."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = Body(receive)
        begun, tried = False, 0

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            if tried and message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (HEADER, str(tried).encode())]}
            await send(message)

        while True:
            await self.app({**scope, "headers": list(scope["headers"])}, body.replay(), watched)
            tried += 1
            if begun or body.left or body.too_long or tried == TRIES:
                return
            log.warning("a replica of the proxy was lost before its answer began: asked again")


class Body:
    """What a client sends, kept so that it can be received again. `left`: the client has gone."""

    def __init__(self, receive: Receive) -> None:
        self.receive, self.kept, self.size = receive, list[Message](), 0
        self.left = self.too_long = False

    def replay(self) -> Receive:
        """A `receive` that begins at the beginning."""
        place = 0

        async def again() -> Message:
            nonlocal place
            if place == len(self.kept):
                message = await self.receive()
                if message["type"] == "http.disconnect":
                    self.left = True
                    return message
                self.size += len(message.get("body", b""))
                self.too_long = self.size > KEPT_BYTES
                if self.too_long:
                    return message
                self.kept.append(message)
            place += 1
            return self.kept[place - 1]

        return again


def middlewares() -> list[Any]:
    """What Ray's HTTP proxies load by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=edgeft.serve.cluster.again:middlewares, set on each
    node before `ray start`."""
    from starlette.middleware import Middleware

    return [Middleware(Again)]
