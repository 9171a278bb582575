"""Who may use an engine now, who waits, who is told to come back.

In flight at most `slots`, waiting at most `waiting`, first come first served. What is expected to begin later than was promised is
refused before it waits, with an honest time to come back after, from measured service times.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from contextlib import suppress

FIRST_GUESS_S = 2.0
WEIGHT = 0.2  # of the newest service time in the running mean
SURE = 2.0  # mean deviations above the mean that a promise allows for
KEPT_BACK = (
    0.15  # of what was promised, for what the estimate does not see: two prompts read at once, a busy machine
)


class Busy(Exception):
    """There is no room, or none within what was promised; `retry_after_s` is when there should be."""

    def __init__(self, retry_after_s: float, why: str = "queue_full") -> None:
        super().__init__(f"busy for about {retry_after_s:.1f} s")
        self.retry_after_s, self.why = max(1.0, retry_after_s), why


class Turn:
    """One request's use of a slot, held for the length of its block. Times are of the monotonic clock."""

    def __init__(self, admission: Admission, prompt_tokens: int, promised_s: float | None) -> None:
        self.admission, self.prompt_tokens, self.promised_s = admission, prompt_tokens, promised_s
        self.began_s, self.ended_s = 0.0, None  # type: float, float | None

    async def __aenter__(self) -> Turn:
        await self.admission.enter(self.prompt_tokens, self.promised_s)
        self.begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.admission.leave(None if self.ended_s is None else self.ended_s - self.began_s)

    def begin(self) -> None:
        """The engine is there: its time runs from now."""
        self.began_s = time.monotonic()

    def done(self) -> None:
        """It answered."""
        self.ended_s = time.monotonic()


class Admission:
    """The slots of one engine and the queue before them. One event loop, no locks."""

    def __init__(self, slots: int, waiting: int) -> None:
        self.slots, self.waiting = slots, waiting
        self.in_flight = 0
        self.queue: deque[asyncio.Future[None]] = deque()
        self.service_s, self.deviation_s = FIRST_GUESS_S, FIRST_GUESS_S / 2
        self.s_per_prompt_token: float | None = None  # from slot to first token; None until one was seen
        self.seen = 0

    def wait_s(self) -> float:
        """How long a newcomer would wait for a slot: k answers end before it begins, at `slots` at a time. Mean and mean deviation are
        running ones, as in TCP's retransmission timer (Jacobson 1988); deviations of k answers add up as sqrt(k)."""
        if self.in_flight < self.slots:
            return 0.0
        k = len(self.queue) + 1
        return (k * self.service_s + SURE * math.sqrt(k) * self.deviation_s) / self.slots

    def ttft_s(self, prompt_tokens: int) -> float:
        """Expected time to the first token of a newcomer."""
        return self.wait_s() + prompt_tokens * (self.s_per_prompt_token or 0.0)

    def refuse(self, prompt_tokens: int = 0, promised_s: float | None = None) -> Busy | None:
        """Why a newcomer may not come in, or None."""
        if self.in_flight >= self.slots and len(self.queue) >= self.waiting:
            return Busy(self.service_s * (len(self.queue) + 1) / self.slots)
        if promised_s is not None and not self.seen and self.in_flight >= self.slots:
            return Busy(
                self.service_s, "ttft"
            )  # no answer was timed yet: nothing can be promised but a free slot
        if (
            promised_s is not None
            and self.in_flight
            and (expected := self.ttft_s(prompt_tokens)) > (1 - KEPT_BACK) * promised_s
        ):
            return Busy(expected - promised_s, "ttft")
        return None

    def first(self, prompt_tokens: int, seconds: float) -> None:
        """The first token of an answer came so long after its slot was taken."""
        rate = seconds / max(1, prompt_tokens)
        known = self.s_per_prompt_token
        self.s_per_prompt_token = rate if known is None else known + WEIGHT * (rate - known)

    def slot(self, prompt_tokens: int = 0, promised_s: float | None = None) -> Turn:
        """A slot for the length of an `async with`, which raises Busy as `refuse` says. Only a block that calls `done` counts as a
        service time."""
        return Turn(self, prompt_tokens, promised_s)

    async def enter(self, prompt_tokens: int, promised_s: float | None) -> None:
        """Take a slot, or wait for one."""
        if busy := self.refuse(prompt_tokens, promised_s):
            try:
                raise busy
            finally:
                del busy  # no circle of it, its traceback and this frame: collecting thousands of those stops everybody
        if self.in_flight < self.slots:
            self.in_flight += 1
        else:
            await self._queue()

    def leave(self, served_s: float | None) -> None:
        """Give a slot back; `served_s` is None where nothing was served."""
        if served_s is not None:
            self._served(served_s)
        self._leave()

    def _served(self, seconds: float) -> None:
        self.seen += 1
        if self.seen == 1:
            self.service_s, self.deviation_s = seconds, seconds / 2
            return
        off = seconds - self.service_s
        self.service_s += WEIGHT * off
        self.deviation_s += WEIGHT * (abs(off) - self.deviation_s)

    async def _queue(self) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave()  # the slot was handed over in the same moment
            else:
                with suppress(ValueError):  # left in the same moment as the one who would have handed over
                    self.queue.remove(turn)
            raise

    def _leave(self) -> None:
        while self.queue and self.in_flight <= self.slots:
            turn = self.queue.popleft()
            if not turn.done():
                turn.set_result(None)  # the slot passes on; in_flight stays
                return
        self.in_flight -= 1
