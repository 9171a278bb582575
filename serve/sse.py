"""Server-sent events of chat completions: read them, gather them into one answer, write them.

An `Answer` is what is left when a stream has ended; it is what the cache keeps, and either form of
reply, streamed or not, can be made of it. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson

Chunk = dict[str, Any]
DONE = b"data: [DONE]\n\n"
DRAIN_S = 1.0


class BrokenStream(Exception):
    """The upstream's stream is not what it should be."""


@dataclass
class Answer:
    """A chat completion as it comes together. Token counts are the upstream's own, or None."""

    message: dict[str, Any] = field(default_factory=lambda: {"role": "assistant", "content": None})
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for the cache."""
        return asdict(self)

    def add(self, chunk: Chunk) -> None:
        """Take in one chunk. Raises BrokenStream where it has no known shape."""
        try:
            if chunk.get("usage"):
                self.usage = chunk["usage"]
            for choice in chunk.get("choices") or []:
                _merge(self.message, choice.get("delta") or {})
                self.finish_reason = choice.get("finish_reason") or self.finish_reason
                if entries := (choice.get("logprobs") or {}).get("content"):
                    self.logprobs = self.logprobs or {"content": []}
                    self.logprobs["content"] += entries
        except (AttributeError, TypeError, KeyError, IndexError, ValueError) as error:
            raise BrokenStream(f"a chunk has an unknown shape ({type(error).__name__})") from None


def _merge(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for name in ("content", "reasoning_content", "refusal"):
        if delta.get(name) is not None:
            message[name] = (message.get(name) or "") + delta[name]
    for part in delta.get("tool_calls") or []:
        calls = message.setdefault("tool_calls", [])
        index = int(part.get("index", len(calls)))
        if not 0 <= index <= len(calls):
            raise ValueError("tool call out of order")
        if index == len(calls):
            calls.append({"id": None, "type": "function", "function": {"name": "", "arguments": ""}})
        call, function = calls[index], part.get("function") or {}
        call["id"] = part.get("id") or call["id"]
        call["function"]["name"] += function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""


def has_output(chunk: Chunk) -> bool:
    """True where the chunk carries something that the model wrote."""
    names = ("content", "reasoning_content", "refusal", "tool_calls")
    return any(
        (choice.get("delta") or {}).get(name) for choice in chunk.get("choices") or [] for name in names
    )


async def read(lines: AsyncIterator[str]) -> AsyncGenerator[Chunk]:
    """The chunks of an upstream's event stream, up to [DONE] or its end.

    Raises BrokenStream for an event that is no JSON object or that reports an error.
    """
    async for line in lines:
        if not line.startswith(("data:", "error:")):
            continue  # comments, event names, blank lines
        data = line.partition(":")[2].strip()
        if data == "[DONE]":
            await _drain(lines)
            return
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError:
            raise BrokenStream("an event is not JSON") from None
        if not isinstance(chunk, dict) or "error" in chunk or line.startswith("error:"):
            raise BrokenStream("the engine reported an error")
        yield chunk


async def _drain(lines: AsyncIterator[str]) -> None:
    """Read to the end, so that the connection can be used again; an upstream that never ends is left."""
    try:
        async with asyncio.timeout(DRAIN_S):
            async for _ in lines:
                pass
    except TimeoutError:
        pass


@dataclass(frozen=True)
class Head:
    """What every chunk of one reply repeats."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def of(self, kind: str) -> dict[str, Any]:
        """The first fields of a reply of one kind."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def event(value: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


def forward(head: Head, chunk: Chunk, first: bool) -> bytes:
    """An upstream's chunk under our head, its usage left out; the first one names the role. Empty for a
    chunk without choices.
    """
    choices = chunk.get("choices") or []
    if not choices:
        return b""
    kept = [{k: c[k] for k in ("index", "delta", "finish_reason", "logprobs") if k in c} for c in choices]
    if first:
        kept[0] = {**kept[0], "delta": {**(kept[0].get("delta") or {}), "role": "assistant"}}
    return event({**head.of("chat.completion.chunk"), "choices": kept})


def usage_event(head: Head, answer: Answer) -> bytes:
    """The last chunk where usage is asked for; empty where the upstream told none, since none is guessed."""
    if not answer.usage:
        return b""
    return event({**head.of("chat.completion.chunk"), "choices": [], "usage": answer.usage})


def replay(head: Head, answer: Answer, include_usage: bool) -> Iterator[bytes]:
    """A kept answer as a stream: what was said in one chunk, the finish, usage if asked for, [DONE]."""
    kind = "chat.completion.chunk"
    delta = dict(answer.message)
    if calls := delta.get("tool_calls"):
        delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
    said: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": None}
    if answer.logprobs:
        said["logprobs"] = answer.logprobs
    yield event({**head.of(kind), "choices": [said]})
    yield event(
        {**head.of(kind), "choices": [{"index": 0, "delta": {}, "finish_reason": answer.finish_reason}]}
    )
    if include_usage:
        yield usage_event(head, answer)
    yield DONE


def completion(head: Head, answer: Answer) -> dict[str, Any]:
    """The answer in one piece. `usage` is left out where the upstream told none."""
    choice: dict[str, Any] = {
        "index": 0,
        "message": answer.message,
        "finish_reason": answer.finish_reason,
        "logprobs": answer.logprobs,
    }
    usage = {"usage": answer.usage} if answer.usage else {}
    return {**head.of("chat.completion"), "choices": [choice], **usage}
