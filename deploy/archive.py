"""A bundle as one tar: the same files give the same bytes. Its manifest comes first, so that reading it reads no more."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from edgeft.errors import UsageError
from edgeft.files import disk_errors, publish, sha256_file

SCHEMA = "edgeft/bundle@1"
MANIFEST, SUMS, SIGNATURE = "bundle.json", "SHA256SUMS", "SHA256SUMS.sig"
HINT = "edgeft bundle ARTIFACT --for PROFILE --out box.tar makes one"
Source = Path | bytes  # a file, or what is in one


def facts_of(files: Mapping[str, Source]) -> dict[str, dict[str, Any]]:
    """Name -> {bytes, sha256, mode}, sorted by name. Shell scripts may be run, nothing else."""
    found = {}
    for name in sorted(files):
        source = files[name]
        if isinstance(source, bytes):
            size, digest = len(source), hashlib.sha256(source).hexdigest()
        else:
            size, digest = source.stat().st_size, sha256_file(source)
        found[name] = {"bytes": size, "sha256": digest, "mode": 0o755 if name.endswith(".sh") else 0o644}
    return found


def sums(facts: Mapping[str, Mapping[str, Any]], manifest: bytes) -> bytes:
    """SHA256SUMS as sha256sum reads it, the manifest's own line included."""
    lines = [f"{f['sha256']}  {name}\n" for name, f in facts.items()]
    lines.append(f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n")
    return "".join(sorted(lines, key=lambda line: line[66:])).encode()


def encode(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as bytes, keys in their order of meaning."""
    return (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()


def write(path: Path, files: Mapping[str, Source]) -> None:
    """Write the tar whole or not at all: entries in the order given, owner root, time zero."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with (
                os.fdopen(handle, "wb") as out,
                tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar,
            ):
                for name, source in files.items():
                    entry = tarfile.TarInfo(name)
                    entry.mode, entry.mtime = (0o755 if name.endswith(".sh") else 0o644), 0
                    if isinstance(source, bytes):
                        entry.size = len(source)
                        tar.addfile(entry, io.BytesIO(source))
                    else:
                        entry.size = source.stat().st_size
                        with source.open("rb") as file:
                            tar.addfile(entry, file)
            Path(temporary).chmod(0o644)
            publish(Path(temporary), path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


class Bundle:
    """A bundle that is read: `manifest`, and its files where they lie in the tar."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with tarfile.open(path, "r:") as tar:
                self.places = {m.name: (m.offset_data, m.size) for m in tar.getmembers() if m.isfile()}
        except FileNotFoundError:
            raise UsageError(f"there is no file {path}.", HINT) from None
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UsageError(f"{path} is no bundle: {error}.", HINT) from None
        try:
            self.manifest = json.loads(self.read(MANIFEST))
            if self.manifest["schema"] != SCHEMA:
                raise ValueError(f"its schema is {self.manifest['schema']!r}")
            names = {MANIFEST, SUMS, *self.manifest["files"]}
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path} is no bundle: {error}.", HINT) from None
        unsafe = [n for n in self.places if PurePosixPath(n).is_absolute() or ".." in PurePosixPath(n).parts]
        if unsafe or names - set(self.places):
            raise UsageError(
                f"{path} is no bundle: {(unsafe or sorted(names - set(self.places)))[0]!r} is unsafe or missing.",
                HINT,
            )

    @property
    def id(self) -> str:
        """The bundle's name: the beginning of the hash over all that is in it."""
        return str(self.manifest["id"])

    def open(self, name: str, offset: int = 0) -> tuple[BinaryIO, int]:
        """(the tar, placed at a file's byte `offset`; bytes from there to the file's end). The caller closes it."""
        begin, size = self.places[name]
        file = self.path.open("rb")
        file.seek(begin + offset)
        return file, size - offset

    def read(self, name: str) -> bytes:
        """A file's content."""
        file, size = self.open(name)
        with file:
            return file.read(size)

    def check(self) -> None:
        """Raise UsageError naming the first file whose hash is not the manifest's."""
        for name, fact in self.manifest["files"].items():
            file, size = self.open(name)
            digest, left = hashlib.sha256(), size
            with file:
                while left and (piece := file.read(min(left, 1 << 20))):
                    digest.update(piece)
                    left -= len(piece)
            if digest.hexdigest() != fact["sha256"]:
                raise UsageError(f"{self.path}: {name} is damaged: its hash is not the manifest's.", HINT)
