"""Which slot of a llama.cpp engine takes a request, so that what one tenant has prefilled is reused by the same tenant alone.

A slot keeps the keys and values of the conversation it had last. A request goes to the free slot of its tenant that shares the
longest beginning; where there is none, to one that nobody used or that was unused longest, and the engine is told not to look at
what lies there (`cache_prompt: false`): neither its text nor its timing can reach another tenant.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson


@dataclass
class Slot:
    """What lies in one slot."""

    owner: tuple[str | None, str | None] | None = None  # (tenant, adapter); None: nothing yet
    chain: tuple[bytes, ...] = ()
    used: int = 0
    taken: bool = False


@dataclass
class Slots:
    """The slots of one engine's process."""

    slots: list[Slot]
    turn: int = 0

    @staticmethod
    def of(count: int) -> Slots:
        """So many empty ones."""
        return Slots([Slot() for _ in range(count)])

    def take(self, tenant: str | None, adapter: str | None, chain: tuple[bytes, ...]) -> tuple[int, bool]:
        """(slot, whether what lies in it may be used). One is free: admission has seen to it."""
        owner = (tenant, adapter)
        free = [i for i, slot in enumerate(self.slots) if not slot.taken]

        def rank(i: int) -> tuple[int, int, int]:
            slot = self.slots[i]
            shared = common(slot.chain, chain) if slot.owner == owner else 0
            return (shared, slot.owner is None, -slot.used)

        best = max(free, key=rank)
        slot = self.slots[best]
        mine = slot.owner == owner
        self.turn += 1
        slot.owner, slot.chain, slot.used, slot.taken = owner, chain, self.turn, True
        return best, mine

    def give(self, index: int, filled: bool) -> None:
        """The request in this slot is done. What it said stays there; where the engine may never have touched it, what does is not known."""
        slot = self.slots[index]
        slot.taken = False
        if not filled:
            slot.owner, slot.chain = None, ()

    def forget(self) -> None:
        """The process was started anew."""
        for slot in self.slots:
            slot.owner, slot.chain = None, ()


def chain_of(messages: Sequence[Mapping[str, Any]], tools: Any = None) -> tuple[bytes, ...]:
    """A hash for each beginning of a conversation: after the tools, after each message."""
    running = hashlib.blake2b(orjson.dumps(tools), digest_size=8)
    chain = [running.digest()]
    for message in messages:
        running.update(orjson.dumps(message, option=orjson.OPT_SORT_KEYS))
        chain.append(running.digest())
    return tuple(chain)


def common(one: tuple[bytes, ...], two: tuple[bytes, ...]) -> int:
    """How many beginnings are alike."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two))
    )
