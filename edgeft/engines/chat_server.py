"""OpenAI's chat API over a Python generator, for engines that bring no server: one request at a time.

Standard library alone, since it runs on edge boxes. A client that leaves ends the generator at the
next token. `/tokenize`, `/apply-template` and `/completion` (of token ids) answer as llama.cpp's server does.
"""

from __future__ import annotations

import functools
import hmac
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MAX_BODY_BYTES = 8 << 20


@dataclass(frozen=True)
class Sampling:
    """What a request asks of decoding."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    ignore_eos: bool


@dataclass(frozen=True)
class Token:
    """One generated token: the text that it completes (may be empty) and its log-probability in nats, if known."""

    text: str
    logprob: float | None


# (messages, sampling) -> (number of prompt tokens, tokens as they come)
Chat = Callable[[list[dict[str, Any]], Sampling], tuple[int, Iterator[Token]]]


@dataclass(frozen=True)
class Reader:
    """How the engine reads what it is given."""

    tokenize: Callable[[str], list[int]]  # a text's ids, nothing added before or after
    render: Callable[[list[dict[str, Any]]], str]  # messages -> the prompt, the answer's turn opened
    complete: Callable[[list[int], Sampling], Iterator[Token]]  # ids -> tokens behind them, as they come


@functools.cache
def compute() -> Executor:
    """The one thread of a worker that loads its model and answers, whichever connection asks.

    OpenMP keeps a pool of threads for each thread that calls it, and once they are more than the cores they no longer spin: with a thread
    a connection llama.cpp decoded at 0.75 of its rate on two cores.
    """
    return ThreadPoolExecutor(1, "compute")


def listen(
    chat: Chat, key: str, model_name: str, reader: Reader | None = None, turn: Executor | None = None
) -> int:
    """Serve `chat` on a free loopback port in a thread; returns the port. Answers are made in `turn`, one at a time."""
    made = handler(chat, key, model_name, reader, turn or compute())
    server = ThreadingHTTPServer(("127.0.0.1", 0), made)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return int(server.server_address[1])


def sampling_of(body: dict[str, Any]) -> Sampling:
    """The fields of a request that are understood; others are ignored."""
    stop = body.get("stop") or []
    return Sampling(
        max_tokens=int(body.get("max_completion_tokens") or body.get("max_tokens") or 256),
        temperature=float(body.get("temperature", 1.0)),
        top_p=float(body.get("top_p", 1.0)),
        seed=body.get("seed"),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        ignore_eos=bool(body.get("ignore_eos")),
    )


def handler(
    chat: Chat, key: str, model_name: str, reader: Reader | None, turn: Executor
) -> type[BaseHTTPRequestHandler]:
    """The request handler for one model."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            known: dict[str, dict[str, Any]] = {
                "/health": {"status": "ok"},
                "/v1/models": {"object": "list", "data": [{"id": model_name}]},
            }
            if self.path in known:
                self.reply(200, known[self.path])
            else:
                self.fail(404, f"no such path: {self.path}")

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            if not hmac.compare_digest(self.headers.get("Authorization", ""), f"Bearer {key}"):
                self.fail(401, "wrong key")
            elif self.path != "/v1/chat/completions" and not (
                reader and self.path in ("/tokenize", "/apply-template", "/completion")
            ):
                self.fail(404, f"no such path: {self.path}")
            elif length > MAX_BODY_BYTES:
                self.fail(413, f"body of {length} bytes; {MAX_BODY_BYTES} are allowed")
            else:
                try:
                    body = json.loads(self.rfile.read(length))
                    if reader and self.path == "/tokenize":
                        self.reply(200, {"tokens": reader.tokenize(body["content"])})
                        return
                    if reader and self.path == "/apply-template":
                        self.reply(200, {"prompt": reader.render(body["messages"])})
                        return
                    if reader and self.path == "/completion":
                        asked = sampling_of({**body, "max_tokens": body["n_predict"]})
                        complete = reader.complete
                        made = turn.submit(lambda: list(until_stop(complete(body["prompt"], asked), asked)))
                        pieces = made.result()
                        self.reply(200, {"content": "".join(piece.text for piece in pieces)})
                        return
                    messages, sampling = body["messages"], sampling_of(body)
                except (ValueError, KeyError, TypeError) as error:
                    self.fail(400, f"bad request: {error}")
                    return
                turn.submit(self.complete, body, messages, sampling).result()

        def complete(self, body: dict[str, Any], messages: list[dict[str, Any]], sampling: Sampling) -> None:
            head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model_name}
            try:
                prompt_tokens, tokens = chat(messages, sampling)
            except ValueError as error:
                self.fail(400, str(error))
                return
            if body.get("stream"):
                self.stream(head, body, prompt_tokens, tokens, sampling)
                return
            pieces = list(until_stop(tokens, sampling))
            choice: dict[str, Any] = {
                "index": 0,
                "message": {"role": "assistant", "content": "".join(piece.text for piece in pieces)},
                "finish_reason": pieces[-1].finish_reason,
            }
            made = [piece.token for piece in pieces if piece.token]
            if body.get("logprobs"):
                choice["logprobs"] = {"content": [logprob_entry(token) for token in made]}
            self.reply(
                200,
                {
                    **head,
                    "object": "chat.completion",
                    "choices": [choice],
                    "usage": usage(prompt_tokens, len(made)),
                },
            )

        def stream(
            self,
            head: dict[str, Any],
            body: dict[str, Any],
            prompt_tokens: int,
            tokens: Iterator[Token],
            sampling: Sampling,
        ) -> None:
            head = {**head, "object": "chat.completion.chunk"}
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            count = 0
            try:
                for piece in until_stop(tokens, sampling):
                    count += piece.token is not None
                    choice: dict[str, Any] = {
                        "index": 0,
                        "delta": {"content": piece.text} if piece.text else {},
                        "finish_reason": piece.finish_reason,
                    }
                    if body.get("logprobs") and piece.token:
                        choice["logprobs"] = {"content": [logprob_entry(piece.token)]}
                    self.event({**head, "choices": [choice]})
                if (body.get("stream_options") or {}).get("include_usage"):
                    self.event({**head, "choices": [], "usage": usage(prompt_tokens, count)})
                self.chunk(b"data: [DONE]\n\n")
                self.chunk(b"")
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def event(self, value: dict[str, Any]) -> None:
            self.chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

        def chunk(self, data: bytes) -> None:
            self.wfile.write(b"%x\r\n" % len(data) + data + b"\r\n")
            self.wfile.flush()

        def reply(self, status: int, value: dict[str, Any]) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def fail(self, status: int, message: str) -> None:
            self.close_connection = True
            self.reply(
                status, {"error": {"message": message, "type": "invalid_request_error", "code": status}}
            )

    return Handler


@dataclass(frozen=True)
class Piece:
    """What goes out next: text, the token it came with, and in the last one the reason to finish."""

    text: str
    token: Token | None
    finish_reason: str | None = None


def until_stop(tokens: Iterator[Token], sampling: Sampling) -> Iterator[Piece]:
    """Pieces up to the token limit or a stop string; the last has no token and says why it ends.

    Text that could be the beginning of a stop string is held back until it is clear.
    """
    held, longest = "", max((len(s) for s in sampling.stop), default=0)
    for count, token in enumerate(tokens, 1):
        held += token.text
        found = [held.index(s) for s in sampling.stop if s in held]
        if found:
            yield Piece(held[: min(found)], token)
            yield Piece("", None, "stop")
            return
        safe = max(0, len(held) - longest + 1) if longest else len(held)
        yield Piece(held[:safe], token)
        held = held[safe:]
        if count >= sampling.max_tokens:
            yield Piece(held, None, "length")
            return
    yield Piece(held, None, "stop")


def logprob_entry(token: Token) -> dict[str, Any]:
    """One entry of OpenAI's `logprobs.content`."""
    return {
        "token": token.text,
        "logprob": token.logprob,
        "bytes": list(token.text.encode()),
        "top_logprobs": [],
    }


def usage(prompt_tokens: int, output_tokens: int) -> dict[str, int]:
    """OpenAI's usage block."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
    }
