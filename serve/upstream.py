"""What stands behind the proxy: anything that turns a request into a stream of chunks.

Local engines are always asked for a stream, also for clients that want none: closing a stream frees the engine's slot at once, closing
a call that is not streamed does not. Servers elsewhere are asked as the client asked, unless told otherwise.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import orjson

from edgeft.serve import sse
from edgeft.serve.answer import BrokenStream, Chunk, chunks_of
from edgeft.serve.protocol import Kind, Refusal
from edgeft.serve.proxied import ProxiedWire, applies
from edgeft.serve.refusals import refused, unreachable
from edgeft.serve.wire import Wire

REMOTE_SLOTS = 64
MAX_ANSWER_BYTES = 64 << 20
NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Features:
    """What an upstream can do beside chat. A remote one is asked and says so itself."""

    completions: bool = True
    embeddings: bool = True
    tools: bool = True
    json_schema: bool = True
    logprobs: bool = True
    n: bool = True  # several answers in one call
    adapters: tuple[str, ...] = ()
    id_slot: bool = False  # takes id_slot and cache_prompt as llama.cpp does


class Upstream(Protocol):
    """One candidate that can answer."""

    slots: int  # requests at a time
    features: Features

    def stream(
        self, kind: Kind, fields: Mapping[str, Any], stream: bool = True, extra: Mapping[str, Any] = NOTHING
    ) -> AsyncGenerator[Chunk]:
        """Chunks of OpenAI's API, usage among them where the upstream tells it. `extra` are the engine's own fields.

        Raises Refusal before the first chunk, BrokenStream after. Closing the iterator ends the work.
        """
        ...

    async def embeddings(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """OpenAI's answer of /v1/embeddings. Raises Refusal."""
        ...

    def fields(self, adapter: str | None, slot: int | None, reuse: bool) -> Mapping[str, Any]:
        """The engine's own fields: its adapter, its slot, and whether what lies in the slot may be used."""
        ...

    def hold(self) -> AbstractAsyncContextManager[None]:
        """Keep what answers loaded for the length of the block; loads it where it is not. Raises Refusal."""
        ...

    def state(self) -> str:
        """ready, loading, unloaded (loads when asked), restarting, or ended."""
        ...

    async def aclose(self) -> None:
        """Give back connections and processes."""
        ...


class HttpUpstream:
    """A server that speaks OpenAI's API: a local model's process, vLLM, llama-server, another edgeft, an API."""

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None,
        *,
        slots: int = REMOTE_SLOTS,
        always_stream: bool = False,
        trust_env: bool = True,
        connect_s: float = 5.0,
        silence_s: float = 600.0,
        ca_file: Path | None = None,
        features: Features | None = None,
    ) -> None:
        """`url` without /v1. `silence_s`: the longest wait for the next byte, as before the first token of a long prompt. Proxies of
        the environment are for the world outside (`trust_env`), not for a process on this box."""
        self.url, self.model, self.slots, self.always_stream = url, model, slots, always_stream
        self.features = features or Features()
        self.headers = {"Content-Type": "application/json"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        tls = ssl.create_default_context(cafile=str(ca_file)) if ca_file else None
        kind = ProxiedWire if trust_env and applies(url) else Wire
        self.wire = kind(url, self.headers, connect_s, silence_s, tls)
        self.connect_s = connect_s

    async def stream(
        self, kind: Kind, fields: Mapping[str, Any], stream: bool = True, extra: Mapping[str, Any] = NOTHING
    ) -> AsyncGenerator[Chunk]:
        body: dict[str, Any] = {**fields, **extra, "model": self.model}
        if streamed := stream or self.always_stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        data, started = orjson.dumps(body), False
        try:
            async with self.wire.ask("POST", kind.path, data) as answer:
                if answer.status != 200:
                    raise await refusal_of(answer)
                if answer.content_type == "text/event-stream" or (
                    streamed and answer.content_type != "application/json"
                ):
                    events, parts = sse.Events(), aiter(answer)
                    async for part in parts:
                        for chunk in events.take(part):
                            started = True
                            yield chunk
                        if events.done:
                            await sse.drain(parts)
                            break
                    else:
                        for chunk in events.end():
                            started = True
                            yield chunk
                else:
                    for chunk in chunks_of(await _json(answer), kind):
                        started = True
                        yield chunk
        except OSError as error:
            if started:
                raise BrokenStream(f"the connection broke ({type(error).__name__})") from None
            raise unreachable(error) from None

    async def embeddings(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        try:
            async with self.wire.ask(
                "POST", "/v1/embeddings", orjson.dumps({**fields, "model": self.model})
            ) as answer:
                if answer.status != 200:
                    raise await refusal_of(answer)
                value = await _json(answer)
        except OSError as error:
            raise unreachable(error) from None
        if not isinstance(value, dict) or not isinstance(value.get("data"), list):
            raise BrokenStream("the answer has no data")
        return value

    async def healthy(self) -> bool:
        """True where the server answers at all."""
        try:
            async with self.wire.ask("GET", "/v1/models", silence_s=self.connect_s) as answer:
                return answer.status < 500
        except OSError:
            return False

    def fields(self, adapter: str | None, slot: int | None, reuse: bool) -> Mapping[str, Any]:
        return NOTHING

    def hold(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    def state(self) -> str:
        return "ready"

    async def aclose(self) -> None:
        await self.wire.aclose()


async def refusal_of(answer: Any) -> Refusal:
    """What is told of an answer that is none."""
    return refused(answer.status, await _message(answer), answer.headers.get("retry-after"))


async def _json(answer: Any) -> Any:
    parts: list[bytes] = []
    size = 0
    async for part in answer:
        size += len(part)
        if size > MAX_ANSWER_BYTES:
            raise BrokenStream("the answer has no end")
        parts.append(part)
    try:
        return orjson.loads(parts[0] if len(parts) == 1 else b"".join(parts))
    except orjson.JSONDecodeError:
        raise BrokenStream("the answer is not JSON") from None


async def _message(answer: Any) -> str:
    """The message in an error's body, at most 300 characters."""
    try:
        body = b""
        async for part in answer:
            body += part
            if len(body) > 65536:
                break
        found = orjson.loads(body)["error"]
        return str(found["message"] if isinstance(found, dict) else found)[:300]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return "no reason given"
