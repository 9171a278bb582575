"""The scenarios that come with edgeft, by name."""

from __future__ import annotations

from pathlib import Path

from edgeft.errors import unknown

FOLDER = Path(__file__).parent / "scenarios"


def names() -> list[str]:
    """All of them."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def shipped(name: str) -> Path:
    """The file of a shipped scenario. Raises UsageError with the nearest name."""
    if name not in names():
        raise unknown("the shipped scenario", name, names(), f"edgeft tco init --like {names()[0]}")
    return FOLDER / f"{name}.yaml"


def find(word: str) -> Path:
    """A file, or a shipped scenario by its name. Raises UsageError where it is neither."""
    path = Path(word)
    if path.exists() or path.suffix in (".yaml", ".yml") or "/" in word:
        return path
    return shipped(word)
