"""The server's side of a connection: the head of a response goes out with what follows it, in one write.

uvloop writes at once, so that each response costs two system calls, each of which also wakes whoever reads.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class HeadHeld:
    """A transport that holds a head until the next write, at most to the loop's next turn. Whatever else is asked of it the
    transport does."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.is_closing = transport.is_closing  # asked for at every response
        self.loop = asyncio.get_running_loop()
        self.held = b""

    def write(self, data: bytes) -> None:
        """Hold a head; send all else, with the head before it."""
        if self.held:
            data, self.held = self.held + data, b""
        elif data.startswith(b"HTTP/1.1 "):
            self.held = data
            self.loop.call_soon(self.flush)
            return
        self.transport.write(data)

    def flush(self) -> None:
        """Send what is held."""
        data, self.held = self.held, b""
        if data and not self.transport.is_closing():
            self.transport.write(data)

    def close(self) -> None:
        """Close when all is sent."""
        self.flush()
        self.transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)


class HeadHeldProtocol(HttpToolsProtocol):
    """uvicorn's HTTP over httptools, with such a transport."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, HeadHeld(transport)))
