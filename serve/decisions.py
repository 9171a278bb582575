"""Decisions as `edgeft route replay` and `recertify` read them: a JSON line a routed request. Texts only where that was agreed to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from edgeft.serve.logs import Lines


class DecisionLog:
    """A file that lines are added to. A disk that is full costs lines, never answers."""

    def __init__(self, path: Path, texts: bool) -> None:
        """Raises EnvironmentFault where the file can't be opened."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.texts, self.lines = texts, Lines(path)

    def write(self, time: str, request_id: str, plan: Any, status: int, **measured: Any) -> None:
        """One request that the policy decided. `measured`: latency_s, ttft_s, prompt_tokens, output_tokens, cost_usd, cache."""
        decision = plan.decision
        if decision is None:
            return  # pinned: nothing was decided
        line: dict[str, Any] = {
            "time": time, "request_id": request_id, "tenant": plan.tenant, "policy_sha256": plan.policy.sha256,
            "choice": decision.choice, "answered_by": plan.route or None, "scores": decision.scores, "costs": decision.costs,
            "propensity": decision.propensity, "explored": decision.explored, "removed": decision.removed, "private": decision.private,
            "certified": decision.certified, "status": status, **measured,
        }  # fmt: skip
        if self.texts and not decision.private:
            line["request"] = plan.request.text
            line["messages"] = list(plan.request.messages)
        self.lines.put(orjson.dumps(line))

    def close(self) -> None:
        """Write what waits, and close the file."""
        self.lines.close()
