"""/openapi.json, made of the same tables of fields that requests are checked against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeft import __version__
from edgeft.serve.other_endpoints import GENERATE, PROMPT_CHARACTERS
from edgeft.serve.protocol import (
    BOUNDS,
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    CONTENT_NEEDED,
    EMBEDDING_FIELDS,
    MOST_STOPS,
    MOST_TAGS,
    OPTIONS,
    ROLES,
)

TYPES = {int: "integer", float: "number", str: "string", list: "array", dict: "object", bool: "boolean"}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ERRORS = {
    "400": "a field is wrong, or nobody can take the request",
    "401": "no key, or an unknown one",
    "403": "a private request that nobody may take, or a web page from elsewhere",
    "404": "the model is not served",
    "413": "the body is too large",
    "415": "the model refuses this kind of input",
    "422": "a field is out of its range",
    "429": "no room in the time that is promised; see Retry-After and retry-after-ms",
    "500": "a fault of edgeft's",
    "502": "the model failed",
    "503": "the model is not ready",
    "504": "the model did not answer in time",
}
TEXT_OR_PARTS = {"type": ["string", "array", "null"], "items": {"type": "object"}}
STOP = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "maxItems": MOST_STOPS, "items": {"type": "string"}},
        {"type": "null"},
    ]
}
IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
MODEL = {"type": "string", "minLength": 1, "description": "'auto', or a candidate's id", "examples": ["auto"]}


def document(paths: list[str]) -> dict[str, Any]:
    """OpenAPI 3.1 of what is served at `paths` and beside them."""
    bodies = {
        "/v1/chat/completions": _chat(),
        "/v1/completions": _completion(),
        "/v1/embeddings": _embedding(),
        "/v1/responses": _response(),
        "/generate": _generate(),
    }
    found: dict[str, Any] = {
        path: {"post": _post(bodies[path], streams=path.endswith(("completions", "responses")))}
        for path in paths
    }
    for path, said, codes in (
        ("/v1/models", "The models.", ("401",)),
        ("/health", "The process runs.", ()),
        ("/health/live", "The process runs.", ()),
        ("/health/ready", "Somebody can answer now.", ()),
    ):
        found[path] = {"get": _get(said, codes)}
    found["/health/ready"]["get"]["responses"]["503"] = found["/health/ready"]["get"]["responses"]["200"]
    return {
        "openapi": "3.1.0",
        "info": {"title": "edgeft serve", "version": __version__},
        "paths": found,
        "components": {
            "schemas": {"Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _post(schema: dict[str, Any], streams: bool) -> dict[str, Any]:
    good: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if streams:
        good["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {
            "200": {"description": "the answer", "content": good},
            **{code: _error(code) for code in ERRORS},
        },
    }


def _get(said: str, codes: tuple[str, ...]) -> dict[str, Any]:
    good = {"description": said, "content": {"application/json": {"schema": {"type": "object"}}}}
    return {"responses": {"200": good, **{code: _error(code) for code in codes}}}


def _error(code: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {"description": ERRORS[code], "content": content}


def _field(name: str, types: tuple[type, ...]) -> dict[str, Any]:
    if name == "stop":
        return STOP
    kinds = [TYPES[t] for t in types if not (t is int and float in types)]
    found: dict[str, Any] = {"type": [*kinds, "null"]}
    if name in BOUNDS:
        found["minimum"], found["maximum"] = BOUNDS[name]
    if list in types:
        found["items"] = {"type": "object"}
    return found


def _fields(known: Mapping[str, tuple[type, ...]], **own: dict[str, Any]) -> dict[str, Any]:
    return {**{name: _field(name, types) for name, types in known.items()}, "model": MODEL, **own}


def _streamed() -> dict[str, Any]:
    options = {"type": ["object", "null"], "properties": {"include_usage": {"type": "boolean"}}}
    own = {
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {n: {"type": TYPES[t[-1]]} for n, t in OPTIONS.items() if n != "tags"}
        | {"tags": {"type": "array", "maxItems": MOST_TAGS, "items": {"type": "string"}}},
    }
    return {"stream": {"type": ["boolean", "null"]}, "stream_options": options, "edgeft": own}


def _chat() -> dict[str, Any]:
    calls = {"type": ["array", "null"], "items": {"type": "object"}}
    one = {
        "type": "object",
        "required": ["role"],
        "properties": {"role": {"enum": list(ROLES)}, "content": TEXT_OR_PARTS, "tool_calls": calls},
        "if": {"properties": {"role": {"enum": list(CONTENT_NEEDED)}}},
        "then": {"required": ["content"], "properties": {"content": {"type": ["string", "array"]}}},
    }
    messages = {"type": "array", "minItems": 1, "items": one}
    return {
        "type": "object",
        "required": ["model", "messages"],
        "properties": _fields(CHAT_FIELDS, messages=messages, **_streamed()),
    }


def _completion() -> dict[str, Any]:
    prompt = {"anyOf": [{"type": "string"}, IDS]}
    return {
        "type": "object",
        "required": ["model", "prompt"],
        "properties": _fields(COMPLETION_FIELDS, prompt=prompt, **_streamed()),
    }


def _embedding() -> dict[str, Any]:
    text = {"type": "string", "minLength": 1}
    several = {"type": "array", "minItems": 1, "items": text}
    own: dict[str, Any] = {
        "input": {"anyOf": [text, several, IDS]},
        "encoding_format": {"enum": ["float", "base64", None]},
    }
    return {"type": "object", "required": ["model", "input"], "properties": _fields(EMBEDDING_FIELDS, **own)}


def _response() -> dict[str, Any]:
    given = {
        "anyOf": [
            {"type": "string", "minLength": 1},
            {"type": "array", "minItems": 1, "items": {"type": "object"}},
        ]
    }
    more = {
        "instructions": {"type": ["string", "null"]},
        "max_output_tokens": {"type": ["integer", "null"], "minimum": 1},
    }
    return {
        "type": "object",
        "required": ["model", "input"],
        "properties": {"model": MODEL, "input": given, **more, "stream": {"type": ["boolean", "null"]}},
    }


def _generate() -> dict[str, Any]:
    least, most = PROMPT_CHARACTERS
    numbers = {
        name: {
            "type": "integer" if isinstance(usual, int) else "number",
            "minimum": low,
            "maximum": high,
            "default": usual,
        }
        for name, (low, high, usual) in GENERATE.items()
    }
    prompt = {"type": "string", "minLength": least, "maxLength": most}
    return {
        "type": "object",
        "required": ["prompt"],
        "properties": {"prompt": prompt, "model": MODEL, **numbers},
    }
