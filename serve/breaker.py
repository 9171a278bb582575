"""Who is not asked for a while because it failed.

Closed until FAILURES in a row; then open for a time that doubles with each trial that fails; when it is over one request is let
through, whose success closes it. Only faults of the upstream count: what a client did wrong does not.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

FAILURES = 4
FIRST_S, LONGEST_S = 2.0, 60.0


@dataclass
class Breaker:
    """The state of one upstream. Times are of the monotonic clock."""

    failures: int = 0
    pause_s: float = FIRST_S
    until_s: float = 0.0
    trying: bool = False  # a trial is under way
    generation: int = 0  # of the process that it speaks of
    at_limit: bool = False  # it was not broken: it asked to be left alone

    def open_for_s(self) -> float:
        """Seconds until it may be asked again; 0 where it may now."""
        if self.failures < FAILURES:
            return 0.0
        left = self.until_s - time.monotonic()
        return left if left > 0 else (0.5 if self.trying else 0.0)

    def begin(self) -> None:
        """A request goes out."""
        if self.failures >= FAILURES:
            self.trying = True

    def good(self) -> None:
        """It answered."""
        self.failures, self.pause_s, self.trying = 0, FIRST_S, False

    def bad(self, retry_after_s: float | None = None, at_limit: bool = False) -> None:
        """It failed; it may have said how long it wants to be left alone."""
        if self.failures >= FAILURES and self.until_s > time.monotonic():
            return  # one of those that were under way when it opened
        self.failures += 1
        self.at_limit = at_limit
        self.trying = False
        if retry_after_s:
            self.failures = max(self.failures, FAILURES)
            self.until_s = time.monotonic() + min(retry_after_s, LONGEST_S)
        elif self.failures >= FAILURES:
            self.until_s = time.monotonic() + self.pause_s
            self.pause_s = min(2 * self.pause_s, LONGEST_S)

    def half(self) -> None:
        """It is said to be back: the next request tries it."""
        self.until_s = 0.0

    def neither(self) -> None:
        """The request ended without telling, as when its client left."""
        self.trying = False
