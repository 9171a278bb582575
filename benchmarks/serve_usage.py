"""Usage as clients were told it and as /metrics counts it, against an upstream's own books, over mixed requests of which some are left.

    python benchmarks/serve_usage.py [--requests 10000] [--cancelled 0.15]

Streamed or not, n of 1 to 3, include_usage or not; clients leave at random moments, with FIN or RST. The upstream is a stand-in that keeps books
(serving/counting.py): usage in a chunk of its own, beside choices, in every chunk, or never told. Must hold:
- every client that read to the end was told the upstream's own figures where the upstream told them, once, and none elsewhere;
- the tokens counted are exactly those of calls whose usage was told: all that were read to the end, and of those that were left after the
  upstream had sent some (it may not have arrived) a subset that gives both sums exactly, looked for in batches of 100;
- every other call stands in edgeft_usage_unresolved_total; one that was left while it was sent on may.
A contract, so without a rival. Prints a table and one JSON line; exit 1 where it does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orjson
from serving import stage
from serving.proxy import edgeft
from serving.stage import Server
from serving.wire import Hangup, Pool

AT_ONCE, BATCH = 32, 100
FIELDS = ("prompt_tokens", "completion_tokens")
TOLD = (*FIELDS, "total_tokens")


def main() -> None:
    """Ask, then compare the books."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--cancelled", type=float, default=0.15, help="share of requests that are left")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        scratch = Path(name)
        books = scratch / "books.jsonl"
        upstream = stack.enter_context(stage.module("counting", str(books), scratch=scratch))
        candidates = [f"openai:{upstream.url}#{name}" for name in ("small", "large")]
        proxy = stack.enter_context(edgeft(candidates, scratch))
        found = asyncio.run(batches(proxy, books, options))
    stage.show([["", ""], *([key, str(value)] for key, value in found.items())], found)
    sys.exit(0 if found["holds"] else 1)


async def batches(server: Server, books: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Ask in batches; after each compare the clients', the upstream's and the proxy's books."""
    found: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    took_s, before, read = [0.05], await settled(server), 0
    for start in range(0, options.requests, BATCH):
        numbers = range(start, min(start + BATCH, options.requests))
        seen = await ask_all(server, numbers, options.cancelled, took_s)
        after = await settled(server)
        lines = books.read_text().splitlines()
        calls, read = [json.loads(line) for line in lines[read:]], len(lines)
        compare(seen, calls, {key: after[key] - before[key] for key in after}, found, wrong)
        before = after
        if start % 1000 == 0:
            print(f"progress: {numbers[-1] + 1} of {options.requests}", file=sys.stderr, flush=True)
    return {"holds": not wrong, **found, "wrong": dict(wrong)}


async def ask_all(
    server: Server, numbers: range, cancelled: float, took_s: list[float]
) -> dict[int, dict[str, Any]]:
    """id -> {"left", "streamed", "asked" (for usage), "status", "usage"} of each request. `took_s` is a running mean of whole answers: who
    leaves does so within twice that."""
    pool, left, seen = Pool(server.url, server.key), iter(numbers), {}

    async def worker() -> None:
        for number in left:
            began = time.monotonic()
            seen[number] = await one(pool, server.model, number, cancelled, took_s[0])
            if not seen[number]["left"]:
                took_s[0] += 0.05 * (time.monotonic() - began - took_s[0])

    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    pool.close()
    return seen


async def one(pool: Pool, model: str, number: int, cancelled: float, took_s: float) -> dict[str, Any]:
    """One request: read to its end, or left at a random moment."""
    chance = random.Random(-1 - number)
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": f"request {number} please"}],
    }
    body["n"] = chance.choice((1, 1, 1, 2, 3))
    body["stream"] = streamed = chance.random() < 0.6
    if asked := chance.random() < 0.5:
        body |= {"stream_options": {"include_usage": True}} if streamed else {}
    leaves = chance.random() < cancelled
    response = await pool.send(stage.PATH, orjson.dumps(body))
    found: dict[str, Any] = {
        "left": leaves,
        "streamed": streamed,
        "asked": asked,
        "status": 0,
        "usage": None,
        "times_told": 0,
    }
    if leaves:
        await asyncio.sleep(2 * took_s * chance.random())
        response.transport.abort() if chance.random() < 0.5 else response.transport.close()
        return found
    try:
        found["status"] = await response.head()
        data = b"".join([part async for part in response.chunks()])
    except Hangup:
        return found
    pool.keep(response)
    values = [data]
    if streamed:
        values = [
            line[6:] for line in data.split(b"\n") if line.startswith(b"data: ") and b"[DONE]" not in line
        ]
    told = [value["usage"] for value in map(orjson.loads, values) if value.get("usage")]
    found["usage"] = told[-1] if told else None
    found["times_told"] = len(told)
    return found


async def settled(server: Server) -> dict[str, float]:
    """The counters, once nothing is under way and they stay the same."""
    pool, before = Pool(server.url, server.key), None
    while True:
        await asyncio.sleep(0.15)
        response = await pool.send("/metrics", b"", "GET")
        await response.head()
        text = (await response.body()).decode()
        pool.keep(response)
        counted = {
            "prompt_tokens": total(text, "edgeft_tokens_total", 'direction="in"'),
            "completion_tokens": total(text, "edgeft_tokens_total", 'direction="out"'),
            "unresolved": total(text, "edgeft_usage_unresolved_total", ""),
            "requests": total(text, "edgeft_requests_total", ""),
        }
        if counted == before and not total(text, "edgeft_in_flight", ""):
            pool.close()
            return counted
        before = counted


def total(text: str, name: str, label: str) -> float:
    """The sum of a counter's samples that have a label."""
    lines = [
        line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} ")) and label in line
    ]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def compare(
    seen: dict[int, dict[str, Any]],
    calls: list[dict[str, Any]],
    counted: dict[str, float],
    found: Counter[str],
    wrong: Counter[str],
) -> None:
    """Add one batch's figures to `found`, and what does not fit to `wrong`."""
    by_id = {call["id"]: call for call in calls}
    for number, request in seen.items():
        if request["left"]:
            continue
        call = by_id.get(number)
        if request["status"] != 200 or call is None:
            wrong[f"status {request['status']}"] += 1
            continue
        tells = call["whole"] and (request["asked"] or not request["streamed"])
        expected = {f: call[f] for f in TOLD} if tells else None
        if (request["usage"] and {f: request["usage"][f] for f in TOLD}) != expected:
            wrong["told otherwise than the upstream"] += 1
        if request["times_told"] > 1:
            wrong["told more than once"] += 1
    sure = [c for c in calls if c["whole"] and not seen[c["id"]]["left"]]
    either = [c for c in calls if c["told"] and seen[c["id"]]["left"]]
    untold = [c for c in calls if not c["told"]]
    unreached = len(seen) - len(by_id)
    rest = tuple(round(counted[f]) - sum(c[f] for c in sure) for f in FIELDS)
    also = subset(either, rest)
    if also is None:
        wrong["batches whose sums no calls explain"] += 1
    else:
        listed = round(counted["unresolved"]) - len(untold) - (len(either) - also)
        if not 0 <= listed <= unreached:
            wrong["batches whose unresolved calls are not the rest"] += 1
    found.update(
        {
            "requests": len(seen),
            "left_by_the_client": sum(r["left"] for r in seen.values()),
            "calls_of_the_upstream": len(calls),
            "calls_asked_twice": len(calls) - len(by_id),
            "told_and_read_to_the_end": len(sure),
            "told_and_left": len(either),
            "told_and_left_but_counted": also or 0,
            "not_told": len(untold),
            "left_before_it_reached_the_upstream": unreached,
            "unresolved_counted": round(counted["unresolved"]),
            "prompt_tokens_counted": round(counted["prompt_tokens"]),
            "completion_tokens_counted": round(counted["completion_tokens"]),
        }
    )


def subset(calls: list[dict[str, Any]], sums: tuple[int, ...]) -> int | None:
    """How many calls a subset has whose tokens add up to `sums`, prompt and output; None where there is none. Of a call that told its usage
    more than once any one may have been the last to arrive."""
    reached = {(0, 0): 0}
    for call in calls:
        reached |= {
            (p + call["prompt_tokens"], o + told): size + 1
            for (p, o), size in list(reached.items())
            for told in call["told"]
        }
    return reached.get((sums[0], sums[1]))


if __name__ == "__main__":
    main()
