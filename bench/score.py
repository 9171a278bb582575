"""Is an answer right?

`exact`: the same text, white space folded. `numeric`: the last number of the output equals the
answer's. `choice`: the same as exact, letter case and closing punctuation aside. `json_schema` and
`text` are run and timed, and not scored yet.
"""

from __future__ import annotations

import re

from edgeft.rows import Row, answer_of

NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:[eE][-+]?\d+)?")


def score(row: Row, output: str) -> float | None:
    """1.0 for right, 0.0 for wrong, None where the row's task is not scored."""
    task, answer = row["task"], answer_of(row)
    if task == "exact":
        return float(fold(output) == fold(answer))
    if task == "choice":
        return float(loose(output) == loose(answer))
    if task == "numeric":
        found, wanted = last_number(output), last_number(answer)
        return float(
            found is not None and wanted is not None and abs(found - wanted) <= 1e-6 * max(1.0, abs(wanted))
        )
    return None


def hopeless(row: Row, begun: str) -> bool:
    """Can no output that begins so be right any more? (The score of whatever follows is then 0.)"""
    answer = answer_of(row)
    if row["task"] == "exact":
        return not fold(answer).startswith(fold(begun))
    if row["task"] == "choice":
        wanted, found = loose(answer), fold(begun).casefold()
        return not wanted.startswith(found) and not found.startswith(wanted)
    return False


def fold(text: str) -> str:
    """Text with runs of white space made one space."""
    return " ".join(text.split())


def loose(text: str) -> str:
    """Folded text in lower case without closing punctuation."""
    return fold(text).casefold().rstrip(".!:;)")


def last_number(text: str) -> float | None:
    """The last number in a text, thousands commas removed."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
