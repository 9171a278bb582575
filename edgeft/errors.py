"""The error tree. Every error says what was seen and what to type next; the CLI prints those two lines.

    EdgeftError
    ├── GateError         exit 1   the work was done and what it made is not good enough
    ├── UsageError        exit 2   what was asked for is wrong: a path, a name, a row, an adapter
    ├── EnvironmentFault  exit 3   the machine lacks something: a package, disk, network, a tool
    └── Inconclusive      exit 4   measured, and the sample is too small to say

Interrupted work ends with 130.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class EdgeftError(Exception):
    """An error with a next step.

    `message` says what happened with the value seen, `hint` what to type next.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = " ".join(message.split())
        self.hint = " ".join(hint.split())


class GateError(EdgeftError):
    """The work was done and its result failed a check; `details` are kept with what was rejected."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "", details: dict[str, Any] | None = None) -> None:
        super().__init__(message, hint)
        self.details = details or {}


class UsageError(EdgeftError):
    """What was asked for is wrong."""

    exit_code = 2


class EnvironmentFault(EdgeftError):
    """The machine lacks something that the work needs."""

    exit_code = 3


class Inconclusive(EdgeftError):
    """The sample is too small for a verdict."""

    exit_code = 4


BY_NAME = {cls.__name__: cls for cls in (EdgeftError, GateError, UsageError, EnvironmentFault, Inconclusive)}


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word closest to `word`, or None where nothing is close."""
    found = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.5)
    return found[0] if found else None


def unknown(kind: str, word: str, known: Iterable[str], hint: str) -> UsageError:
    """An error for a word that is not in a list, with the nearest one that is."""
    known = sorted(known)
    best = nearest(word, known)
    tail = (
        f" Did you mean '{best}'?"
        if best
        else f" Known: {', '.join(known[:20])}{', …' if len(known) > 20 else ''}."
    )
    return UsageError(f"{kind} '{word}' is not known.{tail}", hint)


def missing_extra(package: str, extra: str) -> EnvironmentFault:
    """An error for a package that is not installed, with the line that installs it."""
    return EnvironmentFault(
        f"this needs the package '{package}', which is not installed.", f"pip install 'edgeft[{extra}]'"
    )
