"""Who may use an engine now, who waits, who is told to come back.

In flight at most `slots`, waiting at most `waiting`, first come first served; the rest gets an
honest time to come back after, from the measured service times.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

FIRST_GUESS_S = 2.0
WEIGHT = 0.2  # of the newest service time in the running mean


class Busy(Exception):
    """The queue is full; `retry_after_s` is when there should be room."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"busy for about {retry_after_s} s")
        self.retry_after_s = retry_after_s


class Admission:
    """The slots of one engine and the queue before them. One event loop, no locks."""

    def __init__(self, slots: int, waiting: int) -> None:
        self.slots, self.waiting = slots, waiting
        self.in_flight = 0
        self.queue: deque[asyncio.Future[None]] = deque()
        self.service_s = FIRST_GUESS_S

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Hold a slot for the length of the block. Raises Busy where slots and queue are full."""
        await self._enter()
        started = time.monotonic()
        try:
            yield
        finally:
            self.service_s += WEIGHT * (time.monotonic() - started - self.service_s)
            self._leave()

    async def _enter(self) -> None:
        if self.in_flight < self.slots:
            self.in_flight += 1
            return
        if len(self.queue) >= self.waiting:
            raise Busy(max(1, math.ceil(self.service_s * (len(self.queue) + 1) / self.slots)))
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave()  # the slot was handed over in the same moment
            else:
                self.queue.remove(turn)
            raise

    def _leave(self) -> None:
        while self.queue:
            turn = self.queue.popleft()
            if not turn.done():
                turn.set_result(None)  # the slot passes on; in_flight stays
                return
        self.in_flight -= 1
