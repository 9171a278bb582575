"""An answer as it comes together from the chunks of a stream, and as it is told: in one piece or as a stream again.

An `Answer` is what is left when a stream has ended; it is what the cache keeps, and either form of reply can be made of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from edgeft.serve.protocol import CHAT, COMPLETION, Kind

Chunk = dict[str, Any]
DONE = b"data: [DONE]\n\n"
MOST_CHOICES = 128
TEXTS = ("content", "reasoning_content", "reasoning", "refusal")
SAID = (*TEXTS, "tool_calls")


class BrokenStream(Exception):
    """The upstream's stream is not what it should be."""


@dataclass
class Choice:
    """One of the answers. `message` of a chat; `text` of a completion."""

    message: dict[str, Any] = field(default_factory=lambda: {"role": "assistant", "content": None})
    text: str = ""
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


@dataclass
class Answer:
    """What a model said. Token counts are the upstream's own, or None."""

    choices: list[Choice] = field(default_factory=list)
    usage: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for the cache."""
        return {"choices": [vars(choice) for choice in self.choices], "usage": self.usage}

    @staticmethod
    def from_dict(value: dict[str, Any]) -> Answer:
        """What `to_dict` gave."""
        return Answer([Choice(**choice) for choice in value["choices"]], value["usage"])

    @property
    def whole(self) -> bool:
        """True where every choice says why it ended."""
        return bool(self.choices) and all(choice.finish_reason for choice in self.choices)

    @property
    def text(self) -> str:
        """What the first choice says."""
        first = self.choices[0] if self.choices else Choice()
        return first.text or first.message.get("content") or ""

    def add(self, chunk: Chunk) -> None:
        """Take in one chunk of either API. Raises BrokenStream where it has no known shape."""
        try:
            if chunk.get("usage"):
                self.usage = chunk["usage"]
            for part in chunk.get("choices") or []:
                index = part.get("index", 0)
                if not 0 <= index < MOST_CHOICES:
                    raise ValueError("index")
                while len(self.choices) <= index:
                    self.choices.append(Choice())
                choice = self.choices[index]
                if delta := part.get("delta"):
                    _merge(choice.message, delta)
                if text := part.get("text"):
                    choice.text += text
                if reason := part.get("finish_reason"):
                    choice.finish_reason = reason
                if found := part.get("logprobs"):
                    choice.logprobs = _joined(choice.logprobs, found)
        except (AttributeError, TypeError, KeyError, IndexError, ValueError) as error:
            raise BrokenStream(f"a chunk has an unknown shape ({type(error).__name__})") from None


def _joined(known: dict[str, Any] | None, more: dict[str, Any]) -> dict[str, Any]:
    """Two parts of `logprobs`, whose values are lists."""
    if known is None:
        return {name: list(value) for name, value in more.items() if isinstance(value, list)}
    for name, value in more.items():
        if isinstance(value, list):
            known[name] = [*known.get(name, []), *value]
    return known


def _merge(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for name, said in delta.items():
        if said is not None and name in TEXTS:
            message[name] = (message.get(name) or "") + said
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


def look(chunk: Chunk) -> tuple[bool, bool]:
    """(the chunk carries something that the model wrote, a choice is finished). Raises BrokenStream where it has no known shape."""
    said = finished = False
    try:
        for choice in chunk.get("choices") or ():
            finished = finished or bool(choice.get("finish_reason"))
            if not said:
                delta = choice.get("delta") or {}
                said = bool(choice.get("text") or delta.get("content") or any(map(delta.get, SAID)))
    except (AttributeError, TypeError) as error:
        raise BrokenStream(f"a chunk has an unknown shape ({type(error).__name__})") from None
    return said, finished


@dataclass(slots=True)
class Head:
    """What every chunk of one reply repeats."""

    kind: Kind
    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))
    begun: set[int] = field(default_factory=set)  # choices whose role was told
    opened: tuple[str | None, bytes] = (None, b"")  # the model that it is of; every event up to its choices

    def of(self, name: str) -> dict[str, Any]:
        """The first fields of a reply of one kind."""
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}

    def opening(self) -> bytes:
        """An event with choices, up to these."""
        if self.opened[0] != self.model:
            same = orjson.dumps(self.of(self.kind.chunk_object))
            self.opened = (self.model, b"data: " + same[:-1] + b',"choices":')
        return self.opened[1]


def event(value: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


def forward(head: Head, chunk: Chunk) -> bytes:
    """An upstream's chunk under our head, its usage left out; the first of each choice names the role. Empty for a chunk without choices."""
    kept = []
    for part in chunk.get("choices") or ():
        index = part.get("index", 0)
        choice = {"index": index, "finish_reason": part.get("finish_reason")}
        if "logprobs" in part or head.kind is COMPLETION:
            choice["logprobs"] = part.get("logprobs")
        if head.kind is COMPLETION:
            choice["text"] = part.get("text", "")
        else:
            delta = choice["delta"] = part.get("delta") or {}
            if index not in head.begun:
                head.begun.add(index)
                choice["delta"] = {**delta, "role": "assistant"}
        kept.append(choice)
    return head.opening() + orjson.dumps(kept) + b"}\n\n" if kept else b""


def usage_event(head: Head, answer: Answer) -> bytes:
    """The last chunk where usage is asked for; empty where the upstream told none, since none is guessed."""
    if not answer.usage:
        return b""
    return event({**head.of(head.kind.chunk_object), "choices": [], "usage": answer.usage})


def replay(head: Head, answer: Answer, include_usage: bool) -> Iterator[bytes]:
    """A kept answer as a stream: what was said in one chunk a choice, the finish, usage if asked for, [DONE]."""
    for index, choice in enumerate(answer.choices):
        said: Chunk = {"index": index, "finish_reason": None}
        if head.kind is CHAT:
            said["delta"] = dict(choice.message)
            if calls := choice.message.get("tool_calls"):
                said["delta"]["tool_calls"] = [{"index": place, **call} for place, call in enumerate(calls)]
        else:
            said["text"] = choice.text
        if choice.logprobs:
            said["logprobs"] = choice.logprobs
        yield forward(head, {"choices": [said]})
        yield forward(
            head, {"choices": [{"index": index, "delta": {}, "finish_reason": choice.finish_reason}]}
        )
    if include_usage:
        yield usage_event(head, answer)
    yield DONE


def completion(head: Head, answer: Answer) -> dict[str, Any]:
    """The answer in one piece. `usage` is left out where the upstream told none."""
    choices: list[dict[str, Any]] = []
    for index, choice in enumerate(answer.choices):
        body = {"message": choice.message} if head.kind is CHAT else {"text": choice.text}
        choices.append(
            {"index": index, **body, "finish_reason": choice.finish_reason, "logprobs": choice.logprobs}
        )
    usage = {"usage": answer.usage} if answer.usage else {}
    return {**head.of(head.kind.object), "choices": choices, **usage}


def chunks_of(value: Any, kind: Kind) -> Iterator[Chunk]:
    """A completion that came in one piece, as the chunks that it would have been. Raises BrokenStream where it has no known shape."""
    if not isinstance(value, dict) or not isinstance(value.get("choices"), list) or not value["choices"]:
        raise BrokenStream("the answer has no choices")
    kept = []
    for choice in value["choices"]:
        if not isinstance(choice, dict) or not isinstance(
            choice.get("message" if kind is CHAT else "text"), dict if kind is CHAT else str
        ):
            raise BrokenStream("a choice has an unknown shape")
        part = {k: choice[k] for k in ("index", "finish_reason", "logprobs") if choice.get(k) is not None}
        if kind is COMPLETION:
            part["text"] = choice["text"]
        else:
            delta = dict(choice["message"])
            if isinstance(delta.get("tool_calls"), list):
                delta["tool_calls"] = [
                    {"index": place, **call}
                    for place, call in enumerate(delta["tool_calls"])
                    if isinstance(call, dict)
                ]
            part["delta"] = delta
        kept.append(part)
    yield {"choices": kept, "usage": value.get("usage")}
