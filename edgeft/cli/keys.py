"""`edgeft keys create|list|revoke`."""

from pathlib import Path
from typing import Any

import click

from edgeft import console
from edgeft.cli import Group, options


@click.group("keys", cls=Group)
@options
def command() -> None:
    """Make, list and revoke the proxy's API keys."""


def database(function: Any) -> Any:
    """Add --db."""
    return click.option(
        "--db",
        "path",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="SQLite file of the keys (the user's if left out).",
    )(function)


@command.command("create")
@click.argument("name")
@click.option("--tenant", help="Whose caches and prefixes the key shares (NAME if left out).")
@click.option(
    "--expires",
    type=click.IntRange(1, 36500),
    metavar="DAYS",
    help="Days until it expires (never if left out).",
)
@database
@options
def create_command(name: str, tenant: str | None, expires: int | None, path: Path | None) -> None:
    """Make a key and print it, once.

    Clients send it as `Authorization: Bearer KEY`. Only its hash is kept. A running proxy knows it within a second.
    """
    from edgeft.serve import keys

    row, secret = keys.create(path or keys.default_path(), name, tenant, expires)
    console.note(f"{row.id} of tenant {row.tenant}; this is the only time that the key is shown:")
    console.result({**keys.told(row), "key": secret}, secret)


@command.command("list")
@database
@options
def list_command(path: Path | None) -> None:
    """List the keys, never the keys themselves."""
    from edgeft.serve import keys

    file = path or keys.default_path()
    rows = [keys.told(row) for row in keys.listed(file)]
    columns = ("id", "name", "tenant", "state", "created", "expires", "revoked")
    if rows:
        console.table(columns, [[row[c] or "-" for c in columns] for row in rows])
    console.result(rows, "" if rows else f"There are no keys in {file}: edgeft keys create NAME")


@command.command("revoke")
@click.argument("key_id", metavar="ID")
@database
@options
def revoke_command(key_id: str, path: Path | None) -> None:
    """Revoke a key for good. A running proxy refuses it within a second."""
    from edgeft.serve import keys

    row = keys.told(keys.revoke(path or keys.default_path(), key_id))
    console.result(row, f"{row['id']} ({row['name']}) is revoked since {row['revoked']}")
