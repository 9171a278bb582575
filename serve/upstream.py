"""What stands behind the proxy: anything that turns a chat request into a stream of chunks.

An upstream is always asked for a stream, also for clients that want none: closing a stream frees
the engine's slot at once, closing a call that is not streamed does not.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

from edgeft.serve import sse
from edgeft.serve.protocol import Refusal
from edgeft.serve.sse import Chunk

CONNECT_S, READ_S = 5.0, 600.0  # reading: the longest silence, as before the first token of a long prompt
REMOTE_SLOTS = 64


class Upstream(Protocol):
    """One candidate that can answer."""

    slots: int  # requests at a time

    def stream(self, fields: dict[str, Any]) -> AsyncGenerator[Chunk]:
        """Chunks of OpenAI's chat.completion.chunk, usage among them where the upstream tells it.

        Raises Refusal before the first chunk, BrokenStream after. Closing the iterator ends the work.
        """
        ...

    def alive(self) -> bool:
        """False where it can't answer any more."""
        ...

    async def aclose(self) -> None:
        """Give back connections and processes."""
        ...


class HttpUpstream:
    """A server that speaks OpenAI's chat API: a local model's process, or another server."""

    def __init__(
        self, url: str, model: str, key: str | None, *, slots: int = REMOTE_SLOTS, local: Any = None
    ) -> None:
        """`url` without /v1. `local` is the LocalModel behind it, ended with the upstream."""
        import httpx

        self.url, self.model, self.slots, self.local = f"{url}/v1/chat/completions", model, slots, local
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        # Proxies of the environment are for the world outside, not for a child process.
        self.client = httpx.AsyncClient(
            timeout=httpx.Timeout(READ_S, connect=CONNECT_S, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=REMOTE_SLOTS),
            trust_env=local is None,
        )

    async def stream(self, fields: dict[str, Any]) -> AsyncGenerator[Chunk]:
        import httpx

        body = {**fields, "model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        started = False
        try:
            async with self.client.stream("POST", self.url, json=body, headers=self.headers) as response:
                if response.status_code != 200:
                    raise refused(
                        response.status_code, await _message(response), response.headers.get("retry-after")
                    )
                async with aclosing(sse.read(response.aiter_lines())) as chunks:
                    async for chunk in chunks:
                        started = True
                        yield chunk
        except httpx.HTTPError as error:
            if started:
                raise sse.BrokenStream(f"the connection broke ({type(error).__name__})") from None
            raise Refusal(
                502, f"The engine did not answer ({type(error).__name__}).", kind="upstream_error"
            ) from None

    def alive(self) -> bool:
        return self.local is None or self.local.alive()

    async def aclose(self) -> None:
        import asyncio

        await self.client.aclose()
        if self.local is not None:
            await asyncio.to_thread(self.local.close)


class LitellmUpstream:
    """A provider through litellm, as a library."""

    slots = REMOTE_SLOTS

    def __init__(self, model: str) -> None:
        from edgeft.errors import missing_extra

        os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no download at import
        try:
            import litellm
        except ImportError:
            raise missing_extra("litellm", "api") from None
        self.litellm, self.model = litellm, model
        litellm.suppress_debug_info = True

    async def stream(self, fields: dict[str, Any]) -> AsyncGenerator[Chunk]:
        started = False
        try:
            response = await self.litellm.acompletion(
                model=self.model, stream=True, stream_options={"include_usage": True}, **fields
            )
            try:
                async for chunk in response:
                    started = True
                    yield chunk.model_dump(exclude_none=True)
            finally:
                if closing := getattr(response, "aclose", None):
                    await closing()
        except (Refusal, sse.BrokenStream):
            raise
        except Exception as error:
            # litellm's messages may quote the request: only its type and status are told.
            if started:
                raise sse.BrokenStream(f"the provider failed ({type(error).__name__})") from None
            status = getattr(error, "status_code", 502)
            raise refused(status if isinstance(status, int) else 502, type(error).__name__, None) from None

    def alive(self) -> bool:
        return True

    async def aclose(self) -> None:
        return None


def refused(status: int, message: str, retry_after: str | None) -> Refusal:
    """What the client is told of an upstream's status: its own fault as it is, ours as a 502."""
    if status == 429:
        wait = int(retry_after) if retry_after and retry_after.isdigit() else 1
        return Refusal(429, "The model is at its limit.", kind="rate_limit_error", retry_after_s=wait)
    if status in (400, 404, 413, 415, 422):
        shown = 400 if status == 404 else status
        return Refusal(shown, f"The model refused the request: {message}", code=f"upstream_{status}")
    if status in (401, 403):
        return Refusal(
            502, "The upstream refused edgeft's key.", kind="upstream_error", code=f"upstream_{status}"
        )
    return Refusal(502, "The model failed.", kind="upstream_error", code=f"upstream_{status}")


async def _message(response: Any) -> str:
    """The message in an error's body, at most 300 characters."""
    import orjson

    try:
        found = orjson.loads(await response.aread())["error"]
        return str(found["message"] if isinstance(found, dict) else found)[:300]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return "no reason given"
