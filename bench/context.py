"""Effective context: how right and how fast a model still is as prompts grow, and by where the needed fact stands.

Two parts. `lengths`: the synthetic task of `context_task`, scored by the code of four digits, the same at every length.
`rows`: the user's own questions behind other rows' questions, against the same questions without (paired).
TTFT and prefill tok/s (prompt tokens / TTFT, empty cache, client's side) are of the synthetic task's requests.

`effective_tokens`: the greatest length up to which no length's 95 % interval (Wilson) lies below KEPT x the share right at the
shortest. RULER calls effective the longest context at which a model still has a set score (85.6 %, Llama-2-7B's at 4k; arXiv
2404.06654); here the bar is the model's own score at the shortest length, since a small model has another one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from edgeft.bench.answers import answer
from edgeft.bench.context_task import DEPTHS, after_filler, code_in, fact_tokens, locker_prompt, sentences_for
from edgeft.bench.journal import Journal
from edgeft.bench.pool import Pool
from edgeft.bench.stats import mcnemar, summary, wilson
from edgeft.bench.targets import Target
from edgeft.engines.client import Reply
from edgeft.errors import EnvironmentFault, UsageError
from edgeft.rows import Row, prompt_of, spread

KEPT = 0.85
ABLE = (
    0.5  # who has less right at the shortest length can't do the task, and nothing can be said of its context
)
ANSWER_TOKENS, SPARE_TOKENS = 24, 16
MIN_TOKENS = 128
OWN_TASKS = ("exact", "numeric", "choice", "json_schema")
FORMULA = (
    f"effective: the greatest length up to which no length's 95 % interval lies below {KEPT} x the share right at the shortest; "
    f"none where that is under {ABLE:g}"
)


def read_lengths(text: str | None) -> tuple[int, ...]:
    """'256,512' as lengths in tokens, shortest first. Raises UsageError naming the word that is none."""
    words = text.split(",") if text else []
    for word in words:
        if not word.strip().isdigit() or int(word) < MIN_TOKENS:
            raise UsageError(
                f"'{word}' is no length in tokens of {MIN_TOKENS} or more.",
                "--context-lengths 256,512,1024,1900",
            )
    return tuple(sorted({int(word) for word in words}))


def check(lengths: tuple[int, ...], max_tokens: int, context: int) -> None:
    """Raise UsageError where the longest prompt and its answer don't fit in the served context."""
    if not lengths:
        return
    room = max(ANSWER_TOKENS + SPARE_TOKENS, max_tokens)
    if max(lengths) + room > context:
        raise UsageError(
            f"a prompt of {max(lengths)} tokens and {room} for its answer don't fit in a context of {context}.",
            f"--context {max(lengths) + room}, or --context-lengths up to {context - room}",
        )


def measure(
    target: Target, pool: Pool, rows: list[Row], lengths: tuple[int, ...], repetitions: int, max_tokens: int,
    journal: Journal, say: Callable[[str], None],
) -> None:  # fmt: skip
    """Ask what is not asked yet and keep a `context` (synthetic) or `context-row` (own rows) fact a request."""
    asked, own = cells(lengths, repetitions), own_cells(rows, lengths, repetitions)
    left = asked[len(journal.all(target.id, "context")) :]
    left_own = own[len(journal.all(target.id, "context-row")) :]
    if not (left or left_own) or any(journal.last(target.id, kind) for kind in ("error", "context-error")):
        return
    try:
        with pool.use(target) as running:
            if not journal.last(target.id, "context-size"):
                journal.add(target.id, "context-size", sizes(running.ask, rows))
            size = journal.last(target.id, "context-size") or {}
            for done, cell in enumerate(left, len(asked) - len(left) + 1):
                journal.add(target.id, "context", ask_locker(running.ask, cell, size))
                say(f"{done}/{len(asked)} prompts up to {max(lengths)} tokens")
            for done, (row, tokens) in enumerate(left_own, len(own) - len(left_own) + 1):
                behind_others = behind(row, rows, tokens, size)
                item = answer(target, running.ask, behind_others, max_tokens, reuse=False)
                kept = {k: item[k] for k in ("correct", "output", "prompt_tokens", "ttft_s")}
                journal.add(target.id, "context-row", {"item_id": row["id"], "tokens": tokens, **kept})
                say(f"{done}/{len(own)} own rows behind others")
    except EnvironmentFault as error:
        journal.add(target.id, "context-error", error.message)


def cells(lengths: tuple[int, ...], repetitions: int) -> list[tuple[int, float, int]]:
    """(length, depth, repetition) in the order in which they are asked: lengths in turns, so that a slow minute hits all."""
    return [(t, d, r) for r in range(repetitions) for d in DEPTHS for t in lengths]


def own_cells(rows: list[Row], lengths: tuple[int, ...], repetitions: int) -> list[tuple[Row, int]]:
    """(row, length): as many rows a length as the synthetic task has prompts, spread over those that are right or wrong."""
    scored = [row for row in rows if row["task"] in OWN_TASKS]
    if len(rows) < 2:
        return []
    return [(row, tokens) for row in spread(scored, repetitions * len(DEPTHS)) for tokens in lengths]


def sizes(ask: Callable[[dict[str, Any]], Reply], rows: list[Row]) -> dict[str, Any]:
    """What prompts come to in tokens, by a few untimed requests: `empty` and `period` of the task, `chars` a token of the rows."""

    def count(text: str) -> int:
        found = ask(body_of([{"role": "user", "content": text}], 1)).prompt_tokens
        if found is None:
            raise EnvironmentFault(
                "the server does not count a prompt's tokens.", "leave --context-lengths out"
            )
        return found

    empty, period = fact_tokens(count)
    listed = "".join(f"- {text}\n" for text in texts_of(rows))[:400]
    return {"empty": empty, "period": period, "chars": 2 * len(listed) / (count(listed * 3) - count(listed))}


def texts_of(rows: list[Row]) -> list[str]:
    """The rows' questions."""
    return [prompt_of(row)[-1]["content"] for row in rows]


def ask_locker(
    ask: Callable[[dict[str, Any]], Reply], cell: tuple[int, float, int], size: dict[str, Any]
) -> dict[str, Any]:
    """One prompt of the synthetic task: what was answered, whether it is right, and its times."""
    tokens, depth, repetition = cell
    sentences = sentences_for(tokens, size["empty"], size["period"])
    prompt, code = locker_prompt(sentences, depth, f"{tokens}/{depth}/{repetition}")
    reply = ask(body_of([{"role": "user", "content": prompt}], ANSWER_TOKENS))
    return {
        "tokens": tokens, "depth": depth, "repetition": repetition, "expected": code, "output": reply.text,
        "right": code_in(reply.text) == code, "prompt_tokens": reply.prompt_tokens, "ttft_s": round(reply.ttft_s, 6),
    }  # fmt: skip


def body_of(messages: list[dict[str, Any]], max_tokens: int) -> dict[str, Any]:
    """A greedy request that finds no cache."""
    return {"messages": messages, "max_tokens": max_tokens, "temperature": 0, "cache_prompt": False}


def behind(row: Row, rows: list[Row], tokens: int, size: dict[str, Any]) -> Row:
    """The row with its question behind other rows' questions, so that the prompt has about `tokens`, a little less rather than more."""
    texts = [text for other, text in zip(rows, texts_of(rows), strict=True) if other["id"] != row["id"]]
    random.Random(f"{row['id']}/{tokens}").shuffle(texts)
    own = sum(len(str(message["content"])) for message in prompt_of(row))
    chars = int(0.97 * (tokens - size["empty"]) * size["chars"]) - own
    return {**row, "messages": [*after_filler(row, texts, chars), row["messages"][-1]]}


def result(journal: Journal, target: Target) -> dict[str, Any] | None:
    """The `context` entry of a report; None where it was not asked for or broke off: half of it would mislead."""
    asked = journal.all(target.id, "context")
    if not asked or journal.last(target.id, "context-error"):
        return None
    lengths = [at_length(tokens, asked) for tokens in sorted({a["tokens"] for a in asked})]
    plain = {item["item_id"]: item["correct"] for item in journal.all(target.id, "answer")}
    own = journal.all(target.id, "context-row")
    return {
        "label": "synthetic",
        "lengths": lengths,
        "effective_tokens": effective(lengths),
        "formula": FORMULA,
        "rows": [against_plain(tokens, own, plain) for tokens in sorted({o["tokens"] for o in own})],
        "side": "client",
    }


def at_length(tokens: int, asked: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one length, by depth and over all depths."""
    here = [a for a in asked if a["tokens"] == tokens]
    right = sum(a["right"] for a in here)
    depths = [[a["right"] for a in here if a["depth"] == depth] for depth in DEPTHS]
    return {
        "tokens": tokens,
        "prompt_tokens": [a["prompt_tokens"] for a in here],
        "depths": [
            {"depth": d, "right": sum(found), "n": len(found)}
            for d, found in zip(DEPTHS, depths, strict=True)
            if found
        ],
        "right": right,
        "n": len(here),
        "ci95": wilson(right, len(here)),
        "ttft_s": summary([a["ttft_s"] for a in here]),
        "prefill_tok_per_s": summary([a["prompt_tokens"] / a["ttft_s"] for a in here]),
    }


def effective(lengths: list[dict[str, Any]]) -> int | None:
    """The greatest length that keeps up, all shorter ones too (FORMULA); None where the shortest can't be done."""
    first = lengths[0]["right"] / lengths[0]["n"]
    if first < ABLE:
        return None
    best = None
    for length in lengths:
        if length["ci95"][1] < KEPT * first:
            break
        best = length["tokens"]
    return best


def against_plain(tokens: int, own: list[dict[str, Any]], plain: dict[str, bool | None]) -> dict[str, Any]:
    """The own rows of one length against the same rows alone: what was lost and gained, exact McNemar."""
    here = [o for o in own if o["tokens"] == tokens and None not in (o["correct"], plain.get(o["item_id"]))]
    right, alone = sum(o["correct"] for o in here), sum(bool(plain[o["item_id"]]) for o in here)
    lost = sum(bool(plain[o["item_id"]]) and not o["correct"] for o in here)
    gained = sum(o["correct"] and not plain[o["item_id"]] for o in here)
    return {
        "tokens": tokens,
        "prompt_tokens": [o["prompt_tokens"] for o in here],
        "right": right,
        "right_alone": alone,
        "n": len(here),
        "ci95": wilson(right, len(here)),
        "lost": lost,
        "gained": gained,
        "mcnemar_p": mcnemar(lost, gained),
    }


def notes(result: dict[str, Any]) -> list[str]:
    """A model's effective context in words."""
    found = result.get("context")
    if not found:
        return []
    shares = ", ".join(
        f"{c['tokens']}: {c['right']}/{c['n']} right, TTFT {1000 * c['ttft_s']['p50']:.0f} ms, "
        f"prefill {c['prefill_tok_per_s']['p50']:.0f} tok/s"
        for c in found["lengths"]
    )
    tokens = found["effective_tokens"]
    verdict = f"effective context {tokens} tokens" if tokens else "no effective context"
    lines = [f"{result['id']}, synthetic task by prompt tokens: {shares}; {verdict} ({found['formula']})."]
    worst = [worst_depth(c) for c in found["lengths"]]
    if any(worst):
        lines.append(
            f"{result['id']}, where the fact stands matters most at: {', '.join(w for w in worst if w)} (0 first, 1 last)."
        )
    if found["rows"]:
        listed = ", ".join(
            f"{r['tokens']}: {r['right']}/{r['n']} against {r['right_alone']}, p {r['mcnemar_p']:.2g}"
            for r in found["rows"]
        )
        lines.append(f"{result['id']}, own rows behind others' questions against alone: {listed}.")
    return lines


def worst_depth(length: dict[str, Any]) -> str:
    """The depth at which most is lost at a length, or nothing where all are alike."""
    shares = {d["depth"]: d["right"] / d["n"] for d in length["depths"]}
    low = min(shares, key=shares.__getitem__)
    best = max(shares.values())
    return (
        f"{length['tokens']} tokens, depth {low:g} ({100 * shares[low]:.0f} % right, best {100 * best:.0f} %)"
        if shares[low] < best
        else ""
    )
