"""HTTP to an upstream through a proxy of the environment (HTTPS_PROXY …), by aiohttp: what wire.py does, where that can't."""

from __future__ import annotations

import ssl
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit


def applies(url: str) -> bool:
    """True where the environment names a proxy for this address."""
    address = urlsplit(url)
    known = urllib.request.getproxies()
    return bool(
        (known.get(address.scheme) or known.get("all"))
        and not urllib.request.proxy_bypass(address.hostname or "")
    )


class Answer:
    """What came back."""

    def __init__(self, response: Any) -> None:
        self.response, self.status, self.content_type = response, response.status, response.content_type
        self.headers = {name.lower(): value for name, value in response.headers.items()}

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises OSError where it breaks off."""
        import aiohttp

        try:
            async for part in self.response.content.iter_any():
                yield part
        except aiohttp.ClientError as error:
            raise ConnectionError(type(error).__name__) from None


class ProxiedWire:
    """Connections through the environment's proxy."""

    def __init__(
        self,
        url: str,
        headers: dict[str, str],
        connect_s: float,
        silence_s: float,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.url, self.headers, self.connect_s, self.silence_s = url, headers, connect_s, silence_s
        self.tls: Any = tls or True
        self._session: Any = None

    def session(self) -> Any:
        """Made in the event loop that uses it. Raises ConnectionError where aiohttp is missing."""
        if self._session is None:
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.connect_s, sock_read=self.silence_s)
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30, ssl=self.tls)
            self._session = aiohttp.ClientSession(
                timeout=timeout,
                connector=connector,
                trust_env=True,
                headers=self.headers,
                skip_auto_headers=("User-Agent",),
            )
        return self._session

    @asynccontextmanager
    async def ask(
        self, method: str, path: str, body: bytes = b"", silence_s: float | None = None
    ) -> AsyncIterator[Answer]:
        """As Wire.ask."""
        import aiohttp

        try:
            response = await self.session().request(
                method, f"{self.url}{path}", data=body, allow_redirects=False
            )
        except aiohttp.ServerDisconnectedError:
            try:
                response = await self.session().request(
                    method, f"{self.url}{path}", data=body, allow_redirects=False
                )
            except aiohttp.ClientError as error:
                raise ConnectionError(type(error).__name__) from None
        except aiohttp.ClientError as error:
            raise ConnectionError(type(error).__name__) from None
        async with response:
            yield Answer(response)

    async def aclose(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
