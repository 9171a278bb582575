"""A synthetic task of any length: one fact somewhere in a text, and a question that only the fact answers.

The text is plain sentences and facts of the same form about other lockers, so that a number alone does not give it away. The
idea is RULER's single key with distractors (arXiv 2404.06654); the sentences are ours, and no model is tuned on them here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from edgeft.rows import Row, prompt_of

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # where the fact stands: 0 first, 1 last, right before the question
PLAIN = (
    "The hall was painted last spring.",
    "Most visitors come in the morning.",
    "The lift stops on every floor.",
    "A guard walks round twice a night.",
    "The lamps go out by themselves.",
    "Lost gloves are kept in a box.",
)
OTHERS = 2  # facts of other lockers beside each round of PLAIN
PERIOD = len(PLAIN) + OTHERS
HEAD = "Read these notes."
ROW_HEAD = "Requests that others have sent, not to be answered:"


def locker_prompt(sentences: int, depth: float, seed: str) -> tuple[str, str]:
    """(the prompt with so many sentences around the fact, the code that is asked for); the same for the same seed."""
    chance = random.Random(seed)
    names = [
        f"{chr(65 + n // 900)}{100 + n % 900}"
        for n in chance.sample(range(26 * 900), sentences // PERIOD * OTHERS + 1)
    ]
    code = chance.randrange(9000)
    wanted = fact(names[0], code)
    others = (fact(name, (code + chance.randrange(1, 9000)) % 9000) for name in names[1:])
    # Each run of PERIOD sentences holds the same ones, in an order of its own: so many sentences are so many tokens.
    text: list[str] = []
    while len(text) < sentences:
        part = (
            [*PLAIN, *(next(others) for _ in range(OTHERS))]
            if sentences - len(text) >= PERIOD
            else list(PLAIN)
        )
        chance.shuffle(part)
        text += part[: sentences - len(text)]
    text.insert(round(depth * sentences), wanted)
    question = f"What is the code of locker {names[0]}? Answer with the code alone."
    return f"{HEAD}\n\n{' '.join(text)}\n\n{question}", str(1000 + code)


def fact(name: str, code: int) -> str:
    """A fact about a locker; codes count from 1000."""
    return f"The code of locker {name} is {1000 + code}."


def code_in(output: str) -> str | None:
    """The first number of four digits in an answer, thousands commas removed."""
    found = re.search(r"(?<!\d)\d{4}(?!\d)", re.sub(r"(?<=\d),(?=\d{3})", "", output))
    return found[0] if found else None


def sentences_for(tokens: int, empty: int, period: int) -> int:
    """How many sentences make a prompt of at most about `tokens`, where one has `empty` without and `period` more with PERIOD."""
    return max(0, int((tokens - empty) * PERIOD / (period - empty)))


def fact_tokens(count: Callable[[str], int]) -> tuple[int, int]:
    """Tokens of a prompt without filler and with PERIOD sentences of it, as `count` has them."""
    empty, period = (count(locker_prompt(n, 1.0, "size")[0]) for n in (0, PERIOD))
    return empty, period


def after_filler(row: Row, texts: list[str], chars: int) -> list[dict[str, str]]:
    """The row's messages, its question behind other rows' questions of about `chars` characters, without their answers."""
    own = prompt_of(row)
    filler, index = "", 0
    while len(filler) < chars:
        filler += f"- {texts[index % len(texts)]}\n"
        index += 1
    question = f"{ROW_HEAD}\n{filler[:chars]}\n\nThe request:\n{own[-1]['content']}"
    return [*own[:-1], {**own[-1], "content": question}]
