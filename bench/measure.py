"""Speed and accuracy of one running model, through the interface that serves it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgeft.bench.callers import Caller
from edgeft.bench.score import score
from edgeft.bench.stats import summary, wilson
from edgeft.bench.targets import Target
from edgeft.rows import Row, answer_of, messages_hash, prompt_of


def speed(
    ask: Caller, rows: list[Row], repetitions: int, output_tokens: int, prompt_chars: int
) -> dict[str, Any]:
    """One stream, a prompt of rows' texts, `output_tokens` forced; a warm-up run is left out.

    Prefill tok/s = prompt tokens / TTFT with an empty cache; decode tok/s = (n-1)/(e2e - TTFT).
    """
    replies = []
    for index in range(repetitions + 1):
        body = {
            "messages": [{"role": "user", "content": long_prompt(rows, index, prompt_chars)}],
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        replies.append(ask(body))
    kept = replies[1:]
    decode = [r.decode_tok_per_s for r in kept if r.decode_tok_per_s]
    prefill = [r.prompt_tokens / r.ttft_s for r in kept if r.prompt_tokens]
    return {
        "prompt_tokens": [r.prompt_tokens for r in kept],
        "output_tokens": [r.output_tokens for r in kept],
        "repetitions": repetitions,
        "first_request_s": replies[0].e2e_s,
        "ttft_s": summary([r.ttft_s for r in kept]),
        "prefill_tok_per_s": summary(prefill) if prefill else None,
        "decode_tok_per_s": summary(decode) if decode else None,
        "tpot_s": summary([1 / d for d in decode]) if decode else None,
        "side": "client",
    }


def long_prompt(rows: list[Row], start: int, chars: int) -> str:
    """Texts of rows joined to `chars` characters, beginning at another row for each `start`."""
    texts = [prompt_of(row)[-1]["content"] for row in rows]
    joined, index = "", start * 7
    while len(joined) < chars:
        joined += texts[index % len(texts)] + " "
        index += 1
    return joined[:chars]


def accuracy(
    target: Target, ask: Caller, rows: list[Row], max_tokens: int, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Answer every row greedily; returns the figures and the per-item lines of `items.jsonl`."""
    items = []
    for index, row in enumerate(rows):
        body = {
            "messages": prompt_of(row),
            "max_tokens": max_tokens,
            "temperature": 0,
            "logprobs": True,
            "cache_prompt": False,
        }
        reply = ask(body)
        value = score(row, reply.text)
        items.append(
            {
                "item_id": row["id"],
                "model_id": target.id,
                "artifact_sha256": target.sha256,
                "prompt_hash": messages_hash(prompt_of(row)),
                "row_hash": messages_hash(row["messages"]),
                "request": prompt_of(row)[-1]["content"],
                "expected": answer_of(row),
                "output": reply.text,
                "correct": None if value is None else value == 1.0,
                "score": value,
                "prompt_tokens": reply.prompt_tokens,
                "output_tokens": reply.output_tokens,
                "ttft_s": reply.ttft_s,
                "e2e_s": reply.e2e_s,
                "mean_logprob": reply.mean_logprob,
                "finish_reason": reply.finish_reason,
            }
        )
        say(f"{index + 1}/{len(rows)} answers")
    return figures(items), items


def figures(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Share right with Wilson's interval, times and tokens over a target's items."""
    scored = [item for item in items if item["score"] is not None]
    right = sum(bool(item["correct"]) for item in scored)
    return {
        "correct": right,
        "n": len(scored),
        "share": right / len(scored) if scored else None,
        "ci95": wilson(right, len(scored)) if scored else None,
        "not_scored": len(items) - len(scored),
        "ttft_s": summary([item["ttft_s"] for item in items]),
        "e2e_s": summary([item["e2e_s"] for item in items]),
        "prompt_tokens": sum(item["prompt_tokens"] or 0 for item in items),
        "output_tokens": sum(item["output_tokens"] or 0 for item in items),
    }
