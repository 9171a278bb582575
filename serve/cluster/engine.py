"""A local artefact in a replica of Ray Serve: a model's process on this node, asked through a handle.

A replica whose model's process has ended ends itself, so that Ray starts another and callers know that theirs is gone. Replicas don't
know whose request they answer, so a model looks at nothing that lies in its slots from before: no prefix is reused, of no tenant.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import orjson

from edgeft.serve.answer import BrokenStream
from edgeft.serve.cluster import frames
from edgeft.serve.cluster.parts import start_engine
from edgeft.serve.config import Config
from edgeft.serve.protocol import CHAT, COMPLETION, Refusal

KINDS = {kind.name: kind for kind in (CHAT, COMPLETION)}
REAPED_S = 0.5  # until a process that was killed is known to have ended
log = logging.getLogger("edgeft.serve")


class Engine:
    """One replica: loads the artefact when it starts, after comparing it with the policy's hash."""

    def __init__(self, candidate: dict[str, Any], config: Config) -> None:
        """Raises UsageError where the artefact on this node is missing or another, EnvironmentFault where it does not load."""
        self.local, self.http, self.extra = start_engine(candidate, config)

    async def stream(self, body: bytes) -> AsyncGenerator[bytes]:
        """Frames of one answer. Closing it, or cancelling, frees the model's slot."""
        asked = orjson.loads(body)
        extra = {**asked["extra"], **self.extra}
        try:
            async with aclosing(
                self.http.stream(KINDS[asked["kind"]], asked["fields"], True, extra)
            ) as chunks:
                async for chunk in chunks:
                    yield frames.chunk(chunk)
        except (Refusal, BrokenStream) as error:
            yield await self._failed(error)

    async def embeddings(self, body: bytes) -> bytes:
        """The frame of OpenAI's answer of /v1/embeddings."""
        try:
            return frames.chunk(await self.http.embeddings(orjson.loads(body)))
        except (Refusal, BrokenStream) as error:
            return await self._failed(error)

    def check_health(self) -> None:
        """Asked by Ray; raises where the model's process has ended."""
        if not self.local.alive():
            raise RuntimeError("the model's process has ended")

    async def _failed(self, error: Refusal | BrokenStream) -> bytes:
        """The frame of a failure; ends the replica where the model's process has ended."""
        if isinstance(error, BrokenStream) or error.status >= 500:
            for _ in range(10):
                if not self.local.alive():
                    log.error("the model's process has ended, and this replica with it")
                    os._exit(1)
                await asyncio.sleep(REAPED_S / 10)
        return frames.broken(error) if isinstance(error, BrokenStream) else frames.refused(error)

    async def __del__(self) -> None:
        """Ray calls it when the replica is shut down, after its requests are done."""
        await self.http.aclose()
        await asyncio.to_thread(self.local.close)
