"""One host: check it, send what it lacks, install, wait, measure a minute; and back to what ran before where any of it fails."""

from __future__ import annotations

import getpass
import json
import secrets
import shlex
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from edgeft.deploy import preflight
from edgeft.deploy.archive import MANIFEST, SIGNATURE, SUMS, Bundle
from edgeft.deploy.remote import Box
from edgeft.errors import EdgeftError, GateError

READY_S = 120


@dataclass
class Outcome:
    """What became of one host."""

    host: str
    state: str = "not tried"  # done, unchanged, refused, failed, rolled back, not tried
    text: str = ""
    id: str = ""
    before: str = ""
    sent_bytes: int = 0
    seconds: float = 0.0
    checked: dict[str, Any] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Whether the host runs the bundle now."""
        return self.state in ("done", "unchanged")


def deploy_to(box: Box, bundle: Bundle, check_s: float, say: Callable[[str], None]) -> Outcome:
    """Deploy a bundle on one box. Never raises EdgeftError: what went wrong stands in the outcome."""
    started, found = time.monotonic(), Outcome(box.host, id=bundle.id)
    try:
        with alone(box):
            _deploy(box, bundle, check_s, say, found)
    except EdgeftError as error:
        if found.state == "not tried":
            found.state = "failed"
        found.text = found.text or error.message
    found.sent_bytes, found.seconds = box.sent_bytes, time.monotonic() - started
    return found


@contextmanager
def alone(box: Box) -> Iterator[None]:
    """Nobody else deploys to the box meanwhile. Raises EnvironmentFault where somebody does."""
    token = secrets.token_hex(8)
    box.ask("lock", token, f"{getpass.getuser()} at {socket.gethostname()}")
    try:
        yield
    finally:
        try:
            box.ask("unlock", token, tries=1)
        except EdgeftError:
            pass  # it runs out by itself


def _deploy(box: Box, bundle: Bundle, check_s: float, say: Callable[[str], None], found: Outcome) -> None:
    say("looking at it")
    manifest = bundle.manifest
    state = box.probe(manifest["needs"]["python"])
    found.before = state["current"]
    files = _files(bundle)
    stored = sum(size for _, digest, _, size in files if digest in state["stored"])
    unpacked = max(0, manifest["needs"]["disk_bytes"] - sum(size for *_, size in files))
    state["stored_bytes"] = stored + (unpacked if manifest["venv"] in state["venvs"] else 0)
    if wrong := preflight.faults(manifest, state):
        found.state, found.text = "refused", "; ".join(wrong)
        return
    missing = [f for f in files if f[1] not in state["stored"]]
    total, sent = sum(f[3] for f in missing), 0

    def progress(count: int) -> None:
        nonlocal sent
        sent += count
        say(f"sent {sent / 1e6:.1f} of {total / 1e6:.1f} MB")

    done = set()
    for name, digest, _, _ in missing:
        if digest not in done:
            box.put(digest, lambda offset, name=name: bundle.open(name, offset), progress)  # type: ignore[misc]
            done.add(digest)
    say("putting it together")
    listed = "".join(f"{digest} {mode:o} {name}\n" for name, digest, mode, _ in files)
    box.ask("assemble", bundle.id, listed)
    say("installing and starting")
    try:
        box.ask("install", bundle.id, str(READY_S))
        if check_s:
            say(f"measuring for {check_s:.0f} s")
            port = str(manifest["config"]["port"])
            told = box.ask("check", bundle.id, manifest["venv"], str(check_s), port, timeout_s=check_s + 300)
            found.checked = judged(json.loads(told.splitlines()[-1]), manifest["promised"])
            if found.checked["verdict"] == "FAIL":
                raise GateError(
                    f"it runs and is slower than {manifest['for']['profile']} promises: {found.checked['text']}"
                )
    except EdgeftError as error:
        say("going back")
        _back(box, found, error)
        return
    found.state = "unchanged" if found.before == bundle.id else "done"
    box.ask("tidy")


def _back(box: Box, found: Outcome, error: EdgeftError) -> None:
    """Have what ran before run again; a first deployment is stopped."""
    before = found.before if found.before != found.id else ""
    try:
        box.ask("rollback", before, str(READY_S))
        found.state = "rolled back" if before else "failed"
        found.text = f"{error.message}" + (
            f"; {before} runs again" if before else "; nothing ran before, so it is stopped"
        )
    except EdgeftError as worse:
        found.state, found.text = "failed", f"{error.message}; and going back failed: {worse.message}"


def _files(bundle: Bundle) -> list[tuple[str, str, int, int]]:
    """(name, hash, mode, bytes) of everything in a bundle."""
    import hashlib

    facts = bundle.manifest["files"]
    found = [(n, f["sha256"], f["mode"], f["bytes"]) for n, f in facts.items()]
    for name in (MANIFEST, SUMS, SIGNATURE):
        if name in bundle.places:
            content = bundle.read(name)
            found.append((name, hashlib.sha256(content).hexdigest(), 0o644, len(content)))
    return found


def judged(seen: dict[str, Any], promised: dict[str, float]) -> dict[str, Any]:
    """What was measured beside the profile's limits: FAIL where a 95 % interval of the median lies beyond one, PASS where each
    lies within, else INCONCLUSIVE."""
    words, lines = [], []
    for name, limit in promised.items():
        figure = seen.get(name)
        if not figure:
            continue
        low, high = figure["p50_ci95"]
        floor = name == "decode_tok_per_s"  # more is better
        good, bad = (low >= limit, high < limit) if floor else (high <= limit, low > limit)
        words.append("PASS" if good else "FAIL" if bad else "INCONCLUSIVE")
        lines.append(f"{name} {figure['p50']:.3g} ({'at least' if floor else 'at most'} {limit:g})")
    verdict = next((w for w in ("FAIL", "INCONCLUSIVE", "PASS") if w in words), "nothing promised")
    return {**seen, "verdict": verdict, "text": ", ".join(lines)}


def status_of(box: Box) -> dict[str, Any]:
    """What a host runs, what it would go back to, and whether it is ready."""
    state = box.probe("3")
    return {
        "host": box.host, "current": state["current"] or None, "previous": state["previous"] or None, "state": box.ask("state").strip(),
        "disk_free_gb": state["disk_free_bytes"] / 1e9, "memory_gb": state["memory_bytes"] / 1e9,
    }  # fmt: skip


def roll_back(box: Box) -> dict[str, Any]:
    """Have the version before the current one run. Raises GateError where there is none."""
    state = box.probe("3")
    if not state["previous"] or state["previous"] == state["current"]:
        raise GateError(
            f"{box.host} keeps no version before the current one.",
            f"edgeft deploy status {shlex.quote(box.host)}",
        )
    with alone(box):
        box.ask("rollback", state["previous"], str(READY_S))
    return {"host": box.host, "current": state["previous"], "previous": state["current"]}
