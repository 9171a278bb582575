"""API keys of the proxy: made and revoked by the command line, looked up by the proxy in memory.

A key has 256 random bits, so its plain SHA-256 is kept: there is nothing to guess, and no slow hash to wait for. The
look-up is by that hash, so the time it takes says nothing of the keys that exist.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from edgeft.errors import EnvironmentFault, UsageError, unknown
from edgeft.home import state_dir

PREFIX = "ek-"
RANDOM_BYTES = 32
LONGEST = 200  # characters of what is looked up at all
LOOK_EVERY_S = 0.5
BUSY_S = 30.0
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
TABLE = """CREATE TABLE IF NOT EXISTS keys (
  id TEXT PRIMARY KEY, name TEXT NOT NULL, tenant TEXT NOT NULL, sha256 BLOB NOT NULL UNIQUE,
  created_s INTEGER NOT NULL, expires_s INTEGER, revoked_s INTEGER
)"""
COLUMNS = "id, name, tenant, created_s, expires_s, revoked_s"


@dataclass(frozen=True, slots=True)
class Key:
    """Whose key it is. `tenant` separates caches and prefixes: keys of the same tenant share them."""

    id: str
    name: str
    tenant: str


@dataclass(frozen=True, slots=True)
class Row(Key):
    """A key as it is listed; times in seconds since 1970, UTC."""

    created_s: int
    expires_s: int | None
    revoked_s: int | None

    def state(self, now_s: float) -> str:
        """active, expired or revoked."""
        if self.revoked_s is not None:
            return "revoked"
        return "expired" if self.expires_s is not None and self.expires_s <= now_s else "active"


def default_path() -> Path:
    """Where the keys are unless said otherwise."""
    return state_dir("keys.db")


def prepare(path: Path) -> None:
    """Make the file where there is none, without a key. Raises EnvironmentFault where it can't be written."""
    with _writing(path):
        pass


def create(path: Path, name: str, tenant: str | None = None, days: int | None = None) -> tuple[Row, str]:
    """Make a key; returns its row and the key itself, which is kept nowhere. The tenant is the name if left out.

    Raises UsageError for a name or tenant of other characters, EnvironmentFault where the file can't be written.
    """
    tenant = name if tenant is None else tenant
    for what, word in (("name", name), ("tenant", tenant)):
        if not NAME.fullmatch(word):
            raise UsageError(
                f"'{word[:80]}' can't be a {what}: letters, digits and . _ @ - alone, 64 at most.",
                "edgeft keys create support-bot --tenant support",
            )
    secret = PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(RANDOM_BYTES)).rstrip(b"=").decode()
    now = int(time.time())
    expires_s = None if days is None else now + days * 86400
    row = Row(f"k{secrets.token_hex(5)}", name, tenant, now, expires_s, None)
    with _writing(path) as connection:
        connection.execute(
            f"INSERT INTO keys ({COLUMNS}, sha256) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (row.id, row.name, row.tenant, row.created_s, row.expires_s, None, hash_of(secret)),
        )
    return row, secret


def revoke(path: Path, key_id: str) -> Row:
    """Revoke a key for good; one that is revoked already keeps its time. Raises UsageError for an unknown id."""
    known = {row.id: row for row in listed(path)}
    if key_id not in known:
        raise unknown("the key", key_id, known, "edgeft keys list") if known else none_there(path)
    with _writing(path) as connection:
        now = int(time.time())
        connection.execute("UPDATE keys SET revoked_s = coalesce(revoked_s, ?) WHERE id = ?", (now, key_id))
    return next(row for row in listed(path) if row.id == key_id)


def listed(path: Path) -> list[Row]:
    """All keys, oldest first; none where the file is not there yet."""
    if not path.exists():
        return []
    connection = _reader(path)
    try:
        return [
            Row(*row) for row in connection.execute(f"SELECT {COLUMNS} FROM keys ORDER BY created_s, rowid")
        ]
    except sqlite3.Error as error:
        raise _fault(path, error) from None
    finally:
        connection.close()


def none_there(path: Path) -> UsageError:
    """The error for a file without keys."""
    return UsageError(f"there are no keys in {path}.", "edgeft keys create NAME")


def hash_of(secret: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(secret.encode(errors="replace")).digest()


class KeyStore:
    """The keys that are valid now, in memory; looks at most twice a second whether the file has changed.

    Raises EnvironmentFault where the file can't be read at the start: better no proxy than one that knows nobody. Once
    read, the known keys go on being served while it can't be read: `healthy` is False then and `trouble` says why.
    Any thread may ask.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trouble: str | None = None
        self._keys: dict[bytes, tuple[Key, float]] = {}
        self._connection: sqlite3.Connection | None = None
        self._seen: tuple[int, int, int] | None = None  # device, inode, SQLite's data_version
        self._look_s = time.monotonic() + LOOK_EVERY_S
        self._turn = threading.Lock()
        if not path.exists():
            raise EnvironmentFault(f"there are no keys: {path} does not exist.", "edgeft keys create NAME")
        try:
            self._read()
        except (sqlite3.Error, OSError) as error:
            self.close()
            raise _fault(path, error) from None

    @property
    def healthy(self) -> bool:
        """Whether the file could be read when it was last looked at."""
        return self.trouble is None

    def __len__(self) -> int:
        return len(self._keys)

    def tenant_of(self, presented: str) -> Key | None:
        """The key that was presented; None where it is unknown, expired or revoked (at most a second ago)."""
        if time.monotonic() >= self._look_s:
            self.look()
        if len(presented) > LONGEST:
            return None
        found = self._keys.get(hashlib.sha256(presented.encode(errors="replace")).digest())
        return found[0] if found is not None and found[1] > time.time() else None

    def look(self) -> None:
        """Read the file again if it has changed; never raises for a file that can't be read."""
        if not self._turn.acquire(blocking=False):
            return
        try:
            self._look_s = time.monotonic() + LOOK_EVERY_S
            self._read()
            self.trouble = None
        except (sqlite3.Error, OSError) as error:
            self._disconnect()
            self.trouble = f"{self.path} can't be read ({_why(error)}); the keys known before are served"
        finally:
            self._turn.release()

    def close(self) -> None:
        """Let go of the file."""
        with self._turn:
            self._disconnect()

    def _read(self) -> None:
        stat = self.path.stat()
        if self._seen is None or self._seen[:2] != (stat.st_dev, stat.st_ino):  # another file took its name
            self._disconnect()
        if self._connection is None:
            self._connection = _reader(self.path, timeout_s=0.05)
        (version,) = self._connection.execute("PRAGMA data_version").fetchone()
        seen = (stat.st_dev, stat.st_ino, version)
        if seen != self._seen:
            self._keys = {
                sha256: (Key(key_id, name, tenant), float("inf") if expires_s is None else float(expires_s))
                for key_id, name, tenant, sha256, expires_s in self._connection.execute(
                    "SELECT id, name, tenant, sha256, expires_s FROM keys WHERE revoked_s IS NULL"
                )
            }
            self._seen = seen

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection, self._seen = None, None


@contextmanager
def _writing(path: Path) -> Iterator[sqlite3.Connection]:
    """A transaction on the file, made where it is not there yet: mode 0600, as its journal then is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.chmod(0o600)
        connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
        try:
            _to_wal(connection)
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(TABLE)
            yield connection
            connection.execute("COMMIT")
        finally:
            connection.close()
    except (sqlite3.Error, OSError) as error:
        raise _fault(path, error) from None


def _to_wal(connection: sqlite3.Connection) -> None:
    """Readers go on while a key is written. SQLite does not wait for its turn to change this mode, so we do."""
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _reader(path: Path, timeout_s: float = BUSY_S) -> sqlite3.Connection:
    uri = f"{path.resolve().as_uri()}?mode=ro"
    return sqlite3.connect(uri, uri=True, timeout=timeout_s, isolation_level=None, check_same_thread=False)


def _why(error: Exception) -> str:
    return error.strerror or "unknown" if isinstance(error, OSError) else str(error)


def _fault(path: Path, error: Exception) -> EnvironmentFault:
    return EnvironmentFault(
        f"the keys in {path}: {_why(error)}.", f"ls -l {path.parent}; df -h {path.parent}"
    )


def told(row: Row) -> dict[str, str | None]:
    """A row for JSON and tables; times as ISO 8601 in UTC."""
    times = {"created": row.created_s, "expires": row.expires_s, "revoked": row.revoked_s}
    iso = {k: None if s is None else datetime.fromtimestamp(s, UTC).isoformat() for k, s in times.items()}
    return {"id": row.id, "name": row.name, "tenant": row.tenant, "state": row.state(time.time()), **iso}
