"""Equal requests at the same time make one call: all who wait read the same stream from its beginning.

The call belongs to nobody: whoever began it may leave, and it goes on while anybody waits. When the last one leaves it is
cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, Generic, TypeVar

Chunk = TypeVar("Chunk")


class _Flight(Generic[Chunk]):
    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.ended = False
        self.error: BaseException | None = None
        self.waiting = 0
        self.news = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def tell(self) -> None:
        self.news.set()
        self.news = asyncio.Event()


class Flights(Generic[Chunk]):
    """The calls under way, by key. One event loop, no locks."""

    def __init__(self) -> None:
        self.under_way: dict[str, _Flight[Chunk]] = {}

    async def stream(self, key: str, call: Callable[[], AsyncIterator[Chunk]]) -> AsyncGenerator[Chunk]:
        """The chunks of `call()`, shared with everybody who asks for the same key before it ends. Raises what the call raises."""
        flight = self.under_way.get(key)
        if flight is None:
            flight = self.under_way[key] = _Flight()
            flight.task = asyncio.create_task(self._fly(key, flight, call))
        flight.waiting += 1
        try:
            place = 0
            while True:
                while place < len(flight.chunks):
                    place += 1
                    yield flight.chunks[place - 1]
                if flight.ended:
                    break
                await flight.news.wait()
            if flight.error is not None:
                raise flight.error
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.ended and flight.task is not None:
                self._forget(key, flight)  # a newcomer begins anew rather than joining what ends
                flight.task.cancel()
            del flight  # what it raised knows this frame: no circle

    def leads(self, key: str) -> bool:
        """True where nobody has asked for this key yet."""
        return key not in self.under_way

    async def _fly(self, key: str, flight: _Flight[Chunk], call: Callable[[], AsyncIterator[Chunk]]) -> None:
        source: Any = call()
        try:
            async for chunk in source:
                flight.chunks.append(chunk)
                flight.tell()
        except asyncio.CancelledError:
            flight.error = asyncio.CancelledError()
            raise
        except Exception as error:
            flight.error = error
        finally:
            flight.ended = True
            self._forget(key, flight)
            flight.tell()
            del flight  # no circle, as above
            if (close := getattr(source, "aclose", None)) is not None:
                await close()

    def _forget(self, key: str, flight: _Flight[Chunk]) -> None:
        if self.under_way.get(key) is flight:
            del self.under_way[key]
