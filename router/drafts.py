"""What can be seen of a local draft before a byte of it is sent: checks that compute, and its surface.

A check gives True, False, or None where it does not apply. Nothing here calls a model; a second model's answer comes as text.
"""

from __future__ import annotations

import ast
import json
import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeft.router.request import CHARS_PER_TOKEN

NUMBER = re.compile(r"(?<![\w.])-?\$?\d[\d,]*(?:\.\d+)?")
LEFT = re.compile(r"[\d.,()\s+\-*/x×÷%$]+$")  # what may stand left of an equals sign
RIGHT = re.compile(r"\s*(?:<<[^>]{0,80}>>)?\s*\$?(-?\d[\d,]*(?:\.\d+)?)")
MAX_LEFT = 120  # characters: bounds the time on a hostile draft
OPERATORS: dict[type, Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip
LABEL = "####"  # GSM8K's mark before the final answer


@dataclass(frozen=True)
class Draft:
    """A local answer that was not sent yet."""

    text: str
    finish_reason: str | None = None  # stop, length, …; None: not known
    mean_logprob: float | None = None
    second: str | None = None  # what a second local model answered
    complete: bool = True  # False: the first k tokens alone


@dataclass(frozen=True)
class Equation:
    """left = right, as a draft has it."""

    left: str
    value: float | None  # what the left side comes to
    shown: float | None  # what stands on the right
    written: str  # the right side as text
    end: int  # where the text goes on behind it


def first_tokens(draft: Draft, tokens: int | None) -> Draft:
    """The first so many tokens of a draft, taken as characters / 4; itself where it has no more (or for None). Of what was cut off nothing is
    known: no log-probability, no agreement, no reason why it ended."""
    if tokens is None or len(draft.text) <= CHARS_PER_TOKEN * tokens:
        return draft
    return Draft(draft.text[: CHARS_PER_TOKEN * tokens], complete=False)


def answer_number(text: str) -> float | None:
    """The final number: after the label if it stands, else the last number of the text."""
    tail = text.rsplit(LABEL, 1)[1] if LABEL in text else text
    found = NUMBER.findall(tail)
    return value_of(found[0] if LABEL in text and found else found[-1]) if found else None


def agree(one: str, two: str) -> bool:
    """True where two answers come to the same: the same final number, else the same text but for case and spaces."""
    a, b = answer_number(one), answer_number(two)
    if a is not None and b is not None:
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)
    return " ".join(one.casefold().split()) == " ".join(two.casefold().split())


def equations(text: str) -> list[Equation]:
    """The equations of a text whose left side is arithmetic, in their order."""
    found = []
    for sign in re.finditer("=", text):
        left, right = (
            LEFT.search(text[max(0, sign.start() - MAX_LEFT) : sign.start()]),
            RIGHT.match(text, sign.end()),
        )
        if left is None or right is None or not re.search(r"\d[\d)%\s]*[+\-*/x×÷]", left[0]):
            continue
        found.append(
            Equation(left[0], compute(left[0]), value_of(right[1]), right[1], sign.end() + len(right[0]))
        )
    return found


def arithmetic(text: str) -> tuple[int, int]:
    """(equations that could be computed, how many of them are wrong). Rounding to the digits shown is not wrong."""
    return counted(equations(text))


def counted(found: Sequence[Equation]) -> tuple[int, int]:
    """The same of equations at hand."""
    seen = wrong = 0
    for equation in found:
        if equation.value is None or equation.shown is None:
            continue
        seen += 1
        digits = len(equation.written.partition(".")[2])
        wrong += abs(equation.value - equation.shown) > 0.51 * 10.0**-digits + 1e-9 * abs(equation.value)
    return seen, wrong


def compute(text: str) -> float | None:
    """The value of an arithmetic expression in a text, or None. Parsed, never evaluated as code."""
    plain = re.sub(r"[,$\s]", "", text).replace("x", "*").replace("×", "*").replace("÷", "/").strip("=")
    plain = re.sub(r"(\d(?:[\d.]*))%", r"(\1/100)", plain)
    if not plain or len(plain) > 200:
        return None
    try:
        return _compute(ast.parse(plain, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None


def _compute(node: Any) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_compute(node.left), _compute(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_compute(node.operand))
    raise ValueError("not arithmetic")


def checks(
    draft: Draft, task: str | None = None, schema: Mapping[str, Any] | None = None, labels: Sequence[str] = ()
) -> dict[str, bool | None]:
    """Deterministic checks: ended by itself, arithmetic holds, fits the JSON schema, is one of the required labels, agrees with the second."""
    seen, wrong = arithmetic(draft.text)
    return {
        "ended": None if draft.finish_reason is None else draft.finish_reason in ("stop", "tool_calls"),
        "arithmetic": None if not seen else wrong == 0,
        "json_schema": fits_schema(draft.text, schema)
        if schema is not None or task == "json_schema"
        else None,
        "label": None
        if not labels
        else draft.text.strip().casefold() in {label.casefold() for label in labels},
        "agreement": None if draft.second is None else agree(draft.text, draft.second),
    }


def fits_schema(text: str, schema: Mapping[str, Any] | None) -> bool:
    """True where the text is JSON that the schema allows (types, required, properties, items, enum; other words are not looked at)."""
    try:
        value = json.loads(re.sub(r"^\s*```(?:json)?|```\s*$", "", text))
    except (json.JSONDecodeError, RecursionError):
        return False
    return _fits(value, schema or {}, 0)


TYPES: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int, "number": (int, float),
}  # fmt: skip


def _fits(value: Any, schema: Mapping[str, Any], depth: int) -> bool:
    if depth > 32:
        return False
    wanted = schema.get("type")
    if wanted is not None:
        kinds = wanted if isinstance(wanted, list) else [wanted]
        if not any(
            isinstance(value, TYPES.get(k, object))
            and not (isinstance(value, bool) and k in ("integer", "number"))
            for k in kinds
        ):
            return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if isinstance(value, dict):
        known = schema.get("properties", {})
        if any(name not in value for name in schema.get("required", ())):
            return False
        if schema.get("additionalProperties") is False and any(name not in known for name in value):
            return False
        return all(_fits(inner, known[name], depth + 1) for name, inner in value.items() if name in known)
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        return all(_fits(inner, schema["items"], depth + 1) for inner in value)
    return True


def value_of(text: str) -> float | None:
    """The number that a text of digits, commas and a currency sign writes, or None."""
    try:
        value = float(text.replace("$", "").replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None
