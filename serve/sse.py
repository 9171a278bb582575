"""Server-sent events of an upstream, out of its bytes. Knows nothing of HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import orjson

from edgeft.serve.answer import BrokenStream, Chunk

DRAIN_S = 1.0
MAX_EVENT_BYTES = 16 << 20


async def read(parts: AsyncIterator[bytes]) -> AsyncGenerator[Chunk]:
    """The chunks of an event stream, up to [DONE] or its end.

    Raises BrokenStream for an event that is no JSON object, is too long, or reports an error.
    """
    rest = b""
    async for part in parts:
        lines = (rest + part).split(b"\n") if rest else part.split(b"\n")
        rest = lines.pop()
        if len(rest) > MAX_EVENT_BYTES:
            raise BrokenStream("an event has no end")
        for line in lines:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == b"[DONE]":
                    await _drain(parts)
                    return
                yield _chunk(data)
            elif line.startswith(b"error:"):
                raise BrokenStream("the engine reported an error")
            # comments, event names, blank lines
    if rest.startswith(b"data:") and (data := rest[5:].strip()) and data != b"[DONE]":
        yield _chunk(data)


def _chunk(data: bytes) -> Any:
    try:
        chunk = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise BrokenStream("an event is not JSON") from None
    if not isinstance(chunk, dict) or chunk.get("error"):
        raise BrokenStream("the engine reported an error")
    return chunk


async def _drain(parts: AsyncIterator[bytes]) -> None:
    """Read to the end, so that the connection can be used again; an upstream that never ends is left."""
    try:
        async with asyncio.timeout(DRAIN_S):
            async for _ in parts:
                pass
    except OSError:  # TimeoutError is one: all was said
        pass
