"""Decisions as `edgeft route replay` and `recertify` read them: a JSON line a routed request. Texts only where that was agreed to."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import orjson

from edgeft.errors import EnvironmentFault

log = logging.getLogger("edgeft.serve")


class DecisionLog:
    """A file that lines are added to. A disk that is full costs lines, never answers."""

    def __init__(self, path: Path, texts: bool) -> None:
        """Raises EnvironmentFault where the file can't be written."""
        self.texts, self.lost = texts, 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise EnvironmentFault(
                f"{path} can't be written: {error.strerror}.", "logs: {decisions: …}"
            ) from None

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
        try:
            os.write(self.handle, orjson.dumps(line) + b"\n")
        except OSError as error:
            self.lost += 1
            if self.lost == 1:
                log.error("the log of decisions can't be written: %s", error.strerror)

    def close(self) -> None:
        """Close the file."""
        os.close(self.handle)
