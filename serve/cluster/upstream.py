"""An engine of the cluster as the proxy sees it: an upstream whose stream comes through a handle of Ray Serve.

What has not begun to reach a client is asked of another replica when its own is lost. A stream that a client has begun to read is
not: the other replica would say it in other words. An answer that the client wants in one piece has not begun until it is whole.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any

import orjson

from edgeft.serve.answer import BrokenStream, Chunk, look
from edgeft.serve.cluster import frames
from edgeft.serve.protocol import Kind, Refusal
from edgeft.serve.refusals import at_limit, not_ready
from edgeft.serve.upstream import NOTHING, Features

TRIES = 4  # replicas that one request may lose, and one more
SILENCE_S = 600.0  # the longest wait for the next piece
LOOK_S = 2.0  # how old the number of running replicas may be
RETRY_AFTER_S = 5.0
log = logging.getLogger("edgeft.serve")


class ReplicaLost(Exception):
    """Replica or node went away under a request."""


class RayUpstream:
    """A deployment of engines. `lost` counts the requests whose replica went away, `again` those of them that were asked anew."""

    def __init__(
        self, name: str, handle: Any, slots: int, features: Features, running: Callable[[], int]
    ) -> None:
        """`handle`: DeploymentHandle of `Engine`. `slots`: requests at a time, of all replicas together. `running` asks the cluster how
        many replicas run; called in a thread, at most every LOOK_S."""
        self.name, self.slots, self.features, self.running = name, slots, features, running
        self.streaming, self.unary = handle.options(stream=True), handle
        self.lost = self.again = 0
        self.replicas: int | None = None  # None: not looked yet
        self.looked_s = float("-inf")
        self.looking: asyncio.Task[None] | None = None

    async def stream(
        self, kind: Kind, fields: Mapping[str, Any], stream: bool = True, extra: Mapping[str, Any] = NOTHING
    ) -> AsyncGenerator[Chunk]:
        """Chunks as they come; where the client wants the answer in one piece (not `stream`), all of them at its end."""
        body = orjson.dumps({"kind": kind.name, "fields": dict(fields), "extra": dict(extra)})
        for tried in range(1, TRIES + 1):
            gathered: list[Chunk] = []
            begun = False
            try:
                async with aclosing(self._ask(body)) as chunks:
                    async for chunk in chunks:
                        gathered.append(chunk)
                        begun = begun or (stream and look(chunk)[0])
                        if begun:
                            for held in gathered:
                                yield held
                            gathered.clear()
            except ReplicaLost as loss:
                self._lost(loss, tried, begun)
                continue
            for chunk in gathered:
                yield chunk
            return

    async def embeddings(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        body = orjson.dumps(dict(fields))
        for tried in range(1, TRIES + 1):
            try:
                return frames.read(await self.unary.embeddings.remote(body))
            except (Refusal, BrokenStream):
                raise
            except Exception as error:
                meant = _meant(error)
                if not isinstance(meant, ReplicaLost):
                    try:
                        raise meant from None
                    finally:
                        del meant  # no circle, as in admission.py
                self._lost(meant, tried, begun=False)
        raise AssertionError("the last loss was told")

    async def _ask(self, body: bytes) -> AsyncGenerator[Chunk]:
        """One try. Raises ReplicaLost where replica or node went away."""
        answer = self.streaming.stream.remote(body)
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
                504, "The engine is silent.", kind="upstream_error", code="upstream_timeout", elsewhere=True
            ) from None
        except Exception as error:
            raise _meant(error) from None
        finally:
            answer.cancel()

    def _lost(self, loss: ReplicaLost, tried: int, begun: bool) -> None:
        """Count a lost replica. Raises where the request can't be asked again."""
        self.lost += 1
        if begun:
            raise BrokenStream(f"the engine's machine was lost ({loss})") from None
        if tried == TRIES:
            raise Refusal(
                502,
                f"{TRIES} engines were lost ({loss}).",
                kind="upstream_error",
                code="replica_lost",
                elsewhere=True,
            ) from None
        self.again += 1
        log.warning("a replica was lost (%s) before its answer began: asked again elsewhere", loss)

    def fields(self, adapter: str | None, slot: int | None, reuse: bool) -> Mapping[str, Any]:
        """The adapter's name; the replica turns it into its engine's own fields."""
        return {"adapter": adapter} if adapter else NOTHING

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        """Raises Refusal where no replica runs: Ray would wait for one without end."""
        if self.replicas == 0:
            self.state()
            raise not_ready(self.name, "restarting", RETRY_AFTER_S)
        yield

    def state(self) -> str:
        """What was last seen; looks again in the background where that is long ago."""
        if time.monotonic() - self.looked_s > LOOK_S and (self.looking is None or self.looking.done()):
            self.looking = asyncio.get_running_loop().create_task(self.look())
        return "loading" if self.replicas is None else "ready" if self.replicas else "restarting"

    async def look(self) -> None:
        """Ask the cluster how many replicas run."""
        self.looked_s = time.monotonic()
        try:
            self.replicas = await asyncio.to_thread(self.running)
        except Exception as error:
            log.warning("the cluster does not tell its state: %s", type(error).__name__)

    def describe(self) -> dict[str, Any]:
        """For the page."""
        return {"replicas": self.replicas, "lost": self.lost, "again": self.again}

    async def aclose(self) -> None:
        """The engines are applications of their own and stay."""
        if self.looking:
            self.looking.cancel()


def _meant(error: Exception) -> Exception:
    """What an exception of Ray's says of the request: lost with its replica, refused by a full queue, or a fault of the engine's code."""
    from ray.exceptions import RayError, RayTaskError, TaskCancelledError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    if isinstance(error, BackPressureError):
        return at_limit(RETRY_AFTER_S)
    if isinstance(error, DeploymentUnavailableError):
        return Refusal(
            503,
            "No engine runs.",
            kind="server_error",
            code="model_ended",
            retry_after_s=RETRY_AFTER_S,
            elsewhere=True,
        )
    if isinstance(error, RayError) and not isinstance(error, RayTaskError | TaskCancelledError):
        return ReplicaLost(type(error).__name__)
    return Refusal(502, f"The engine failed ({type(error).__name__}).", kind="upstream_error", elsewhere=True)
