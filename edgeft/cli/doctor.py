"""`edgeft doctor`."""

import click

from edgeft import console
from edgeft.cli import options


@click.command("doctor")
@options
def command() -> None:
    """Show what this machine has and what it lacks.

    Ends with 3 where a package that edgeft can't run without is broken, else with 0.
    """
    from edgeft.doctor import broken_core, examine
    from edgeft.errors import EnvironmentFault

    rows = examine()
    broken = broken_core(rows)
    columns = ("check", "state", "seen", "hint")
    if "rich" in broken:
        console.result(rows, "\n".join("  ".join(row[c] for c in columns) for row in rows))
    else:
        _table(rows)
        console.result(rows)
    if broken:
        raise EnvironmentFault(
            f"core packages are broken or missing: {', '.join(broken)}.",
            "pip install --force-reinstall edgeft",
        )


def _table(rows: list[dict[str, str]]) -> None:
    """Like console.table, with every column to the left and what to type in the last."""
    if console.output.json:
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("check", "state", "seen", "what to type"):
        drawn.add_column(name, overflow="fold")
    for row in rows:
        drawn.add_row(row["check"], row["state"], row["seen"], row["hint"])
    screen = Console(highlight=False, markup=False)
    if not screen.is_terminal:
        screen = Console(highlight=False, markup=False, width=160)
    screen.print(drawn)
