"""A provider's API through litellm, as a library; imported only where a policy has such a candidate."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

from edgeft.serve.answer import BrokenStream, Chunk
from edgeft.serve.protocol import Kind, Refusal
from edgeft.serve.refusals import refused
from edgeft.serve.upstream import NOTHING, REMOTE_SLOTS, Features


class LitellmUpstream:
    """One model of a provider."""

    slots = REMOTE_SLOTS

    def __init__(self, model: str, key: str | None = None, silence_s: float = 600.0) -> None:
        from edgeft.errors import missing_extra

        os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no download at import
        try:
            import litellm
        except ImportError:
            raise missing_extra("litellm", "api") from None
        self.litellm, self.model, self.features = litellm, model, Features()
        self.more: dict[str, Any] = {
            "timeout": silence_s,
            "num_retries": 0,
            **({"api_key": key} if key else {}),
        }
        litellm.suppress_debug_info = True

    async def stream(
        self, kind: Kind, fields: Mapping[str, Any], stream: bool = True, extra: Mapping[str, Any] = NOTHING
    ) -> AsyncGenerator[Chunk]:
        started = False
        call = self.litellm.acompletion if kind.name == "chat" else self.litellm.atext_completion
        try:
            response = await call(
                model=self.model, stream=True, stream_options={"include_usage": True}, **fields, **self.more
            )
            try:
                async for chunk in response:
                    started = True
                    yield chunk.model_dump(exclude_none=True)
            finally:
                if closing := getattr(response, "aclose", None):
                    await closing()
        except (Refusal, BrokenStream):
            raise
        except Exception as error:
            # litellm's messages may quote the request: only its type and status are told.
            if started:
                raise BrokenStream(f"the provider failed ({type(error).__name__})") from None
            raise _by_status(error) from None

    async def embeddings(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        try:
            response = await self.litellm.aembedding(model=self.model, **fields, **self.more)
        except Exception as error:
            raise _by_status(error) from None
        value: dict[str, Any] = response.model_dump(exclude_none=True)
        return value

    def fields(self, adapter: str | None, slot: int | None, reuse: bool) -> Mapping[str, Any]:
        return NOTHING

    def hold(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    def state(self) -> str:
        return "ready"

    async def aclose(self) -> None:
        return None


def _by_status(error: Exception) -> Refusal:
    status = getattr(error, "status_code", 502)
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    return refused(
        status if isinstance(status, int) else 502, type(error).__name__, headers.get("retry-after")
    )
