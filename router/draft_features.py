"""The numbers that the judge of drafts reads of a prompt and a draft. Made for worked numeric answers; for free text most are silent."""

from __future__ import annotations

import math
import re
from collections import Counter

from edgeft.router.drafts import (
    LABEL,
    NUMBER,
    Draft,
    Equation,
    agree,
    answer_number,
    counted,
    equations,
    value_of,
)

HEDGES = re.compile(
    r"\b(?:however|but|assum\w+|let's|denote|equation|closest|approximately|rounded|suppose|unknown)\b",
    re.IGNORECASE,
)
WORD = re.compile(r"\w+")
DIVIDED = re.compile(r"\d\s*/\s*\d")
COMPARED = re.compile(r"\b(?:more|less) than\b")
FRACTIONS = ("half", "third", "quarter", "fifth")  # also within words: a quarterly one
MARKS = {  # whole words
    "question_asks_remaining": ("left", "remain", "fewer", "difference", "still"),
    "question_each": ("each", "every", "per"),
    "question_times": ("twice", "double", "triple", "times", "half"),
    "question_order": ("first", "then", "after", "before", "next", "last"),
    "question_time": tuple(
        f"{span}{s}" for span in ("day", "week", "month", "year", "hour", "minute") for s in ("", "s")
    ),
}
OPERATOR = re.compile(r"[+\-*/x×÷]")
MOST_EQUATIONS = 64  # that are replayed: bounds the time on a hostile draft
EVERYDAY = {
    0.5,
    1.0,
    2.0,
    3.0,
    4.0,
    7.0,
    12.0,
    24.0,
    30.0,
    52.0,
    60.0,
    100.0,
    365.0,
}  # need no source in the question
FEATURES = (
    "log_characters", "log_prompt", "lines", "numbers", "equations", "equations_wrong", "label", "cut",
    "answer_integer", "log_answer", "answer_last", "numbers_unused", "numbers_new", "steps_per_number",
    "annotations", "ends_blank", "question_numbers", "question_sentences", "hedges", "fractions", "percent",
    "repeats", "answer_in_question", "answer_negative", "rounding", "equal_signs", "question_asks_remaining",
    "variables", "max_number", "logprob", "logprob_known", "agrees", "agrees_known",
    "answer_is_last_result", "answer_is_a_result", "results_unused", "operands_strange", "answer_repeated", "answer_to_numbers",
    "question_words", "length_to_prompt", "equations_a_sentence", "long_equations", "divisions", "subtractions",
    "multiplications", "additions", "answer_below_one", "answer_zero", "answer_missing", "longest_line", "question_each",
    "question_times", "question_order", "question_time", "label_at_end", "sentences", "blank_lines", "says_answer", "labels",
    "sum_of_numbers", "different_numbers", "question_decimals",
)  # fmt: skip

# Those that the prompt alone says.
QUESTION = tuple(
    name
    for name in FEATURES
    if name.startswith("question")
    or name in ("log_prompt", "fractions", "percent", "max_number", "sum_of_numbers", "different_numbers")
)


def features(prompt: str, draft: Draft) -> list[float]:
    """The numbers that the judge reads, in the order of FEATURES."""
    found = equations(draft.text)
    numbers = (
        question(prompt) | surface(prompt, draft, found) | replay(prompt, draft.text, found[:MOST_EQUATIONS])
    )
    return [float(numbers[name]) for name in FEATURES]


def question(prompt: str) -> dict[str, float | bool]:
    """Length, numbers and marks of the prompt alone."""
    asked, low = _numbers(prompt), prompt.lower()
    seen = Counter(WORD.findall(low))
    counts = {name: sum(seen[word] for word in words) for name, words in MARKS.items()}
    remaining = counts.pop("question_asks_remaining") > 0
    divided = len(DIVIDED.findall(low)) if "/" in low else 0
    return {
        **counts, "log_prompt": math.log1p(len(prompt)), "question_numbers": len(asked), "question_sentences": _sentences(prompt),
        "fractions": divided + sum(low.count(word) for word in FRACTIONS), "percent": prompt.count("%"),
        "question_asks_remaining": remaining or (" than" in low and COMPARED.search(low) is not None),
        "max_number": math.log1p(max([abs(v) for v in asked] or [0])), "question_words": len(prompt.split()),
        "sum_of_numbers": math.log1p(sum(abs(v) for v in asked)), "different_numbers": len(set(asked)),
        "question_decimals": sum(v != round(v) for v in asked),
    }  # fmt: skip


def surface(prompt: str, draft: Draft, found: list[Equation]) -> dict[str, float | bool]:
    """Lengths, counts and marks of the draft, some against the question's."""
    text, answer = draft.text, answer_number(draft.text)
    asked, used = _numbers(prompt), _numbers(text)
    seen, wrong = counted(found)
    known = set(asked)
    body = used[:-1] if LABEL in text and used else used
    lines = [line for line in text.splitlines() if line.strip()]
    agrees = None if draft.second is None else agree(text, draft.second)
    return {
        "log_characters": math.log1p(len(text)), "lines": len(lines), "numbers": math.log1p(len(used)),
        "equations": seen, "equations_wrong": wrong, "label": LABEL in text, "cut": _is_cut(draft),
        "answer_integer": answer is not None and abs(answer - round(answer)) < 1e-6,
        "log_answer": 0.0 if answer is None else math.log1p(abs(min(answer, 1e12))),
        "answer_last": bool(body) and answer is not None and math.isclose(body[-1], answer, rel_tol=1e-6),
        "numbers_unused": sum(v not in used for v in known), "numbers_new": len(set(used) - known),
        "steps_per_number": seen / (1 + len(asked)), "annotations": text.count("<<"), "ends_blank": text.endswith("\n"),
        "hedges": len(HEDGES.findall(text)),
        "repeats": len(lines) - len(set(lines)), "answer_in_question": answer is not None and answer in known,
        "answer_negative": answer is not None and answer < 0, "rounding": _count(r"\d\.\d{3,}", text), "equal_signs": text.count("="),
        "variables": _count(r"(?<![\w])[a-zA-Z](?=\s*[=+\-*/])", text),
        "logprob": draft.mean_logprob or 0.0, "logprob_known": draft.mean_logprob is not None,
        "agrees": bool(agrees), "agrees_known": agrees is not None,
        "length_to_prompt": len(text) / (1 + len(prompt)),
        "answer_below_one": answer is not None and abs(answer) < 1, "answer_zero": answer == 0, "answer_missing": answer is None,
        "longest_line": max([len(line) for line in lines] or [0]) / 100,
        "label_at_end": LABEL in text.rstrip()[-60:], "sentences": _count(r"[.!?]", text.partition(LABEL)[0]), "blank_lines": text.count("\n\n"),
        "says_answer": _count(r"the answer", text), "labels": text.count(LABEL),
    }  # fmt: skip


def replay(prompt: str, text: str, found: list[Equation]) -> dict[str, float | bool]:
    """Whether the steps hang together: the answer is the last result, every result is used again, every operand comes from somewhere."""
    answer, asked = answer_number(text), _numbers(prompt)
    results = [e.shown for e in found if e.shown is not None]
    sources, strange = {*asked, *EVERYDAY}, 0
    for equation in found:
        operands = _numbers(re.sub(r"[x*×]", " ", equation.left))
        strange += sum(not any(_same(v, known) for known in sources) for v in operands)
        if equation.shown is not None:
            sources.add(equation.shown)
    unused = sum(
        e.shown is not None and not any(_same(e.shown, v) for v in _numbers(text[e.end :]))
        for e in found[:-1]
    )
    body = _numbers(text.partition(LABEL)[0])
    largest = max([abs(v) for v in asked] or [0.0])
    return {
        "answer_is_last_result": bool(results) and _same(results[-1], answer), "answer_is_a_result": sum(_same(r, answer) for r in results),
        "results_unused": unused, "operands_strange": strange, "answer_repeated": sum(_same(v, answer) for v in body),
        "answer_to_numbers": 0.0 if answer is None or not asked else math.log1p(abs(answer) / (1 + largest)),
        "equations_a_sentence": len(found) / (1 + _sentences(prompt)),
        "long_equations": sum(len(OPERATOR.findall(e.left)) > 1 for e in found),
        "divisions": sum("/" in e.left or "÷" in e.left for e in found), "subtractions": sum("-" in e.left for e in found),
        "multiplications": sum(any(sign in e.left for sign in "*x×") for e in found), "additions": sum("+" in e.left for e in found),
    }  # fmt: skip


def _numbers(text: str) -> list[float]:
    return [v for n in NUMBER.findall(text) if (v := value_of(n)) is not None]


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.IGNORECASE))


def _sentences(text: str) -> int:
    return len(re.findall(r"[.!?](?:\s|$)", text))


def _same(one: float | None, two: float | None) -> bool:
    return one is not None and two is not None and math.isclose(one, two, rel_tol=1e-3, abs_tol=1e-6)


def _is_cut(draft: Draft) -> bool:
    if draft.finish_reason is not None:
        return draft.finish_reason == "length"
    return LABEL not in draft.text and not re.search(r"[.!?)}\]\"']\s*$", draft.text[-40:])
