"""Answers that several proxies share, in Redis: the exact cache's interface, over a network that may fail.

A value is text: its labels on the first line, the answer as JSON on the second. One SET a put, one GET a get; Redis itself forgets
what is too old. A Redis that fails or is slow costs the hit, never the answer: after a failure nobody asks for PAUSE_S.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from edgeft.errors import EnvironmentFault, UsageError, missing_extra

TIMEOUT_S = 0.2
DROP_TIMEOUT_S = 5.0
PAUSE_S = 5.0
MOST_BYTES = 1 << 20  # of one answer; a longer one is made anew
LABELS_BYTES = 1024  # read of each entry when a label is dropped; of an entry with more labels, all is read
SCANNED = 500  # entries looked at in one round trip
SCHEMES = ("redis", "rediss", "unix")
log = logging.getLogger("edgeft.cache")


class Breaker:
    """Whether to ask. After a failure: no, for `pause_s`; then one call tries, and the others go on waiting for what it finds."""

    def __init__(self, pause_s: float = PAUSE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self.pause_s, self.clock = pause_s, clock
        self.closed_until_s: float | None = None  # None: all is well

    def asks(self) -> bool:
        """True where this call may ask."""
        if self.closed_until_s is None:
            return True
        now = self.clock()
        if now < self.closed_until_s:
            return False
        self.closed_until_s = now + self.pause_s  # this call is the one that tries
        return True

    def failed(self) -> None:
        """The call got no answer."""
        self.closed_until_s = self.clock() + self.pause_s

    def answered(self) -> None:
        """The call got an answer."""
        self.closed_until_s = None


class RedisCache:
    """Answers in one Redis (no Redis Cluster). `aget` and `aput` never hold up the event loop; `get` and `put` wait in the thread.

    Its memory is bounded by the server's own `maxmemory` with `maxmemory-policy allkeys-lru`. Whoever can write to it can put words
    into the models' mouths: a password, and TLS (`rediss://`) where the network is not trusted.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "edgeft",
        timeout_s: float = TIMEOUT_S,
        password_file: Path | None = None,
    ) -> None:
        """`url`: redis://[USER:PASSWORD@]HOST:PORT/DB, rediss:// for TLS (certificates are checked; ?ssl_ca_certs=FILE for an authority
        of one's own), unix://PATH. `timeout_s` bounds each wait for the socket in get and put, and the whole of aget and aput.
        Connects at the first call, so a server that is down is no error here.

        Raises UsageError for a URL or a password file that can't be used, EnvironmentFault where `redis` is not installed.
        """
        try:
            import redis
            import redis.asyncio
        except ImportError:
            raise missing_extra("redis", "redis") from None
        self.prefix, self.timeout_s = f"{prefix}:answer:", timeout_s
        self.where = _where(url)
        self.breaker = Breaker()
        password = {"password": read_secret(password_file)} if password_file else {}
        self._client = lambda kind, seconds, retry: kind.from_url(
            url,
            **password,
            decode_responses=True,
            encoding_errors="replace",  # what others wrote there is no JSON then, and no more
            socket_timeout=seconds,
            socket_connect_timeout=seconds,
            retry=retry,
        )
        try:
            self.redis = self._client(redis.Redis, timeout_s, _once(redis.retry.Retry))
            self.aredis = self._client(redis.asyncio.Redis, timeout_s, _once(redis.asyncio.retry.Retry))
        except (ValueError, TypeError):  # its message may hold the URL
            raise UsageError(f"the cache's address is no URL of Redis ({self.where}).", HINT) from None

    def __repr__(self) -> str:
        return f"RedisCache({self.where})"

    def get(self, key: str) -> Any:
        """The kept value (JSON types), or None."""
        if not self.breaker.asks():
            return None
        try:
            text = self.redis.get(self.prefix + key)
        except Exception as error:
            return self._failed("read", error)
        return self._value(text)

    def put(self, key: str, value: Any, ttl_s: float, labels: Sequence[str] = ()) -> None:
        """Keep a value of JSON types for `ttl_s` seconds; `labels` ("model:…", "tenant:…", "tag:…") are what it can be dropped by."""
        if not (text := _text(value, labels)) or not self.breaker.asks():
            return
        try:
            self.redis.set(self.prefix + key, text, px=_ms(ttl_s))
        except Exception as error:
            self._failed("write", error)
        else:
            self.breaker.answered()

    async def aget(self, key: str) -> Any:
        """`get`, while the event loop goes on."""
        if not self.breaker.asks():
            return None
        try:
            async with asyncio.timeout(self.timeout_s):
                text = await self.aredis.get(self.prefix + key)
        except Exception as error:
            return self._failed("read", error)
        return self._value(text)

    async def aput(self, key: str, value: Any, ttl_s: float, labels: Sequence[str] = ()) -> None:
        """`put`, while the event loop goes on."""
        if not (text := _text(value, labels)) or not self.breaker.asks():
            return
        try:
            async with asyncio.timeout(self.timeout_s):
                await self.aredis.set(self.prefix + key, text, px=_ms(ttl_s))
        except Exception as error:
            self._failed("write", error)
        else:
            self.breaker.answered()

    def drop(self, label: str) -> int:
        """Forget everything that carries the label; returns how many. Walks the whole cache, SCANNED entries a round trip.

        Raises EnvironmentFault where Redis does not answer: what must be forgotten must not be taken for forgotten.
        """
        import redis

        gone = 0
        client = self._client(redis.Redis, DROP_TIMEOUT_S, _once(redis.retry.Retry))
        try:
            place = 0
            while True:
                place, keys = client.scan(place, match=_literal(self.prefix) + "*", count=SCANNED)
                with client.pipeline(transaction=False) as pipe:
                    for key in keys:
                        pipe.getrange(key, 0, LABELS_BYTES - 1)
                    heads = pipe.execute(raise_on_error=False)  # an entry of another kind is not ours
                found = [k for k, head in zip(keys, heads, strict=True) if label in _labels(client, k, head)]
                gone += client.unlink(*found) if found else 0
                if not place:
                    return gone
        except redis.RedisError as error:
            raise EnvironmentFault(
                f"Redis at {self.where} did not forget '{label}' ({type(error).__name__}); {gone} entries are gone.",
                "again, when it answers",
            ) from None
        finally:
            client.close()

    def close(self) -> None:
        """Close the connections of `get` and `put`."""
        self.redis.close()

    async def aclose(self) -> None:
        """Close all connections; in the event loop of `aget` and `aput`."""
        self.close()
        await self.aredis.aclose()

    def _value(self, text: str | None) -> Any:
        self.breaker.answered()
        if text is None:
            return None
        try:
            return json.loads(text.partition("\n")[2])
        except ValueError:
            log.warning("cache read failed: an entry that is no JSON")
            return None

    def _failed(self, what: str, error: Exception) -> None:
        self.breaker.failed()
        log.warning(
            "cache %s failed: %s; not asked for %g s", what, type(error).__name__, self.breaker.pause_s
        )


class InLoop:
    """The cache for an event loop: coroutines under the names that a store has."""

    def __init__(self, cache: RedisCache) -> None:
        self.cache, self.get, self.put, self.close = cache, cache.aget, cache.aput, cache.aclose

    async def drop(self, label: str) -> int:
        """`RedisCache.drop`, in a thread."""
        return await asyncio.to_thread(self.cache.drop, label)


HINT = "redis://HOST:PORT/0, or rediss:// for TLS, with the password in the URL or in a file"


def read_secret(file: Path) -> str:
    """The one line of a file. Raises UsageError, without a word of what stands in it."""
    try:
        secret = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the password file {file} can't be read ({type(error).__name__}).", HINT) from None
    if not secret or "\n" in secret:
        raise UsageError(f"the password file {file} must hold one line.", HINT)
    return secret


def _where(url: str) -> str:
    """Host and port for messages: no user, no password, no query. Raises UsageError for what is no address of Redis."""
    try:
        parts = urlsplit(url)
        place = (
            unquote(parts.path) if parts.scheme == "unix" else f"{parts.hostname or ''}:{parts.port or 6379}"
        )
    except ValueError:
        raise UsageError("the cache's address is no URL.", HINT) from None
    if parts.scheme not in SCHEMES or not (parts.hostname or parts.scheme == "unix"):
        raise UsageError(f"the cache's address is no URL of Redis ({place}).", HINT)
    return place


def _once(retry: Any) -> Any:
    """A connection that the server has closed meanwhile is opened again once and at once; a slow server is not asked twice."""
    from redis.backoff import NoBackoff
    from redis.exceptions import ConnectionError

    return retry(NoBackoff(), 1, supported_errors=(ConnectionError,))


def _text(value: Any, labels: Sequence[str]) -> str | None:
    """What stands in Redis; None for what is not kept: no JSON, or too long."""
    try:
        text = f"{json.dumps(list(labels))}\n{json.dumps(value, separators=(',', ':'))}"
    except (TypeError, ValueError) as error:
        log.warning("cache write failed: %s", type(error).__name__)
        return None
    return text if len(text) <= MOST_BYTES else None


def _ms(ttl_s: float) -> int:
    return max(1, round(ttl_s * 1000))


def _labels(client: Any, key: str, head: Any) -> list[str]:
    """The labels of an entry by its beginning, or by all of it where the beginning is not enough."""
    if not isinstance(head, str):
        return []
    line, end, _ = head.partition("\n")
    if head and not end:
        line = (client.get(key) or "").partition("\n")[0]
    try:
        found = json.loads(line) if line else []
    except ValueError:
        return []
    return found if isinstance(found, list) else []


def _literal(text: str) -> str:
    """A text in a pattern of Redis."""
    return "".join(f"\\{c}" if c in "*?[]\\^" else c for c in text)
