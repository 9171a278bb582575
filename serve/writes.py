"""The server's side of a connection: what is sent in one turn of the event loop goes out in one write.

uvloop writes at once, so that a response costs two system calls (head, body) and a stream that comes in bursts one an event, each of
which also wakes whoever reads.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_HELD_BYTES = 64 << 10


class Gathered:
    """A transport that holds writes until the loop's next turn. Whatever else is asked of it the transport does."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.loop = asyncio.get_running_loop()
        self.held: list[bytes] = []
        self.held_bytes = 0

    def write(self, data: bytes) -> None:
        """Hold some bytes; many are sent on at once, so that the transport's flow control sees them."""
        if not self.held:
            self.loop.call_soon(self.flush)
        self.held.append(data)
        self.held_bytes += len(data)
        if self.held_bytes > MOST_HELD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Send what is held."""
        if not self.held:
            return
        data = b"".join(self.held)
        self.held, self.held_bytes = [], 0
        if not self.transport.is_closing():
            self.transport.write(data)

    def close(self) -> None:
        """Close when all is sent."""
        self.flush()
        self.transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)


class GatheringProtocol(HttpToolsProtocol):
    """uvicorn's HTTP over httptools, with such a transport."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, Gathered(transport)))
