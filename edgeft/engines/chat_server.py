"""OpenAI's API over Python generators, for engines that bring no server: one request at a time.

Standard library alone, since it runs on edge boxes. A client that leaves, streamed to or not, ends the generator at its next
step: a token, or a piece of the prompt (`edgeft.engines.decoding.Pace`). `/tokenize`, `/apply-template` and `/completion` (of
token ids) answer as llama.cpp's server does.
"""

from __future__ import annotations

import functools
import hmac
import json
import select
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from edgeft.engines import bodies
from edgeft.engines.bodies import CHAT, TEXT
from edgeft.engines.decoding import BadRequest, Sampling, Steps, Token, sampling_of, until_stop

__all__ = ["Chat", "Gone", "Reader", "Sampling", "Token", "compute", "features", "listen", "until_stop"]
MAX_BODY_BYTES = 8 << 20

# (messages, sampling) -> (number of prompt tokens, what comes step by step)
Chat = Callable[[list[dict[str, Any]], Sampling], tuple[int, Steps]]


@dataclass(frozen=True)
class Reader:
    """How the engine reads what it is given."""

    tokenize: Callable[[str], list[int]]  # a text's ids, nothing added before or after
    render: Callable[[list[dict[str, Any]]], str]  # messages -> the prompt, the answer's turn opened
    complete: Callable[[list[int], Sampling], Steps]  # ids -> what comes behind them
    begin: tuple[int, ...] = ()  # ids that stand before a plain text
    # ids -> None after each piece that was read, at last the vector
    embed: Callable[[list[int]], Iterator[list[float] | None]] | None = None
    constrains: bool = False  # Sampling.schema is obeyed
    reused: Callable[[], int] | None = (
        None  # how many ids of the last prompt were not computed again; None: nothing is ever kept
    )


class Gone(Exception):
    """The client has left."""


@functools.cache
def compute() -> Executor:
    """The one thread of a worker that loads its model and answers, whichever connection asks.

    OpenMP keeps a pool of threads for each thread that calls it, and once they are more than the cores they no longer spin: with a thread
    a connection llama.cpp decoded at 0.75 of its rate on two cores.
    """
    return ThreadPoolExecutor(1, "compute")


def features(reader: Reader, **more: Any) -> dict[str, Any]:
    """What an engine behind this server can do, as `start` tells it."""
    return {
        "completions": True, "embeddings": reader.embed is not None, "tools": False, "json_schema": reader.constrains,
        "logprobs": True, "top_logprobs": True, "adapters": [], "id_slot": False, "prompt_progress": False, **more,
    }  # fmt: skip


def listen(
    chat: Chat, key: str, model_name: str, reader: Reader | None = None, turn: Executor | None = None
) -> int:
    """Serve `chat` on a free loopback port in a thread; returns the port. Answers are made in `turn`, one at a time."""
    made = handler(chat, key, model_name, reader, turn or compute())
    server = ThreadingHTTPServer(("127.0.0.1", 0), made)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return int(server.server_address[1])


def left(connection: socket.socket) -> bool:
    """True where the other side has closed (FIN) or reset the connection."""
    try:
        if not select.select([connection], [], [], 0)[0]:
            return False
        return not connection.recv(1, socket.MSG_PEEK)
    except (OSError, ValueError):
        return True


def watched(steps: Iterator[Any], connection: socket.socket) -> Iterator[Any]:
    """What comes, the pieces of the prompt (None) left out. Raises Gone, the steps closed, where the client has left."""
    try:
        if left(connection):
            raise Gone
        for step in steps:
            if left(connection):
                raise Gone
            if step is not None:
                yield step
    finally:
        if close := getattr(steps, "close", None):
            close()


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
                "/v1/models": {"object": "list", "data": [{"id": model_name, "object": "model"}]},
            }
            if self.path in known:
                self.reply(200, known[self.path])
            else:
                self.fail(404, f"no such path: {self.path}")

        def do_POST(self) -> None:
            answer = {
                "/v1/chat/completions": self.chat, "/v1/completions": self.text, "/v1/embeddings": self.embeddings,
                "/completion": self.raw, "/tokenize": self.tokens, "/apply-template": self.prompt,
            }.get(self.path)  # fmt: skip
            length = self.headers.get("Content-Length") or "0"
            if not hmac.compare_digest(
                self.headers.get("Authorization", "").encode(), f"Bearer {key}".encode()
            ):
                self.fail(401, "wrong key")
            elif answer is None or (reader is None and self.path != "/v1/chat/completions"):
                self.fail(404, f"no such path: {self.path}")
            elif not length.isdigit() or int(length) > MAX_BODY_BYTES:
                self.fail(413, f"body of {length} bytes; {MAX_BODY_BYTES} are allowed")
            else:
                self.sent = False
                try:
                    answer(json.loads(self.rfile.read(int(length))))
                except (Gone, BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                except (ValueError, KeyError, TypeError) as error:
                    known = isinstance(error, BadRequest)
                    self.broken(400, str(error) if known else f"bad request: {error}", error)
                except Exception as error:
                    self.broken(500, f"the engine failed: {type(error).__name__}", error)

        def broken(self, status: int, message: str, error: Exception) -> None:
            """Tell what went wrong, in the stream where it has begun."""
            if status == 500:
                print(f"failed: {type(error).__name__}", flush=True)  # no request's text in the log
            if not self.sent:
                self.fail(status, message)
                return
            self.close_connection = True
            self.event({"error": error_of(500, message)})

        def chat(self, body: dict[str, Any]) -> None:
            wanted = bodies.asked(body, CHAT, bool(reader and reader.constrains))
            messages = body["messages"]
            turn.submit(lambda: self.answer(CHAT, body, wanted, *chat(messages, wanted))).result()

        def text(self, body: dict[str, Any]) -> None:
            assert reader
            wanted = bodies.asked(body, TEXT, reader.constrains)
            ids, complete = ids_of(body["prompt"], reader), reader.complete
            turn.submit(lambda: self.answer(TEXT, body, wanted, len(ids), complete(ids, wanted))).result()

        def answer(
            self, kind: str, body: dict[str, Any], wanted: Sampling, prompt_tokens: int, steps: Steps
        ) -> None:
            """Make and send an answer; in the thread that computes."""
            pieces = until_stop(watched(steps, self.connection), wanted)
            streamed = bool(body.get("stream"))
            head = bodies.head(kind, model_name, streamed)

            def usage() -> dict[str, Any]:
                return bodies.usage(
                    prompt_tokens, count, reader.reused() if reader and reader.reused else None
                )

            if not streamed:
                made = list(pieces)
                count = sum(piece.token is not None for piece in made)
                choices = [bodies.whole(kind, made, wanted)]
                self.reply(200, {**head, "choices": choices, "usage": usage()})
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.sent, count = True, 0
            try:
                for piece in pieces:
                    count += piece.token is not None
                    self.event({**head, "choices": [bodies.part(kind, piece, wanted)]})
            finally:
                pieces.close()  # type: ignore[attr-defined]
            if (body.get("stream_options") or {}).get("include_usage"):
                self.event({**head, "choices": [], "usage": usage()})
            self.chunk(b"data: [DONE]\n\n")
            self.chunk(b"")

        def embeddings(self, body: dict[str, Any]) -> None:
            assert reader
            if not (embed := reader.embed):
                self.fail(501, "this engine gives no embeddings; see docs/engines.md")
                return
            encoding = body.get("encoding_format") or "float"
            if encoding not in ("float", "base64"):
                raise BadRequest("encoding_format must be float or base64")
            given = body["input"]
            many = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
            texts = [ids_of(text, reader) for text in (given if many else [given])]
            vectors = turn.submit(
                lambda: [next(watched(embed(ids), self.connection)) for ids in texts]
            ).result()
            self.reply(200, bodies.embeddings(model_name, vectors, sum(map(len, texts)), encoding))

        def raw(self, body: dict[str, Any]) -> None:
            assert reader
            wanted, complete = sampling_of({**body, "max_tokens": body["n_predict"]}), reader.complete
            ids = list(body["prompt"])
            made = turn.submit(
                lambda: list(until_stop(watched(complete(ids, wanted), self.connection), wanted))
            )
            self.reply(200, {"content": "".join(piece.text for piece in made.result())})

        def tokens(self, body: dict[str, Any]) -> None:
            assert reader
            self.reply(200, {"tokens": reader.tokenize(body["content"])})

        def prompt(self, body: dict[str, Any]) -> None:
            assert reader
            self.reply(200, {"prompt": reader.render(body["messages"])})

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
            self.reply(status, {"error": error_of(status, message)})

    return Handler


def error_of(status: int, message: str) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = {401: "authentication_error", 501: "not_supported_error"}.get(status)
    return {
        "message": message,
        "type": kind or ("server_error" if status >= 500 else "invalid_request_error"),
        "code": status,
    }


def ids_of(given: Any, reader: Reader) -> list[int]:
    """The ids of a text, or the ids that were given. Raises BadRequest for anything else."""
    if isinstance(given, list) and len(given) == 1 and not isinstance(given[0], int):
        given = given[0]
    if isinstance(given, str):
        ids = [*reader.begin, *reader.tokenize(given)]
    elif isinstance(given, list) and all(type(one) is int and one >= 0 for one in given):
        ids = given
    else:
        raise BadRequest("this engine takes one text or one list of token ids a request")
    if not ids:
        raise BadRequest("the text is empty")
    return ids
