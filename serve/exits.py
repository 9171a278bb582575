"""To be told when a child process has ended, without polling."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from typing import Any


def on_exit(loop: asyncio.AbstractEventLoop, process: Any, then: Callable[[], None]) -> Callable[[], None]:
    """Call `then` in the loop when a process ends; returns what stops watching. Linux tells it by a pidfd, elsewhere a thread waits."""
    if hasattr(os, "pidfd_open"):
        try:
            descriptor = os.pidfd_open(process.pid)
        except OSError:  # gone already, or a kernel without it
            descriptor = -1
        if descriptor >= 0:
            watching = [True]

            def stop() -> None:
                if watching.pop() if watching else False:
                    loop.remove_reader(descriptor)
                    os.close(descriptor)

            def ended() -> None:
                stop()
                then()

            loop.add_reader(descriptor, ended)
            return stop
    active = threading.Event()
    active.set()

    def wait() -> None:
        process.wait()
        if active.is_set() and not loop.is_closed():
            loop.call_soon_threadsafe(lambda: then() if active.is_set() else None)

    threading.Thread(target=wait, daemon=True).start()
    return active.clear
