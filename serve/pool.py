"""Local models as child processes: loaded when they are asked for, ended when idle or when their memory is needed, restarted when they die.

Plain asyncio, no HTTP. A process that dies is noticed by its pidfd; nothing polls.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeft.engines.local import LocalModel
from edgeft.engines.memory import estimated_bytes
from edgeft.serve.exits import on_exit

FIRST_BACKOFF_S, LONGEST_BACKOFF_S, HEALTHY_S = 0.5, 60.0, 60.0
BATCH_S = 0.25  # the contract about clients that leave: docs/engines.md
RETIRING_LOOK_S = 0.5
TYPICAL_LOAD_S = 10.0  # told to who doesn't wait, while no load was measured yet

UNLOADED, LOADING, READY, RESTARTING, FAILED = "unloaded", "loading", "ready", "restarting", "failed"


@dataclass(frozen=True)
class LocalSpec:
    """A local model and how it is run; `context` in tokens a slot."""

    id: str
    path: Path
    engine: str
    context: int
    log: Path
    threads: int | None = None
    slots: int = 1
    adapters: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


class NotReady(Exception):
    """The model can't answer now; `retry_after_s` says when to come again, `state` and the text say why."""

    def __init__(self, retry_after_s: float, state: str, reason: str) -> None:
        super().__init__(reason)
        self.retry_after_s, self.state = retry_after_s, state


# (spec, to be called with the model as soon as its process exists) -> the loaded model; runs in a thread
Starter = Callable[[LocalSpec, Callable[[Any], None]], Any]


def start(spec: LocalSpec, spawned: Callable[[Any], None]) -> LocalModel:
    """Load a model; blocks. Raises EnvironmentFault or UsageError where it can't be."""
    options = {"slots": spec.slots, "batch_s": BATCH_S, "adapters": dict(spec.adapters), **spec.options}
    return LocalModel(
        spec.path,
        spec.engine,
        log=spec.log,
        threads=spec.threads,
        context=spec.context,
        name=spec.id,
        options=options,
        spawned=spawned,
    )


@dataclass
class Loaded:
    """A running model and who uses it."""

    model: Any
    since: float  # monotonic
    users: int = 0
    idle_since: float | None = None  # monotonic
    unwatch: Callable[[], None] = lambda: None


@dataclass
class Entry:
    """What is known of one spec."""

    spec: LocalSpec
    state: str = UNLOADED
    loaded: Loaded | None = None
    spawned: Any = None  # while it loads
    task: asyncio.Task[None] | None = None  # the load, or the wait before a restart
    loads: int = 0
    restarts: int = 0
    failures: int = 0  # in a row
    retry_at: float = 0.0  # monotonic
    reason: str = ""
    load_s: float = TYPICAL_LOAD_S
    rss_bytes: int | None = None  # as last measured
    reserved_bytes: int = 0
    dropped: bool = False  # it is in no table any more: no load begins


class Pool:
    """The local models of one server. All methods belong to the thread of the event loop."""

    def __init__(
        self,
        specs: Sequence[LocalSpec],
        *,
        memory_bytes: int | None = None,
        idle_s: float | None = None,
        starter: Starter = start,
    ) -> None:
        self.entries = {spec.id: Entry(spec) for spec in specs}
        self.memory_bytes, self.idle_s, self.starter = memory_bytes, idle_s, starter
        self.closed = False
        self._room = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    def state(self, name: str) -> str:
        """unloaded, loading, ready, restarting (waiting to be) or failed (its load did)."""
        return self.entries[name].state

    def describe(self, name: str) -> dict[str, Any]:
        """For the page: what runs, who uses it, and how often it was loaded. Times are Unix times."""
        entry, loaded = self.entries[name], self.entries[name].loaded
        now, wall = time.monotonic(), time.time()
        return {
            "id": name,
            "engine": entry.spec.engine,
            "state": entry.state,
            "pid": loaded.model.pid if loaded else None,
            "rss_bytes": self._measure(entry) if loaded else None,
            "slots": loaded.model.slots if loaded else entry.spec.slots,
            "in_use": loaded.users if loaded else 0,
            "loads": entry.loads,
            "restarts": entry.restarts,
            "loaded_at": wall - (now - loaded.since) if loaded else None,
            "idle_since": wall - (now - loaded.idle_since) if loaded and loaded.idle_since else None,
            "retry_after_s": max(0.0, entry.retry_at - now) if entry.state in (RESTARTING, FAILED) else None,
            "reason": entry.reason or None,
        }

    @asynccontextmanager
    async def lease(self, name: str, wait_s: float | None = None) -> AsyncIterator[Any]:
        """The loaded model, which stays loaded meanwhile. Loads it where it is not, waiting at most `wait_s` (None: as long as it takes).

        Raises KeyError for a name that is none, NotReady where it waits for a restart, its load failed or takes longer, or
        memory is short.
        """
        entry = self.entries[name]
        loaded = await self._ready(entry, wait_s)
        loaded.users += 1
        loaded.idle_since = None
        try:
            yield loaded.model
        finally:
            loaded.users -= 1
            if loaded.users == 0:
                self._idle(entry, loaded)

    def spec(self, name: str) -> LocalSpec | None:
        """How a model is run; None where there is none of that name."""
        return self.entries[name].spec if name in self.entries else None

    async def prepared(self, spec: LocalSpec, load: bool) -> Entry:
        """An entry that is in no table yet, loaded beside what runs where `load`. Raises NotReady, and nothing has changed."""
        entry = Entry(spec)
        if load:
            await self._ready(entry, None)
        return entry

    def put(self, entry: Entry) -> None:
        """Take a model in, in place of one of its name: who uses the process of before keeps it to the end."""
        self.drop(entry.spec.id)
        self.entries[entry.spec.id] = entry

    def drop(self, name: str) -> None:
        """Forget a model; its process ends when nobody uses it any more."""
        if (entry := self.entries.pop(name, None)) is not None:
            entry.dropped = True
            self._spawn(self._retire(entry))

    async def _retire(self, entry: Entry) -> None:
        if entry.task:
            if entry.state == RESTARTING:
                entry.task.cancel()
            await asyncio.gather(entry.task, return_exceptions=True)
        while entry.loaded and entry.loaded.users and not self.closed:
            await asyncio.sleep(RETIRING_LOOK_S)
        await self._unload(entry)

    async def preload(self, names: Iterable[str]) -> None:
        """Load models one after the other. Raises NotReady for the first that can't be."""
        for name in names:
            await self._ready(self.entries[name], None)

    async def unload(self, name: str) -> None:
        """End a model's process where it runs, whoever uses it."""
        await self._unload(self.entries[name])

    async def aclose(self) -> None:
        """End all children, also those that are loading."""
        self.closed = True
        for entry in self.entries.values():
            if entry.task and entry.state == RESTARTING:
                entry.task.cancel()
            if entry.spawned is not None:
                await asyncio.to_thread(entry.spawned.close)
        pending = [e.task for e in self.entries.values() if e.task] + list(self._tasks)
        await asyncio.gather(*pending, return_exceptions=True)
        await asyncio.gather(*(self._unload(entry) for entry in self.entries.values()))

    async def _ready(self, entry: Entry, wait_s: float | None) -> Loaded:
        deadline = None if wait_s is None else time.monotonic() + wait_s
        while True:
            now = time.monotonic()
            if self.closed:
                raise NotReady(LONGEST_BACKOFF_S, entry.state, "the server is shutting down")
            if entry.dropped and entry.state != READY:
                raise NotReady(1.0, entry.state, f"{entry.spec.id} is run otherwise now")
            if entry.state == READY and entry.loaded:
                return entry.loaded
            if entry.state in (RESTARTING, FAILED) and now < entry.retry_at:
                raise NotReady(entry.retry_at - now, entry.state, entry.reason)
            if entry.state in (UNLOADED, FAILED):
                await self._make_room(entry)  # raises NotReady
                if entry.state in (UNLOADED, FAILED):
                    self._begin_load(entry)
            task = entry.task
            if task is None:
                await asyncio.sleep(0)
                continue
            left = None if deadline is None else max(0.0, deadline - now)
            done, _ = await asyncio.wait({task}, timeout=left)
            if not done:
                raise NotReady(max(1.0, entry.load_s), entry.state, "the model is still loading")
            if entry.state == FAILED:
                raise NotReady(max(0.0, entry.retry_at - time.monotonic()), FAILED, entry.reason)

    def _begin_load(self, entry: Entry) -> None:
        entry.state = LOADING
        entry.task = asyncio.get_running_loop().create_task(self._load(entry))

    async def _load(self, entry: Entry) -> None:
        """Load in a thread; ends in READY or FAILED, raises nothing."""
        loop, begun = asyncio.get_running_loop(), time.monotonic()

        def spawned(model: Any) -> None:
            entry.spawned = model
            if self.closed:
                model.close()

        try:
            model = await asyncio.to_thread(self.starter, entry.spec, spawned)
        except Exception as error:
            reason = getattr(error, "message", type(error).__name__)
            said = reason if "did not load" in reason else f"{entry.spec.id} did not load: {reason}"
            self._failed(entry, said)
            return
        finally:
            entry.spawned, entry.reserved_bytes = None, 0
        now = time.monotonic()
        entry.loads, entry.load_s, entry.reason = entry.loads + 1, now - begun, ""
        loaded = Loaded(model, now)
        entry.loaded, entry.state, entry.task = loaded, READY, None
        loaded.unwatch = on_exit(loop, model.process, lambda: self._died(entry, loaded))
        self._measure(entry)
        self._idle(entry, loaded)

    def _failed(self, entry: Entry, reason: str) -> None:
        entry.failures += 1
        entry.retry_at = time.monotonic() + backoff_s(entry.failures)
        entry.state, entry.reason, entry.task = FAILED, reason, None

    def _died(self, entry: Entry, loaded: Loaded) -> None:
        """The process has ended by itself: again after a pause, which doubles with each death within a minute of its load."""
        if entry.loaded is not loaded:
            return
        loaded.unwatch()
        now = time.monotonic()
        entry.failures = 1 if now - loaded.since >= HEALTHY_S else entry.failures + 1
        pause = backoff_s(entry.failures)
        entry.loaded, entry.state, entry.retry_at = None, RESTARTING, now + pause
        entry.reason = f"the engine's process of {entry.spec.id} ended"
        entry.restarts += 1
        self._spawn(asyncio.to_thread(loaded.model.close))
        if entry.dropped:
            return
        entry.task = asyncio.get_running_loop().create_task(self._restart(entry, pause))

    async def _restart(self, entry: Entry, pause: float) -> None:
        await asyncio.sleep(pause)
        try:
            await self._make_room(entry)
        except NotReady:  # its memory was given away meanwhile: when it is asked for
            entry.state, entry.task = UNLOADED, None
            return
        entry.state = LOADING
        await self._load(entry)

    def _idle(self, entry: Entry, loaded: Loaded) -> None:
        """Note that nobody uses it now, and end it after `idle_s`."""
        loaded.idle_since = since = time.monotonic()
        if self.idle_s is None or self.closed:
            return

        def look() -> None:
            if entry.loaded is loaded and loaded.users == 0 and loaded.idle_since == since:
                self._spawn(self._unload(entry))

        asyncio.get_running_loop().call_later(self.idle_s, look)

    async def _unload(self, entry: Entry) -> None:
        loaded = entry.loaded
        if loaded is None:
            return
        self._measure(entry)
        loaded.unwatch()
        entry.loaded, entry.state, entry.failures = None, UNLOADED, 0
        await asyncio.to_thread(loaded.model.close)

    async def _make_room(self, entry: Entry) -> None:
        """End what is idle longest until the model fits, and keep its room. Raises NotReady where it can't."""
        if self.memory_bytes is None:
            return
        async with self._room:
            if entry.state in (LOADING, READY):
                return
            spec, needed = entry.spec, entry.rss_bytes or 0
            if not needed:
                tokens = spec.context * spec.slots
                needed = await asyncio.to_thread(estimated_bytes, spec.path, spec.engine, tokens)
            if needed > self.memory_bytes:
                raise NotReady(
                    LONGEST_BACKOFF_S,
                    entry.state,
                    f"{spec.id} takes about {needed / 1e9:.1f} GB and {self.memory_bytes / 1e9:.1f} GB are allowed",
                )
            while self._used(entry) + needed > self.memory_bytes:
                idle = [
                    e for e in self.entries.values() if e.loaded and e.loaded.users == 0 and e is not entry
                ]
                if not idle:
                    raise NotReady(
                        1.0, entry.state, f"there is no memory for {spec.id}: other models are in use"
                    )
                await self._unload(min(idle, key=lambda e: e.loaded.idle_since or 0.0))  # type: ignore[union-attr]
            entry.reserved_bytes = needed

    def _used(self, but: Entry) -> int:
        """Bytes of what runs, and of what is about to."""
        return sum(
            max(entry.reserved_bytes, self._measure(entry) if entry.loaded else 0)
            for entry in self.entries.values()
            if entry is not but
        )

    def _measure(self, entry: Entry) -> int:
        """Resident bytes of a model's processes now."""
        from edgeft import child

        assert entry.loaded
        found = child.resident(child.process_tree(entry.loaded.model.pid))[0]
        if found:
            entry.rss_bytes = found
        return found

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def backoff_s(failures: int) -> float:
    """The pause after so many failures in a row: 0.5 s, doubled each time, at most 60 s."""
    return float(min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 30)))
