"""Answers by the hash of the whole request, on disk, until they are too old.

Whatever could change an answer is in the key: every field of the request but those listed in NO_EFFECT, the tenant, the chosen
model, and the hashes of its artefact, adapter and template. The disk holds answers and labels, never prompts; JSON text, no pickles.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeft.errors import EnvironmentFault, missing_extra

SCHEMA = "edgeft/answer@3"
SIZE_LIMIT_BYTES = 256 << 20
# Of the database in the proxy's memory. diskcache maps 64 MiB and lets SQLite keep 32 MiB of pages, which fill for hours: a proxy that grows.
MAPPED_BYTES = 8 << 20
KEPT_PAGES = 512  # of 4 KiB
# Fields of OpenAI's API that change how an answer is sent or booked, not what it says. A field that is not known counts.
NO_EFFECT = frozenset(
    {
        "stream",
        "stream_options",
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
    }
)
log = logging.getLogger("edgeft.cache")


@dataclass(frozen=True)
class Settings:
    """What may be kept and served again. `sampled` maps (tenant, route) to an answer; "*" stands for any, the more exact wins."""

    ttl_s: float = 3600.0
    sampled: Mapping[tuple[str, str], bool] = field(
        default_factory=dict
    )  # default: sampled answers are made anew

    def allows(self, request: Mapping[str, Any], tenant: str | None = None, route: str = "") -> bool:
        """True where a kept answer may be served to this request: greedy, seeded, or the setting says so."""
        if request.get("temperature") == 0 or request.get("seed") is not None:
            return True
        for pair in ((tenant or "", route), (tenant or "", "*"), ("*", route), ("*", "*")):
            if pair in self.sampled:
                return self.sampled[pair]
        return False


def key_of(
    request: Mapping[str, Any],
    model: str,
    *,
    tenant: str | None = None,
    artifact_sha256: str | None = None,
    adapter_sha256: str | None = None,
    template_sha256: str | None = None,
) -> str:
    """SHA-256 over the canonical request and what answers it."""
    fields = {name: value for name, value in request.items() if name not in NO_EFFECT and name != "model"}
    whole = [SCHEMA, tenant, model, artifact_sha256, adapter_sha256, template_sha256, fields]
    return hashlib.sha256(_canonical(whole)).hexdigest()


def _canonical(value: Any) -> bytes:
    """JSON with its keys in order. orjson takes a tenth of the time, but neither lone surrogates nor integers over 64 bits."""
    import orjson

    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except TypeError:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        return text.encode()


def _loads(text: str) -> Any:
    """A kept value. orjson takes a third of the time, but no NaN or infinity, as log-probabilities may be."""
    import orjson

    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return json.loads(text)


def keepable(finish_reason: str | None, message: Mapping[str, Any] | None = None, error: Any = None) -> bool:
    """True for an answer that ended by itself: no error, no refusal, not cut by length or by a filter."""
    return error is None and finish_reason in ("stop", "tool_calls") and not (message or {}).get("refusal")


def opened(folder: Path, disk: Callable[[], Any], size_limit_bytes: int) -> Any:
    """diskcache's cache in a folder that only its owner reads, made where there is none; `disk` gives the class that writes values.

    Raises EnvironmentFault where the folder can't be used.
    """
    try:
        import diskcache
    except ImportError:
        raise missing_extra("diskcache", "serve") from None
    import sqlite3

    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return diskcache.Cache(
            str(folder),
            disk=disk(),
            size_limit=size_limit_bytes,
            timeout=1.0,
            sqlite_mmap_size=MAPPED_BYTES,
            sqlite_cache_size=KEPT_PAGES,
        )
    except (OSError, sqlite3.Error, diskcache.Timeout) as error:
        raise EnvironmentFault(
            f"the cache {folder} can't be opened: {error}.", "--cache DIR or --no-cache"
        ) from None


class ExactCache:
    """Answers on disk. A disk that fails costs the hit, never the answer."""

    def __init__(self, folder: Path, size_limit_bytes: int = SIZE_LIMIT_BYTES) -> None:
        """Open or make the cache. Raises EnvironmentFault where the folder can't be used."""
        self.disk = opened(folder, _text_disk, size_limit_bytes)

    def get(self, key: str) -> Any:
        """The kept value (JSON types), or None."""
        try:
            text = self.disk.get(key)
            return None if text is None else _loads(text)["value"]
        except Exception as error:
            log.warning("cache read failed: %s", type(error).__name__)
            return None

    def put(self, key: str, value: Any, ttl_s: float, labels: Sequence[str] = ()) -> None:
        """Keep a value of JSON types for `ttl_s` seconds; `labels` ("model:…", "tenant:…", "tag:…") are what it can be dropped by."""
        try:
            self.disk.set(
                key, json.dumps({"labels": list(labels), "value": value}, separators=(",", ":")), expire=ttl_s
            )
        except Exception as error:
            log.warning("cache write failed: %s", type(error).__name__)

    def drop(self, label: str) -> int:
        """Forget everything that carries the label; returns how many. Walks the whole cache."""
        gone = 0
        for key in list(self.disk):
            text = self.disk.get(key)
            if text is not None and label in json.loads(text)["labels"]:
                gone += bool(self.disk.delete(key))
        return gone

    def close(self) -> None:
        """Close the files."""
        self.disk.close()


def _text_disk() -> Any:
    """A disk that keeps text and refuses all that diskcache would pickle or unpickle (CVE-2025-69872)."""
    from diskcache import Disk
    from diskcache.core import MODE_PICKLE

    class TextDisk(Disk):
        def put(self, key: Any) -> Any:
            if type(key) is not str:
                raise TypeError("a key of the cache is text")
            return super().put(key)

        def get(self, key: Any, raw: Any) -> Any:
            if not raw:
                raise ValueError("a pickled key in the cache")
            return super().get(key, raw)

        def store(self, value: Any, read: bool, key: Any = None) -> Any:
            if type(value) is not str:
                raise TypeError("a value of the cache is text")
            return super().store(value, read, key=key)

        def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
            if mode == MODE_PICKLE:
                raise ValueError("a pickled value in the cache")
            return super().fetch(mode, filename, value, read)

    return TextDisk
