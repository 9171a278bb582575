"""Server-sent events of an upstream, out of its bytes. Knows nothing of HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import orjson

from edgeft.serve.answer import BrokenStream, Chunk

DRAIN_S = 1.0
MAX_EVENT_BYTES = 16 << 20


class Events:
    """The chunks of one event stream, up to [DONE] or its end.

    Raises BrokenStream for an event that is no JSON object, is too long, or reports an error.
    """

    def __init__(self) -> None:
        self.rest = b""
        self.done = False  # [DONE] was read

    def take(self, part: bytes) -> Iterator[Chunk]:
        """The chunks that are whole with these bytes."""
        lines = (self.rest + part if self.rest else part).split(b"\n")
        self.rest = lines.pop()
        if len(self.rest) > MAX_EVENT_BYTES:
            raise BrokenStream("an event has no end")
        for line in lines:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == b"[DONE]":
                    self.done = True
                    return
                yield _chunk(data)
            elif line.startswith(b"error:"):
                raise BrokenStream("the engine reported an error")
            # comments, event names, blank lines

    def end(self) -> Iterator[Chunk]:
        """The last one, where no line's end came after it."""
        if self.rest.startswith(b"data:") and (data := self.rest[5:].strip()) and data != b"[DONE]":
            yield _chunk(data)


def _chunk(data: bytes) -> Any:
    try:
        chunk = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise BrokenStream("an event is not JSON") from None
    if not isinstance(chunk, dict) or chunk.get("error"):
        raise BrokenStream("the engine reported an error")
    return chunk


async def drain(parts: AsyncIterator[bytes]) -> None:
    """Read to the end, so that the connection can be used again; an upstream that never ends is left."""
    try:
        async with asyncio.timeout(DRAIN_S):
            async for _ in parts:
                pass
    except OSError:  # TimeoutError is one: all was said
        pass
