"""Exact answers kept on disk: the same request to the same artefact gets the same answer.

The key is a hash of everything that decides the answer, so the disk holds no prompts; it does hold
answers. diskcache's JSON disk, with its way back to pickle closed (CVE-2025-69872).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from edgeft.files import sha256_json
from edgeft.router.cache.exact import opened
from edgeft.serve.sse import Answer

TTL_S = 3600.0
SIZE_LIMIT_BYTES = 256 << 20
KEPT_REASONS = ("stop", "length")
log = logging.getLogger("edgeft.serve")


def key_of(candidate_id: str, artifact_sha256: str | None, fields: dict[str, Any]) -> str:
    """The key: chosen model, its artefact's hash, and every field that goes upstream."""
    return sha256_json(["edgeft/answer@1", candidate_id, artifact_sha256, fields])


class AnswerCache:
    """Answers by key. A disk that fails costs the hit, never the answer."""

    def __init__(self, folder: Path, ttl_s: float = TTL_S) -> None:
        """Open or make the cache. Raises EnvironmentFault where the folder can't be used."""
        self.ttl_s = ttl_s
        self.disk = opened(folder, _json_disk, SIZE_LIMIT_BYTES)

    def get(self, key: str) -> Answer | None:
        """The kept answer, or None."""
        try:
            value = self.disk.get(key)
            return None if value is None else Answer(**value)
        except Exception as error:
            log.warning("cache read failed: %s", type(error).__name__)
            return None

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer that ended by itself or at its token limit; others are not kept."""
        if answer.finish_reason not in KEPT_REASONS:
            return
        try:
            self.disk.set(key, answer.to_dict(), expire=self.ttl_s)
        except Exception as error:
            log.warning("cache write failed: %s", type(error).__name__)

    def close(self) -> None:
        """Close the files."""
        self.disk.close()


def _json_disk() -> Any:
    """diskcache's JSONDisk, refusing what its parent would unpickle."""
    from diskcache import JSONDisk
    from diskcache.core import MODE_PICKLE

    class NoPickle(JSONDisk):
        def get(self, key: Any, raw: Any) -> Any:
            if not raw:
                raise ValueError("a pickled key in the cache")
            return super().get(key, raw)

        def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
            if mode == MODE_PICKLE:
                raise ValueError("a pickled value in the cache")
            return super().fetch(mode, filename, value, read)

    return NoPickle
