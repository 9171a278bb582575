"""`edgeft deploy`."""

from pathlib import Path
from typing import Any

import click

from edgeft import console
from edgeft.cli import Group, options

PATH = click.Path(path_type=Path)


def _where(function: Any) -> Any:
    """--prefix and --ssh-config."""
    prefix = click.option("--prefix", default="~/edgeft", show_default=True, help="Folder on the box.")
    config = click.option(
        "--ssh-config", "config", type=PATH, help="A file for ssh's -F: ports, keys, jump hosts."
    )
    return prefix(config(function))


@click.group("deploy", cls=Group, default="run")
@options
def command() -> None:
    """Bring a bundle onto boxes over ssh.

    What is no command below goes to `run`: `edgeft deploy box.tar user@host`.
    """


@command.command("run")
@click.argument("bundle", type=PATH)
@click.argument("hosts", nargs=-1, required=True)
@_where
@click.option("--at-once", type=click.IntRange(1), default=2, show_default=True, help="Hosts at a time.")
@click.option(
    "--max-failures",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="No new host when more have failed.",
)
@click.option(
    "--check-seconds",
    type=click.FloatRange(0),
    default=60,
    show_default=True,
    help="Time to measure; 0: don't.",
)
@click.option(
    "--signers", type=PATH, metavar="FILE", help="Public keys, one of which must have signed the bundle."
)
@options
def run_command(
    bundle: Path,
    hosts: tuple[str, ...],
    prefix: str,
    config: Path | None,
    at_once: int,
    max_failures: int,
    check_seconds: float,
    signers: Path | None,
) -> int:
    """Send what HOSTS lack of BUNDLE, install, start, measure; go back where that fails."""
    from dataclasses import asdict

    from edgeft.deploy import deploy

    outcomes = deploy(
        bundle, hosts, prefix=prefix, config=config, at_once=at_once, max_failures=max_failures, check_s=check_seconds, signers=signers
    )  # fmt: skip
    rows = [
        [o.host, o.state, f"{o.sent_bytes / 1e6:.2f} MB", f"{o.seconds:.1f} s", o.checked.get("verdict", "–"),
         o.text or o.checked.get("text", "")]
        for o in outcomes
    ]  # fmt: skip
    console.table(["host", "", "sent", "took", "measured", ""], rows)
    console.result([asdict(o) for o in outcomes])
    return 0 if all(o.good for o in outcomes) else 1


@command.command("status")
@click.argument("hosts", nargs=-1, required=True)
@_where
@options
def status_command(hosts: tuple[str, ...], prefix: str, config: Path | None) -> None:
    """What HOSTS run, whether it is ready, and what they would go back to."""
    from edgeft.deploy.host import status_of
    from edgeft.deploy.remote import Box

    found = []
    for host in hosts:
        with Box(host, prefix, config) as box:
            found.append(status_of(box))
    rows = [
        [s["host"], s["state"], s["current"] or "–", s["previous"] or "–", f"{s['disk_free_gb']:.1f} GB"]
        for s in found
    ]
    console.table(["host", "state", "current", "previous", "disk free"], rows)
    console.result(found)


@command.command("rollback")
@click.argument("host")
@_where
@options
def rollback_command(host: str, prefix: str, config: Path | None) -> None:
    """Have the version before the current one run on HOST again."""
    from edgeft.deploy.host import roll_back
    from edgeft.deploy.remote import Box

    with console.step(f"going back on {host}"):
        with Box(host, prefix, config) as box:
            found = roll_back(box)
    console.result(found, f"{host} runs {found['current']}; {found['previous']} is kept")
