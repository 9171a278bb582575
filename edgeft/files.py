"""Files written whole or not at all, and hashed.

A reader never sees a half-written artefact: everything is made under a temporary name beside its
place, flushed to disk, and renamed. What a killed process leaves under temporary names is found by
`sweep`: a lock that the kernel lets go of when its holder ends tells the leftovers from work under way.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgeft.errors import EnvironmentFault, UsageError


def sha256_file(path: Path) -> str:
    """SHA-256 of a file as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON as hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def list_files(folder: Path, leave_out: frozenset[str] = frozenset()) -> dict[str, dict[str, Any]]:
    """Relative path -> {bytes, sha256} of every file under `folder`, sorted."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in leave_out:
            found[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    return found


def tree_bytes(folder: Path) -> int:
    """Bytes of all files under a folder (or of one file)."""
    if folder.is_file():
        return folder.stat().st_size
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Raises EnvironmentFault where the disk is full or read-only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a JSON-lines file atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UsageError with the path where it is absent or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}.", f"ls {path.parent}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}.", f"python3 -m json.tool {path}") from None


def publish(partial: Path, target: Path) -> None:
    """Give a finished file its name, flushed to disk first."""
    flush(partial)
    partial.replace(target)
    flush(target.parent)


def flush(path: Path) -> None:
    """Have a file's contents, or a folder's names, on disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def staged_folder(target: Path, staging_root: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` if the block ends well, and vanishes if it does not.

    What a killed run left beside `target` is swept first.
    """
    root = staging_root or target.parent
    with disk_errors(target):
        root.mkdir(parents=True, exist_ok=True)
        sweep(target, root)
        staging, lock = _fresh_folder(root, target.name)
    try:
        with disk_errors(target):
            yield staging
            for path in staging.rglob("*"):
                if path.suffix == ".safetensors" and path.is_file():
                    # safetensors 0.8 writes for its owner alone, and a service is another user.
                    path.chmod(0o644)
                if path.is_file() or path.is_dir():
                    flush(path)
            flush(staging)
            replace_folder(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        unlock(lock)


def replace_folder(staging: Path, target: Path) -> None:
    """Rename `staging` to `target`, moving an old `target` out of the way first.

    A kill between the two renames leaves the old folder under its other name; `sweep` puts it back.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    old, lock = None, None
    if target.exists():
        old = target.with_name(f".{target.name}.old-{os.getpid()}")
        lock = try_lock(target)  # stays with the folder when it is renamed
        target.rename(old)
    try:
        staging.rename(target)
        flush(target.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if old is not None and not target.exists():
            old.rename(target)
        raise
    finally:
        unlock(lock)


def published_name(folder: Path) -> str:
    """The name that a folder has, or will have where it is half-made."""
    return folder.name.removeprefix(".").partition(".part-")[0]


def sweep(target: Path, root: Path | None = None) -> None:
    """Undo what killed runs left beside `target` (half-made folders in `root`): half-made folders go, and an old
    `target` that was moved out of the way comes back where nothing took its place. Work under way is left alone."""
    name = glob.escape(target.name)
    moved = sorted(target.parent.glob(f".{name}.old-*"), key=lambda p: p.stat().st_mtime, reverse=True)
    half_made = (root or target.parent).glob(f".{name}.part-*")
    for left in [*moved, *half_made]:
        lock = try_lock(left)
        if lock is None:
            continue
        if ".old-" in left.name and not target.exists():
            left.rename(target)
        else:
            shutil.rmtree(left, ignore_errors=True)
        unlock(lock)
    for left in (root or target.parent).glob(f".{name}.new-*"):
        try:
            left.rmdir()  # made and not locked yet: its owner makes another
        except OSError:
            continue


def _fresh_folder(root: Path, name: str) -> tuple[Path, int | None]:
    """A new empty folder under a temporary name, locked before `sweep` could take it for a leftover."""
    while True:
        fresh = Path(tempfile.mkdtemp(dir=root, prefix=f".{name}.new-"))
        try:
            fresh.chmod(0o755)
            lock = try_lock(fresh)
            staging = fresh.with_name(f".{name}.part-{fresh.name.rpartition('-')[2]}")
            fresh.rename(staging)
        except FileNotFoundError:
            continue
        return staging, lock


def try_lock(path: Path) -> int | None:
    """Lock a file or folder for this process and return the handle to `unlock`; None where another process holds it
    or the file system knows no locks. The kernel lets go of it when the process ends, however it ends."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def unlock(handle: int | None) -> None:
    """Let go of what `try_lock` gave."""
    if handle is not None:
        os.close(handle)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a two-line error that names the place."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(path) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise EnvironmentFault(
                f"cannot write to {path}: {error.strerror}.", f"ls -ld {path.parent}"
            ) from error
        raise


def disk_full(path: Path) -> EnvironmentFault:
    """The error for a full disk at `path`."""
    return EnvironmentFault(f"the disk is full while writing {path}.", f"df -h {path.parent}")


def need_disk(folder: Path, bytes_needed: int) -> None:
    """Raise EnvironmentFault before the work starts where `folder`'s disk has too little room."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < bytes_needed:
        raise EnvironmentFault(
            f"{folder} needs about {bytes_needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free.",
            f"df -h {existing}",
        )
