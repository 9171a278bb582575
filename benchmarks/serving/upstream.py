"""A stand-in upstream that answers at once, so that a proxy's own time is what is left. No model: its tokens are one word each.

    python -m serving.upstream [--tokens 16] [--token-s 0] [--slots 0]

OpenAI's chat completions over raw asyncio, streamed or not, with usage. `--token-s` is the pause before each token, `--slots` how many
requests are computed at a time; the others wait in order, for ever, as in an engine without admission control.
Prints {"url": …} and runs until it is ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any, cast

import httptools
import orjson
import uvloop

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n%b\r\n\r\n"
BASE = {"id": "chatcmpl-stand-in", "created": 1, "model": "stand-in"}


def answers(tokens: int, prompt_tokens: int) -> tuple[bytes, list[bytes], bytes]:
    """(whole response, one event a token, the last events: finish, usage, [DONE])."""
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
    }
    words = [f" word{i}" for i in range(tokens)]
    message = {"role": "assistant", "content": "".join(words)}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    body = orjson.dumps({**BASE, "object": "chat.completion", "choices": [choice], "usage": usage})
    whole = HEAD % (b"application/json", b"Content-Length: %d" % len(body)) + body
    events = [_event([{"index": 0, "delta": {"content": word}, "finish_reason": None}]) for word in words]
    end = _event([{"index": 0, "delta": {}, "finish_reason": "stop"}]) + _event([], usage)
    return whole, events, end + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def _event(choices: list[Any], usage: dict[str, int] | None = None) -> bytes:
    value = {**BASE, "object": "chat.completion.chunk", "choices": choices, "usage": usage}
    return _chunk(b"data: " + orjson.dumps(value) + b"\n\n")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Connection(asyncio.Protocol):
    """One connection; `options` are those of the command line, `turns` its slots or None."""

    def __init__(self, options: argparse.Namespace, turns: asyncio.Semaphore | None) -> None:
        self.options, self.turns = options, turns
        self.whole, self.events, self.end = answers(options.tokens, options.prompt_tokens)
        self.at_once = (
            HEAD % (b"text/event-stream", b"Transfer-Encoding: chunked") + b"".join(self.events) + self.end
        )
        self.work: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.parser = httptools.HttpRequestParser(self)
        self.body: list[bytes] = []

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_body(self, part: bytes) -> None:
        """httptools' callback."""
        self.body.append(part)

    def on_message_complete(self) -> None:
        """httptools' callback: the request is whole."""
        body, self.body = b"".join(self.body), []
        streamed = bool(body) and orjson.loads(body).get("stream") is True
        if self.options.token_s or self.turns:
            self.work = asyncio.ensure_future(self.slowly(streamed))
        else:
            self.transport.write(self.at_once if streamed else self.whole)

    async def slowly(self, streamed: bool) -> None:
        """Answer at the pace of the options, in a slot where there are some."""
        async with self.turns or asyncio.Semaphore():
            if streamed:
                self.transport.write(HEAD % (b"text/event-stream", b"Transfer-Encoding: chunked"))
            for event in self.events:
                await asyncio.sleep(self.options.token_s)
                if streamed:
                    self.transport.write(event)
            self.transport.write(self.end if streamed else self.whole)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.work:
            self.work.cancel()


async def main() -> None:
    """Listen on a free port of loopback."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--token-s", type=float, default=0.0)
    parser.add_argument("--slots", type=int, default=0)
    options = parser.parse_args()
    turns = asyncio.Semaphore(options.slots) if options.slots else None
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(options, turns), "127.0.0.1", 0, backlog=512)
    print(json.dumps({"url": f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"}), flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
