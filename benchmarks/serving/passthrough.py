"""The bare pass-through: raw ASGI on uvicorn, one worker, that hands a request on and the answer back, and does nothing else.

    python -m serving.passthrough UPSTREAM

It parses no JSON, checks no key, counts nothing: what any Python proxy pays. Prints {"url": …} and runs until it is ended.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from typing import Any

import uvicorn

from serving.wire import Hangup, Pool

POOLS: dict[str, Pool] = {}


async def app(scope: Any, receive: Any, send: Any) -> None:
    """One request."""
    if scope["type"] != "http":
        return
    message = await receive()
    body = message["body"]
    while message.get("more_body"):
        message = await receive()
        body += message["body"]
    pool = POOLS["upstream"]
    response = await pool.send(scope["path"], body)
    status = await response.head()
    kind = response.headers.get("content-type", "application/json").encode()
    headers = [(b"content-type", kind)]
    if length := response.headers.get("content-length"):
        headers.append((b"content-length", length.encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    try:
        whole = response.complete
        async for data in response.chunks():
            await send({"type": "http.response.body", "body": data, "more_body": not whole})
        if not whole:
            await send({"type": "http.response.body", "body": b""})
        pool.keep(response)
    except Hangup:
        pool.hang_up(response)


async def main(upstream: str) -> None:
    """Listen on a free port of loopback."""
    POOLS["upstream"] = Pool(upstream)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        print(json.dumps({"url": f"http://127.0.0.1:{bound.getsockname()[1]}"}), flush=True)
        config = uvicorn.Config(app, http="httptools", log_config=None, access_log=False, lifespan="off")
        await uvicorn.Server(config).serve(sockets=[bound])


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvicorn.Config(app, loop="uvloop").get_loop_factory()) as runner:
        runner.run(main(sys.argv[1]))
