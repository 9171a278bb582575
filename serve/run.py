"""Run the proxy: check everything, listen, load the models, serve until told to end."""

from __future__ import annotations

import asyncio
import importlib.util
import ipaddress
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft import console
from edgeft.errors import UsageError, missing_extra
from edgeft.home import cache_dir

PACKAGES = ("starlette", "uvicorn", "orjson", "prometheus_client", "safetensors")
DRAIN_S = 20
BACKLOG = 512


@dataclass(frozen=True)
class Config:
    """What `serve` needs to know."""

    policy: Path
    host: str = "127.0.0.1"
    port: int = 8080  # 0: a free one
    cache: Path | None = None  # None: no cache
    threads: int | None = None  # of each local model; None: the engine's default
    context: int = 2048  # tokens, of each local model
    artifacts: Path | None = None  # where the artefacts lie, if not where the policy says


def serve(config: Config) -> int:
    """Serve until SIGTERM (returns 0) or SIGINT (returns 130); requests that run are finished first.

    Raises UsageError for a host that is not loopback, a taken port, a policy or artefact that is missing
    or changed; EnvironmentFault where a package is missing or a model does not load.
    """
    refuse_public(config.host)
    for package in (*PACKAGES, *(("diskcache",) if config.cache else ())):
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, "serve")
    import uvicorn

    from edgeft.router import load_policy
    from edgeft.serve.app import create_app
    from edgeft.serve.cache import AnswerCache
    from edgeft.serve.candidates import check
    from edgeft.serve.upstream import Upstream

    logging.getLogger("httpx").setLevel(logging.WARNING)
    policy = load_policy(config.policy)
    candidates = [check(c, config.artifacts) for c in policy.candidates.values()]
    bound = bind(config.host, config.port)
    try:
        upstreams: dict[str, Upstream] = {}
        app = create_app(policy, upstreams, AnswerCache(config.cache) if config.cache else None)
        settings = uvicorn.Config(
            app,
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=DRAIN_S,
        )

        class Server(uvicorn.Server):
            @contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield  # ours: uvicorn's would raise the signal again when all is done

        runner = Runner(Server(settings), upstreams, candidates, config)
        with asyncio.Runner(loop_factory=settings.get_loop_factory()) as loop:
            return loop.run(runner.run(bound))
    finally:
        bound.close()


class Runner:
    """One run: the server in the event loop, the models loading in a thread beside it."""

    def __init__(
        self, server: Any, upstreams: dict[str, Any], candidates: list[dict[str, Any]], config: Config
    ) -> None:
        self.server, self.upstreams, self.candidates, self.config = server, upstreams, candidates, config
        self.signal = 0
        self.failure: Exception | None = None

    async def run(self, bound: socket.socket) -> int:
        """Serve on the socket; returns the exit code. Raises what loading a model raised."""
        loop = asyncio.get_running_loop()
        for sign in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(sign, self.stop, sign)
        host, port = bound.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        loading = threading.Thread(target=self.load, args=(url,), daemon=True)
        loading.start()
        await self.server.serve(sockets=[bound])
        if loading.is_alive():
            end_children()  # the model that loads just now; its thread then ends with an error
            await asyncio.to_thread(loading.join, 10)
        for upstream in self.upstreams.values():
            await upstream.aclose()
        if self.failure and not self.signal:
            raise self.failure
        return 130 if self.signal == signal.SIGINT else 0

    def stop(self, sign: int) -> None:
        """End gracefully; a second signal ends at once."""
        self.server.force_exit = bool(self.signal)
        self.signal = self.signal or sign
        self.server.should_exit = True

    def load(self, url: str) -> None:
        """Start the candidates one after the other. Runs in a thread."""
        from edgeft.serve.candidates import start

        logs = cache_dir("logs")
        try:
            for candidate in self.candidates:
                if self.server.should_exit:
                    return
                with console.step(f"loading {candidate['id']}"):
                    upstream = start(candidate, logs, self.config.threads, self.config.context)
                self.upstreams[candidate["id"]] = upstream
            console.note(
                f"ready: {url}/v1, model 'auto' or {' or '.join(repr(name) for name in self.upstreams)}"
            )
            console.result({"url": url, "ready": True})
        except Exception as error:
            self.failure = error
            self.server.should_exit = True


def refuse_public(host: str) -> None:
    """Raise UsageError unless the host is this machine alone."""
    try:
        private = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        private = False
    if not private:
        raise UsageError(
            f"--host {host} would open the proxy to the network, and it asks nobody for a key yet.",
            "edgeft serve … --host 127.0.0.1, behind a proxy that checks keys",
        )


def bind(host: str, port: int) -> socket.socket:
    """A socket on the address. Raises UsageError where it is taken or not allowed."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise UsageError(
            f"{host}:{port} can't be listened on: {error.strerror}.", "--port 0 takes a free one"
        ) from None
    return bound


def end_children() -> None:
    """Kill the processes that this one has started."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
