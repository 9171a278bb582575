"""Several hosts, a few at a time; no new one is begun when too many have failed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edgeft import console
from edgeft.deploy.archive import SIGNATURE, SUMS, Bundle
from edgeft.deploy.host import Outcome, deploy_to
from edgeft.deploy.remote import Box
from edgeft.deploy.signing import verify
from edgeft.errors import UsageError


def deploy(
    path: Path,
    hosts: Sequence[str],
    *,
    prefix: str = "~/edgeft",
    config: Path | None = None,
    at_once: int = 2,
    max_failures: int = 1,
    check_s: float = 60,
    signers: Path | None = None,
) -> list[Outcome]:
    """Deploy a bundle; an outcome a host, in their order. Stops beginning hosts when more than `max_failures` did not end well.

    Raises UsageError for a bundle that is none or damaged, GateError for a signature that is not one of `signers`.
    """
    if len(set(hosts)) != len(hosts):
        raise UsageError("a host is named twice.", "edgeft deploy box.tar HOST HOST2")
    bundle = Bundle(path)
    with console.step(f"checking {path.name}"):
        bundle.check()
        if signers:
            signature = bundle.read(SIGNATURE) if SIGNATURE in bundle.places else None
            verify(bundle.read(SUMS), signature, signers)
    outcomes = [Outcome(host, id=bundle.id) for host in hosts]
    failures, lock = 0, threading.Lock()
    with console.step(f"deploying {bundle.id}") as say:

        def one(number: int) -> None:
            nonlocal failures
            host = hosts[number]
            with lock:
                if failures > max_failures:
                    outcomes[number].text = f"not begun: {failures} hosts failed before"
                    return
            with Box(host, prefix, config) as box:
                outcomes[number] = deploy_to(box, bundle, check_s, lambda text: say(f"{host}: {text}"))
            with lock:
                failures += not outcomes[number].good

        with ThreadPoolExecutor(max(1, at_once)) as pool:
            for future in [pool.submit(one, number) for number in range(len(hosts))]:
                future.result()
    return outcomes
