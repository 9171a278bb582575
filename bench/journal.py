"""What a run has found so far: one JSON line a fact, written before the next thing is measured.

A killed run reads it back and goes on. A first line names what the facts depend on; where that has changed, the
journal begins anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgeft.files import disk_errors, write_text


class Journal:
    """Facts of a run, by target and kind, in the order in which they were found."""

    def __init__(self, file: Path, key: str) -> None:
        self.file = file
        self.facts: dict[tuple[str, str], list[Any]] = {}
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        known = [value for line in lines if (value := _parsed(line)) is not None]
        if not known or known[0] != {"key": key}:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")
            return
        for line in known[1:]:
            if line["kind"].endswith("error"):
                continue  # what broke is tried again
            self.facts.setdefault((line["target"], line["kind"]), []).append(line["value"])
        if len(known) < len(lines):  # the line that was being written when it ended
            write_text(file, "".join(json.dumps(k, ensure_ascii=False) + "\n" for k in known))

    def add(self, target: str, kind: str, value: Any) -> None:
        """Keep a fact. Raises EnvironmentFault where the disk is full; what was kept before stays."""
        line = json.dumps({"target": target, "kind": kind, "value": value}, ensure_ascii=False) + "\n"
        with disk_errors(self.file), self.file.open("a", encoding="utf-8") as out:
            out.write(line)
        self.facts.setdefault((target, kind), []).append(value)

    def all(self, target: str, kind: str) -> list[Any]:
        """The facts of a kind."""
        return self.facts.get((target, kind), [])

    def last(self, target: str, kind: str) -> Any | None:
        """The newest fact of a kind."""
        found = self.all(target, kind)
        return found[-1] if found else None

    def empty(self) -> bool:
        """True where nothing was found yet."""
        return not self.facts


def _parsed(line: str) -> Any | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
