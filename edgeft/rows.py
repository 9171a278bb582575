"""Rows: the one shape of data that every stage reads.

    {"id"?, "messages", "task"?, "choices"?, "schema"?, "tools"?, "meta"?}

The last assistant turn is the answer; unknown keys are kept; the id defaults to the hash of `messages`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edgeft.errors import UsageError, unknown

Row = dict[str, Any]
TASKS = ("exact", "numeric", "choice", "json_schema", "text")
ROLES = ("system", "user", "assistant", "tool")


def messages_hash(messages: list[dict[str, Any]]) -> str:
    """The first 16 hex digits of the SHA-256 of the messages' canonical JSON."""
    canonical = json.dumps(messages, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def prompt_of(row: Row) -> list[dict[str, Any]]:
    """The messages before the answer."""
    return row["messages"][:-1]


def answer_of(row: Row) -> str:
    """The answer: the text of the last assistant turn."""
    return row["messages"][-1]["content"]


def row_hash(row: Row) -> str:
    """What a manifest records of a row that a step saw."""
    return messages_hash(row["messages"])


def spread(rows: list[Row], count: int | None) -> list[Row]:
    """At most `count` rows, evenly spread over all: files are often sorted by their answer."""
    if count is None or count >= len(rows):
        return rows
    return [rows[index * len(rows) // count] for index in range(count)]


def load_rows(path: Path) -> list[Row]:
    """Read a JSON-lines file of rows.

    Raises UsageError naming the line that is not JSON, has no messages, or has no answer.
    """
    if not path.is_file():
        seen = (
            f"{path} is a folder, and a file of rows is wanted"
            if path.is_dir()
            else f"there is no file {path}"
        )
        raise UsageError(f"{seen}.", f"ls {path if path.is_dir() else path.parent}")
    rows: list[Row] = []
    seen_at: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        row = _parse(line, path, number)
        row.setdefault("id", messages_hash(row["messages"]))
        row.setdefault("task", "exact")
        if row["id"] in seen_at:
            raise UsageError(
                f"{path} line {number}: the id '{row['id']}' stands on line {seen_at[row['id']]} already.",
                f"sed -n '{seen_at[row['id']]}p;{number}p' {path}",
            )
        seen_at[row["id"]] = number
        rows.append(row)
    if not rows:
        raise UsageError(f"{path} has no rows.", f"head -3 {path}")
    return rows


def _parse(line: str, path: Path, number: int) -> Row:
    look = f"sed -n {number}p {path}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path} line {number} is not JSON: {error.msg} at column {error.colno}.", look
        ) from None
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list) or not row["messages"]:
        raise UsageError(f"{path} line {number} has no list 'messages'.", look)
    for message in row["messages"]:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise UsageError(
                f"{path} line {number}: a message's role must be one of {', '.join(ROLES)}.", look
            )
    last = row["messages"][-1]
    if last["role"] != "assistant" or not isinstance(last.get("content"), str) or not last["content"].strip():
        raise UsageError(
            f"{path} line {number} has no answer: the last message must be the assistant's.", look
        )
    if len(row["messages"]) < 2:
        raise UsageError(f"{path} line {number} has an answer and no question before it.", look)
    if "task" in row and row["task"] not in TASKS:
        raise unknown(f"{path} line {number}: the task", str(row["task"]), TASKS, look)
    return row


def refuse_seen(rows: Iterable[Row], seen: dict[str, list[str]], doing: str, path: Path) -> None:
    """Refuse rows that an earlier step of another kind has seen.

    `seen` maps a kind of step (train, calibrate, …) to row hashes. Raises UsageError with the first clash.
    """
    where = {digest: kind for kind, digests in seen.items() for digest in digests}
    clashes = [(row, where[row_hash(row)]) for row in rows if row_hash(row) in where]
    if clashes:
        row, kind = clashes[0]
        raise UsageError(
            f"{path}: {len(clashes)} row(s) were used to {kind} already (first: '{row['id']}') and cannot be used to {doing}.",
            "use another part of the data, or --allow-seen-rows and a figure that flatters",
        )
