"""Answers kept by the hash of the whole request: what serving adds to `edgeft.router.cache`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeft.router.cache.exact import Settings, keepable, key_of
from edgeft.serve.answer import Answer
from edgeft.serve.choose import Plan
from edgeft.serve.config import Cache
from edgeft.serve.protocol import Asked


class AnswerCache:
    """Answers by key. A store that fails costs the hit, never the answer."""

    def __init__(self, store: Any, settings: Cache) -> None:
        """`store` is an ExactCache, or what behaves like one (also with coroutines)."""
        self.store, self.ttl_s = store, settings.ttl_s
        sampled = {
            (t, r): allowed for pair, allowed in settings.sampled.items() for t, r in (pair.split("/"),)
        }
        self.settings = Settings(settings.ttl_s, sampled)

    def key(self, asked: Asked, plan: Plan) -> str | None:
        """The key of a request to the plan's first choice, or None where nothing of it may be kept or given again: private ones,
        and sampled ones unless that was allowed."""
        if plan.private or not self.settings.allows(asked.fields, plan.tenant, plan.order[0]):
            return None
        return self.key_for(asked, plan, plan.order[0])

    @staticmethod
    def key_for(asked: Asked, plan: Plan, candidate_id: str) -> str:
        """The key of a request to one candidate. The judge's threshold is part of what decides a drafted answer."""
        candidate = plan.policy.candidates[candidate_id]
        fields = {**asked.fields, "edgeft/api": asked.kind.name}
        if plan.draft:
            fields["edgeft/judged-by"] = plan.policy.sha256
        return key_of(
            fields,
            candidate_id,
            tenant=plan.tenant,
            artifact_sha256=candidate.get("artifact_sha256"),
            adapter_sha256=adapter_key(plan, candidate_id),
        )

    async def get(self, key: str) -> tuple[Answer, str] | None:
        """(the kept answer, who gave it), or None."""
        value = await _now(self.store.get(key))
        try:
            return None if value is None else (Answer.from_dict(value["answer"]), value["route"])
        except (KeyError, TypeError):
            return None

    async def put(self, key: str, answer: Answer, plan: Plan, route: str) -> None:
        """Keep an answer that ended by itself: not one that was cut, refused or filtered."""
        if not all(keepable(c.finish_reason, c.message) for c in answer.choices):
            return
        labels = [f"model:{route}", *([f"tenant:{plan.tenant}"] if plan.tenant else [])]
        value: Mapping[str, Any] = {"answer": answer.to_dict(), "route": route}
        await _now(self.store.put(key, value, self.ttl_s, labels))

    async def aclose(self) -> None:
        """Close what is open."""
        await _now(self.store.close())


def adapter_key(plan: Plan, candidate_id: str) -> str | None:
    """The adapter's name and files; None where there is none."""
    return None if plan.adapter is None else f"{plan.adapter} {plan.adapter_facts.get(candidate_id, '')}"


async def _now(value: Any) -> Any:
    return await value if hasattr(value, "__await__") else value
