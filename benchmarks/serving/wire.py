"""HTTP/1.1 to one loopback address over raw asyncio: connections that are kept, streams as they come, a way to hang up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import cast
from urllib.parse import urlsplit

import httptools


class Hangup(Exception):
    """The server closed the connection before the response was whole."""


class Response(asyncio.Protocol):
    """A connection and the response that it carries now."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.waiter: asyncio.Future[None] | None = None
        self.lost = False
        self.reset()

    def reset(self) -> None:
        """Ready for the next response."""
        self.parser = httptools.HttpResponseParser(self)
        self.headers: dict[str, str] = {}
        self.parts: list[bytes] = []
        self.status, self.complete = 0, False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._wake()

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)
        self._wake()

    def on_header(self, name: bytes, value: bytes) -> None:
        """httptools' callback."""
        self.headers[name.decode().lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """httptools' callback."""
        self.status = self.parser.get_status_code()

    def on_body(self, part: bytes) -> None:
        """httptools' callback."""
        self.parts.append(part)

    def on_message_complete(self) -> None:
        """httptools' callback."""
        self.complete = True

    def _wake(self) -> None:
        if self.waiter and not self.waiter.done():
            self.waiter.set_result(None)

    async def _news(self) -> None:
        if self.lost:
            raise Hangup
        self.waiter = self.loop.create_future()
        await self.waiter

    async def head(self) -> int:
        """The status, when it has come."""
        while not self.status:
            await self._news()
        return self.status

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises Hangup where it breaks off."""
        while True:
            if self.parts:
                data, self.parts = b"".join(self.parts), []
                yield data
            elif self.complete:
                return
            else:
                await self._news()

    async def body(self) -> bytes:
        """The whole body."""
        while not self.complete:
            await self._news()
        return b"".join(self.parts)


class Pool:
    """Connections to one address that are kept for the next request."""

    def __init__(self, url: str, key: str | None = None) -> None:
        address = urlsplit(url)
        self.host, self.port = address.hostname, address.port
        own = f"Authorization: Bearer {key}\r\n" if key else ""
        self.fixed = f"Host: {self.host}:{self.port}\r\nContent-Type: application/json\r\n{own}"
        self.idle: list[Response] = []

    async def send(self, path: str, body: bytes, method: str = "POST") -> Response:
        """Send a request; its response is on the way. Hand it back with `keep`, or end it with `hang_up`."""
        while self.idle and self.idle[-1].lost:
            self.idle.pop()
        if self.idle:
            response = self.idle.pop()
            response.reset()
        else:
            loop = asyncio.get_running_loop()
            _, response = await loop.create_connection(Response, self.host, self.port)
        head = f"{method} {path} HTTP/1.1\r\n{self.fixed}Content-Length: {len(body)}\r\n\r\n"
        response.transport.write(head.encode() + body)
        return response

    def keep(self, response: Response) -> None:
        """Give back a connection whose response is whole."""
        if response.complete and not response.lost and response.parser.should_keep_alive():
            self.idle.append(response)
        else:
            response.transport.close()

    def hang_up(self, response: Response) -> None:
        """Close the connection in the middle."""
        response.transport.abort()

    def close(self) -> None:
        """Close what is kept."""
        for response in self.idle:
            response.transport.close()
