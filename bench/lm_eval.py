"""lm-eval's tasks on an artefact: its likelihoods from the engine's logits, its answers by the engine that serves it.

`Reader` does the work and needs no lm-eval; `bench/lm_eval_model.py` puts it behind lm-eval's interface. Text becomes tokens in
the running engine itself. Pairs are split into context and continuation as lm-eval's own models do (`TemplateLM._encode_pair`),
and too long ones lose their beginning, as there.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx

from edgeft import child, console
from edgeft.bench.environment import environment
from edgeft.bench.likelihood import Ids, split, windows
from edgeft.bench.targets import Target, find
from edgeft.engines.local import LocalModel, default_threads
from edgeft.engines.text import EngineText, begins_with, prefix_token
from edgeft.errors import UsageError, missing_extra
from edgeft.files import write_json, write_jsonl


class Reader:
    """Likelihoods and greedy continuations of texts by one artefact; at most `context` tokens at once."""

    def __init__(self, target: Target, text: EngineText, log: Path, threads: int, context: int) -> None:
        assert target.path is not None
        self.target, self.path, self.text = target, target.path, text
        self.log, self.threads, self.context = log, threads, context

    @cached_property
    def before(self) -> Ids:
        """What the tokenizer puts before a text by itself."""
        return begins_with(self.text)

    @cached_property
    def prefix(self) -> int:
        """What a text stands on that has nothing before it."""
        return prefix_token(self.path, self.target.engine)

    def tokens(self, text: str) -> Ids:
        """A text's ids with what the tokenizer puts before it, once."""
        ids = self.text.tokens(text)
        return ids if ids[: len(self.before)] == self.before else self.before + ids

    def pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """(context, continuation) as token ids: spaces between them belong to the continuation."""
        if not context:
            ids = self.text.tokens(continuation)
            # The prefix is often the very token that stands first already.
            return (ids[:1], ids[1:]) if ids[:1] == [self.prefix] else ([self.prefix], ids)
        bare = context.rstrip()
        if not bare:
            return self.pair("", context + continuation)
        continuation = context[len(bare) :] + continuation
        prompt = self.tokens(bare)
        return prompt, split(self.tokens(bare + continuation), prompt, self.text.tokens(continuation))

    def likelihoods(self, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(sum of ln p of the continuation's tokens, would greedy decoding give it) of each pair of texts."""
        encoded = [fitted(*self.pair(*pair), self.context) for pair in pairs]
        return [(found["logprob"], found["greedy"]) for found in self.scored(encoded)]

    def rolling(self, texts: list[str]) -> list[float]:
        """The sum of ln p of all of a text's tokens, each predicted once."""
        parts = [windows(self.tokens(text), self.prefix, self.context) for text in texts]
        found = iter(self.scored([pair for text in parts for pair in text]))
        return [sum(next(found)["logprob"] for _ in text) for text in parts]

    def scored(self, pairs: list[tuple[Ids, Ids]]) -> list[dict[str, Any]]:
        """What `likelihood.of_continuation` says of each pair of ids."""
        found = child.call(
            "edgeft.bench.likelihood:score", log=self.log, title=f"the logits of {self.target.id}",
            engine=self.target.engine, folder=str(self.path), threads=self.threads,
            items=[{"prompt": prompt, "continuations": [ids]} for prompt, ids in pairs],
        )  # fmt: skip
        return [entry[0] for entry in found["items"]]

    def continued(self, context: str, max_tokens: int, stop: list[str]) -> str:
        """What greedy decoding puts behind a text, up to a stop string; the context's beginning goes where there is no room."""
        room = self.context - max_tokens - 1
        if room < 1:
            raise UsageError(
                f"an answer of {max_tokens} tokens leaves no room for its question in a context of {self.context}.",
                f"--context {2 * max_tokens}",
            )
        return self.text.complete(self.tokens(context)[-room:], max_tokens, stop)


def fitted(prompt: Ids, continuation: Ids, longest: int) -> tuple[Ids, Ids]:
    """The pair without as much of its beginning as is too long: at most `longest` tokens are fed, the last one never is."""
    continuation = continuation[-longest:]
    return prompt[-(longest + 1 - len(continuation)) :], continuation


@contextmanager
def reading(target: Target, logs: Path, threads: int, context: int) -> Iterator[Reader]:
    """Start the artefact and yield its Reader."""
    assert target.path is not None
    log = logs / f"{target.id.replace('/', '+')}.log"
    with (
        LocalModel(target.path, target.engine, log=log, threads=threads, context=context) as local,
        httpx.Client() as client,
    ):
        yield Reader(target, EngineText(local, client), log, threads, context)


def evaluate(
    place: Path,
    tasks: list[str],
    out: Path,
    include_path: Path | None = None,
    limit: int | None = None,
    chat: bool = False,
    threads: int | None = None,
    context: int = 2048,
) -> dict[str, Any]:
    """Run lm-eval's tasks on one artefact; writes `results.json` and `samples-TASK.jsonl` into `out` and returns the former.

    `include_path`: a folder of task files of one's own. `chat`: put prompts into the artefact's chat template.
    Raises UsageError for a task that is not known, EnvironmentFault where lm-eval is missing.
    """
    if find_spec("lm_eval") is None:
        raise missing_extra("lm_eval", "lm-eval")
    target = one_of(find([place], []), place)
    if include_path and not include_path.is_dir():
        raise UsageError(f"there is no folder {include_path}.", "--include-path FOLDER-OF-YAML-FILES")
    from edgeft.bench.lm_eval_model import run, task_manager

    manager = task_manager(tasks, include_path)
    threads = threads or default_threads()
    with tempfile.TemporaryDirectory(prefix="edgeft-") as scratch:
        with (
            console.step(f"lm-eval of {target.id}"),
            reading(target, Path(scratch), threads, context) as reader,
        ):
            build = reader.text.local.build
            found = run(reader, tasks, manager, limit, chat)
    out.mkdir(parents=True, exist_ok=True)
    for task, samples in found.pop("samples").items():
        write_jsonl(out / f"samples-{task.replace('/', '+')}.jsonl", samples)
    result = {
        "id": target.id, "artifact_sha256": target.sha256, "engine": target.engine, "engine_build": build,
        "chat_template": chat, "limit": limit, "threads": threads, "context": context, **found,
        "environment": environment(),
    }  # fmt: skip
    write_json(out / "results.json", result)
    return result


def one_of(targets: list[Target], place: Path) -> Target:
    """The only target. Raises UsageError where a folder holds several."""
    if len(targets) > 1:
        raise UsageError(
            f"{place} holds {len(targets)} artefacts, and lm-eval takes one.",
            f"edgeft bench lm-eval {targets[0].path} --tasks …",
        )
    return targets[0]


def plain(value: Any) -> Any:
    """A value as JSON can hold it: what is no JSON becomes its text."""
    return json.loads(json.dumps(value, default=str, ensure_ascii=False))
