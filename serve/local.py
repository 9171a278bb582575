"""A local model behind the pool of processes: loaded when it is asked, spoken to over its loopback port."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from edgeft.engines.bodies import side_by_side
from edgeft.serve.answer import Chunk
from edgeft.serve.pool import LocalSpec, NotReady, Pool
from edgeft.serve.prefixes import Slots
from edgeft.serve.protocol import COMPLETION, Kind
from edgeft.serve.refusals import not_ready
from edgeft.serve.upstream import NOTHING, Features, HttpUpstream


class LocalUpstream:
    """One model of the pool. `generation` counts its processes: what lay in the slots of the last one is gone."""

    def __init__(self, pool: Pool, spec: LocalSpec, load_wait_s: float) -> None:
        self.pool, self.spec, self.load_wait_s = pool, spec, load_wait_s
        self.slots, self.context_tokens = spec.slots, spec.context
        self.features = Features(n=False, adapters=tuple(spec.adapters), **guess(spec.engine, spec.options))
        self.adapter_facts = {name: facts_of(Path(path)) for name, path in spec.adapters.items()}
        self.generation = 0
        self.prefixes = Slots.of(spec.slots)
        self._model: Any = None
        self._http: HttpUpstream | None = None

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        try:
            async with self.pool.lease(self.spec.id, wait_s=self.load_wait_s) as model:
                if model is not self._model:
                    await self._meet(model)
                yield
        except NotReady as error:
            raise not_ready(self.spec.id, error.state, error.retry_after_s) from None

    async def _meet(self, model: Any) -> None:
        """Another process than last time."""
        before, self._model = self._http, model
        self.generation += 1
        self.prefixes = Slots.of(model.slots)  # who still uses the last process gives back to its own
        can = model.features
        self.features = Features(
            **{
                name: bool(can.get(name))
                for name in ("completions", "embeddings", "tools", "json_schema", "logprobs", "id_slot")
            },
            n=False,
            adapters=tuple(can.get("adapters", ())),
        )
        self.slots = model.slots
        self._http = HttpUpstream(
            model.url, self.spec.id, model.key, slots=self.slots, always_stream=True, trust_env=False
        )
        if before is not None:
            await before.aclose()

    async def stream(
        self, kind: Kind, fields: Mapping[str, Any], stream: bool = True, extra: Mapping[str, Any] = NOTHING
    ) -> AsyncGenerator[Chunk]:
        assert self._http is not None, "hold() first"
        async with aclosing(self._http.stream(kind, fields, True, extra)) as chunks:
            offset = 0
            async for chunk in chunks:
                if "prompt_progress" in chunk:
                    continue
                if kind is COMPLETION:
                    offset = told_as_completion(chunk, offset)
                yield chunk

    def fields(self, adapter: str | None, slot: int | None, reuse: bool) -> Mapping[str, Any]:
        assert self._model is not None, "hold() first"
        own: dict[str, Any] = self._model.fields(adapter=adapter, slot=slot)
        return own if slot is None else {**own, "cache_prompt": reuse}

    async def embeddings(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        assert self._http is not None, "hold() first"
        return await self._http.embeddings(fields)

    def state(self) -> str:
        return self.pool.state(self.spec.id)

    def describe(self) -> dict[str, Any]:
        """The process, for the page."""
        return self.pool.describe(self.spec.id)

    async def aclose(self) -> None:
        if self._http is not None:
            await self._http.aclose()


def facts_of(path: Path) -> str:
    """What tells one adapter's files from another's: names, sizes and times of change."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return " ".join(f"{p.name}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files if p.exists())


def told_as_completion(chunk: Chunk, offset: int) -> int:
    """Turn llama.cpp's log-probabilities, which are chat's for completions too, into completions' own; returns the text's length so far."""
    for choice in chunk.get("choices") or ():
        entries = (choice.get("logprobs") or {}).get("content")
        if entries:
            choice["logprobs"] = side_by_side(entries, offset)
        offset += len(choice.get("text") or "")
    return offset


def guess(engine: str, options: Mapping[str, Any] = NOTHING) -> dict[str, bool]:
    """What an engine can do, before its process has said so."""
    llama = engine in ("gguf", "llama_server")
    return {
        "embeddings": engine == "transformers" or bool(options.get("embeddings")),
        "tools": llama,
        "json_schema": llama,
        "logprobs": engine != "onnx",
        "id_slot": llama or engine == "onnx",
    }
