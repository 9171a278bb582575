"""How a target is asked: one function from a chat body to a `Reply`, whatever is behind it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx

from edgeft.bench.targets import Target
from edgeft.engines.client import Loopback, Reply, chat, gather
from edgeft.engines.local import LocalModel
from edgeft.errors import EnvironmentFault, UsageError, missing_extra

Caller = Callable[[dict[str, Any]], Reply]


@contextmanager
def caller(
    target: Target, log: Path, threads: int | None, context: int, options: dict[str, Any] | None = None
) -> Iterator[tuple[Caller, LocalModel | None]]:
    """Start what the target needs and yield (ask, the local model if it is one); `options` are the engine's own."""
    if target.engine == "litellm":
        yield _litellm(target.facts["model"]), None
    elif target.engine == "openai":
        key = os.environ.get("OPENAI_API_KEY")
        url, model = target.facts["url"], target.facts["model"]
        with httpx.Client(limits=httpx.Limits(max_connections=None)) as client:
            yield lambda body: chat(client, url, {**plain(body), "model": model}, key), None
    else:
        assert target.path is not None
        with (
            LocalModel(
                target.path, target.engine, log=log, threads=threads, context=context, sample_memory=True,
                options=options,
            ) as local,
            closing(Loopback(local.port, local.key)) as loopback,
        ):  # fmt: skip

            def ask(body: dict[str, Any]) -> Reply:
                try:
                    return loopback.chat({**body, "model": local.options["name"]})
                except EnvironmentFault as error:
                    raise EnvironmentFault(f"{target.id}: {error.message}", f"less {log}") from error

            yield ask, local


def plain(body: dict[str, Any]) -> dict[str, Any]:
    """A body for a server of any kind: without `cache_prompt` where it says what llama.cpp does by itself; OpenAI's own API refuses it."""
    return {name: value for name, value in body.items() if (name, value) != ("cache_prompt", True)}


def _litellm(model: str) -> Caller:
    # The prices that ship with the package, not a page fetched at import.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    try:
        import litellm
        import openai
    except ImportError:
        raise missing_extra("litellm", "api") from None

    def ask(body: dict[str, Any]) -> Reply:
        allowed = {k: v for k, v in body.items() if k in ("messages", "max_tokens", "temperature", "seed")}
        started = time.perf_counter()
        try:
            stream = litellm.completion(
                model=model, stream=True, stream_options={"include_usage": True}, **allowed
            )
            return gather((time.perf_counter() - started, chunk.model_dump()) for chunk in stream)
        except litellm.exceptions.AuthenticationError as error:
            raise UsageError(
                f"{model}: no valid API key.", "set the provider's key, as OPENAI_API_KEY"
            ) from error
        except openai.OpenAIError as error:  # the root of all that litellm raises
            raise EnvironmentFault(
                f"{model} failed: {str(error)[:200]}", "try again, or leave --model out"
            ) from error

    return ask
