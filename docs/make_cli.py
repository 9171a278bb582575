"""Write docs/cli.md from `--help`; a test fails where the file is stale."""

from __future__ import annotations

from pathlib import Path

import click

FILE = Path(__file__).resolve().parent / "cli.md"


def text() -> str:
    """The whole page."""
    from edgeft.cli import cli

    parts = ["# Commands\n\nMade from `--help` by `make docs`.\n"]
    _add(cli, "edgeft", None, parts)
    return "\n".join(parts)


def _add(command: click.Command, path: str, parent: click.Context | None, parts: list[str]) -> None:
    settings = {"help_option_names": ["-h", "--help"]} if parent is None else {}
    context = click.Context(
        command,
        info_name=path.rsplit(" ", 1)[-1],
        parent=parent,
        terminal_width=100,
        max_content_width=100,
        **settings,
    )
    parts.append(f"## {path}\n\n```\n{command.get_help(context)}\n```\n")
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            _add(found, f"{path} {name}", context, parts)


if __name__ == "__main__":
    FILE.write_text(text())
