"""What one running proxy holds: the policy in force, who can answer, queues, counters. No HTTP."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.router import LoadedPolicy, State
from edgeft.router.cache.flight import Flights
from edgeft.serve.admission import Admission
from edgeft.serve.breaker import Breaker
from edgeft.serve.config import Config
from edgeft.serve.metrics import Metrics
from edgeft.serve.protocol import Asked
from edgeft.serve.upstream import Upstream

if TYPE_CHECKING:
    from edgeft.serve.cache import AnswerCache

AUTO = "auto"
MOST_CONVERSATIONS = 20_000
ABLE = ("ready", "unloaded")
OUT = ("paused", "ended", "failed", "restarting")


@dataclass
class Proxy:
    """`upstreams` may fill up after the start, as models load."""

    policy: LoadedPolicy
    upstreams: dict[str, Upstream]
    config: Config
    cache: AnswerCache | None = None
    semantic: Any = None  # Semantic
    keys: Any = None  # KeyStore
    metrics: Metrics = field(default_factory=Metrics)
    live: Any = None
    log: Any = None
    decisions: Any = None  # DecisionLog
    watch: Any = None  # drift and budget
    started_s: float = field(default_factory=time.monotonic)
    draining: bool = False
    reloads: int = 0
    reload_error: str | None = None

    def __post_init__(self) -> None:
        self.admissions: dict[str, Admission] = {}
        self.breakers: dict[str, Breaker] = {}
        self.flights: Flights[Any] = Flights()
        self.texts: OrderedDict[str, Any] = OrderedDict()  # text -> what was computed of it, in memory alone
        self.conversations: OrderedDict[int, str] = OrderedDict()  # hash of what was said -> who said it

    def state_of(self, candidate_id: str) -> str:
        """loading, unloaded, ready, restarting, paused (its breaker is open) or ended."""
        upstream = self.upstreams.get(candidate_id)
        if upstream is None:
            return "loading"
        if self.breaker(candidate_id).open_for_s():
            return "paused"
        return upstream.state()

    def admission(self, candidate_id: str) -> Admission:
        """The slots and the queue of a candidate."""
        found = self.admissions.get(candidate_id)
        if found is None:
            found = self.admissions[candidate_id] = Admission(
                self.upstreams[candidate_id].slots, self.config.limits.waiting
            )
        return found

    def breaker(self, candidate_id: str) -> Breaker:
        """The breaker of a candidate."""
        found = self.breakers.get(candidate_id)
        if found is None:
            found = self.breakers[candidate_id] = Breaker()
        return found

    def promised_s(self, candidate_id: str, asked: Asked) -> float | None:
        """The time to the first token that is promised to this request there."""
        own = asked.options.get("max_latency_s")
        named = self.config.model(candidate_id).ttft_s or self.config.limits.ttft_s
        return min((x for x in (own, named) if x is not None), default=None)

    def moment(self, removed: frozenset[str]) -> State:
        """What `decide` is to know of now. `removed` can't take this request, whatever their state."""
        unavailable = removed
        if out := [name for name in self.policy.candidates if self.state_of(name) in OUT]:
            unavailable = removed.union(out)
            if unavailable >= self.policy.candidates.keys() - removed:
                unavailable = removed  # nobody can: the one that is chosen says why
        queues = {name: wait for name, a in self.admissions.items() if (wait := a.wait_s())}
        price = self.watch.price_of_cost() if self.watch else None
        suspended = bool(self.watch and self.watch.suspended())
        return State(frozenset(unavailable), queues, price, suspended)

    def remember(self, conversation: int, candidate_id: str) -> None:
        """Who said the last word of a conversation."""
        self.conversations[conversation] = candidate_id
        self.conversations.move_to_end(conversation)
        if len(self.conversations) > MOST_CONVERSATIONS:
            self.conversations.popitem(last=False)

    def ready(self) -> tuple[bool, dict[str, str]]:
        """(able to answer now, state by candidate): nobody is loading for the first time, and somebody can answer."""
        states = {name: self.state_of(name) for name in self.policy.candidates}
        first_load = any(self.upstreams.get(name) is None for name in states)
        able = any(state in ABLE for state in states.values())
        return able and not first_load and not self.draining, states

    async def aclose(self) -> None:
        """End what stands behind."""
        for upstream in self.upstreams.values():
            await upstream.aclose()
        if self.cache:
            await self.cache.aclose()
        for book in (self.log, self.decisions):
            if book:
                book.close()


def default_config() -> Config:
    """Nothing but defaults, for tests and for embedding."""
    return Config(policy=Path("policy"))
