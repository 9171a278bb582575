"""A running proxy in front of fake engines that speak OpenAI's chat API on real sockets."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

pytest.importorskip("starlette", reason="edgeft[serve] is not installed")
pytest.importorskip("uvicorn", reason="edgeft[serve] is not installed")
pytest.importorskip("httptools", reason="edgeft[serve] is not installed")

import uvicorn

from edgeft.engines.chat_server import Sampling, Token, listen
from edgeft.router import LoadedPolicy, rule
from edgeft.router.cache.exact import ExactCache
from edgeft.router.features import DIMENSIONS, SPEC, vector
from edgeft.serve.app import create_app
from edgeft.serve.cache import AnswerCache
from edgeft.serve.config import Cache, Config, Limits, Model
from edgeft.serve.upstream import Features, HttpUpstream
from edgeft.serve.writes import HeadHeldProtocol
from edgeft.types import Policy

KEY = "fake-key"
SECRET = "planted-secret-7731"


class Engine:
    """A fake engine: echoes its name and the last message's words; 'slow' never ends by itself."""

    def __init__(self, name: str) -> None:
        self.name, self.calls, self.running, self.left = name, 0, 0, threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self.url = f"http://127.0.0.1:{listen(self.chat, KEY, name, turn=ThreadPoolExecutor(1))}"

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


def policy_of(*names: str, **changes: Any) -> LoadedPolicy:
    """Two candidates, 'weak' and 'strong' if not named: what says 'refund' goes to the second, the rest to the first."""
    (column, sign), *_ = vector("refund").items()
    gain = [0.0] * DIMENSIONS
    gain[column] = 9.0 * sign
    candidates = [
        {"id": name, "kind": "api", "remote": False, "engine": "openai", "path": None, "artifact_sha256": f"sha-{name}", "price": None}
        for name in (names or ("weak", "strong"))
    ]  # fmt: skip
    settings = {**rule.DEFAULTS, "threshold": 0.3}
    policy = Policy("2026-01-01T00:00:00+00:00", candidates, dict(SPEC), settings, {"max_loss": 0.01})
    rows = ((0.0,) * DIMENSIONS, tuple(gain))[: len(candidates)]
    return LoadedPolicy(replace(policy, **changes), rows, (0.5, -0.2)[: len(candidates)])


def tensors_of(policy: LoadedPolicy) -> dict[str, Any]:
    """What `save_policy` wants beside the policy."""
    return {"text.weights": np.float32(policy.weights), "text.bias": np.float32(policy.bias)}


@contextmanager
def running(app: Any) -> Iterator[httpx.Client]:
    """The app under uvicorn on a free port, in a thread; yields a client."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        server = uvicorn.Server(
            uvicorn.Config(
                app, http=HeadHeldProtocol, log_config=None, lifespan="on", timeout_graceful_shutdown=2
            )
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
    upstreams = {n: upstream_of(e) for n, e in engines.items()}
    app = create_app(
        policy_of(), upstreams, cache_in(tmp_path / "cache"), config=config_of(limits=Limits(waiting=1))
    )
    with running(app) as client:
        yield Stage(client, engines, app)


def upstream_of(engine: Engine, **given: Any) -> Any:
    """An engine as a local one is reached: one slot, always streamed, one answer a call."""
    features = Features(n=False, tools=True)
    return HttpUpstream(
        engine.url, engine.name, KEY, **{"slots": 1, "always_stream": True, "features": features, **given}
    )


def cache_in(folder: Path, **settings: Any) -> AnswerCache:
    """An answer cache on disk."""
    return AnswerCache(ExactCache(folder), Cache(**settings))


def config_of(**parts: Any) -> Config:
    """A configuration whose policy is handed over, not read. Failures are not tried again unless said."""
    return Config(
        policy=Path("policy"), **{"models": {name: Model(retries=0) for name in ("weak", "strong")}, **parts}
    )


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, which must end with [DONE]."""
    parts = [part.removeprefix("data: ") for part in response.text.split("\n\n") if part]
    assert parts[-1] == "[DONE]"
    return [json.loads(part) for part in parts[:-1]]


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])


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


Script = Callable[[str, dict[str, Any]], tuple[int, dict[str, str], bytes]]


@contextmanager
def scripted(script: Script) -> Iterator[str]:
    """An upstream that answers what `script(path, body)` says: (status, headers, body)."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.say(*script(self.path, {}))

        def do_POST(self) -> None:
            self.say(*script(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def say(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def said(text: str, prompt_tokens: int = 3, output_tokens: int = 2) -> bytes:
    """A chat completion in one piece."""
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
    }
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return json.dumps({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}).encode()


JSON = {"Content-Type": "application/json"}


@contextmanager
def before(url: str, cache: AnswerCache | None = None) -> Iterator[Stage]:
    """A proxy with one address behind both candidates."""
    upstreams: dict[str, Any] = {
        name: HttpUpstream(url, name, None, always_stream=True) for name in ("weak", "strong")
    }
    app = create_app(policy_of(), upstreams, cache, config=config_of())
    with running(app) as client:
        yield Stage(client, {}, app)
