"""Multiple choice by log-probability: of a row's `choices` the one that the artefact gives most probability is its answer.

A choice's score is the sum of ln p over its tokens, standing where the answer would, behind the prompt that the artefact's own
template renders. `accuracy` takes the greatest sum (lm-eval's `acc`), `accuracy_norm` the greatest sum a byte of UTF-8, so that
long choices are not at a loss (lm-eval's `acc_bytes`, which is its `acc_norm`, a character, where all is ASCII: `process_results`
of lm_eval/api/task.py). As there, no end of text is asked for behind a choice. Equal sums: the first counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from edgeft import child, console
from edgeft.bench.journal import Journal
from edgeft.bench.likelihood import split
from edgeft.bench.pool import Pool
from edgeft.bench.stats import wilson
from edgeft.bench.targets import Target
from edgeft.engines.text import EngineText
from edgeft.errors import EnvironmentFault, UsageError
from edgeft.rows import Row, answer_of, prompt_of

TASK = "choice"
FORMULA = (
    "right where the sum of ln p over its tokens is greatest; norm: the sum over its bytes of UTF-8; "
    "margin: the right one's sum less the best other's, nats"
)


def asked(rows: list[Row]) -> list[Row]:
    """The rows that are multiple choice."""
    return [row for row in rows if row["task"] == TASK]


def check(rows: list[Row], path: Any) -> None:
    """Raise UsageError for a choice row without `choices`, with too few, with one twice, or whose answer is none of them."""
    for row in asked(rows):
        look, found = f"grep -n '{row['id']}' {path}", row.get("choices")
        if not isinstance(found, list) or len(found) < 2:
            raise UsageError(
                f"{path}: the row '{row['id']}' is a choice task and has no list 'choices' of two or more.",
                look,
            )
        if any(not isinstance(choice, str) or not choice for choice in found) or len(set(found)) < len(found):
            raise UsageError(
                f"{path}: the 'choices' of row '{row['id']}' are not texts that differ and hold something.",
                look,
            )
        if answer_of(row) not in found:
            raise UsageError(
                f"{path}: the answer '{answer_of(row)}' of row '{row['id']}' is none of its 'choices'.", look
            )


def read(target: Target, pool: Pool, rows: list[Row], journal: Journal) -> None:
    """Keep how the artefact's engine reads the choice rows, as token ids, unless that is known already."""
    if not asked(rows) or target.path is None or journal.last(target.id, "error"):
        return
    if journal.last(target.id, "choice-ids") or journal.last(target.id, "choices-error"):
        return
    try:
        with pool.use(target) as running, httpx.Client() as client:
            assert running.local is not None
            text = EngineText(running.local, client)
            first = prompt_of(asked(rows)[0])
            counted = running.ask({"messages": first, "max_tokens": 1, "temperature": 0}).prompt_tokens
            if counted != (seen := len(text.tokens(text.render(first), add_special=True))):
                raise EnvironmentFault(
                    f"{target.id}: a prompt has {seen} tokens by the engine's /tokenize and {counted} when it is answered.",
                    "log-probabilities would be of another text than the one that is served",
                )
            ids = [ids_of(text, row) for row in asked(rows)]
    except EnvironmentFault as error:
        journal.add(target.id, "choices-error", error.message)
    else:
        journal.add(target.id, "choice-ids", ids)


def ids_of(text: EngineText, row: Row) -> dict[str, Any]:
    """A row as token ids: its `prompt`, and each choice as a continuation of it."""
    rendered = text.render(prompt_of(row))
    prompt = text.tokens(rendered, add_special=True)
    whole = [text.tokens(rendered + choice, add_special=True) for choice in row["choices"]]
    return {
        "prompt": prompt,
        "continuations": [
            split(ids, prompt, text.tokens(choice)) for ids, choice in zip(whole, row["choices"], strict=True)
        ],
    }


def measure(targets: list[Target], rows: list[Row], threads: int, journal: Journal, state: Path) -> None:
    """The log-probabilities of every artefact whose token ids are known and that has none yet."""
    for target in targets:
        ids = journal.last(target.id, "choice-ids")
        if not ids or any(journal.last(target.id, kind) for kind in ("choices", "choices-error")):
            continue
        log = state / f"{target.id.replace('/', '+')}.choices.log"
        try:
            with console.step(f"choices of {target.id}", log):
                found = child.call(
                    "edgeft.bench.likelihood:score", log=log, title=f"the choices of {target.id}",
                    engine=target.engine, folder=str(target.path), items=ids, threads=threads,
                )  # fmt: skip
            items = [
                judged(row, [c["logprob"] for c in entry])
                for row, entry in zip(asked(rows), found["items"], strict=True)
            ]
            journal.add(target.id, "choices", {**figures(items), "logits_build": found["build"]})
        except EnvironmentFault as error:
            journal.add(target.id, "choices-error", error.message)


def judged(row: Row, sums: list[float]) -> dict[str, Any]:
    """One row's line: which choice is the likeliest, plain and a byte, and by how much (nats; below 0 is wrong)."""
    choices, right = row["choices"], row["choices"].index(answer_of(row))
    norm = [total / len(choice.encode()) for total, choice in zip(sums, choices, strict=True)]
    best, best_norm = (max(range(len(choices)), key=values.__getitem__) for values in (sums, norm))
    return {
        "item_id": row["id"],
        "choice": choices[best],
        "choice_norm": choices[best_norm],
        "choice_correct": best == right,
        "choice_correct_norm": best_norm == right,
        "choice_margin": sums[right] - max(s for i, s in enumerate(sums) if i != right),
        "choice_logprobs": sums,
    }


def figures(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Both accuracies with Wilson's intervals, the mean margin, what guessing would get, and the lines."""
    n = len(items)
    right, right_norm = (sum(item[k] for item in items) for k in ("choice_correct", "choice_correct_norm"))
    return {
        "n": n,
        "accuracy": right / n,
        "ci95": wilson(right, n),
        "accuracy_norm": right_norm / n,
        "ci95_norm": wilson(right_norm, n),
        "chance": sum(1 / len(item["choice_logprobs"]) for item in items) / n,
        "margin_mean": sum(item["choice_margin"] for item in items) / n,
        "formula": FORMULA,
        "items": items,
    }


def result(journal: Journal, target: Target) -> dict[str, Any] | None:
    """The `choices` entry of a report; its lines stand in `items.jsonl`."""
    found = journal.last(target.id, "choices")
    return {k: v for k, v in found.items() if k != "items"} if found else None


def with_choices(items: list[dict[str, Any]], journal: Journal) -> list[dict[str, Any]]:
    """The lines of `items.jsonl` with what is known of their choices."""
    known = {
        (model, line["item_id"]): line
        for model in {item["model_id"] for item in items}
        for line in (journal.last(model, "choices") or {}).get("items", [])
    }
    return [{**item, **known.get((item["model_id"], item["item_id"]), {})} for item in items]


def notes(result: dict[str, Any]) -> list[str]:
    """What a reader must know of a model's choices."""
    found = result.get("choices")
    if not found:
        return []
    return [
        f"{result['id']}, multiple choice by log-probability: {100 * found['accuracy']:.1f} % right {_ci(found['ci95'])}, "
        f"{100 * found['accuracy_norm']:.1f} % a byte {_ci(found['ci95_norm'])}, n {found['n']}, "
        f"guessing {100 * found['chance']:.1f} %; logits through {found['logits_build']}."
    ]


def _ci(interval: list[float]) -> str:
    return f"({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"
