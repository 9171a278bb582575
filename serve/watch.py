"""Drift and budget of the policy in force: told of every decision, asked before the next one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from edgeft.router import LoadedPolicy, Request
from edgeft.router.heads import Features, cluster_of
from edgeft.router.watching import watches
from edgeft.types import Decision

log = logging.getLogger("edgeft.serve")


class Watch:
    """One policy's. `suspend(why)` is called once, in a thread, when drift ends the certificate: it writes the one field."""

    def __init__(self, policy: LoadedPolicy, suspend: Callable[[str], object] | None = None) -> None:
        self.policy = policy
        self.drift, self.budget = watches(policy)
        self.suspend = suspend
        self.task: asyncio.Task[object] | None = None

    def saw(
        self,
        decision: Decision,
        request: Request,
        features: Features,
        cost_usd: float | None,
    ) -> None:
        """A request that was decided is over."""
        if self.drift.known is not None:
            self._look(decision, request, features)
        if self.budget is not None:
            self.budget.saw(decision, time.monotonic(), cost_usd)

    def _look(self, decision: Decision, request: Request, features: Features) -> None:
        before, cluster = self.drift.suspended_because, cluster_of(self.policy, features)
        if self.drift.saw(decision, len(request.text), features.similarity, cluster) and before is None:
            why = str(self.drift.suspended_because)
            log.error("the certificate is suspended: drift in %s", why)
            if self.suspend is not None:
                self.task = asyncio.ensure_future(asyncio.to_thread(self._write, why))

    def _write(self, why: str) -> None:
        assert self.suspend is not None
        try:
            self.suspend(f"drift in {why}")
        except Exception as error:
            log.error("the suspension could not be written: %s", type(error).__name__)

    def suspended(self) -> str | None:
        """Why drift has suspended the certificate, or None."""
        return self.drift.suspended_because

    def price_of_cost(self) -> float | None:
        """λ where the budget needs one."""
        return self.budget.price_of_cost if self.budget else None
