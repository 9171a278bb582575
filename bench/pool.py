"""Running models, as many at a time as memory holds, so that artefacts can be measured in turns.

The one that was used longest ago ends where another needs its room. What does not fit even alone is refused before it
is loaded, with the number.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.bench.callers import Caller, caller
from edgeft.bench.targets import Target
from edgeft.engines.local import LocalModel
from edgeft.engines.memory import FIXED_BYTES
from edgeft.errors import EnvironmentFault

GB = 1_000_000_000


@dataclass
class Running:
    """A model that answers; `local` is None for one on another machine."""

    ask: Caller
    local: LocalModel | None
    stack: ExitStack
    last_used: int = 0


class Pool:
    """The models that run now."""

    def __init__(self, threads: int | None, context: int, log_of: Callable[[Target], Path]) -> None:
        self.threads, self.context, self.log_of = threads, context, log_of
        self.running: dict[str, Running] = {}
        self.uses = 0

    @contextmanager
    def use(self, target: Target) -> Iterator[Running]:
        """The running target, its memory sampled meanwhile; started where it is not running yet.

        Raises EnvironmentFault where it does not fit or does not load.
        """
        if target.id not in self.running:
            self._room_for(target)
            stack = ExitStack()
            ask, local = stack.enter_context(caller(target, self.log_of(target), self.threads, self.context))
            self.running[target.id] = Running(ask, local, stack)
        found = self.running[target.id]
        self.uses += 1
        found.last_used = self.uses
        memory = found.local.memory if found.local else None
        if memory:
            memory.paused = False
        try:
            yield found
        except EnvironmentFault:
            self.end(target)
            raise
        finally:
            if memory:
                memory.paused = True

    def _room_for(self, target: Target) -> None:
        if target.path is None:
            return
        needed = need_bytes(target)
        while free_bytes() < needed and self.running:
            oldest = min(self.running, key=lambda name: self.running[name].last_used)
            self._close(oldest)
        refuse_without_room(target)

    def end(self, target: Target) -> None:
        """End the target where it runs."""
        if target.id in self.running:
            self._close(target.id)

    def _close(self, name: str) -> None:
        self.running.pop(name).stack.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.running):
            self._close(name)


def refuse_without_room(target: Target, copies: int = 1) -> None:
    """Raise EnvironmentFault where so many processes of the target have no room now."""
    needed, free = copies * need_bytes(target), free_bytes()
    if free < needed:
        raise EnvironmentFault(
            f"{target.id} needs about {needed / GB:.1f} GB of memory, and {free / GB:.1f} GB are free.",
            "free some, or take a smaller artefact: edgeft compress … --fit SIZE",
        )


def need_bytes(target: Target) -> int:
    """About how much memory a target takes to run: its weights as its engine holds them, and what stands beside them.

    transformers holds a model in float32 (a quantized one as it is); GGUF files are mapped, and slow where they can't stay.
    """
    weights = float(target.size_bytes or 0)
    if target.engine == "transformers" and target.facts.get("format") == "safetensors":
        weights = 4.0 * target.facts.get("parameters", weights / 2)
    return int(weights + FIXED_BYTES.get(target.engine, 0.5 * GB))


def free_bytes() -> int:
    """Memory that can still be had here, the control group's limit included."""
    from edgeft.profiles.detection import memory_facts

    return int(
        memory_facts({})["available_bytes"] or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )


def drop_from_cache(path: Path) -> bool:
    """Ask the kernel to forget a model's file pages, so that the next start reads the disk; False where it can't be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    files: list[Any] = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return True
