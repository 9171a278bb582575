"""What tests of failures share: an upstream on raw sockets that does what a script says, `edgeft serve` as a process, a client that hangs up."""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from edgeft.router.features import DIMENSIONS
from edgeft.router.policy import save_policy
from tests.serve_stage import policy_of

USAGE = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}
DONE = b"data: [DONE]\n\n"
CHAT = "/v1/chat/completions"


def chunk(text: str | None = None, finish: str | None = None, **more: Any) -> bytes:
    """An event of a chat stream."""
    delta = {} if text is None else {"content": text}
    value = {
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
    }
    return b"data: " + json.dumps({**value, **more}).encode() + b"\n\n"


def usage_chunk(usage: dict[str, int] = USAGE) -> bytes:
    """The last chunk, which OpenAI sends without choices."""
    return b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"


class HungUp(Exception):
    """The script ends its connection."""


class Call:
    """A request that reached the upstream, and its connection."""

    def __init__(self, connection: socket.socket, path: str, body: dict[str, Any]) -> None:
        self.connection, self.path, self.body = connection, path, body
        self.streamed = body.get("stream") is True
        self.at_s = time.monotonic()
        self.here = (
            threading.Event()
        )  # set by a script that has come to the point where the client is to leave
        self.closed_s: float | None = None  # monotonic

    def send(self, data: bytes) -> None:
        """Bytes as they are."""
        self.connection.sendall(data)

    def status(self, code: int, body: bytes = b"{}", kind: str = "application/json", **headers: str) -> None:
        """A whole response."""
        more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        head = f"HTTP/1.1 {code} X\r\nContent-Type: {kind}\r\n{more}Content-Length: {len(body)}\r\n\r\n"
        self.send(head.encode() + body)

    def begin(self) -> None:
        """The head of a stream."""
        self.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")

    def part(self, data: bytes) -> None:
        """A part of a stream's body."""
        self.send(b"%x\r\n%b\r\n" % (len(data), data))

    def end(self) -> None:
        """The end of a stream's body."""
        self.send(b"0\r\n\r\n")

    def answer(self, text: str = "fine", usage: dict[str, int] | None = USAGE) -> None:
        """A whole answer in the form that was asked for."""
        if self.streamed:
            self.begin()
            self.part(chunk(text) + chunk(finish="stop") + (usage_chunk(usage) if usage else b"") + DONE)
            self.end()
            return
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        value = {"object": "chat.completion", "choices": [choice]} | ({"usage": usage} if usage else {})
        self.status(200, json.dumps(value).encode())

    def reset(self) -> None:
        """End the script and the connection with RST."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise HungUp

    def hang_up(self) -> None:
        """End the script and the connection with FIN."""
        raise HungUp

    def until_closed(self, seconds: float = 10.0) -> bool:
        """Wait until the other side has closed; False where it has not within so many seconds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            readable, _, _ = select.select([self.connection], [], [], 0.02)
            if not readable:
                continue
            try:
                gone = not self.connection.recv(4096)
            except OSError:
                gone = True
            if gone:
                self.closed_s = time.monotonic()
                return True
        return False


Script = Callable[[Call], None]


class Upstream:
    """Listens on loopback; what asks for the model NAME gets what scripts[NAME] does, by default an answer."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.scripts: dict[str, Script] = {}
        self.calls: list[Call] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def id(self, name: str) -> str:
        """A candidate's id."""
        return f"openai:{self.url}#{name}"

    def of(self, name: str) -> list[Call]:
        """The calls of one model."""
        return [call for call in self.calls if call.body.get("model") == name]

    def close(self) -> None:
        """Stop listening."""
        self.listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError, ValueError, HungUp), connection, connection.makefile("rb") as lines:
            while request := lines.readline():
                method, path, _ = request.decode().split(" ", 2)
                length = 0
                while (line := lines.readline()) not in (b"\r\n", b""):
                    name, _, value = line.decode().partition(":")
                    length = int(value) if name.lower() == "content-length" else length
                body = json.loads(lines.read(length)) if length else {}
                call = Call(connection, path, body)
                if method == "GET":
                    call.status(200, b'{"object": "list", "data": []}')
                    continue
                self.calls.append(call)
                self.scripts.get(body.get("model", ""), Call.answer)(call)


@dataclass
class Served:
    """A running proxy."""

    process: subprocess.Popen[str]
    url: str
    folder: Path

    def chat(self, model: str = "auto", text: str = "hello", **fields: Any) -> httpx.Response:
        """One chat request."""
        return httpx.post(self.url + CHAT, json=asking(model, text, **fields), timeout=20)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of a counter that have these labels."""
        total = 0.0
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            if line.split("{")[0].split(" ")[0] == name and all(
                f'{k}="{v}"' in line for k, v in labels.items()
            ):
                total += float(line.rsplit(" ", 1)[1])
        return total


def asking(model: str, text: str = "hello", **fields: Any) -> dict[str, Any]:
    """The body of a chat request."""
    return {"model": model, "messages": [{"role": "user", "content": text}], **fields}


@contextmanager
def served(
    folder: Path,
    ids: Sequence[str],
    *,
    program: Sequence[str] = ("-m", "edgeft"),
    local: dict[str, Any] | None = None,
    **settings: Any,
) -> Iterator[Served]:
    """`edgeft serve` as a process over these candidates, the first one preferred; `settings` are those of edgeft.yaml.

    `local` is put into the first candidate's place: {"kind", "engine", "path", "artifact_sha256"}. The one place that knows the command line.
    """
    loaded = policy_of(*ids[:2])
    candidates = [{**loaded.policy.candidates[0], "id": name, "artifact_sha256": None} for name in ids]
    if local:
        candidates[0] |= local
    tensors = {
        "text.weights": np.zeros((len(ids), DIMENSIONS), np.float32),
        "text.bias": np.zeros(len(ids), np.float32),
    }
    save_policy(replace(loaded.policy, candidates=candidates), tensors, folder / "policy")
    config = {"policy": "policy", "listen": {"port": 0}, "cache": {"enabled": False}, **settings}
    (folder / "edgeft.yaml").write_text(json.dumps(config))  # JSON is YAML
    command = [sys.executable, *program, "serve", "--config", str(folder / "edgeft.yaml"), "--json"]
    log = folder / "stderr.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "EDGEFT_HOME": str(folder / "home")},
        )
    try:
        assert process.stdout
        line = process.stdout.readline()
        assert line, log.read_text()
        yield Served(process, json.loads(line)["url"], folder)
    finally:
        process.kill()
        process.communicate()


def knock(url: str, body: dict[str, Any]) -> socket.socket:
    """Send a chat request over a socket of one's own."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(head.encode() + data)
    return connection


def leave(connection: socket.socket, how: str) -> None:
    """End a connection with FIN (nothing more is sent) or RST."""
    if how == "rst":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    else:
        connection.shutdown(socket.SHUT_WR)


def events(text: str) -> list[dict[str, Any]]:
    """A stream's events, [DONE] left out."""
    parts = [part.removeprefix("data: ") for part in text.split("\n\n") if part.startswith("data: ")]
    return [json.loads(part) for part in parts if part != "[DONE]"]


def said(text: str) -> str:
    """What a stream said."""
    return "".join(
        c["delta"].get("content") or "" for event in events(text) for c in event.get("choices", [])
    )
