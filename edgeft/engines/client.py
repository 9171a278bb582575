"""One chat request to anything that speaks OpenAI's API, with the time of every piece of text.

Always streamed, since the first token's time is wanted. A chunk is not a token: counts come from
the engine's own usage block. Bytes are kept with the time they came and parsed when the stream is over:
an engine beside needs every core for the next token.
"""

from __future__ import annotations

import http.client
import json
import select
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from edgeft.errors import EnvironmentFault

TIMEOUT_S = 600.0
PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class Reply:
    """What came back. Times are seconds since the request was sent, on the client's clock."""

    text: str
    prompt_tokens: int | None
    output_tokens: int | None
    ttft_s: float  # to the first non-empty piece of text; the whole time where there was none
    e2e_s: float  # to the last event of the stream
    chunk_s: list[float]
    mean_logprob: float | None  # nats a token, where the engine gives log-probabilities
    finish_reason: str | None

    @property
    def decode_tok_per_s(self) -> float | None:
        """(n-1)/(e2e - TTFT), or None for fewer than two tokens."""
        if not self.output_tokens or self.output_tokens < 2 or self.e2e_s <= self.ttft_s:
            return None
        return (self.output_tokens - 1) / (self.e2e_s - self.ttft_s)


def chat(
    client: httpx.Client,
    url: str,
    body: dict[str, Any],
    key: str | None = None,
    leave: Callable[[str], bool] | None = None,
) -> Reply:
    """Send one streamed chat completion; `leave` may say of the text so far that the rest is not wanted.

    Raises EnvironmentFault where the server refuses or breaks off.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    started = time.perf_counter()
    try:
        with client.stream(
            "POST", f"{url}{PATH}", json=streamed(body), headers=headers, timeout=TIMEOUT_S
        ) as response:
            if response.status_code != 200:
                raise refused(url, response.status_code, response.read())
            pieces = ((time.perf_counter() - started, piece) for piece in response.iter_bytes())
            if leave:
                return gather(until(events(pieces), leave))
            kept = list(pieces)
    except httpx.HTTPError as error:
        raise broke_off(url, error) from error
    return gather(events(kept))


class Loopback:
    """Asks an engine on this box with half the processor time of `chat`: one kept connection a thread, no client library.

    Plain HTTP only. Raises EnvironmentFault where the engine refuses or breaks off.
    """

    def __init__(self, port: int, key: str) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self.headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self._mine = threading.local()
        self._all: list[http.client.HTTPConnection] = []

    def chat(self, body: dict[str, Any]) -> Reply:
        """Send one streamed chat completion."""
        data = json.dumps(streamed(body)).encode()
        try:
            started, response = self._send(data)
            if response.status != 200:
                raise refused(self.url, response.status, response.read())
            pieces = []
            while piece := response.read1(1 << 16):
                pieces.append((time.perf_counter() - started, piece))
        except (OSError, http.client.HTTPException) as error:
            self._connection().close()
            raise broke_off(self.url, error) from error
        except BaseException:
            self._connection().close()  # half an answer must not stand before the next one
            raise
        return gather(events(pieces))

    def _send(self, data: bytes) -> tuple[float, http.client.HTTPResponse]:
        """(when it was sent, the answer's head). llama.cpp's server hangs up after a stream, which may be seen too late: once more then."""
        connection = self._connection()
        kept = connection.sock is not None
        while True:
            started = time.perf_counter()
            try:
                connection.request("POST", PATH, data, self.headers)
                return started, connection.getresponse()
            except ConnectionError:  # also RemoteDisconnected: not a byte of an answer came
                connection.close()
                if not kept:
                    raise
                kept = False

    def _connection(self) -> http.client.HTTPConnection:
        """This thread's connection; one that the engine has hung up on opens anew with its next request."""
        if not hasattr(self._mine, "connection"):
            self._mine.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
            self._all.append(self._mine.connection)
        connection: http.client.HTTPConnection = self._mine.connection
        if connection.sock and select.select([connection.sock], [], [], 0)[0]:
            connection.close()
        return connection

    def close(self) -> None:
        """Hang up, in all threads."""
        for connection in self._all:
            connection.close()


def streamed(body: dict[str, Any]) -> dict[str, Any]:
    """The body so that the answer comes piece by piece, its usage at the end."""
    return {**body, "stream": True, "stream_options": {"include_usage": True}}


def refused(url: str, status: int, detail: bytes) -> EnvironmentFault:
    """The error for an answer that is none."""
    return EnvironmentFault(
        f"{url} answered {status}: {detail.decode(errors='replace')[:300]}", f"curl {url}/health"
    )


def broke_off(url: str, error: Exception) -> EnvironmentFault:
    """The error for a connection that ended early or never began."""
    return EnvironmentFault(f"{url} broke off: {type(error).__name__} {error}", f"curl {url}/health")


def events(pieces: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, dict[str, Any]]]:
    """The JSON of each server-sent event and when its line was whole, up to [DONE]."""
    rest = b""
    for at, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                yield at, json.loads(data)


def until(
    chunks: Iterable[tuple[float, dict[str, Any]]], leave: Callable[[str], bool]
) -> Iterator[tuple[float, dict[str, Any]]]:
    """The chunks up to the one after which `leave` is true of the text."""
    text = ""
    for at, chunk in chunks:
        yield at, chunk
        pieces = [(choice.get("delta") or {}).get("content") or "" for choice in chunk.get("choices") or []]
        if any(pieces):
            text += "".join(pieces)
            if leave(text):
                return


def gather(chunks: Iterable[tuple[float, dict[str, Any]]]) -> Reply:
    """A stream as one reply; each chunk comes with the seconds since the request was sent."""
    pieces: list[str] = []
    times: list[float] = []
    logprobs: list[float] = []
    usage: dict[str, Any] = {}
    reason, e2e = None, 0.0
    for e2e, chunk in chunks:
        if "error" in chunk:
            raise EnvironmentFault(f"the server broke off: {str(chunk['error'])[:300]}", "look at its log")
        usage = chunk.get("usage") or usage
        for choice in chunk.get("choices") or []:
            reason = choice.get("finish_reason") or reason
            entries = (choice.get("logprobs") or {}).get("content") or []
            logprobs += [e["logprob"] for e in entries if e.get("logprob") is not None]
            if text := (choice.get("delta") or {}).get("content"):
                times.append(e2e)
                pieces.append(text)
    return Reply(
        text="".join(pieces),
        prompt_tokens=usage.get("prompt_tokens"),
        output_tokens=usage.get("completion_tokens"),
        ttft_s=times[0] if times else e2e,
        e2e_s=e2e,
        chunk_s=times,
        mean_logprob=sum(logprobs) / len(logprobs) if logprobs else None,
        finish_reason=reason,
    )
