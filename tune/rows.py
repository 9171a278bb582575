"""A table of texts and labels as rows, in the five parts that keep every figure honest.

train (the adapter), calibrate (importance matrix, GPTQ), select (gate, choosing, fitting the
router), certify (the certificate), report (what is printed as quality). A row's part is a hash of
its cluster of near-duplicates, so near-duplicates stay on one side and a row keeps its part when
others are added.
"""

from __future__ import annotations

import csv
import hashlib
import zlib
from pathlib import Path

import numpy as np

from edgeft.errors import UsageError, nearest
from edgeft.files import write_jsonl
from edgeft.rows import Row, messages_hash

PARTS = {"train": 0.50, "calibrate": 0.06, "select": 0.14, "certify": 0.15, "report": 0.15}
NEAR_DUPLICATE = (4, 5)  # the cosine above which two texts are near-duplicates: 0.8
_BUCKETS = 4096


def rows_from_csv(path: Path, text: str, label: str, system: str) -> list[Row]:
    """Read a CSV with a column of texts and a column of answers.

    Raises UsageError for a column that is not there (the nearest is named) or a line without an answer.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}.", f"ls {path.parent}")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames or []
        for wanted in (text, label):
            if wanted not in names:
                best = nearest(wanted, names)
                tail = f" Did you mean '{best}'?" if best else f" It has {', '.join(names)}."
                raise UsageError(f"{path} has no column '{wanted}'.{tail}", f"head -1 {path}")
        rows = {}
        for record in reader:
            question, answer = (record[text] or "").strip(), (record[label] or "").strip()
            if not question or not answer:
                empty = "text" if not question else "answer"
                raise UsageError(
                    f"{path} line {reader.line_num} has no {empty}.", f"sed -n {reader.line_num}p {path}"
                )
            messages = [
                {"role": "system", "content": system},
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            row = {"id": messages_hash(messages), "messages": messages, "task": "exact"}
            rows[row["id"]] = row
    return list(rows.values())


def split(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by part, near-duplicates together."""
    parts: dict[str, list[Row]] = {name: [] for name in PARTS}
    edges = np.cumsum(list(PARTS.values()))
    for row, cluster in zip(
        rows, near_duplicate_clusters([r["messages"][-2]["content"] for r in rows]), strict=True
    ):
        digest = hashlib.sha256(rows[cluster]["id"].encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        parts[list(PARTS)[int(np.searchsorted(edges, place, side="right"))]].append(row)
    return parts


def near_duplicate_clusters(texts: list[str]) -> list[int]:
    """For each text the index of its cluster's first text.

    Texts whose hashed character 4-gram counts have a cosine above 0.8 are joined, and so on through chains. Counted in whole
    numbers: a cosine of just 0.8, rounded up by one machine's BLAS and down by another's, put a row into another part there.
    """
    counts = np.zeros((len(texts), _BUCKETS), dtype=np.float32)
    for index, text in enumerate(texts):
        folded = f" {' '.join(''.join(c if c.isalnum() else ' ' for c in text.lower()).split())} "
        for start in range(len(folded) - 3):
            counts[index, zlib.crc32(folded[start : start + 4].encode()) % _BUCKETS] += 1
    squares = (counts.astype(np.float64) ** 2).sum(1)
    above, below = NEAR_DUPLICATE
    parent = list(range(len(texts)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for start in range(0, len(texts), 1024):
        dots = (counts[start : start + 1024] @ counts.T).astype(np.float64)  # whole, below 2**24: exact
        close = (below * dots) ** 2 > above**2 * np.outer(squares[start : start + 1024], squares)
        for left, right in np.argwhere(close):
            a, b = root(int(left) + start), root(int(right))
            parent[max(a, b)] = min(a, b)
    return [root(index) for index in range(len(texts))]


def write_parts(parts: dict[str, list[Row]], out: Path) -> dict[str, int]:
    """Write `<part>.jsonl` for each part; returns the counts."""
    for name, rows in parts.items():
        write_jsonl(out / f"{name}.jsonl", rows)
    return {name: len(rows) for name, rows in parts.items()}
