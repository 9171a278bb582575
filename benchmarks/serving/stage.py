"""Processes of a benchmark: start them, wait until they answer, end them; the edgeft that is measured; wrk."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
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
def process(command: Sequence[str], log: Path, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
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
def edgeft(
    candidates: Sequence[str],
    scratch: Path,
    *,
    cache: bool = False,
    model: str = "auto",
    upstream_key: str | None = None,
    arguments: Sequence[str] = (),
) -> Iterator[Server]:
    """`edgeft serve` over candidates (openai:URL#NAME, or what a report called a local one), with a policy fitted on a table of random texts.

    The one place that knows edgeft's command line.
    """
    place = Path(tempfile.mkdtemp(dir=scratch, prefix="edgeft-"))
    own = {"EDGEFT_HOME": str(place / "home")} | ({"OPENAI_API_KEY": upstream_key} if upstream_key else {})
    table = place / "table.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows(candidates)))
    names = [part for name in candidates for part in ("--candidate", name)]
    command = [sys.executable, "-m", "edgeft"]
    fit = [*command, "route", "fit", str(table), *names, "--out", str(place / "policy"), "--quiet"]
    subprocess.run(fit, check=True, env=environment(**own), stdout=subprocess.DEVNULL)
    kept = ["--cache", str(place / "answers")] if cache else ["--no-cache"]
    serve = [*command, "serve", "--policy", str(place / "policy"), "--port", "0", "--json", *kept, *arguments]
    with process(serve, place / "log", environment(**own)) as child:
        url = first_line(child, place / "log")["url"]
        yield Server(url, model=model, pid=child.pid)


def rows(candidates: Sequence[str]) -> Iterator[dict[str, Any]]:
    """400 graded requests of common words in which the dearer candidates gain where 'because' is said: enough for a hashed head."""
    import random

    chance = random.Random(0)
    for _ in range(400):
        hard = chance.random() < 0.5
        text = " ".join(chance.choices(WORDS, k=30)) + (" because" if hard else "")
        scores = {f"{name}:score": float(place > 0 or not hard) for place, name in enumerate(candidates)}
        yield {"request": text, **scores}


WORDS = (
    "the of and to in is that it was for on are as with his they at be this from have or by one had not but what all were when we "
    "there can an your which their said if do will each about how up out them then she many some so these would other into has more"
).split()


def bodies(count: int, model: str, tokens: int = 200, **fields: Any) -> list[dict[str, Any]]:
    """Different requests of about `tokens` tokens each: common words, of which byte-pair vocabularies make one token each."""
    import random

    chance = random.Random(1)
    return [
        {
            "model": model,
            "messages": [{"role": "user", "content": f"{i} " + " ".join(chance.choices(WORDS, k=tokens - 2))}],
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


def free_port() -> int:
    """A port that was free a moment ago, for programs that can't take 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wrk(server: Server, requests: list[dict[str, Any]], connections: int, seconds: float, scratch: Path) -> dict[str, float]:
    """`wrk -t1 -c CONNECTIONS` on the chat endpoint: requests/s and latency in ms. Ends the run where a request failed."""
    file = scratch / f"bodies-{connections}.jsonl"
    file.write_text("".join(json.dumps(body) + "\n" for body in requests))
    env = {**os.environ, "BODIES": str(file)} | ({"KEY": server.key} if server.key else {})
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:.0f}s", "--timeout", "30s", "-s", str(HERE / "post.lua")]
    try:
        done = subprocess.run([*command, server.url + PATH], env=env, text=True, capture_output=True, check=True)
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


def rss_bytes(pid: int) -> int:
    """Resident memory of a process and its children."""
    import psutil

    root = psutil.Process(pid)
    return sum(p.memory_info().rss for p in (root, *root.children(recursive=True)))


def show(table: list[list[str]], found: dict[str, Any]) -> None:
    """A table for people, then one JSON line."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(json.dumps(found))
