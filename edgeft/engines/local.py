"""The parent's side of an engine: a local model as a child process with an address."""

from __future__ import annotations

import json
import os
import secrets
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.device import device_of
from edgeft.engines.run_profile import options_for
from edgeft.errors import BY_NAME, EnvironmentFault

START_DEADLINE_S = 600.0


class LocalModel:
    """A model that is loaded and listens on `url`; a context manager that ends its process.

    Attributes: url, port, key, pid, cold_start_s (spawning to ready, imports included), load_s (inside the
    child, imports of the engine included), build (the engine's name and version), load_mode, slots (requests at a time), batch
    (tokens of a prompt read at once, where the engine says it), device (a GPU's name, or 'cpu'), features (what it
    can do: docs/engines.md), memory (its peak, sampled from the start, with `sample_memory`).
    Raises EnvironmentFault where the engine can't load the folder.
    """

    def __init__(
        self,
        folder: Path,
        engine: str,
        *,
        log: Path,
        threads: int | None = None,
        context: int = 2048,
        name: str = "",
        sample_memory: bool = False,
        options: dict[str, Any] | None = None,
        spawned: Callable[[LocalModel], None] = lambda _: None,
    ) -> None:
        """`spawned` is called as soon as there is a process: another thread may then end a load by `close`."""
        self.folder, self.log = folder, log
        self.key = secrets.token_urlsafe(24)
        asked = dict(options or {})
        profile = options_for(folder, engine) if asked.pop("run_profile", True) and threads is None else {}
        self.run_profile = profile
        self.engine = profile.get("engine", engine)
        group = asked.pop("group", None)  # a control group that the process is put into before it loads
        self.options: dict[str, Any] = {
            "threads": threads or default_threads(),
            "context": context,
            "key": self.key,
            "name": name or folder.name,
            **{key: value for key, value in profile.items() if key != "engine"},
            **asked,
        }
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "edgeft.engines.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                env={**os.environ, **child.ENVIRONMENT, "HF_HUB_OFFLINE": "1"},
                start_new_session=True,
            )
        self.pid = self.process.pid
        if group:
            Path(group, "cgroup.procs").write_text(str(self.pid))
        self.memory = child.PeakMemory(self.pid) if sample_memory else None
        try:
            spawned(self)
            reply = self._order({"engine": self.engine, "folder": str(folder), "options": self.options})
        except BaseException:
            self.close()
            raise
        self.cold_start_s = time.monotonic() - started
        self.port = int(reply["port"])
        self.url = f"http://127.0.0.1:{self.port}"
        self.load_s = float(reply["load_s"])
        self.build = str(reply["build"])
        self.load_mode = str(reply["load_mode"])
        self.device = str(reply.get("device") or device_of(self.pid))
        self.slots = int(reply.get("slots", 1))
        self.batch: int | None = reply.get("batch")
        self.features: dict[str, Any] = reply.get("features", {})

    def _order(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], START_DEADLINE_S)
        line = self.process.stdout.readline() if ready else b""
        if not line:
            raise EnvironmentFault(
                f"{self.folder.name} did not load: {child.last_line(self.log)}", f"less {self.log}"
            )
        reply = json.loads(line)
        if "error" in reply:
            raise BY_NAME[reply["error"]](reply["message"], reply["hint"])
        if "failed" in reply:
            raise EnvironmentFault(f"{self.folder.name} did not load: {reply['failed']}", f"less {self.log}")
        return reply

    def fields(
        self, *, adapter: str | None = None, slot: int | None = None, stream: bool = True
    ) -> dict[str, Any]:
        """What to add to a request's body: its adapter (None: the base), its slot, and being told of a prompt's progress.

        llama.cpp's server sees that a client has left before the first token only while it reports progress; drop the chunks with
        `prompt_progress`. A request that names no adapter would be answered out of the slot's cache of another one, so
        each names them all. Raises KeyError for an adapter that is not loaded.
        """
        named: list[str] = self.features.get("adapters", [])
        if adapter is not None and adapter not in named:
            raise KeyError(adapter)
        found: dict[str, Any] = {}
        if named:
            found["lora"] = [
                {"id": index, "scale": float(name == adapter)} for index, name in enumerate(named)
            ]
        if slot is not None and self.features.get("id_slot"):
            found["id_slot"] = slot
        if stream and self.features.get("prompt_progress"):
            found["return_progress"] = True
        return found

    def alive(self) -> bool:
        """True while the process runs."""
        return self.process.poll() is None

    def close(self) -> None:
        """End the process; `memory.peak` keeps what it took at most."""
        if self.memory:
            self.memory.stop()
        if self.process.stdin:
            try:
                self.process.stdin.close()
            except OSError:
                pass
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            child.end_group(self.process)
        if self.process.stdout:
            self.process.stdout.close()

    def __enter__(self) -> LocalModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def default_threads() -> int:
    """Physical cores that this process may use: hyper-threads slow decoding down."""
    import psutil

    allowed = usable_cores()
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


def usable_cores() -> int:
    """Logical cores that this process may use: `taskset` and a container's cpuset count."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
