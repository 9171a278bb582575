"""OpenAI's API as edgeft takes it: which fields, of which type, and how an error looks.

Only fields that are listed here go upstream; others are dropped, so that no engine's own extension
(slots, adapters, cache salts) can be reached from outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

MAX_BODY_BYTES = 1 << 20
MOST_ANSWERS = 16  # n
NUMBER, INTEGER, TEXT_OR_LIST = (int, float), (int,), (str, list)
# field -> the types that it may have
SAMPLING: dict[str, tuple[type, ...]] = {
    "max_tokens": INTEGER,
    "temperature": NUMBER,
    "top_p": NUMBER,
    "n": INTEGER,
    "seed": INTEGER,
    "stop": TEXT_OR_LIST,
    "frequency_penalty": NUMBER,
    "presence_penalty": NUMBER,
}
CHAT_FIELDS: dict[str, tuple[type, ...]] = {
    "messages": (list,),
    **SAMPLING,
    "max_completion_tokens": INTEGER,
    "tools": (list,),
    "tool_choice": (str, dict),
    "parallel_tool_calls": (bool,),
    "response_format": (dict,),
    "logprobs": (bool,),
    "top_logprobs": INTEGER,
    "reasoning_effort": (str,),
}
COMPLETION_FIELDS: dict[str, tuple[type, ...]] = {
    "prompt": TEXT_OR_LIST,
    **SAMPLING,
    "logprobs": INTEGER,
    "echo": (bool,),
}
EMBEDDING_FIELDS: dict[str, tuple[type, ...]] = {
    "input": TEXT_OR_LIST,
    "dimensions": INTEGER,
    "encoding_format": (str,),
}
# field -> (least, most) where a number has bounds
BOUNDS: dict[str, tuple[float, float]] = {
    "max_tokens": (1, 1 << 31),
    "max_completion_tokens": (1, 1 << 31),
    "temperature": (0, 2),
    "top_p": (0, 1),
    "n": (1, MOST_ANSWERS),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
    "top_logprobs": (0, 20),
    "seed": (-(1 << 63), (1 << 63) - 1),
    "dimensions": (1, 1 << 16),
}
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
CONTENT_NEEDED = ("system", "developer", "user", "tool")
MOST_STOPS, MOST_TAGS = 16, 16
MOST_LEVELS = 64  # of nesting
NAMES = {
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
    bool: "a boolean",
}


class Refusal(Exception):
    """A request that gets an error in OpenAI's form. `elsewhere` is True where another candidate may still answer it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        elsewhere: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after_s = status, message, retry_after_s
        self.elsewhere, self.code = elsewhere, code
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Kind:
    """One of the two APIs that generate text."""

    name: str
    path: str
    fields: Mapping[str, tuple[type, ...]]
    object: str
    chunk_object: str
    id_prefix: str


CHAT = Kind(
    "chat", "/v1/chat/completions", CHAT_FIELDS, "chat.completion", "chat.completion.chunk", "chatcmpl-"
)
COMPLETION = Kind(
    "completion", "/v1/completions", COMPLETION_FIELDS, "text_completion", "text_completion", "cmpl-"
)


@dataclass
class Asked:
    """A checked request for text."""

    kind: Kind
    model: str
    fields: dict[str, Any]  # what goes upstream
    stream: bool
    include_usage: bool
    options: Mapping[str, Any] = field(default_factory=dict)  # of edgeft's own: adapter, tags, limits

    @property
    def n(self) -> int:
        """How many answers are asked for."""
        return int(self.fields.get("n", 1))

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation; a bare prompt counts as what a user said."""
        if self.kind is CHAT:
            return self.fields["messages"]
        prompt = self.fields["prompt"]
        # Token ids are nothing that privacy rules can read.
        return [
            {
                "role": "user",
                "content": prompt if isinstance(prompt, str) else [{"type": "tokens", "ids": prompt}],
            }
        ]


# edgeft's own fields, in an object "edgeft" of the body (openai-python: extra_body={"edgeft": {...}}); they go nowhere else.
OPTIONS: dict[str, tuple[type, ...]] = {
    "adapter": (str,),
    "tags": (list,),
    "private": (bool,),
    "floor": NUMBER,
    "max_cost": NUMBER,
    "max_latency_s": NUMBER,
}


def loads(body: bytes) -> dict[str, Any]:
    """A body as a JSON object without its nulls. Raises Refusal (400)."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refusal(
            400, f"The body is not valid JSON (line {error.lineno}, column {error.colno})."
        ) from None
    if not isinstance(value, dict):
        raise Refusal(400, "The body must be a JSON object.")
    # No deeper than it has brackets: nearly every body is told by counting them.
    if body.count(b"{") + body.count(b"[") > MOST_LEVELS and deeper(value, MOST_LEVELS):
        raise Refusal(400, f"The body is nested over {MOST_LEVELS} levels.")
    return {name: entry for name, entry in value.items() if entry is not None}


def deeper(value: Any, levels: int) -> bool:
    """True where a JSON value is nested over so many levels."""
    if isinstance(value, dict):
        return levels == 0 or any(
            deeper(entry, levels - 1) for entry in value.values() if isinstance(entry, (dict, list))
        )
    if isinstance(value, list):
        return levels == 0 or any(
            deeper(entry, levels - 1) for entry in value if isinstance(entry, (dict, list))
        )
    return False


def parse(body: bytes, kind: Kind = CHAT) -> Asked:
    """Check a body. Raises Refusal (400) naming the field; the message never holds its value."""
    return checked(loads(body), kind)


def checked(value: dict[str, Any], kind: Kind) -> Asked:
    """The same of a body that is read already."""
    model = value.get("model")
    if not isinstance(model, str) or not model:
        raise Refusal(400, "'model' must be a string: 'auto', or the id of a model.", param="model")
    fields = listed(value, kind.fields)
    if kind is CHAT:
        _check_messages(fields.get("messages"))
    else:
        _check_prompt(fields.get("prompt"))
    if "stop" in fields:
        stop = fields["stop"]
        if isinstance(stop, list) and (len(stop) > MOST_STOPS or not all(isinstance(s, str) for s in stop)):
            raise Refusal(400, f"'stop' must be a string or up to {MOST_STOPS} of them.", param="stop")
    for name in ("tools",):
        if any(not isinstance(entry, dict) for entry in fields.get(name, ())):
            raise Refusal(400, f"'{name}' must be a list of objects.", param=name)
    stream, shown = value.get("stream", False), value.get("stream_options", {})
    if not isinstance(stream, bool):
        raise Refusal(400, "'stream' must be a boolean.", param="stream")
    if not isinstance(shown, dict):
        raise Refusal(400, "'stream_options' must be an object.", param="stream_options")
    return Asked(kind, model, fields, stream, shown.get("include_usage") is True, options_of(value))


def listed(value: Mapping[str, Any], known: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    """The fields that go upstream, of the right type and within their bounds. Raises Refusal (400)."""
    fields = {name: value[name] for name in known if name in value}
    for name, entry in fields.items():
        if not _is(entry, known[name]):
            raise Refusal(400, f"'{name}' must be {NAMES[known[name][-1]]}.", param=name)
        if name in BOUNDS and not isinstance(entry, bool):
            least, most = BOUNDS[name]
            if not least <= entry <= most:
                span = f"at least {least:g}" if most >= 1 << 31 else f"between {least:g} and {most:g}"
                raise Refusal(400, f"'{name}' must be {span}.", param=name)
    return fields


def options_of(value: Mapping[str, Any]) -> dict[str, Any]:
    """edgeft's own options of a body. Raises Refusal (400)."""
    own = value.get("edgeft", {})
    if not isinstance(own, dict):
        raise Refusal(400, "'edgeft' must be an object.", param="edgeft")
    return _options(own)


def _options(own: Mapping[str, Any]) -> dict[str, Any]:
    for name, entry in own.items():
        if name not in OPTIONS:
            raise Refusal(
                400, f"'edgeft' may hold {', '.join(OPTIONS)}, nothing else.", param="edgeft", code="unknown_field"
            )  # fmt: skip
        if not _is(entry, OPTIONS[name]):
            raise Refusal(400, f"'edgeft.{name}' must be {NAMES[OPTIONS[name][-1]]}.", param=f"edgeft.{name}")
    tags = own.get("tags", [])
    if len(tags) > MOST_TAGS or not all(isinstance(tag, str) for tag in tags):
        raise Refusal(400, f"'edgeft.tags' must be up to {MOST_TAGS} strings.", param="edgeft.tags")
    return dict(own)


def _is(value: Any, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and (not isinstance(value, bool) or bool in types)


def _check_messages(messages: Any) -> None:
    if not messages:
        raise Refusal(400, "'messages' must be a list of at least one message.", param="messages")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise Refusal(400, f"'{where}.role' must be one of {', '.join(ROLES)}.", param=where)
        content = message.get("content")
        if content is None:
            if message["role"] in CONTENT_NEEDED:
                raise Refusal(400, f"'{where}.content' is missing.", param=where)
        elif not isinstance(content, str) and not (
            isinstance(content, list) and all(isinstance(part, dict) for part in content)
        ):
            raise Refusal(400, f"'{where}.content' must be a string or a list of parts.", param=where)
        calls = message.get("tool_calls")
        if calls is not None and not (
            isinstance(calls, list) and all(isinstance(call, dict) for call in calls)
        ):
            raise Refusal(400, f"'{where}.tool_calls' must be a list of objects.", param=where)


def _check_prompt(prompt: Any) -> None:
    if isinstance(prompt, str):
        return
    if not prompt or not all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
        raise Refusal(400, "'prompt' must be one string, or one list of token ids.", param="prompt")
