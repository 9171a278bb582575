"""OpenAI's chat API as edgeft takes it: which fields, of which type, and how an error looks.

Only fields that are listed here go upstream; others are dropped, so that no engine's own extension
(slots, adapters, cache salts) can be reached from outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAX_BODY_BYTES = 1 << 20
NUMBER, INTEGER, TEXT_OR_LIST = (int, float), (int,), (str, list)
# field -> the types that it may have
FIELDS: dict[str, tuple[type, ...]] = {
    "messages": (list,),
    "max_tokens": INTEGER,
    "max_completion_tokens": INTEGER,
    "temperature": NUMBER,
    "top_p": NUMBER,
    "seed": INTEGER,
    "stop": TEXT_OR_LIST,
    "tools": (list,),
    "tool_choice": (str, dict),
    "response_format": (dict,),
    "logprobs": (bool,),
    "top_logprobs": INTEGER,
    "frequency_penalty": NUMBER,
    "presence_penalty": NUMBER,
}
ROLES = ("system", "developer", "user", "assistant", "tool")
NAMES = {
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
    bool: "a boolean",
}


class Refusal(Exception):
    """A request that gets an error in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after_s = status, message, retry_after_s
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class ChatRequest:
    """A checked request."""

    model: str
    fields: dict[str, Any]  # what goes upstream
    stream: bool
    include_usage: bool

    @property
    def repeatable(self) -> bool:
        """True where the same request is meant to give the same answer: greedy, or with a seed."""
        return self.fields.get("temperature") == 0 or "seed" in self.fields


def parse(body: bytes) -> ChatRequest:
    """Check a body. Raises Refusal (400) naming the field; the message never holds its value."""
    import orjson

    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refusal(
            400, f"The body is not valid JSON (line {error.lineno}, column {error.colno})."
        ) from None
    if not isinstance(value, dict):
        raise Refusal(400, "The body must be a JSON object.")
    value = {name: entry for name, entry in value.items() if entry is not None}
    model = value.get("model")
    if not isinstance(model, str) or not model:
        raise Refusal(400, "'model' must be a string: 'auto', or the id of a model.", param="model")
    if value.get("n", 1) != 1 or isinstance(value.get("n"), bool):
        raise Refusal(400, "Only n=1 is served.", param="n", code="unsupported_value")
    for name, types in FIELDS.items():
        if name in value and not _is(value[name], types):
            raise Refusal(400, f"'{name}' must be {NAMES[types[-1]]}.", param=name)
    for name in ("max_tokens", "max_completion_tokens"):
        if value.get(name, 1) < 1:
            raise Refusal(400, f"'{name}' must be at least 1.", param=name)
    _check_messages(value.get("messages"))
    stream, options = value.get("stream", False), value.get("stream_options", {})
    if not isinstance(stream, bool):
        raise Refusal(400, "'stream' must be a boolean.", param="stream")
    if not isinstance(options, dict):
        raise Refusal(400, "'stream_options' must be an object.", param="stream_options")
    fields = {name: value[name] for name in FIELDS if name in value}
    return ChatRequest(model, fields, stream, options.get("include_usage") is True)


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
            if message["role"] != "assistant":
                raise Refusal(400, f"'{where}.content' is missing.", param=where)
        elif not isinstance(content, str) and not (
            isinstance(content, list) and all(isinstance(part, dict) for part in content)
        ):
            raise Refusal(400, f"'{where}.content' must be a string or a list of parts.", param=where)
