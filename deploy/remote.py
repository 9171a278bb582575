"""A box over ssh: the machine's own ssh client, one shared connection, box.sh for everything that is asked.

Knows nothing of bundles but names of files and hashes. A connection that breaks is taken up again where it broke.
"""

from __future__ import annotations

import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from edgeft.errors import EnvironmentFault, UsageError

BOX = (Path(__file__).parent / "templates" / "box.sh").read_text(encoding="utf-8")
LOST = 255  # what ssh ends with where the connection, not the command, failed
TRIES, PAUSE_S = 6, 2.0
CHUNK = 1 << 18
OPTIONS = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=3", "ServerAliveCountMax=3")


def source_size(source: Callable[[int], tuple[BinaryIO, int]]) -> int:
    """Bytes of a file that `source` opens."""
    file, size = source(0)
    file.close()
    return size


def probed(said: str) -> dict[str, Any]:
    """What box.sh said to `probe`: machine; memory, what of it is unused or our own service's, free disk, in bytes; Python,
    processor flags, releases, stored hashes."""
    lines = (line.split("=", 1) for line in said.splitlines() if "=" in line)
    found: dict[str, Any] = {k: v.strip() for k, v in lines}
    for name in ("memory_bytes", "unused_bytes", "ours_bytes", "disk_free_bytes"):
        found[name] = int(found[name])
    return {**found, "stored": set(found["stored"].split()), "venvs": set(found["venvs"].split())}


class Broken(Exception):
    """The connection broke; what arrived is kept there."""


class Box:
    """One host. A context manager that ends the shared connection; raises EnvironmentFault where the box can't be reached."""

    def __init__(self, host: str, prefix: str, config: Path | None = None) -> None:
        if host.startswith("-") or any(c.isspace() for c in host) or not host:
            raise UsageError(f"'{host}' is no host.", "edgeft deploy box.tar user@host")
        if not prefix or any(c in "'\"\\$`;&|<>*?()" or c.isspace() for c in prefix):
            raise UsageError(
                f"--prefix {prefix!r} has a character that a shell reads.", "--prefix /opt/edgeft"
            )
        self.host, self.prefix = host, prefix
        self.sent_bytes = 0
        self._parts: set[str] | None = None
        self._scratch = tempfile.TemporaryDirectory(prefix="edgeft-ssh-")
        self._ssh = ["ssh", *(["-F", str(config)] if config else []), *(w for o in OPTIONS for w in ("-o", o)),
                     "-o", f"ControlPath={self._scratch.name}/c", "-o", "ControlMaster=auto", "-o", "ControlPersist=60"]  # fmt: skip

    def __enter__(self) -> Box:
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run([*self._ssh, "-O", "exit", "--", self.host], capture_output=True, check=False)
        self._scratch.cleanup()

    def ask(self, word: str, *words: str, tries: int = TRIES, timeout_s: float = 900) -> str:
        """What box.sh says to a word. Raises EnvironmentFault with its last line where it fails, after `tries` connections."""
        command = shlex.join(["sh", "-s", "--", word, self.prefix, *words])
        for attempt in range(1, tries + 1):
            done = self._run(command, BOX.encode(), timeout_s)
            if done.returncode != LOST:
                break
            if attempt < tries:
                self._again()
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines() or ["no word"]
            hint = f"ssh {self.host}" if done.returncode == LOST else f"ssh {self.host} ls {self.prefix}"
            raise EnvironmentFault(f"{self.host}: {said[-1][-300:]}", hint)
        self.sent_bytes += len(BOX)
        return done.stdout.decode(errors="replace")

    def _run(self, command: str, given: bytes, timeout_s: float) -> subprocess.CompletedProcess[bytes]:
        try:
            return subprocess.run(
                [*self._ssh, "--", self.host, command],
                input=given,
                capture_output=True,
                check=False,
                timeout=timeout_s,
            )
        except FileNotFoundError:
            raise EnvironmentFault("there is no ssh on this machine.", "apt install openssh-client") from None
        except subprocess.TimeoutExpired:
            raise EnvironmentFault(
                f"{self.host}: nothing came back within {timeout_s:.0f} s.", f"ssh {self.host}"
            ) from None

    def probe(self, python: str) -> dict[str, Any]:
        """What the box is and has: machine, memory, disk, Python, processor flags, releases, stored hashes."""
        return probed(self.ask("probe", python))

    def put(
        self, digest: str, source: Callable[[int], tuple[BinaryIO, int]], say: Callable[[int], None]
    ) -> None:
        """Send one file by its hash; what of it arrived before is not sent again. `source(offset)` opens it there; `say` is told
        the bytes of each piece. Raises EnvironmentFault where the disk is full, or the line breaks more often than TRIES."""
        for attempt in range(TRIES):
            there = self.ask("size", digest).strip() if attempt or digest in self._left() else "0"
            if there == "whole":  # it arrived, and only the word that it did was lost
                return
            offset = int(there)
            try:
                self._append(digest, source, offset, say)
                return
            except Broken as broke:
                if attempt == TRIES - 1:
                    raise EnvironmentFault(
                        f"{self.host}: {broke}", "the same command goes on from what arrived"
                    ) from None
                self._again()

    def _left(self) -> set[str]:
        """Hashes of files that an earlier deployment has sent in part; asked once."""
        if self._parts is None:
            listed = self._run(f"cd {self._quoted()}/store && ls .*.part 2>/dev/null || true", b"", 60)
            self._parts = {name[1:-5] for name in listed.stdout.decode().split()}
        return self._parts

    def _quoted(self) -> str:
        return self.prefix if self.prefix.startswith("~/") else shlex.quote(self.prefix)

    def _append(
        self,
        digest: str,
        source: Callable[[int], tuple[BinaryIO, int]],
        offset: int,
        say: Callable[[int], None],
    ) -> None:
        part = f"{self._quoted()}/store/.{digest}.part"
        whole = f"{self._quoted()}/store/{digest}"
        size = source_size(source)
        check = (
            f"if [ \"$(sha256sum < {part})\" = '{digest}  -' ]; then mv {part} {whole}; "
            f'elif [ "$(stat -c %s {part})" -ge {size} ]; then rm -f {part}; exit 9; else exit 10; fi'
        )
        command = f"cat >> {part} || exit 8; {check}"
        file, left = source(offset)
        process = subprocess.Popen(
            [*self._ssh, "--", self.host, command],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert process.stdin and process.stderr
        with file:
            try:
                while left and (piece := file.read(min(left, CHUNK))):
                    process.stdin.write(piece)
                    left -= len(piece)
                    self.sent_bytes += len(piece)
                    say(len(piece))
                process.stdin.close()
            except BrokenPipeError:
                pass
        said = process.stderr.read().decode(errors="replace").strip()
        code = process.wait()
        if code == 8:
            raise EnvironmentFault(
                f"{self.host}: {said.splitlines()[-1] if said else 'writing failed'}",
                f"ssh {self.host} df -h {self.prefix}",
            )
        if code in (9, 10):
            raise Broken("a file arrived damaged" if code == 9 else "the connection broke")
        if code:
            raise Broken(said.splitlines()[-1] if said else "the connection broke")

    def _again(self) -> None:
        """Let a broken shared connection go, and wait a moment."""
        subprocess.run([*self._ssh, "-O", "exit", "--", self.host], capture_output=True, check=False)
        time.sleep(PAUSE_S)
