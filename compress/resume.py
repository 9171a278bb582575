"""Work that outlives a kill: one run an OUT, leftovers swept, every built artefact kept until it has its name.

Steps are known by the hash of what decides their result. A step's files appear under that name whole or not at all
(`edgeft.files.staged_folder`), so a run that was killed anywhere goes on from the last finished step.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.errors import UsageError
from edgeft.files import disk_errors, read_json, staged_folder, sweep, write_json

RECORD = ".made.json"  # what a kept step returned and cost, beside its files
LEFTOVER = re.compile(r"\.(.+)\.(?:part|old|new)-[^.]+$")


@contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Hold OUT for this run and sweep what killed ones left there.

    Raises UsageError where another run holds it. A `kill -9` leaves no lock behind: the kernel drops it.
    """
    work = out / ".work"
    with disk_errors(out):
        work.mkdir(parents=True, exist_ok=True)
    handle = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
            raise UsageError(
                f"another run (process {holder}) is writing to {out}.",
                "wait until it has ended, or take another --out",
            ) from None
        except OSError:
            pass  # a file system without locks: two runs at once can't be told there
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        sweep_out(out)
        yield
    finally:
        os.close(handle)


def sweep_out(out: Path) -> None:
    """Remove or put back what killed runs left in OUT, its work folder and its rejects."""
    for folder in (out, out / ".work", out / ".rejected"):
        for name in {found[1] for p in folder.glob(".*") if (found := LEFTOVER.fullmatch(p.name))}:
            sweep(folder / name)
        for partial in folder.glob("*.part"):
            partial.unlink(missing_ok=True)


def kept(
    folder: Path, out: Path, make: Callable[[Path], dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Put what `make` writes into `out`; returns (what it returned, what its steps cost).

    It is made in `folder`, whose name must hold the hash of what decides the result, and stays there until `forget`:
    a run that was killed later takes it from there. `out` gets links, so nothing is stored twice.
    """
    ledger = folder.with_name(f"{folder.name}.steps.jsonl")
    before = len(_steps_in(ledger))
    was_there = (folder / RECORD).is_file()
    if not was_there:
        with staged_folder(folder) as staging, child.recorded(ledger):
            result = make(staging)
            steps = [{**step, "kept": index < before} for index, step in enumerate(_steps_in(ledger))]
            write_json(staging / RECORD, {"result": result, "steps": steps})
    record = read_json(folder / RECORD)
    shutil.copytree(
        folder, out, copy_function=_link, ignore=shutil.ignore_patterns(RECORD), dirs_exist_ok=True
    )
    latest = {step["name"]: {**step, "kept": step["kept"] or was_there} for step in record["steps"]}
    return record["result"], list(latest.values())


def _steps_in(ledger: Path) -> list[dict[str, Any]]:
    """The steps that ended for this key, in killed runs too; a line that a kill cut short is left out."""
    found = []
    for line in ledger.read_text().splitlines() if ledger.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def forget(folder: Path) -> None:
    """Remove a kept step: its artefact has its name, or was rejected."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_name(f"{folder.name}.steps.jsonl").unlink(missing_ok=True)


def forget_all(work: Path) -> None:
    """Remove what steps handed to each other, after a run that ended well."""
    for left in (p for p in work.glob("made-*") if p.is_dir()):
        forget(left)
    for left in (*work.glob("made-*"), *work.glob("source-*"), *work.glob("smooth-*")):
        left.unlink()
    shutil.rmtree(work / "moments", ignore_errors=True)
