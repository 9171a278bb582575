"""What the router may know of a request and of the moment. Plain data; nothing here decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeft.router.features import content_text, request_text

CHARS_PER_TOKEN = 4  # an estimate for what no tokenizer has counted
SHAPES = ("tools", "functions", "response_format", "stop", "user", "metadata")
IMAGE_CHARS = 4000  # an image counts as about a thousand tokens


@dataclass
class Request:
    """One request. `floor`, `max_cost` and `max_latency_s` override the policy's for this request."""

    messages: Sequence[Mapping[str, Any]]
    tools: bool = False  # tools are offered, or calls stand in the history
    max_tokens: int | None = None
    prompt_tokens: int | None = None  # None: characters / 4
    tags: frozenset[str] = frozenset()
    tenant: str | None = None
    previous: str | None = None  # the candidate that answered this conversation before
    private: bool = False  # the caller says so, whatever the rules see
    floor: float | None = None  # lowest expected score, 0..1
    max_cost: float | None = None  # in the policy's unit
    max_latency_s: float | None = None
    extra_text: str = (
        ""  # more of what goes upstream (schemas of tools, response_format): privacy rules read it
    )

    @property
    def text(self) -> str:
        """What the heads look at: the last user message."""
        return request_text(self.messages)

    @property
    def tokens(self) -> int:
        """Tokens of the prompt, counted or estimated."""
        if self.prompt_tokens is not None:
            return self.prompt_tokens
        return tokens_of(self.messages, self.extra_text)


@dataclass
class State:
    """The moment: who can be asked, how long their queues are, what the budget's λ is."""

    unavailable: frozenset[str] = frozenset()
    queue_s: Mapping[str, float] = field(default_factory=dict)  # wait before an answer begins
    price_of_cost: float | None = None  # λ, score per unit of cost; None: the policy's own
    suspended: bool = False  # the certificate is suspended (drift), beside what the file says


def as_request(request: Request | str | Sequence[Mapping[str, Any]]) -> Request:
    """A request out of its text, its messages, or itself."""
    if isinstance(request, Request):
        return request
    if isinstance(request, str):
        return Request([{"role": "user", "content": request}])
    return Request(request, tools=uses_tools(request))


def from_openai(body: Mapping[str, Any], **known: Any) -> Request:
    """A request out of the body of OpenAI's chat API; `known` are fields that it does not hold (tenant, tags …)."""
    import json

    messages = body["messages"]
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    shapes = {name: body[name] for name in SHAPES if body.get(name)}
    extra = json.dumps(shapes, ensure_ascii=False) if shapes else ""
    fields: dict[str, Any] = {
        "tools": bool(body.get("tools") or body.get("functions")) or uses_tools(messages),
        "max_tokens": limit,
        "prompt_tokens": tokens_of(messages, extra),
        "extra_text": extra,
    }
    return Request(messages, **{**fields, **known})


def uses_tools(messages: Sequence[Mapping[str, Any]]) -> bool:
    """True where a tool was called or has answered in the conversation."""
    return any(m.get("tool_calls") or m.get("role") in ("tool", "function") for m in messages)


def tokens_of(messages: Sequence[Mapping[str, Any]], extra_text: str = "") -> int:
    """An estimate of a prompt's tokens."""
    characters = len(extra_text)
    for message in messages:
        content = message.get("content")
        characters += len(content_text(content))
        if isinstance(content, list):
            characters += IMAGE_CHARS * _images(content)
    return characters // CHARS_PER_TOKEN + 4 * len(messages)


def _images(content: Sequence[Any]) -> int:
    return sum(1 for part in content if isinstance(part, dict) and part.get("type") not in ("text", None))
