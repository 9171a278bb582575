"""What a person or a program sees: progress on stderr, results on stdout.

Progress shows on a terminal only; `--quiet` silences it, `--json` leaves one JSON value on stdout.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Output:
    """How this run of the CLI speaks."""

    json: bool = False
    quiet: bool = False
    debug: bool = False


output = Output()


def note(text: str) -> None:
    """A line about the work, on stderr; silent with --quiet and --json."""
    if not (output.quiet or output.json):
        print(text, file=sys.stderr, flush=True)


def result(value: Any, text: str = "") -> None:
    """The result: `value` as JSON with --json, else `text`."""
    if output.json:
        print(json.dumps(value, ensure_ascii=False), flush=True)
    elif text:
        print(text, flush=True)


@contextmanager
def step(title: str, log: Path | None = None) -> Iterator[Callable[[str], None]]:
    """Show a running step with its elapsed time on a terminal; elsewhere one line when it is done.

    Yields a function that sets the text beside the title. With `log`, the last line there that begins
    with `progress:` is shown instead.
    """
    started = time.monotonic()
    if output.quiet or output.json:
        yield lambda text: None
        return
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            shown = progress.add_task(title)
            ended = threading.Event()

            def say(text: str) -> None:
                progress.update(shown, description=f"{title}: {text}")

            if log:
                threading.Thread(target=_follow, args=(log, say, ended), daemon=True).start()
            try:
                yield say
            finally:
                ended.set()
    else:
        yield lambda text: None
    note(f"  {title} ({time.monotonic() - started:.1f} s)")


def _follow(log: Path, say: Callable[[str], None], ended: threading.Event) -> None:
    while not ended.wait(0.5):
        if log.exists():
            with log.open("rb") as file:
                file.seek(max(0, log.stat().st_size - 4096))
                lines = file.read().decode(errors="replace").splitlines()
            for line in reversed(lines):
                if line.startswith("progress:"):
                    say(line.removeprefix("progress:").strip())
                    break


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table on stdout; nothing with --json."""
    if output.json:
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    width = None if sys.stdout.isatty() else 160
    drawn = Table(title=title or None, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for index, name in enumerate(columns):
        drawn.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    Console(width=width, highlight=False, markup=False).print(drawn)
