"""Upstreams that break, refuse or tell little."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from typing import Any

import pytest

pytest.importorskip("starlette", reason="edgeft[serve] is not installed")
pytest.importorskip("uvicorn", reason="edgeft[serve] is not installed")


from edgeft.serve import answer as sse
from edgeft.serve.app import create_app
from edgeft.serve.protocol import CHAT
from edgeft.serve.provider import LitellmUpstream
from tests.serve_stage import SECRET, Stage, before, cache_in, canned, events, policy_of, running

STREAMS = {
    "no JSON": (b'data: {"choices": [{"delta": {"content": "a"}}]}\n\ndata: {nonsense\n\n', "not JSON"),
    "cut off": (b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n', "without a finish reason"),
    "error event": (
        b'data: {"choices": [{"delta": {"content": "a"}}]}\n\ndata: {"error": {"message": "x"}}\n\n',
        "reported",
    ),
    "odd shape": (b'data: {"choices": [{"delta": "a"}]}\n\n', "unknown shape"),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_broken_stream_is_never_passed_off_as_an_answer(name, tmp_path):
    body, why = STREAMS[name]
    with canned(200, body) as url, before(url, cache_in(tmp_path)) as stage:
        whole = stage.chat("x", temperature=0)
        assert whole.status_code == 502 and why in whole.json()["error"]["message"]
        streamed = stage.chat("x", temperature=0, stream=True)
        assert "[DONE]" not in streamed.text and '"error"' in streamed.text
        assert stage.chat("x", temperature=0).headers["x-edgeft-cache"] == "miss", "nothing of it was kept"


@pytest.mark.parametrize(
    ("status", "shown"), [(500, 502), (503, 502), (401, 502), (404, 400), (400, 400), (429, 429)]
)
def test_upstream_errors(status, shown):
    body = json.dumps({"error": {"message": "because"}}).encode()
    for stream in (False, True):
        with canned(status, body, {"Retry-After": "7"}) as url, before(url) as stage:
            response = stage.chat("x", stream=stream)
            assert response.status_code == shown and response.json()["error"]["code"] != "because"
        told = response.headers.get("retry-after")
        assert 7 <= int(told or 0) <= 11 if status in (429, 503) else told is None


def test_a_dead_upstream_is_502():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        with before(f"http://127.0.0.1:{taken.getsockname()[1]}") as stage:
            response = stage.chat("x", stream=True)
            assert response.status_code == 502 and response.json()["error"]["type"] == "upstream_error"


def test_usage_that_the_upstream_does_not_tell_is_not_guessed():
    body = b'data: {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
    with canned(200, body) as url, before(url) as stage:
        assert "usage" not in stage.chat("x").json()
        assert "usage" not in stage.chat("x", stream=True, stream_options={"include_usage": True}).text
        assert 'edgeft_usage_unresolved_total{route="weak"} 2.0' in stage.client.get("/metrics").text


def test_tool_calls_are_gathered_and_streamed_as_they_are():
    calls = [
        {"index": 0, "id": "c1", "type": "function", "function": {"name": "look", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"a"'}},
        {"index": 0, "function": {"arguments": ": 1}"}},
        {"index": 1, "id": "c2", "type": "function", "function": {"name": "stop", "arguments": "{}"}},
    ]
    chunks = [
        {"choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}]} for call in calls
    ]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    body = b"".join(sse.event(chunk) for chunk in chunks) + sse.DONE
    with canned(200, body) as url, before(url) as stage:
        message = stage.chat("x").json()["choices"][0]["message"]
        assert [c["function"] for c in message["tool_calls"]] == [
            {"name": "look", "arguments": '{"a": 1}'},
            {"name": "stop", "arguments": "{}"},
        ]
        streamed = events(stage.chat("x", stream=True))
        assert [c["choices"][0]["delta"]["tool_calls"][0] for c in streamed[:-1]] == calls
        replayed = sse.Answer([sse.Choice(message, finish_reason="tool_calls")])
        again = sse.Answer()
        for part in sse.replay(sse.Head(CHAT, "i", "m"), replayed, False):
            if part != sse.DONE:
                again.add(json.loads(part.removeprefix(b"data: ")))
        assert again == replayed


def test_litellm_chunks_and_errors(monkeypatch):
    """A stand-in for litellm: its acompletion's shape, and an error whose text quotes the prompt."""

    class Chunk:
        def __init__(self, value: dict[str, Any]) -> None:
            self.value = value

        def model_dump(self, exclude_none: bool) -> dict[str, Any]:
            assert exclude_none
            return self.value

    class Fake:
        suppress_debug_info = False

        async def acompletion(self, **arguments: Any) -> Any:
            assert arguments["stream"] and arguments["stream_options"] == {"include_usage": True}
            if arguments["messages"][0]["content"] == SECRET:
                error = RuntimeError(f"bad prompt: {SECRET}")
                error.status_code = 400  # type: ignore[attr-defined]
                raise error

            async def chunks() -> Any:
                yield Chunk(
                    {
                        "choices": [
                            {"index": 0, "delta": {"content": arguments["model"]}, "finish_reason": None}
                        ]
                    }
                )
                yield Chunk({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
                yield Chunk(
                    {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}
                )

            return chunks()

    monkeypatch.setitem(sys.modules, "litellm", Fake())  # type: ignore[arg-type]
    upstreams: dict[str, Any] = {name: LitellmUpstream(f"maker/{name}") for name in ("weak", "strong")}
    with running(create_app(policy_of(), upstreams)) as client:
        stage = Stage(client, {}, None)
        answer = stage.chat("hello").json()
        assert (
            answer["choices"][0]["message"]["content"] == "maker/weak"
            and answer["usage"]["total_tokens"] == 2
        )
        refused = stage.chat(SECRET)
        assert refused.status_code == 400 and SECRET not in refused.text


def test_a_head_goes_out_with_what_follows_it():
    from edgeft.serve.writes import HeadHeld

    class Transport:
        def __init__(self) -> None:
            self.sent: list[bytes] = []
            self.closed = False

        def write(self, data: bytes) -> None:
            assert not self.closed
            self.sent.append(data)

        def is_closing(self) -> bool:
            return self.closed

        def close(self) -> None:
            self.closed = True

    async def scenario() -> None:
        inner = Transport()
        outer: Any = HeadHeld(inner)  # type: ignore[arg-type]
        outer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        assert inner.sent == []
        outer.write(b"body")
        outer.write(b"more")
        assert inner.sent == [b"HTTP/1.1 200 OK\r\n\r\nbody", b"more"] and not outer.is_closing()
        outer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await asyncio.sleep(0)
        assert len(inner.sent) == 3, "nothing followed in this turn of the loop"
        outer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        outer.close()
        assert inner.sent[3:] == [b"HTTP/1.1 204 No Content\r\n\r\n"] and inner.closed
        await asyncio.sleep(0)
        assert len(inner.sent) == 4

    asyncio.run(scenario())
