"""A local artefact in a replica of Ray Serve: a model's process on this node, asked through a handle.

A replica whose model's process has ended ends itself, so that Ray starts another and callers know that theirs is gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import orjson

from edgeft.serve.cluster import frames
from edgeft.serve.cluster.parts import start_engine
from edgeft.serve.protocol import Refusal
from edgeft.serve.sse import BrokenStream

REAPED_S = 0.5  # until a process that was killed is known to have ended
log = logging.getLogger("edgeft.serve")


class Engine:
    """One replica: loads the artefact when it starts, after comparing it with the policy's hash."""

    def __init__(self, candidate: dict[str, Any], options: dict[str, Any]) -> None:
        """Raises UsageError where the artefact on this node is missing or another, EnvironmentFault where it does not load."""
        self.upstream = start_engine(candidate, options)

    async def stream(self, body: bytes) -> AsyncGenerator[bytes]:
        """Frames of one answer. Closing it, or cancelling, frees the engine's slot."""
        try:
            async with aclosing(self.upstream.stream(orjson.loads(body))) as chunks:
                async for chunk in chunks:
                    yield frames.chunk(chunk)
        except Refusal as refusal:
            if refusal.status >= 500:
                await self._end_with_the_model()
            yield frames.refused(refusal)
        except BrokenStream as error:
            await self._end_with_the_model()
            yield frames.broken(error)

    def check_health(self) -> None:
        """Asked by Ray; raises where the model's process has ended."""
        if not self.upstream.alive():
            raise RuntimeError("the model's process has ended")

    async def _end_with_the_model(self) -> None:
        for _ in range(10):
            if not self.upstream.alive():
                log.error("the model's process has ended, and this replica with it")
                os._exit(1)
            await asyncio.sleep(REAPED_S / 10)

    async def __del__(self) -> None:
        """Ray calls it when the replica is shut down, after its requests are done."""
        await self.upstream.aclose()
