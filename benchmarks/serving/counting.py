"""A stand-in upstream with books of its own: what it told of which request, and whether the connection was still there.

    python -m serving.counting BOOKS.jsonl

Requests name themselves in their text ("request 17 …"). How it answers is drawn from that number: 1 to 12 tokens a choice with pauses of up to
4 ms, `n` choices in turn, usage in a chunk of its own, beside choices, in every chunk (cumulative), or not at all. A line is written
when an answer has ended: {"id", "told": completion tokens of every usage that was sent, "whole": whether the last one was, and the usage}.
Prints {"url": …}.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys
from typing import Any, TextIO, cast

import httptools
import orjson
import uvloop

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
WAYS = ("own chunk", "own chunk", "own chunk", "beside choices", "every chunk", "not told")


def plan(number: int, n: int) -> dict[str, Any]:
    """How request `number` is answered."""
    chance = random.Random(number)
    tokens = [chance.randint(1, 12) for _ in range(n)]
    usage = {"prompt_tokens": chance.randint(1, 4000), "completion_tokens": sum(tokens)}
    usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
    pause_s = chance.choice((0.0, 0.001, 0.004))
    return {"tokens": tokens, "usage": usage, "pause_s": pause_s, "way": chance.choice(WAYS)}


def event(choices: list[Any], usage: dict[str, int] | None = None) -> bytes:
    """A chunk of the stream, as HTTP carries it."""
    value = {"object": "chat.completion.chunk", "choices": choices} | ({"usage": usage} if usage else {})
    data = b"data: " + orjson.dumps(value) + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


class Connection(asyncio.Protocol):
    """One connection."""

    def __init__(self, books: TextIO) -> None:
        self.books = books
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
        if body:
            self.work = asyncio.ensure_future(self.answer(orjson.loads(body)))
        else:
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    def connection_lost(self, exc: Exception | None) -> None:
        if self.work:
            self.work.cancel()

    async def answer(self, body: dict[str, Any]) -> None:
        """Answer, and write down what was told."""
        number = int(re.match(r"request (\d+)", body["messages"][0]["content"])[1])  # type: ignore[index]
        how: dict[str, Any] = plan(number, body.get("n", 1))
        told: list[int] = []
        try:
            await (self.stream(how, told) if body.get("stream") is True else self.whole(how, told))
        finally:
            whole = how["usage"]["completion_tokens"] in told
            line = {"id": number, "told": told, "whole": whole, **how["usage"]}
            self.books.write(json.dumps(line) + "\n")
            self.books.flush()

    async def whole(self, how: dict[str, Any], told: list[int]) -> None:
        """In one piece."""
        await asyncio.sleep(how["pause_s"] * max(how["tokens"]))
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": "word " * count},
                "finish_reason": "stop",
            }
            for i, count in enumerate(how["tokens"])
        ]
        tells = how["way"] != "not told"
        value = {"object": "chat.completion", "choices": choices} | ({"usage": how["usage"]} if tells else {})
        data = orjson.dumps(value)
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        self.transport.write(head % len(data) + data)
        told += [how["usage"]["completion_tokens"]] if tells else []

    async def stream(self, how: dict[str, Any], told: list[int]) -> None:
        """Chunk by chunk."""
        usage, way = how["usage"], how["way"]
        self.transport.write(STREAM)
        written = 0
        for place in range(max(how["tokens"])):
            await asyncio.sleep(how["pause_s"])
            for index, count in enumerate(how["tokens"]):
                if place >= count:
                    continue
                written += 1
                ends = "stop" if place == count - 1 else None
                so_far = {
                    "prompt_tokens": usage["prompt_tokens"],
                    "completion_tokens": written,
                    "total_tokens": usage["prompt_tokens"] + written,
                }
                last = written == usage["completion_tokens"]
                shown = so_far if way == "every chunk" or (way == "beside choices" and last) else None
                delta = {"index": index, "delta": {"content": "word "}, "finish_reason": ends}
                self.transport.write(event([delta], shown))
                told += [written] if shown else []
        if way == "own chunk":
            await asyncio.sleep(how["pause_s"])
            self.transport.write(event([], usage))
            told.append(written)
        done = b"data: [DONE]\n\n"
        self.transport.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(done), done))


async def main(books: str) -> None:
    """Listen on a free port of loopback."""
    with open(books, "a") as file:  # noqa: PTH123
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Connection(file), "127.0.0.1", 0, backlog=512)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        print(json.dumps({"url": url}), flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
