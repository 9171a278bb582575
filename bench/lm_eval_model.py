"""An artefact as a model of lm-eval (lm_eval.api.model.LM). Needs the extra `lm-eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from edgeft.bench.lm_eval import Reader, plain
from edgeft.errors import UsageError, unknown

MAX_TOKENS = 256  # of an answer whose task names no limit, as in lm-eval's own models


class ArtefactLM(LM):
    """Hands lm-eval's requests to a Reader."""

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.reader = reader

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """ln p of each continuation behind its context, and whether greedy decoding gives it."""
        found = self.reader.likelihoods([request.args for request in requests])
        self._keep("loglikelihood", requests, found)
        return found

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """ln p of each whole text."""
        found = self.reader.rolling([request.args[0] for request in requests])
        self._keep("loglikelihood_rolling", requests, found)
        return found

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Greedy answers. Raises UsageError for a task that asks for sampling."""
        found = [self._answer(*request.args) for request in requests]
        self._keep("generate_until", requests, found)
        return found

    def _answer(self, context: str, asked: dict[str, Any]) -> str:
        if asked.get("do_sample") or asked.get("temperature"):
            raise UsageError(
                f"the task asks for sampling (temperature {asked.get('temperature')}), and answers here are greedy.",
                "set do_sample: false in its generation_kwargs",
            )
        until = asked.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        limit = next(
            (asked[k] for k in ("max_gen_toks", "max_new_tokens", "max_tokens") if k in asked), MAX_TOKENS
        )
        return self.reader.continued(context, int(limit), until)

    def _keep(self, kind: str, requests: list[Any], found: list[Any]) -> None:
        for request, value in zip(requests, found, strict=True):
            self.cache_hook.add_partial(kind, request.args, value)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as the artefact's own template writes it."""
        if not add_generation_prompt:
            raise UsageError(
                "the task begins the answer itself (assistant_prefill), which the engine's template does not take.",
                "leave --chat out",
            )
        return self.reader.text.render(chat_history)

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's request cache tells templates apart by."""
        return self.reader.target.sha256 or self.reader.target.id


def task_manager(tasks: list[str], include_path: Path | None) -> Any:
    """lm-eval's index of tasks, its own and those of a folder. Raises UsageError for a name that is not in it."""
    manager = TaskManager(include_path=str(include_path) if include_path else None)
    for name in tasks:
        if name not in manager.all_tasks:
            raise unknown("the task", name, manager.all_tasks, "lm-eval ls tasks, or --include-path FOLDER")
    return manager


def run(reader: Reader, tasks: list[str], manager: Any, limit: int | None, chat: bool) -> dict[str, Any]:
    """lm-eval's figures: `results`, `versions`, `configs`, `n-samples`, `higher_is_better`, and `samples` by task."""
    found = lm_eval.simple_evaluate(
        model=ArtefactLM(reader), tasks=tasks, task_manager=manager, limit=limit, apply_chat_template=chat,
        log_samples=True, bootstrap_iters=1000,
    )  # fmt: skip
    kept = ("results", "versions", "configs", "n-shot", "n-samples", "higher_is_better", "samples")
    return plain({"lm_eval_version": lm_eval.__version__, **{k: found[k] for k in kept if k in found}})
