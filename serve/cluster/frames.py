"""What an engine's replica says to the proxy, piece by piece, as bytes: a letter and JSON.

Refusals and broken streams travel as data, not as exceptions, so that what a client is told does not hang on how Ray wraps errors;
an exception of Ray's then always means that replica or node is gone.
"""

from __future__ import annotations

from typing import Any

import orjson

from edgeft.serve.answer import BrokenStream, Chunk
from edgeft.serve.protocol import Refusal

CHUNK, REFUSED, BROKEN = b"c", b"r", b"b"


def chunk(value: Chunk) -> bytes:
    """A chunk of OpenAI's API, or a whole answer of it."""
    return CHUNK + orjson.dumps(value)


def refused(refusal: Refusal) -> bytes:
    """A refusal before the first chunk."""
    fields = {
        "status": refusal.status,
        "body": refusal.body,
        "retry_after_s": refusal.retry_after_s,
        "elsewhere": refusal.elsewhere,
    }
    return REFUSED + orjson.dumps(fields)


def broken(error: BrokenStream) -> bytes:
    """The end of a stream that broke."""
    return BROKEN + orjson.dumps(str(error))


def read(frame: bytes) -> Chunk:
    """The chunk. Raises the Refusal or BrokenStream that the frame holds."""
    kind, value = frame[:1], orjson.loads(frame[1:])
    if kind == CHUNK:
        found: Chunk = value
        return found
    if kind == BROKEN:
        raise BrokenStream(value)
    raise _refusal(value)


def _refusal(value: dict[str, Any]) -> Refusal:
    error = value["body"]["error"]
    return Refusal(
        value["status"],
        error["message"],
        kind=error["type"],
        param=error["param"],
        code=error["code"],
        retry_after_s=value["retry_after_s"],
        elsewhere=value["elsewhere"],
    )
