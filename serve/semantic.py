"""Answers to questions that mean the same: what serving adds to `edgeft.router.cache.semantic`. Off unless a calibration is named.

Only where the exact cache could have answered (so never private or, unless allowed, sampled requests). A share of hits is asked again;
where the two answers differ too often for the budget, the cache switches itself off and says so.
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass
from pathlib import Path

from edgeft.router.cache.semantic import Audit, SemanticCache, partition_of
from edgeft.router.drafts import agree
from edgeft.serve.answer import Answer
from edgeft.serve.cache import adapter_key
from edgeft.serve.choose import Plan
from edgeft.serve.protocol import CHAT, Asked

AUDITED = 0.05  # of hits
log = logging.getLogger("edgeft.serve")


@dataclass
class Semantic:
    """The questions in memory, and the audit."""

    cache: SemanticCache
    audited: float = AUDITED

    def place(self, asked: Asked, plan: Plan) -> tuple[str, str] | None:
        """(partition, question), or None where only the exact cache may answer."""
        if asked.kind is not CHAT or self.cache.audit.off:
            return None
        candidate = plan.policy.candidates[plan.order[0]]
        return partition_of(
            asked.fields,
            plan.order[0],
            tenant=plan.tenant,
            artifact_sha256=candidate.get("artifact_sha256"),
            adapter_sha256=adapter_key(plan, plan.order[0]),
        )

    async def find(self, place: tuple[str, str]) -> str | None:
        """The exact cache's key of a question that means the same."""
        found = await asyncio.to_thread(self.cache.find, *place)
        return found[0] if found else None

    async def add(self, place: tuple[str, str], key: str) -> None:
        """Remember a question whose answer is kept under `key`."""
        await asyncio.to_thread(self.cache.add, *place, key)

    def asked_again(self) -> bool:
        """Whether this hit is one of the sample."""
        return random.random() < self.audited

    def saw(self, kept: Answer, fresh: Answer) -> None:
        """The answers of an audited hit: the same final number, or the same text but for case and spaces, is right."""
        if not self.cache.audit.saw(agree(kept.text, fresh.text)):
            log.error(
                "the semantic cache is off: %d of %d audited hits were wrong",
                self.cache.audit.wrong,
                self.cache.audit.looked,
            )


def load(calibration: Path) -> Semantic:
    """The cache that `edgeft route cache-calibrate` allows. Raises UsageError where the file or its encoder is another."""
    from edgeft.router.cache.calibration import read
    from edgeft.router.embedding import load_encoder

    value = read(calibration)
    audit = Audit(value["budget"], value["delta"])
    return Semantic(SemanticCache(load_encoder(value["encoder"]), value["threshold"], audit))
