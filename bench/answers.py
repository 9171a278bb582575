"""Are the answers right? Every row is asked of a running model through the interface that serves it.

A beginning that a row's prompt shares with the one before it (a system prompt) is not computed again where the engine keeps it, as
serving does: a bench of rows under a long system prompt takes minutes in place of hours. The times of answers are with it,
so TTFT with an empty cache is taken from the requests of `speed` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edgeft.bench.callers import Caller
from edgeft.bench.score import METRICS, score
from edgeft.bench.stats import bootstrap, summary, wilson
from edgeft.bench.targets import Target
from edgeft.rows import Row, answer_of, messages_hash, prompt_of


def ask_all(
    target: Target,
    ask: Caller,
    rows: list[Row],
    max_tokens: int,
    say: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None] = lambda item: None,
) -> list[dict[str, Any]]:
    """Answer every row greedily; returns the lines of `items.jsonl`, each given to `keep` as soon as it is there."""
    items = []
    for index, row in enumerate(rows):
        items.append(answer(target, ask, row, max_tokens))
        keep(items[-1])
        say(f"{index + 1}/{len(rows)} answers")
    return items


def answer(target: Target, ask: Caller, row: Row, max_tokens: int, reuse: bool = True) -> dict[str, Any]:
    """One row asked greedily: what came, whether it is right, and what it took. Without `reuse` its whole prompt is computed."""
    reply = ask(
        {
            "messages": prompt_of(row),
            "max_tokens": max_tokens,
            "temperature": 0,
            "logprobs": True,
            "cache_prompt": reuse,
        }
    )
    value = score(row, reply.text)
    return {
        "item_id": row["id"],
        "model_id": target.id,
        "artifact_sha256": target.sha256,
        "prompt_hash": messages_hash(prompt_of(row)),
        "row_hash": messages_hash(row["messages"]),
        "request": prompt_of(row)[-1]["content"],
        "expected": answer_of(row),
        "output": reply.text,
        "task": row["task"],
        "correct": None if value is None or row["task"] == "text" else value == 1.0,
        "score": value,
        "prompt_tokens": reply.prompt_tokens,
        "output_tokens": reply.output_tokens,
        "ttft_s": reply.ttft_s,
        "e2e_s": reply.e2e_s,
        "mean_logprob": reply.mean_logprob,
        "finish_reason": reply.finish_reason,
    }


def figures(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Share right with Wilson's interval, the mean score by task, times and tokens over a target's items."""
    judged = [item for item in items if item["correct"] is not None]
    right = sum(item["correct"] for item in judged)
    return {
        "correct": right,
        "n": len(judged),
        "share": right / len(judged) if judged else None,
        "ci95": wilson(right, len(judged)) if judged else None,
        "not_scored": sum(item["score"] is None for item in items),
        "by_task": by_task(items),
        "ttft_s": summary([item["ttft_s"] for item in items]),
        "e2e_s": summary([item["e2e_s"] for item in items]),
        "prompt_tokens": sum(item["prompt_tokens"] or 0 for item in items),
        "output_tokens": sum(item["output_tokens"] or 0 for item in items),
    }


def by_task(items: list[dict[str, Any]]) -> dict[str, Any]:
    """For each kind of task its metric, the mean score with a bootstrap interval, and n."""
    found = {}
    for task in sorted({item.get("task", "exact") for item in items}):
        scores = [i["score"] for i in items if i.get("task", "exact") == task and i["score"] is not None]
        if scores:
            found[task] = {
                "metric": METRICS[task],
                "mean": sum(scores) / len(scores),
                "ci95": bootstrap(scores, np.mean),
                "n": len(scores),
            }
    return found
