"""An engine of the cluster as the proxy sees it: an upstream whose stream comes through a handle of Ray Serve.

What has not begun to reach a client is asked of another replica when its own is lost. A stream that a client has begun to read is
not: the other replica would say it in other words. An answer that the client wants in one piece has not begun until it is whole.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import orjson

from edgeft.serve.cluster import frames
from edgeft.serve.protocol import Refusal
from edgeft.serve.sse import BrokenStream, Chunk

TRIES = 4  # replicas that one request may lose
SILENCE_S = 600.0  # the longest wait for the next piece
LOOK_S = 2.0  # how old the number of running replicas may be
RETRY_AFTER_S = 5
log = logging.getLogger("edgeft.serve")


class RayUpstream:
    """A deployment of engines. `lost` counts the requests whose replica went away, `again` those of them that were asked anew."""

    def __init__(self, handle: Any, slots: int, running: Callable[[], int]) -> None:
        """`handle`: DeploymentHandle of `Engine`. `slots`: requests at a time, of all replicas together. `running` asks the cluster how
        many replicas run; called in a thread, at most every LOOK_S."""
        self.handle, self.slots, self.running = handle.options(stream=True), slots, running
        self.lost = self.again = 0
        self.replicas, self.looked_s = 0, float("-inf")
        self.looking: asyncio.Task[None] | None = None

    async def stream(self, fields: dict[str, Any], *, streamed: bool = True) -> AsyncGenerator[Chunk]:
        """Chunks as they come; where the client wants the answer in one piece (not `streamed`), all of them at its end.

        Raises Refusal before the first chunk, BrokenStream after. Closing the iterator ends the work on the replica.
        """
        body = orjson.dumps(fields)
        for left in reversed(range(TRIES)):
            gathered: list[Chunk] = []
            begun = False
            try:
                async with aclosing(self._ask(body)) as chunks:
                    async for chunk in chunks:
                        if streamed:
                            begun = True
                            yield chunk
                        else:
                            gathered.append(chunk)
            except ReplicaLost as loss:
                self.lost += 1
                if begun:
                    raise BrokenStream(f"the engine's machine was lost ({loss})") from None
                if not left:
                    raise Refusal(
                        502,
                        f"{TRIES} engines were lost ({loss}).",
                        kind="upstream_error",
                        code="replica_lost",
                    ) from None
                self.again += 1
                log.warning("a replica was lost (%s) before its answer began: asked again elsewhere", loss)
                continue
            for chunk in gathered:
                yield chunk
            return

    async def _ask(self, body: bytes) -> AsyncGenerator[Chunk]:
        """One try. Raises ReplicaLost where replica or node went away."""
        answer = self.handle.stream.remote(body)
        try:
            pieces = aiter(answer)
            while True:
                try:
                    async with asyncio.timeout(SILENCE_S):
                        frame = await anext(pieces)
                except StopAsyncIteration:
                    return
                yield frames.read(frame)
        except (Refusal, BrokenStream):
            raise
        except TimeoutError:
            raise Refusal(
                504, "The engine is silent.", kind="upstream_error", code="upstream_timeout"
            ) from None
        except Exception as error:
            raise _meant(error) from None
        finally:
            answer.cancel()

    def alive(self) -> bool:
        """True where a replica ran when last looked; looks again in the background where that is long ago."""
        if time.monotonic() - self.looked_s > LOOK_S and (self.looking is None or self.looking.done()):
            self.looking = asyncio.get_running_loop().create_task(self.look())
        return self.replicas > 0

    async def look(self) -> None:
        """Ask the cluster how many replicas run."""
        self.looked_s = time.monotonic()
        try:
            self.replicas = await asyncio.to_thread(self.running)
        except Exception as error:
            log.warning("the cluster does not tell its state: %s", type(error).__name__)

    async def aclose(self) -> None:
        """The engines are applications of their own and stay."""
        if self.looking:
            self.looking.cancel()


class ReplicaLost(Exception):
    """Replica or node went away under a request."""


def _meant(error: Exception) -> Exception:
    """What an exception of Ray's says of the request: lost with its replica, refused by a full queue, or a fault of the engine's code."""
    from ray.exceptions import RayError, RayTaskError, TaskCancelledError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    if isinstance(error, BackPressureError):
        return Refusal(
            429,
            "Too many requests wait for the engines.",
            kind="rate_limit_error",
            code="queue_full",
            retry_after_s=RETRY_AFTER_S,
        )
    if isinstance(error, DeploymentUnavailableError):
        return Refusal(
            503, "No engine runs.", kind="server_error", code="model_ended", retry_after_s=RETRY_AFTER_S
        )
    if isinstance(error, RayError) and not isinstance(error, RayTaskError | TaskCancelledError):
        return ReplicaLost(type(error).__name__)
    return Refusal(502, f"The engine failed ({type(error).__name__}).", kind="upstream_error")
