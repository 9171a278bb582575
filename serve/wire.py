"""HTTP/1.1 to one upstream over raw asyncio: kept connections, answers as they come, leaving in the middle closes the connection.

aiohttp costs the proxy a third of its requests a second; it is used where a proxy of the environment stands between (proxied.py), which
this does not speak to. Parsing is httptools', TLS is Python's. Errors are OSError, of which TimeoutError is one.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

MOST_WAITING_BYTES = 1 << 20  # of a body that nobody has read yet; then the upstream waits
MOST_HEADER_BYTES = 64 << 10
KEPT = 256
STALE_S = 30.0  # a connection that was idle for so long is not used again


class Exchange(asyncio.Protocol):
    """A connection, and the answer that it carries now."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.lost: Exception | None = None
        self.waiter: asyncio.Future[None] | None = None
        self.silent_at = 0.0  # of the loop's clock: when who waits has waited long enough
        self.alarm: asyncio.TimerHandle | None = None  # one a connection, not one a wait
        self.alarm_at = 0.0
        self.idle_since = 0.0
        self.parser = httptools.HttpResponseParser(self)
        self.reset()

    def reset(self) -> None:
        """Ready for the next answer."""
        self.headers: dict[str, str] = {}
        self.header_bytes = 0
        self.waiting: list[bytes] = []
        self.waiting_bytes = 0
        self.paused = False
        self.status, self.whole, self.any, self.keep = 0, False, False, False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if (
            self.status
            and not self.whole
            and "content-length" not in self.headers
            and self.headers.get("transfer-encoding") != "chunked"
        ):
            self.whole = True  # such a body ends with its connection
        self.lost = exc or ConnectionResetError("closed")
        if self.alarm is not None:
            self.alarm.cancel()
            self.alarm = None
        self._wake()

    def data_received(self, data: bytes) -> None:
        self.any = True
        if self.whole:  # more than was asked for: whose it is can't be known
            self.keep = False
            self.lost = self.lost or ConnectionError("bytes after the answer")
            self.transport.abort()
            return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.lost = ConnectionError(f"no HTTP: {type(error).__name__}")
            self.transport.abort()
        self._wake()

    def on_header(self, name: bytes, value: bytes) -> None:
        """httptools' callback."""
        self.header_bytes += len(name) + len(value)
        if self.header_bytes > MOST_HEADER_BYTES:
            raise ValueError("headers without end")
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """httptools' callback."""
        status = self.parser.get_status_code()
        if status >= 200:  # 100 and 103 are no answers
            self.status = status

    def on_body(self, part: bytes) -> None:
        """httptools' callback."""
        self.waiting.append(part)
        self.waiting_bytes += len(part)
        if self.waiting_bytes > MOST_WAITING_BYTES and not self.paused:
            self.paused = True
            self.transport.pause_reading()

    def on_message_complete(self) -> None:
        """httptools' callback."""
        if self.status:
            self.whole = True
            self.keep = (
                self.headers.get("connection", "").lower() != "close"
                and self.parser.get_http_version() == "1.1"
            )

    def _wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def news(self, silence_s: float) -> None:
        """Wait for bytes. Raises OSError where the connection ends, TimeoutError where it is silent for so long."""
        if self.lost is not None:
            raise self.lost
        self.silent_at = self.loop.time() + silence_s
        if self.alarm is None or self.alarm_at > self.silent_at:
            self._set_alarm()
        self.waiter = self.loop.create_future()
        await self.waiter

    def _set_alarm(self) -> None:
        if self.alarm is not None:
            self.alarm.cancel()
        self.alarm_at = self.silent_at
        self.alarm = self.loop.call_at(self.alarm_at, self._look)

    def _look(self) -> None:
        """The alarm rings: too early where bytes have come since it was set."""
        self.alarm = None
        if self.waiter is None or self.waiter.done():
            return
        if self.loop.time() >= self.silent_at:
            self.waiter.set_exception(TimeoutError("silent"))
        else:
            self._set_alarm()


class Answer:
    """What came back: status, headers, and the body as it comes, by `async for`: OSError where it breaks off."""

    def __init__(self, exchange: Exchange, silence_s: float) -> None:
        self.exchange, self.silence_s = exchange, silence_s
        self.status, self.headers = exchange.status, exchange.headers

    @property
    def content_type(self) -> str:
        """Without its parameters, in lower case."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> bytes:
        exchange = self.exchange
        while not exchange.waiting:
            if exchange.whole:
                raise StopAsyncIteration
            await exchange.news(self.silence_s)
        data, exchange.waiting, exchange.waiting_bytes = b"".join(exchange.waiting), [], 0
        if exchange.paused:
            exchange.paused = False
            exchange.transport.resume_reading()
        return data


class Asking:
    """A request that is sent on entering, which gives its answer once the headers are here. Leaving before its end hangs up."""

    def __init__(self, wire: Wire, data: bytes, silence_s: float) -> None:
        self.wire, self.data, self.silence_s = wire, data, silence_s

    async def __aenter__(self) -> Answer:
        self.exchange = await self.wire.begin(self.data, self.silence_s)
        return Answer(self.exchange, self.silence_s)

    async def __aexit__(self, *_: object) -> None:
        self.wire.end(self.exchange)


class Wire:
    """Connections to one address that are kept for the next request."""

    def __init__(
        self,
        url: str,
        headers: dict[str, str],
        connect_s: float,
        silence_s: float,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`url` without a trailing slash; `headers` go with every request."""
        address = urlsplit(url)
        self.host, self.secure = address.hostname or "", address.scheme == "https"
        self.port = address.port or (443 if self.secure else 80)
        self.base = address.path
        self.connect_s, self.silence_s = connect_s, silence_s
        self.tls = (tls or ssl.create_default_context()) if self.secure else None
        self.fixed = "".join(
            f"{name}: {value}\r\n"
            for name, value in {"Host": address.netloc.rpartition("@")[2], **headers}.items()
        )
        self.idle: list[Exchange] = []

    def ask(self, method: str, path: str, body: bytes = b"", silence_s: float | None = None) -> Asking:
        """A request; entering it raises OSError."""
        head = (
            f"{method} {self.base}{path} HTTP/1.1\r\n{self.fixed}Content-Length: {len(body)}\r\n\r\n".encode(
                "latin-1"
            )
        )
        return Asking(self, head + body, self.silence_s if silence_s is None else silence_s)

    def end(self, exchange: Exchange) -> None:
        """Keep a connection whose answer is whole, hang up on any other."""
        if (
            exchange.whole
            and exchange.lost is None
            and exchange.keep
            and not exchange.paused
            and len(self.idle) < KEPT
        ):
            exchange.idle_since = exchange.loop.time()
            self.idle.append(exchange)
        else:
            exchange.transport.abort()

    async def begin(self, data: bytes, silence_s: float) -> Exchange:
        """The exchange whose answer has begun. A kept connection that the server has hung up on meanwhile is replaced once."""
        exchange = self._kept()
        if exchange is not None:
            try:
                return await self._sent(exchange, data, silence_s)
            except TimeoutError:
                raise
            except OSError:
                if exchange.any:
                    raise
        return await self._sent(await self._connect(), data, silence_s)

    async def _sent(self, exchange: Exchange, data: bytes, silence_s: float) -> Exchange:
        """The exchange, once its answer has begun."""
        exchange.transport.write(data)
        try:
            while not exchange.status:
                await exchange.news(silence_s)
        except BaseException:
            exchange.transport.abort()
            raise
        return exchange

    def _kept(self) -> Exchange | None:
        while self.idle:
            exchange = self.idle.pop()
            if exchange.lost is None and exchange.loop.time() - exchange.idle_since < STALE_S:
                exchange.reset()
                return exchange
            exchange.transport.abort()
        return None

    async def _connect(self) -> Exchange:
        loop = asyncio.get_running_loop()
        more: dict[str, Any] = {"ssl": self.tls, "server_hostname": self.host} if self.tls else {}
        async with asyncio.timeout(self.connect_s):
            _, exchange = await loop.create_connection(lambda: Exchange(loop), self.host, self.port, **more)
        return exchange

    async def aclose(self) -> None:
        """Close what is kept."""
        for exchange in self.idle:
            exchange.transport.abort()
        self.idle.clear()
