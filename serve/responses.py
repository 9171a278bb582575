"""A thin /v1/responses over the chat API: text and function tools in, text and function calls out. Nothing is stored.

What it leaves out is refused by name: stored conversations, background work, built-in tools.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import orjson

from edgeft.serve import endpoints
from edgeft.serve.answer import Answer, Chunk
from edgeft.serve.generate import ROUTE
from edgeft.serve.http import Reply
from edgeft.serve.protocol import CHAT, Asked, Refusal, checked, loads
from edgeft.serve.proxy import Proxy

UNSUPPORTED = ("previous_response_id", "conversation", "prompt")
PASSED = ("temperature", "top_p", "parallel_tool_calls", "top_logprobs")
PARTS = ("input_text", "output_text", "text")


async def responses(proxy: Proxy, body: bytes, reply: Reply) -> None:
    """POST /v1/responses."""
    value = loads(body)
    for name in UNSUPPORTED:
        if value.get(name):
            raise Refusal(
                400,
                f"'{name}' is not supported: nothing is stored here.",
                param=name,
                code="unsupported_parameter",
            )
    if value.get("background"):
        raise Refusal(400, "'background' is not supported.", param="background", code="unsupported_parameter")
    asked = checked(chat_of(value), CHAT)
    made = _Made(value, f"resp_{reply.request_id}", f"msg_{reply.request_id}")
    if asked.stream:
        await _stream(proxy, asked, reply, made)
    else:
        answer = await endpoints.whole(proxy, asked, reply)
        await reply.json(200, made.response("completed", reply.route, answer))


def chat_of(value: Mapping[str, Any]) -> dict[str, Any]:
    """The chat request that asks the same. Raises Refusal (400) for what chat can't carry."""
    messages: list[dict[str, Any]] = []
    if isinstance(instructions := value.get("instructions"), str):
        messages.append({"role": "system", "content": instructions})
    given = value.get("input")
    if isinstance(given, str) and given:
        messages.append({"role": "user", "content": given})
    elif isinstance(given, list) and given:
        for item in given:
            messages.append(_message(item))
    else:
        raise Refusal(400, "'input' must be a text or a list of items.", param="input")
    chat: dict[str, Any] = {
        "model": value.get("model"),
        "messages": messages,
        "stream": value.get("stream", False),
    }
    chat |= {name: value[name] for name in (*PASSED, "edgeft") if name in value}
    if "max_output_tokens" in value:
        chat["max_completion_tokens"] = value["max_output_tokens"]
    tools = value.get("tools") or []
    if not isinstance(tools, list) or any(
        not isinstance(t, dict) or t.get("type") != "function" for t in tools
    ):
        raise Refusal(400, "Only function tools are supported.", param="tools", code="unsupported_parameter")
    if tools:
        chat["tools"] = [
            {"type": "function", "function": {k: v for k, v in t.items() if k != "type"}} for t in tools
        ]
        choice = value.get("tool_choice", "auto")
        if isinstance(choice, dict) and "name" in choice:
            choice = {"type": "function", "function": {"name": choice["name"]}}
        chat["tool_choice"] = choice
    shape = (value.get("text") or {}).get("format") if isinstance(value.get("text"), dict) else None
    if isinstance(shape, dict) and shape.get("type") == "json_schema":
        chat["response_format"] = {
            "type": "json_schema",
            "json_schema": {k: v for k, v in shape.items() if k != "type"},
        }
    elif isinstance(shape, dict) and shape.get("type") == "json_object":
        chat["response_format"] = {"type": "json_object"}
    return chat


def _message(item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise Refusal(400, "Every item of 'input' must be an object.", param="input")
    kind = item.get("type", "message")
    if kind == "function_call":
        function = {"name": str(item.get("name", "")), "arguments": str(item.get("arguments", ""))}
        call = {"id": str(item.get("call_id", "")), "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    if kind == "function_call_output":
        output = item.get("output", "")
        text = output if isinstance(output, str) else orjson.dumps(output).decode()
        return {"role": "tool", "tool_call_id": str(item.get("call_id", "")), "content": text}
    if kind != "message":
        raise Refusal(
            400,
            "Items of 'input' may be messages, function calls and their outputs.",
            param="input",
            code="unsupported_parameter",
        )
    content = item.get("content")
    if isinstance(content, list):
        parts = []
        for part in content:
            if isinstance(part, dict) and part.get("type") in PARTS and isinstance(part.get("text"), str):
                parts.append({"type": "text", "text": part["text"]})
            elif (
                isinstance(part, dict)
                and part.get("type") == "input_image"
                and isinstance(part.get("image_url"), str)
            ):
                parts.append({"type": "image_url", "image_url": {"url": part["image_url"]}})
            else:
                raise Refusal(
                    400,
                    "A part of 'input' is neither text nor an image's URL.",
                    param="input",
                    code="unsupported_parameter",
                )
        content = parts[0]["text"] if len(parts) == 1 and "text" in parts[0] else parts
    return {"role": item.get("role", "user"), "content": content}


class _Made:
    """The response object as it comes together."""

    def __init__(self, value: Mapping[str, Any], response_id: str, message_id: str) -> None:
        self.id, self.message_id, self.created = response_id, message_id, int(time.time())
        self.repeated = {
            "instructions": value.get("instructions"), "max_output_tokens": value.get("max_output_tokens"),
            "parallel_tool_calls": value.get("parallel_tool_calls", True), "temperature": value.get("temperature"),
            "tool_choice": value.get("tool_choice", "auto"), "tools": value.get("tools") or [], "top_p": value.get("top_p"),
            "metadata": value.get("metadata") or {}, "text": value.get("text") or {"format": {"type": "text"}},
            "previous_response_id": None, "store": False,
        }  # fmt: skip

    def response(self, status: str, model: str, answer: Answer | None) -> dict[str, Any]:
        """The whole object. Cut answers are `incomplete`, as OpenAI has it."""
        output: list[dict[str, Any]] = []
        details = None
        usage = None
        if answer is not None:
            choice = answer.choices[0]
            if choice.finish_reason in ("length", "content_filter"):
                status = "incomplete"
                details = {
                    "reason": "max_output_tokens" if choice.finish_reason == "length" else "content_filter"
                }
            calls = choice.message.get("tool_calls") or []
            if answer.text or not calls:
                output.append(
                    self.message("completed" if status == "completed" else "incomplete", answer.text)
                )
            for place, call in enumerate(calls):
                output.append(
                    {
                        "type": "function_call",
                        "id": f"fc_{place}_{self.id}",
                        "call_id": call["id"],
                        "status": "completed",
                        "name": call["function"]["name"],
                        "arguments": call["function"]["arguments"],
                    }
                )
            usage = _usage(answer.usage)
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "error": None,
            "incomplete_details": details, "model": model, "output": output, "usage": usage, **self.repeated,
        }  # fmt: skip

    def message(self, status: str, text: str) -> dict[str, Any]:
        """The output item that holds the text."""
        part = {"type": "output_text", "text": text, "annotations": []}
        content = [part] if status != "in_progress" else []
        return {
            "type": "message",
            "id": self.message_id,
            "status": status,
            "role": "assistant",
            "content": content,
        }


def _usage(usage: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not usage:
        return None
    details = usage.get("prompt_tokens_details") or {}
    cached, written = details.get("cached_tokens") or 0, details.get("cache_write_tokens") or 0
    thought = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return {
        "input_tokens": usage.get("prompt_tokens"), "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": written},
        "output_tokens": usage.get("completion_tokens"), "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": usage.get("total_tokens"),
    }  # fmt: skip


async def _stream(proxy: Proxy, asked: Asked, reply: Reply, made: _Made) -> None:
    number = 0
    text_begun = False

    async def tell(kind: str, **fields: Any) -> None:
        nonlocal number
        value = {"type": kind, "sequence_number": number, **fields}
        number += 1
        await reply.events(b"event: " + kind.encode() + b"\ndata: " + orjson.dumps(value) + b"\n\n")

    place = {"item_id": made.message_id, "output_index": 0, "content_index": 0}
    empty = {"type": "output_text", "text": "", "annotations": []}

    async def open_text() -> None:
        nonlocal text_begun
        text_begun = True
        await tell("response.output_item.added", output_index=0, item=made.message("in_progress", ""))
        await tell("response.content_part.added", **place, part=empty)

    async def tell_chunk(chunk: Chunk) -> None:
        if ROUTE in chunk:
            response = made.response("in_progress", chunk[ROUTE], None)
            await tell("response.created", response=response)
            await tell("response.in_progress", response=response)
            return
        for choice in chunk.get("choices") or ():
            if said := (choice.get("delta") or {}).get("content"):
                if not text_begun:
                    await open_text()
                await tell("response.output_text.delta", **place, delta=said, logprobs=[])

    answer = await endpoints.answered(proxy, asked, reply, tell_chunk)
    final = made.response("completed", reply.route, answer)
    for index, item in enumerate(final["output"]):
        if item["type"] == "message":
            if not text_begun:
                await open_text()
                if answer.text:
                    await tell("response.output_text.delta", **place, delta=answer.text, logprobs=[])
            await tell("response.output_text.done", **place, text=answer.text, logprobs=[])
            await tell("response.content_part.done", **place, part={**empty, "text": answer.text})
        else:
            await tell(
                "response.output_item.added",
                output_index=index,
                item={**item, "arguments": "", "status": "in_progress"},
            )
            where = {"item_id": item["id"], "output_index": index}
            await tell("response.function_call_arguments.delta", **where, delta=item["arguments"])
            await tell(
                "response.function_call_arguments.done",
                **where,
                name=item["name"],
                arguments=item["arguments"],
            )
        await tell("response.output_item.done", output_index=index, item=item)
    kind = "response.completed" if final["status"] == "completed" else "response.incomplete"
    await tell(kind, response=final)
    await reply.part(b"", more=False)
