"""Processes of a benchmark: start them, wait until they answer, end them; the edgeft that is measured; wrk."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STARTS_IN_S = 300.0
PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class Server:
    """Something that listens: `url` without /v1, the key that it asks for, the name of the model to ask for."""

    url: str
    key: str | None = None
    model: str = "stand-in"
    pid: int = 0


def environment(**more: str) -> dict[str, str]:
    """This process's environment for a child, in which `serving` can be imported; no proxy between loopback addresses."""
    path = os.pathsep.join(
        part for part in (str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH")) if part
    )
    return {**os.environ, "PYTHONPATH": path, "NO_PROXY": "127.0.0.1", **more}


@contextmanager
def process(
    command: Sequence[str], log: Path, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A child whose standard error goes to `log`, ended at the end of the block."""
    with log.open("a") as out:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=out, text=True, env=env or environment()
        )
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def first_line(child: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    """The JSON line with which a child says where it listens."""
    assert child.stdout
    line = child.stdout.readline()
    if not line:
        sys.exit(f"a process did not start:\n{log.read_text()[-2000:]}")
    return json.loads(line)


@contextmanager
def module(name: str, *arguments: str, scratch: Path) -> Iterator[Server]:
    """One of this folder's modules that print their address."""
    log = scratch / f"{name}.log"
    with process([sys.executable, "-m", f"serving.{name}", *arguments], log) as child:
        yield Server(first_line(child, log)["url"], pid=child.pid)


@contextmanager
def engine(gguf: Path, scratch: Path, threads: int, slots: int, context: int) -> Iterator[Server]:
    """A GGUF file in edgeft's child process, without the proxy; `context` tokens for each slot."""
    from edgeft.engines.local import LocalModel
    from edgeft.serve.pool import BATCH_S

    wanted = {"slots": slots, "batch_s": BATCH_S, "run_profile": False}  # as the proxy starts it
    with LocalModel(
        gguf,
        "gguf",
        log=scratch / "engine.log",
        threads=threads,
        context=context,
        name="small",
        options=wanted,
    ) as model:
        yield Server(model.url, model.key, "small", model.pid)


COMMON = """
the of and to in is that it was for on are as with his they at be this from have or by one had not but what all were
when we there can an your which their said if do will each about how up out them then she many some so these would other
into has more
"""
WORDS = COMMON.split()


def bodies(count: int, model: str, tokens: int = 200, **fields: Any) -> list[dict[str, Any]]:
    """Different requests of about `tokens` tokens each: common words, of which byte-pair vocabularies make one token each."""
    import random

    chance = random.Random(1)
    return [
        {
            "model": model,
            "messages": [
                {"role": "user", "content": f"{i} " + " ".join(chance.choices(WORDS, k=tokens - 2))}
            ],
            **fields,
        }
        for i in range(count)
    ]


def wait_until(url: str, log: Path, child: subprocess.Popen[str]) -> None:
    """Wait until GET url is 200."""
    import httpx

    deadline = time.monotonic() + STARTS_IN_S
    while time.monotonic() < deadline and child.poll() is None:
        try:
            if httpx.get(url, timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    sys.exit(f"{url} does not answer:\n{log.read_text()[-2000:]}")


def answers(server: Server, body: dict[str, Any]) -> None:
    """Ask once and wait for as long as a first answer takes. Ends the run where it is an error."""
    import httpx

    headers = {"Authorization": f"Bearer {server.key}"} if server.key else {}
    reply = httpx.post(server.url + PATH, json=body, headers=headers, timeout=STARTS_IN_S, trust_env=False)
    if reply.status_code != 200:
        sys.exit(f"{server.url}: {reply.status_code} {reply.text[:500]}")


def free_port() -> int:
    """A port that was free a moment ago, for programs that can't take 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wrk(
    server: Server, requests: list[dict[str, Any]], connections: int, seconds: float, scratch: Path
) -> dict[str, float]:
    """`wrk -t1 -c CONNECTIONS` on the chat endpoint: requests/s and latency in ms. Ends the run where a request failed."""
    file = scratch / f"bodies-{connections}.jsonl"
    file.write_text("".join(json.dumps(body) + "\n" for body in requests))
    env = {**os.environ, "BODIES": str(file)} | ({"KEY": server.key} if server.key else {})
    command = [
        "wrk",
        "-t1",
        f"-c{connections}",
        f"-d{seconds:.0f}s",
        "--timeout",
        "30s",
        "-s",
        str(HERE / "post.lua"),
    ]
    try:
        done = subprocess.run(
            [*command, server.url + PATH], env=env, text=True, capture_output=True, check=True
        )
    except FileNotFoundError:
        sys.exit("there is no wrk: apt-get install wrk")
    found = json.loads(done.stdout.splitlines()[-1])
    if found["failed"] or not found["requests"]:
        sys.exit(f"{server.url}: {found['failed']} of {found['requests']} requests failed\n{done.stdout}")
    return {
        "requests_per_s": 1e6 * found["requests"] / found["duration_us"],
        "p50_ms": found["p50_us"] / 1e3,
        "p99_ms": found["p99_us"] / 1e3,
    }


def memory_bytes(pid: int) -> tuple[int, int]:
    """(resident, of it not shared) memory of a process and its children. A mapped cache file is resident and shared."""
    import psutil

    root = psutil.Process(pid)
    parts = [p.memory_info() for p in (root, *root.children(recursive=True))]
    return sum(m.rss for m in parts), sum(m.rss - m.shared for m in parts)


def show(table: list[list[str]], found: dict[str, Any]) -> None:
    """A table for people, then one JSON line."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(json.dumps(found))
