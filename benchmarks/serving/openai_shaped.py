"""A stand-in for OpenAI's API that answers every field it is asked for in the right shape: what a proxy must carry. No model behind it.

    python benchmarks/serving/openai_shaped.py

Chat with tools, logprobs, `n`, JSON schemas, stop reasons and streams; completions, embeddings, models. It answers with what it was asked, so
that a test sees what arrived: chat says the last message's text, a tool is called with {"asked": that text}. Texts that begin with
"fail 429" give that status.
Prints {"url": …}; used by tests/test_serve_conformance.py and benchmarks/serve_openai_suite.py.
"""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


def text_of(content: Any) -> str:
    """The text of a message's content."""
    if isinstance(content, list):
        return " ".join(part.get("text", "") for part in content)
    return content or ""


def tokens(text: str) -> list[str]:
    """Words with their spaces stand for tokens."""
    words = text.split(" ")
    return [word if i == 0 else f" {word}" for i, word in enumerate(words)]


def usage(prompt: str, written: list[list[str]]) -> dict[str, Any]:
    """Counts of these tokens."""
    a, b = len(tokens(prompt)), sum(map(len, written))
    return {
        "prompt_tokens": a,
        "completion_tokens": b,
        "total_tokens": a + b,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def example(schema: dict[str, Any]) -> Any:
    """A value that fits a JSON schema of objects, arrays and plain types."""
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type")
    if kind == "object":
        return {name: example(part) for name, part in schema.get("properties", {}).items()}
    if kind == "array":
        return [example(schema.get("items", {}))]
    return {"string": "text", "integer": 7, "number": 1.5, "boolean": True}.get(str(kind))


def logprob(token: str, most: int) -> dict[str, Any]:
    """OpenAI's entry of one token."""
    one = {"token": token, "logprob": -0.5, "bytes": list(token.encode())}
    return {**one, "top_logprobs": [{**one, "logprob": -0.5 - i} for i in range(most)]}


def chat_choice(body: dict[str, Any]) -> tuple[list[str], dict[str, Any] | None, str]:
    """(tokens, tool call, finish reason) of every choice."""
    text = text_of(body["messages"][-1].get("content"))
    form = body.get("response_format") or {}
    if body.get("tools") and body.get("tool_choice") != "none" and body["messages"][-1]["role"] != "tool":
        wanted = body.get("tool_choice")
        name = (
            wanted["function"]["name"] if isinstance(wanted, dict) else body["tools"][0]["function"]["name"]
        )
        call = {
            "id": "call_1",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps({"asked": text})},
        }
        return [], call, "tool_calls"
    if form.get("type") == "json_schema":
        text = json.dumps(example(form["json_schema"].get("schema") or {}))
    elif form.get("type") == "json_object":
        text = json.dumps({"said": text})
    said = tokens(text)
    for stop in [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []:
        said = tokens(text.split(stop)[0]) if stop in text else said
    most = body.get("max_completion_tokens") or body.get("max_tokens") or len(said)
    return said[:most], None, "length" if most < len(said) else "stop"


async def chat(request: Request) -> Response:
    """POST /v1/chat/completions."""
    body = await request.json()
    if refused := failure(text_of(body["messages"][-1].get("content"))):
        return refused
    said, call, finish = chat_choice(body)
    n, most = body.get("n") or 1, body.get("top_logprobs") or 0
    prompt = " ".join(text_of(message.get("content")) for message in body["messages"])
    used = usage(prompt, [said or ["call"]] * n)
    base = {"id": "chatcmpl-1", "created": 1, "model": body["model"]}
    if not body.get("stream"):
        message = {"role": "assistant", "content": None if call else "".join(said), "refusal": None}
        message |= {"tool_calls": [call]} if call else {}
        kept = (
            {"content": [logprob(t, most) for t in said], "refusal": None} if body.get("logprobs") else None
        )
        choices = [
            {"index": i, "message": message, "logprobs": kept, "finish_reason": finish} for i in range(n)
        ]
        return JSONResponse({**base, "object": "chat.completion", "choices": choices, "usage": used})

    def chunks() -> Iterator[dict[str, Any]]:
        for i in range(n):
            yield delta(i, {"role": "assistant", "content": None if call else ""})
            if call:
                function = call["function"]
                opened = {**call, "index": 0, "function": {**function, "arguments": ""}}
                yield delta(i, {"tool_calls": [opened]})
                for part in (function["arguments"][:5], function["arguments"][5:]):
                    yield delta(i, {"tool_calls": [{"index": 0, "function": {"arguments": part}}]})
            for token in said:
                extra = (
                    {"logprobs": {"content": [logprob(token, most)], "refusal": None}}
                    if body.get("logprobs")
                    else {}
                )
                yield delta(i, {"content": token}, **extra)
            yield delta(i, {}, finish_reason=finish)
        if (body.get("stream_options") or {}).get("include_usage"):
            yield {"choices": [], "usage": used}

    def delta(index: int, value: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"choices": [{"index": index, "delta": value, "finish_reason": None, **more}]}

    return stream({**base, "object": "chat.completion.chunk", **chunk} for chunk in chunks())


async def completions(request: Request) -> Response:
    """POST /v1/completions."""
    body = await request.json()
    prompt = body.get("prompt") or ""
    prompts = [prompt] if isinstance(prompt, str) else [p for p in prompt if isinstance(p, str)] or [""]
    if refused := failure(prompts[0]):
        return refused
    said = [tokens(text) for text in prompts for _ in range(body.get("n") or 1)]
    used = usage(" ".join(prompts), said)
    base = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": body["model"]}
    if not body.get("stream"):
        choices = [choice(i, "".join(part), "stop") for i, part in enumerate(said)]
        return JSONResponse({**base, "choices": choices, "usage": used})
    parts = [choice(i, token, None) for i, part in enumerate(said) for token in part]
    parts += [choice(i, "", "stop") for i in range(len(said))]
    values = [{**base, "choices": [part]} for part in parts]
    if (body.get("stream_options") or {}).get("include_usage"):
        values.append({**base, "choices": [], "usage": used})
    return stream(iter(values))


def choice(index: int, text: str, finish: str | None) -> dict[str, Any]:
    """A choice of the completions API."""
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}


async def embeddings(request: Request) -> Response:
    """POST /v1/embeddings: vectors of the texts' lengths."""
    body = await request.json()
    given = body["input"]
    texts = [given] if isinstance(given, str) else given
    size = body.get("dimensions") or 4

    def encoded(vector: list[float]) -> Any:
        if body.get("encoding_format") == "base64":
            return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        return vector

    data = [
        {"object": "embedding", "index": i, "embedding": encoded([float(len(text))] * size)}
        for i, text in enumerate(texts)
    ]
    count = sum(len(tokens(text)) for text in texts if isinstance(text, str))
    used = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse({"object": "list", "data": data, "model": body["model"], "usage": used})


async def models(_: Request) -> Response:
    """GET /v1/models."""
    return JSONResponse(
        {
            "object": "list",
            "data": [{"id": "stand-in", "object": "model", "created": 1, "owned_by": "nobody"}],
        }
    )


def failure(text: str) -> Response | None:
    """The error that a text asks for."""
    if not text.startswith("fail "):
        return None
    status = int(text.split(" ")[1])
    headers = {"Retry-After": "9"} if status == 429 else {}
    return JSONResponse({"error": {"message": "as asked", "type": "stand_in", "code": None}}, status, headers)


def stream(values: Iterator[dict[str, Any]]) -> Response:
    """Server-sent events, ended with [DONE]."""
    parts = (f"data: {json.dumps(value)}\n\n" for value in values)
    return StreamingResponse(
        (p for part in (parts, ["data: [DONE]\n\n"]) for p in part), media_type="text/event-stream"
    )


async def unreadable(_: Request, error: Exception) -> Response:
    """What is not shaped like OpenAI's requests is the caller's fault."""
    return JSONResponse(
        {"error": {"message": type(error).__name__, "type": "invalid_request_error", "code": None}}, 400
    )


app = Starlette(
    exception_handlers=dict.fromkeys(
        (ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error), unreadable
    ),
    routes=[
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
        Route("/v1/models", models),
    ],
)


if __name__ == "__main__":
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        print(json.dumps({"url": f"http://127.0.0.1:{bound.getsockname()[1]}"}), flush=True)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        asyncio.run(server.serve(sockets=[bound]))
