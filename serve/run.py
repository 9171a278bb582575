"""Run the proxy: check everything, listen, load the models, serve until told to end; read the configuration again on SIGHUP."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import importlib.util
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edgeft import console
from edgeft.errors import UsageError, missing_extra
from edgeft.home import cache_dir
from edgeft.serve.config import Config, secret

PACKAGES = ("starlette", "uvicorn", "orjson", "prometheus_client", "safetensors", "httptools")
BACKLOG = 2048
M_ARENA_MAX = -8  # of mallopt(3), in glibc's malloc.h
log = logging.getLogger("edgeft.serve")


def serve(config: Config, reread: Any = None) -> int:
    """Serve until SIGTERM (returns 0) or SIGINT (returns 130); requests that were accepted are finished first.

    `reread()` gives the configuration anew on SIGHUP. Raises UsageError for a host that is not loopback where no key is asked for, a taken
    port, a policy or artefact that is missing or changed; EnvironmentFault where a package is missing or a model does not load.
    """
    refuse_public(config)
    for package in (*PACKAGES, *(("diskcache",) if config.cache.enabled else ())):
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, "serve")
    import uvicorn

    from edgeft.serve.running import Running
    from edgeft.serve.writes import HeadHeldProtocol

    one_arena()
    running = Running(config)
    bound = bind(config.listen.host, config.listen.port)
    try:
        app = running.start()
        settings = uvicorn.Config(
            app,
            http=HeadHeldProtocol,
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            date_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=round(config.listen.drain_s),
            ssl_certfile=config.listen.tls_certificate,
            ssl_keyfile=config.listen.tls_key,
        )

        class Server(uvicorn.Server):
            @contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield  # ours: uvicorn's would raise the signal again when all is done

        settings.load()
        runner = Runner(Server(settings), running, reread)
        with asyncio.Runner(loop_factory=settings.get_loop_factory()) as loop:
            return loop.run(runner.run(bound))
    finally:
        bound.close()


def one_arena() -> None:
    """Have glibc take all memory from one pool: freed pieces of one thread's are no use to another's, and a proxy that runs for weeks must
    not grow by them (what soaks showed: docs/benchmarks.md). Other C libraries: nothing."""
    if "MALLOC_ARENA_MAX" in os.environ:
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


class Runner:
    """One run: the server in the event loop, signals, the models loading beside it."""

    def __init__(self, server: Any, running: Any, reread: Any) -> None:
        self.server, self.running, self.reread = server, running, reread
        self.signal = 0
        self.failure: Exception | None = None
        self.tasks: set[asyncio.Task[None]] = set()
        self.turn = asyncio.Lock()
        self.loading: asyncio.Task[None] | None = None

    async def run(self, bound: socket.socket) -> int:
        """Serve on the socket; returns the exit code. Raises what loading a model raised."""
        loop = asyncio.get_running_loop()
        for sign in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(sign, self.stop, sign)
        loop.add_signal_handler(signal.SIGHUP, lambda: self.begin(self.reload()))
        host, port = bound.getsockname()[:2]
        scheme = "https" if self.running.config.listen.tls_certificate else "http"
        url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        self.loading = loading = self.begin(self.load(url))
        self.begin(self.running.look_after())
        await self.server.serve(sockets=[bound])
        if not loading.done():
            await self.running.aclose()  # ends the model that loads just now
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.running.aclose()
        if self.failure and not self.signal:
            raise self.failure
        return 130 if self.signal == signal.SIGINT else 0

    def begin(self, work: Any) -> asyncio.Task[None]:
        """Run something beside the server."""
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def stop(self, sign: int) -> None:
        """End gracefully; a second signal ends at once."""
        self.server.force_exit = bool(self.signal)
        self.signal = self.signal or sign
        self.running.proxy.draining = True
        self.server.should_exit = True

    async def load(self, url: str) -> None:
        """Start the candidates that are to be there from the beginning."""
        try:
            names = await self.running.load()
            console.note(f"ready: {url}/v1, model 'auto' or {' or '.join(repr(name) for name in names)}")
            console.result({"url": url, "ready": True})
            # What is loaded stays: the collector need not walk through it again for every few hundred requests.
            gc.collect()
            gc.freeze()
            gc.set_threshold(20_000, 20, 50)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self.failure = error
            self.server.should_exit = True

    async def reload(self) -> None:
        """Take a new configuration and policy; what is wrong leaves everything as it is. One at a time, after the first load."""
        async with self.turn:
            if self.loading:
                await asyncio.wait({self.loading})
            proxy = self.running.proxy
            try:
                await self.running.reload(self.reread() if self.reread else self.running.config)
                proxy.reloads, proxy.reload_error = proxy.reloads + 1, None
                console.note("reloaded")
                log.info("reloaded")
            except Exception as error:
                proxy.reload_error = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
                console.note(f"not reloaded: {proxy.reload_error}")
                log.error("not reloaded: %s", proxy.reload_error)


def refuse_public(config: Config) -> None:
    """Raise UsageError unless the host is this machine alone, or keys are asked for."""
    host = config.listen.host
    try:
        private = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        private = False
    if not private and not config.keys.required:
        raise UsageError(
            f"the host {host} would open the proxy to the network, and it asks nobody for a key.",
            "keys: {required: true} in edgeft.yaml, and edgeft keys create NAME",
        )


def bind(host: str, port: int) -> socket.socket:
    """A socket on the address. Raises UsageError where it is taken or not allowed."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(
            f"{host}:{port} can't be listened on: {error.strerror}.", "--host 127.0.0.1"
        ) from None
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


def open_cache(config: Config) -> Any:
    """The store of answers, or None."""
    from edgeft.serve.cache import AnswerCache

    settings = config.cache
    if not settings.enabled:
        return None
    store: Any
    if url := secret(settings.redis_env, None, "the address of Redis"):
        from edgeft.router.cache.shared import InLoop, RedisCache

        store = InLoop(RedisCache(url))
    else:
        from edgeft.router.cache.exact import ExactCache

        store = ExactCache(settings.folder or cache_dir("answers"), settings.size_bytes)
    return AnswerCache(store, settings)


def open_keys(config: Config) -> Any:
    """Who may ask, or None where nobody has a key and none is needed."""
    from edgeft.serve.keys import KeyStore, default_path, prepare

    path = config.keys.database or default_path()
    if not config.keys.required and not path.exists():
        return None
    if not path.exists():
        prepare(path)
    store = KeyStore(path)
    if config.keys.required and not len(store):
        console.note("there are no keys yet, so everybody is refused: edgeft keys create NAME")
    return store


def reader(path: Path | None, given: Config) -> Any:
    """What gives the configuration anew: the file, or what was given on the command line."""
    if path is None:
        return lambda: given
    from edgeft.serve.config_file import load

    return lambda: load(path)
