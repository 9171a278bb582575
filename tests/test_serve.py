"""The proxy, in front of fake engines that speak OpenAI's chat API on real sockets."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("starlette", reason="edgeft[serve] is not installed")
pytest.importorskip("uvicorn", reason="edgeft[serve] is not installed")

import uvicorn

from edgeft.cli import run as cli
from edgeft.engines.chat_server import Sampling, Token, listen
from edgeft.errors import UsageError
from edgeft.router import LoadedPolicy
from edgeft.router.features import DIMENSIONS, SPEC, vector
from edgeft.router.policy import save_policy
from edgeft.serve import sse
from edgeft.serve.admission import Admission, Busy
from edgeft.serve.app import create_app
from edgeft.serve.cache import AnswerCache, key_of
from edgeft.serve.candidates import address_of, check
from edgeft.serve.protocol import Refusal, parse
from edgeft.serve.run import refuse_public
from edgeft.serve.upstream import HttpUpstream, LitellmUpstream
from edgeft.types import Policy

KEY = "fake-key"
SECRET = "planted-secret-7731"


class Engine:
    """A fake engine: echoes its name and the last message's words; 'slow' never ends by itself."""

    def __init__(self, name: str) -> None:
        self.name, self.calls, self.running, self.left = name, 0, 0, threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self.url = f"http://127.0.0.1:{listen(self.chat, KEY, name)}"

    def chat(self, messages: list[dict[str, Any]], sampling: Sampling) -> tuple[int, Iterator[Token]]:
        self.calls += 1
        text = messages[-1]["content"]
        if text == "too long":
            raise ValueError("the prompt has 9 tokens and the context 8")
        return sum(len(m["content"].split()) for m in messages), self.tokens(text)

    def tokens(self, text: str) -> Iterator[Token]:
        self.running += 1
        self.left.clear()
        try:
            yield Token(f"{self.name}:", -0.1)
            for word in text.split():
                self.gate.wait(10)
                yield Token(f" {word}", -0.2)
            while text == "slow":
                time.sleep(0.01)
                yield Token(" …", None)
        finally:
            self.running -= 1
            self.left.set()


def policy_of(weak: str = "weak", strong: str = "strong", **changes: Any) -> LoadedPolicy:
    """Sends to strong what says 'refund', else to weak."""
    (column, sign), *_ = vector("refund").items()
    weights = [0.0] * DIMENSIONS
    weights[column] = 9.0 * sign
    sides = [
        {
            "id": name,
            "kind": "api",
            "engine": "openai",
            "path": None,
            "artifact_sha256": f"sha-{name}",
            "price": None,
        }
        for name in (weak, strong)
    ]
    policy = Policy("2026-01-01T00:00:00+00:00", sides[0], sides[1], dict(SPEC), 0.3, {"max_loss": 0.01}, {})
    return LoadedPolicy(replace(policy, **changes), tuple(weights), -0.2)


@contextmanager
def running(app: Any) -> Iterator[httpx.Client]:
    """The app under uvicorn on a free port, in a thread; yields a client."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=2)
        )
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])), daemon=True)
        thread.start()
        until(lambda: server.started)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{bound.getsockname()[1]}", timeout=20) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()


def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


class Stage:
    """A running proxy with its two engines."""

    def __init__(self, client: httpx.Client, engines: dict[str, Engine], app: Any) -> None:
        self.client, self.engines, self.app = client, engines, app

    def chat(self, text: str, model: str = "auto", **fields: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
        return self.client.post("/v1/chat/completions", json=body)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    engines = {name: Engine(name) for name in ("weak", "strong")}
    upstreams: dict[str, Any] = {n: HttpUpstream(e.url, n, KEY, slots=1) for n, e in engines.items()}
    app = create_app(policy_of(), upstreams, AnswerCache(tmp_path / "cache"), waiting=1)
    with running(app) as client:
        yield Stage(client, engines, app)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, which must end with [DONE]."""
    parts = [part.removeprefix("data: ") for part in response.text.split("\n\n") if part]
    assert parts[-1] == "[DONE]"
    return [json.loads(part) for part in parts[:-1]]


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])


def test_auto_is_routed_by_the_policy_and_says_why(stage):
    one, two = stage.chat("where is my card"), stage.chat("a refund")
    assert one.json()["choices"][0]["message"] == {"role": "assistant", "content": "weak: where is my card"}
    assert two.json()["choices"][0]["message"]["content"] == "strong: a refund"
    assert one.json()["model"] == one.headers["x-edgeft-route"] == "weak"
    assert two.headers["x-edgeft-route"] == "strong" and float(two.headers["x-edgeft-gain"]) >= 0.3
    assert "at or above" in two.headers["x-edgeft-reason"]
    assert one.headers["x-edgeft-request-id"] != two.headers["x-edgeft-request-id"]


def test_an_id_pins_and_an_unknown_model_is_404(stage):
    pinned = stage.chat("a refund", model="weak")
    assert pinned.json()["choices"][0]["message"]["content"] == "weak: a refund"
    assert "pinned" in pinned.headers["x-edgeft-reason"] and "x-edgeft-gain" not in pinned.headers
    wrong = stage.chat("hello", model="gpt-9")
    assert wrong.status_code == 404
    error = wrong.json()["error"]
    assert error["code"] == "model_not_found" and "'auto', 'weak', 'strong'" in error["message"]
    assert [m["id"] for m in stage.client.get("/v1/models").json()["data"]] == ["auto", "weak", "strong"]


def test_a_stream_says_the_same_as_one_piece(stage):
    fields = {"max_tokens": 4, "logprobs": True}
    whole = stage.chat("one two three four five", **fields).json()
    response = stage.chat(
        "one two three four five", stream=True, stream_options={"include_usage": True}, **fields
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response)
    assert text_of(chunks) == whole["choices"][0]["message"]["content"] == "weak: one two three"
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert whole["usage"] == {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "length"
    assert len({c["id"] for c in chunks}) == 1 and {c["model"] for c in chunks} == {"weak"}
    logprobs = [
        e["logprob"]
        for c in chunks
        if c["choices"]
        for e in (c["choices"][0].get("logprobs") or {}).get("content", [])
    ]
    assert (
        logprobs
        == [e["logprob"] for e in whole["choices"][0]["logprobs"]["content"]]
        == [-0.1, -0.2, -0.2, -0.2]
    )
    without = events(stage.chat("one", stream=True))
    assert all(c["choices"] and "usage" not in c for c in without), "usage only where it is asked for"


def test_tokens_come_as_they_are_made(stage):
    engine = stage.engines["weak"]
    engine.gate.clear()
    body = {"model": "weak", "messages": [{"role": "user", "content": "held back"}], "stream": True}
    with stage.client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        assert "weak:" in next(lines), "the first token is here while the engine still waits"
        assert engine.running == 1
        engine.gate.set()
        assert list(lines)[-1] == "data: [DONE]"


def test_openai_client(stage):
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    client = openai.OpenAI(base_url=f"{stage.client.base_url}/v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": "a refund"}]
    assert (
        client.chat.completions.create(model="auto", messages=messages).choices[0].message.content
        == "strong: a refund"
    )
    with client.chat.completions.stream(model="auto", messages=messages) as stream:
        assert stream.get_final_completion().choices[0].message.content == "strong: a refund"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nope", messages=messages)


def test_a_repeat_comes_from_the_cache_in_both_forms(stage):
    first = stage.chat("tell me", temperature=0)
    assert first.headers["x-edgeft-cache"] == "miss"
    again = stage.chat("tell me", temperature=0)
    assert again.headers["x-edgeft-cache"] == "hit" and again.headers["x-edgeft-route"] == "weak"
    assert (
        again.json()["choices"] == first.json()["choices"] and again.json()["usage"] == first.json()["usage"]
    )
    assert again.json()["id"] != first.json()["id"]
    streamed = stage.chat("tell me", temperature=0, stream=True, stream_options={"include_usage": True})
    chunks = events(streamed)
    assert streamed.headers["x-edgeft-cache"] == "hit" and text_of(chunks) == "weak: tell me"
    assert (
        chunks[-1]["usage"] == first.json()["usage"] and chunks[-2]["choices"][0]["finish_reason"] == "stop"
    )
    assert stage.chat("tell me", model="weak", temperature=0).headers["x-edgeft-cache"] == "hit", (
        "the same model, pinned"
    )
    assert stage.engines["weak"].calls == 1
    assert stage.chat("streamed first", seed=3, stream=True).headers["x-edgeft-cache"] == "miss"
    assert (
        stage.chat("streamed first", seed=3).json()["choices"][0]["message"]["content"]
        == "weak: streamed first"
    )
    assert stage.engines["weak"].calls == 2


def test_what_differs_or_is_sampled_is_not_a_hit(stage):
    stage.chat("tell me", temperature=0)
    for fields in (
        {"max_tokens": 2},
        {"stop": ["x"]},
        {"seed": 1},
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function"}]},
        {"model": "strong"},
    ):
        assert stage.chat("tell me", **{"temperature": 0, **fields}).headers["x-edgeft-cache"] == "miss", (
            fields
        )
    for _ in range(2):
        assert stage.chat("tell me").headers["x-edgeft-cache"] == "off", (
            "sampled: the client wants another each time"
        )
    assert stage.chat("tell me", temperature=1).headers["x-edgeft-cache"] == "off"


def test_the_key_holds_the_artefact():
    fields = {"messages": [{"role": "user", "content": "x"}], "temperature": 0}
    keys = {
        key_of("a", "1", fields),
        key_of("a", "2", fields),
        key_of("b", "1", fields),
        key_of("a", "1", {**fields, "seed": 1}),
    }
    assert len(keys) == 4 and key_of("a", "1", dict(reversed(fields.items()))) in keys


def test_the_cache_keeps_whole_answers_only_forgets_in_time_and_never_unpickles(tmp_path):
    import pickle
    import sqlite3

    kept = sse.Answer({"role": "assistant", "content": "é 日本"}, "stop", None, {"total_tokens": 3})
    cache = AnswerCache(tmp_path / "a", ttl_s=0.2)
    cache.put("k", kept)
    cache.put("tools", replace(kept, finish_reason="tool_calls"))
    cache.put("cut", replace(kept, finish_reason=None))
    assert cache.get("k") == kept and cache.get("tools") is None and cache.get("cut") is None
    until(lambda: cache.get("k") is None, 2)
    assert oct((tmp_path / "a").stat().st_mode & 0o777) == "0o700"

    mark = tmp_path / "unpickled"
    evil = AnswerCache(tmp_path / "b")
    evil.put("k", kept)
    evil.close()

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (mark,))

    with sqlite3.connect(tmp_path / "b" / "cache.db") as database:
        database.execute(
            "UPDATE Cache SET mode = 4, value = ?, filename = NULL", (sqlite3.Binary(pickle.dumps(Bomb())),)
        )
    assert AnswerCache(tmp_path / "b").get("k") is None
    assert not mark.exists()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 2}, "n"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "pirate", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0]"),
        ({"model": None}, "model"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": True}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": 3}, "stream_options"),
    ],
)
def test_wrong_fields_are_400_in_openais_form(stage, change, param):
    body = {"model": "auto", "messages": [{"role": "user", "content": SECRET}], **change}
    response = stage.client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (
        error["type"] == "invalid_request_error"
        and error["param"] == param
        and SECRET not in error["message"]
    )
    assert stage.engines["weak"].calls == 0


def test_bodies_that_are_no_json_or_too_large(stage):
    for body in (b"{", b"[]", b"\xff"):
        response = stage.client.post("/v1/chat/completions", content=body)
        assert response.status_code == 400 and response.json()["error"]["message"]
    large = b'{"x":"' + b"y" * (1 << 20) + b'"}'
    assert stage.client.post("/v1/chat/completions", content=large).status_code == 413
    parts = (large[i : i + 65536] for i in range(0, len(large), 65536))  # chunked: no length is declared
    assert stage.client.post("/v1/chat/completions", content=parts).status_code == 413
    assert stage.client.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert stage.client.get("/v1/chat/completions").status_code == 405


def test_only_listed_fields_go_upstream():
    request = parse(
        json.dumps(
            {
                "model": "auto", "messages": [{"role": "user", "content": "x"}], "id_slot": 1, "lora": [], "cache_salt": "s",
                "n_discard": 9, "n": 1, "temperature": 0, "seed": None, "user": "me",
            }
        ).encode()
    )  # fmt: skip
    assert set(request.fields) == {"messages", "temperature"} and request.repeatable


def test_the_engines_own_refusal_is_passed_on(stage):
    response = stage.chat("too long")
    assert response.status_code == 400 and "the context 8" in response.json()["error"]["message"]
    assert response.headers["x-edgeft-route"] == "weak"
    assert stage.chat("fine").status_code == 200, "the slot is free again"


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "in one piece"])
def test_a_client_that_leaves_frees_the_engine(stage, stream):
    engine = stage.engines["weak"]
    body = {
        "model": "weak",
        "messages": [{"role": "user", "content": "slow"}],
        "stream": stream,
        "max_tokens": 100000,
    }
    with pytest.raises(httpx.ReadTimeout):
        with httpx.Client(base_url=stage.client.base_url, timeout=0.5) as client:
            if stream:
                with client.stream("POST", "/v1/chat/completions", json=body, timeout=5) as response:
                    next(response.iter_lines())
                    assert engine.running == 1
                raise httpx.ReadTimeout("left by itself")
            client.post("/v1/chat/completions", json=body)
    assert engine.left.wait(5), "the engine went on for a client that is gone"
    until(lambda: stage.app.state.proxy.admission("weak").in_flight == 0)
    assert stage.chat("next", model="weak").status_code == 200
    until(lambda: 'edgeft_requests_total{route="weak",status="499"} 1.0' in stage.client.get("/metrics").text)


def test_a_full_queue_is_429_and_one_who_waited_is_served(stage):
    engine, admission = stage.engines["weak"], stage.app.state.proxy.admission("weak")
    engine.gate.clear()
    replies: list[httpx.Response] = []

    def ask(text: str) -> threading.Thread:
        thread = threading.Thread(target=lambda: replies.append(stage.chat(text, model="weak")))
        thread.start()
        return thread

    first = ask("in the slot")
    until(lambda: admission.in_flight == 1)
    second = ask("in the queue")
    until(lambda: len(admission.queue) == 1)
    refused = stage.chat("too many", model="weak")
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"
    assert stage.chat("a refund").status_code == 200, "the other model has its own queue"
    assert engine.calls == 1, "one at a time"
    engine.gate.set()
    for thread in (first, second):
        thread.join(10)
    assert [r.status_code for r in replies] == [200, 200] and admission.in_flight == 0


def test_admission_hands_on_slots_and_survives_cancelled_waiters():
    async def play() -> None:
        admission, order = Admission(1, 2), []

        async def use(name: str, pause: float = 0.0) -> None:
            async with admission.slot():
                order.append(name)
                await asyncio.sleep(pause)

        first = asyncio.create_task(use("first", 0.05))
        await asyncio.sleep(0)
        gone, waits = asyncio.create_task(use("gone")), asyncio.create_task(use("waits"))
        await asyncio.sleep(0)
        with pytest.raises(Busy):
            await use("too many")
        gone.cancel()
        await asyncio.gather(first, waits)
        assert order == ["first", "waits"] and admission.in_flight == 0 and not admission.queue
        # cancelled in the moment in which the slot is handed over
        holder = asyncio.create_task(use("holder", 0.01))
        await asyncio.sleep(0)
        unlucky = asyncio.create_task(use("unlucky"))
        await asyncio.sleep(0)
        admission._leave()
        unlucky.cancel()
        await asyncio.gather(unlucky, return_exceptions=True)
        admission.in_flight += 1  # what the holder gives back
        await holder
        assert admission.in_flight == 0

    asyncio.run(play())


def test_metrics_count(stage):
    stage.chat("one two", temperature=0)
    stage.chat("one two", temperature=0)
    stage.chat("a refund", stream=True)
    stage.chat("x", model="nope")
    text = stage.client.get("/metrics").text
    for line in (
        'edgeft_requests_total{route="weak",status="200"} 2.0',
        'edgeft_requests_total{route="strong",status="200"} 1.0',
        'edgeft_requests_total{route="none",status="404"} 1.0',
        'edgeft_cache_total{result="hit"} 1.0',
        'edgeft_cache_total{result="miss"} 1.0',
        'edgeft_tokens_total{direction="in",route="weak"} 2.0',
        'edgeft_tokens_total{direction="out",route="weak"} 3.0',
        'edgeft_tokens_total{direction="out",route="strong"} 3.0',
        'edgeft_request_duration_seconds_count{route="weak"} 2.0',
        'edgeft_ttft_seconds_count{route="weak"} 1.0',
    ):
        assert line in text, line


def test_health_tells_loading_from_ready_and_requests_wait_outside():
    engine, upstreams = Engine("weak"), {}
    with running(create_app(policy_of(), upstreams)) as client:
        stage = Stage(client, {"weak": engine}, None)
        assert client.get("/health").status_code == client.get("/health/live").status_code == 200
        early = client.get("/health/ready")
        assert early.status_code == 503 and early.json()["models"] == {"weak": "loading", "strong": "loading"}
        refused = stage.chat("hello")
        assert (
            refused.status_code == 503
            and refused.headers["retry-after"]
            and refused.json()["error"]["code"] == "model_loading"
        )
        for name in ("weak", "strong"):
            upstreams[name] = HttpUpstream(engine.url, name, KEY)
        assert client.get("/health/ready").json() == {
            "status": "ready",
            "models": {"weak": "ready", "strong": "ready"},
        }
        assert stage.chat("hello").headers["x-edgeft-cache"] == "off"


STREAMS = {
    "no JSON": (b'data: {"choices": [{"delta": {"content": "a"}}]}\n\ndata: {nonsense\n\n', "not JSON"),
    "cut off": (b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n', "without a finish reason"),
    "error event": (
        b'data: {"choices": [{"delta": {"content": "a"}}]}\n\ndata: {"error": {"message": "x"}}\n\n',
        "reported",
    ),
    "odd shape": (b'data: {"choices": [{"delta": "a"}]}\n\n', "unknown shape"),
}


@contextmanager
def canned(status: int, body: bytes, headers: dict[str, str] | None = None) -> Iterator[str]:
    """An upstream that always says the same."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def before(url: str, cache: AnswerCache | None = None) -> Iterator[Stage]:
    """A proxy with one address behind both candidates."""
    upstreams: dict[str, Any] = {name: HttpUpstream(url, name, None) for name in ("weak", "strong")}
    app = create_app(policy_of(), upstreams, cache)
    with running(app) as client:
        yield Stage(client, {}, app)


@pytest.mark.parametrize("name", STREAMS)
def test_a_broken_stream_is_never_passed_off_as_an_answer(name, tmp_path):
    body, why = STREAMS[name]
    with canned(200, body) as url, before(url, AnswerCache(tmp_path)) as stage:
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
    with canned(status, body, {"Retry-After": "7"}) as url, before(url) as stage:
        for stream in (False, True):
            response = stage.chat("x", stream=stream)
            assert response.status_code == shown and response.json()["error"]["code"] != "because"
        assert response.headers.get("retry-after") == ("7" if status == 429 else None)


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
        replayed = sse.Answer(message, "tool_calls")
        again = sse.Answer()
        for part in sse.replay(sse.Head("i", "m"), replayed, False):
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


def test_prompts_stand_in_no_log_and_no_metric(stage, caplog):
    caplog.set_level("DEBUG", logger="edgeft.serve")
    caplog.set_level("INFO")
    stage.chat(SECRET)
    stage.chat("slow " + SECRET, temperature=0, max_tokens=1)
    stage.chat("x", model=SECRET)
    stage.client.post("/v1/chat/completions", content=f'{{"model": "{SECRET}'.encode())
    assert SECRET not in caplog.text and SECRET not in stage.client.get("/metrics").text
    kept = Path(stage.app.state.proxy.cache.disk.directory)
    assert not any(SECRET.encode() in path.read_bytes() for path in kept.rglob("*") if path.is_file())


def test_only_loopback_is_listened_on():
    for host in ("127.0.0.1", "localhost", "::1"):
        refuse_public(host)
    for host in ("0.0.0.0", "::", "192.168.1.4", "example.org", ""):
        with pytest.raises(UsageError, match="open the proxy to the network"):
            refuse_public(host)


def test_candidates_that_are_not_what_was_measured(tmp_path):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"weights")
    from edgeft.files import sha256_file, sha256_json

    right = sha256_json({"model.gguf": sha256_file(gguf)})
    candidate = {"id": "m", "kind": "folder", "engine": "gguf", "path": str(gguf), "artifact_sha256": right}
    assert check(candidate)["path"] == str(gguf)
    assert check({**candidate, "path": "/elsewhere/model.gguf"}, tmp_path)["path"] == str(gguf)
    with pytest.raises(UsageError, match="is missing: there is no /elsewhere"):
        check({**candidate, "path": "/elsewhere/model.gguf"})
    gguf.write_bytes(b"Weights")
    with pytest.raises(UsageError, match="is not the one that the policy was fitted on"):
        check(candidate)
    with pytest.raises(UsageError, match="was changed"):
        (tmp_path / "folder").mkdir()
        check({**candidate, "kind": "artifact", "path": str(tmp_path / "folder")})
    assert address_of("openai:http://h:1/v1#m/x") == ("openai", "http://h:1", "m/x")
    assert address_of("litellm:openai/gpt") == ("litellm", "", "openai/gpt")
    with pytest.raises(UsageError):
        address_of("openai:http://h:1")


def test_a_request_refuses_as_parse_says():
    with pytest.raises(Refusal) as refused:
        parse(b'{"model": "auto", "messages": [{"role": "user", "content": "x"}], "n": true}')
    assert refused.value.status == 400


@contextmanager
def served(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`edgeft serve --json` as a process, over two fake engines; yields it and its address."""
    engines = [Engine("one"), Engine("two")]
    names = [f"openai:{engine.url}#{engine.name}" for engine in engines]
    policy = policy_of(*names)
    save_policy(policy.policy, policy.weights, policy.bias, tmp_path / "policy")
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "edgeft",
            "serve",
            "--policy",
            str(tmp_path / "policy"),
            "--port",
            "0",
            "--json",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OPENAI_API_KEY": KEY, "EDGEFT_HOME": str(tmp_path / "home")},
    )
    try:
        assert process.stdout
        ready = json.loads(process.stdout.readline())
        assert ready["ready"] is True
        yield process, ready["url"]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_command_serves_and_ends_when_told(tmp_path, sign, code):
    with served(tmp_path) as (process, url):
        body = {"model": "auto", "messages": [{"role": "user", "content": "a refund"}], "temperature": 0}
        assert httpx.get(f"{url}/health/ready").status_code == 200
        replies = [httpx.post(f"{url}/v1/chat/completions", json=body) for _ in range(2)]
        assert [r.headers["x-edgeft-cache"] for r in replies] == ["miss", "hit"]
        assert replies[1].json()["choices"][0]["message"]["content"] == "two: a refund"
        assert (tmp_path / "home" / "answers").is_dir()
        slow = {"model": "auto", "messages": [{"role": "user", "content": "word " * 30}], "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=slow) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(sign)
            assert [line for line in lines if line][-1] == "data: [DONE]", "a running answer is finished"
        assert process.wait(15) == code
        assert process.stderr and process.stderr.read() == ""


def test_the_command_refuses_in_two_lines(tmp_path, capsys):
    policy = policy_of("openai:http://h:1#a", "openai:http://h:1#b")
    save_policy(policy.policy, policy.weights, policy.bias, tmp_path / "policy")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, message in (
            (["--policy", str(tmp_path / "policy"), "--host", "0.0.0.0"], "open the proxy to the network"),
            (["--policy", str(tmp_path / "none")], "holds no policy.json"),
            (["--policy", str(tmp_path / "policy"), "--port", port, "--no-cache"], "can't be listened on"),
        ):
            assert cli(["serve", *arguments]) == 2
            problem = capsys.readouterr().err.splitlines()
            assert len(problem) == 2 and message in problem[0], problem
