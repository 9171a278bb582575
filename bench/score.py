"""Is an answer right?

`exact`: the same text, white space folded. `numeric`: the last number of the output equals the
answer's. `choice`: the same as exact, letter case and closing punctuation aside. `json_schema`: JSON that holds to the
row's `schema`. `text`: F1 of the tokens that output and answer share, as SQuAD counts it (arXiv 1606.05250).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from edgeft.errors import UsageError, missing_extra
from edgeft.rows import Row, answer_of

METRICS = {
    "exact": "exact match",
    "choice": "exact match, case aside",
    "numeric": "last number equal",
    "json_schema": "valid by the row's schema",
    "text": "token F1",
}

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
    if task == "json_schema":
        return float(holds_to(row["schema"], output)) if "schema" in row else None
    if task == "text":
        return token_f1(output, answer)
    return None


def check(rows: list[Row], path: Any) -> None:
    """Raise UsageError for a row that can't be scored: no `schema`, a schema that is none, an answer without a number."""
    for row in rows:
        look = f"grep -n '{row['id']}' {path}"
        if row["task"] == "json_schema":
            if not isinstance(row.get("schema"), dict):
                raise UsageError(
                    f"{path}: the row '{row['id']}' is a json_schema task and has no 'schema'.", look
                )
            known = _validator(row["schema"])
            if fault := next(known(known.META_SCHEMA).iter_errors(row["schema"]), None):
                raise UsageError(f"{path}: the schema of row '{row['id']}' is none: {fault.message}", look)
        if row["task"] == "numeric" and last_number(answer_of(row)) is None:
            raise UsageError(
                f"{path}: the row '{row['id']}' is a numeric task and its answer has no number.", look
            )


def _validator(schema: dict[str, Any]) -> Any:
    """The class of jsonschema that reads a schema."""
    try:
        from jsonschema.validators import validator_for
    except ImportError:
        raise missing_extra("jsonschema", "bench") from None
    return validator_for(schema)


def holds_to(schema: dict[str, Any], output: str) -> bool:
    """Is the output JSON that the schema allows? A fence of three backticks around it is taken off."""
    text = re.sub(r"^```(?:json)?\s*|\s*```$", "", output.strip())
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return bool(_validator(schema)(schema).is_valid(value))


def token_f1(output: str, answer: str) -> float:
    """2PR/(P+R) over the words that both hold, letter case and punctuation aside; two empty texts agree."""
    found, wanted = (Counter(re.findall(r"\w+", text.casefold())) for text in (output, answer))
    shared = sum((found & wanted).values())
    if not found or not wanted:
        return float(found == wanted)
    return 2 * shared / (sum(found.values()) + sum(wanted.values()))


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
