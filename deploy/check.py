"""Run on the box after installing: requests to the proxy for a while, one after the other, and what they took, as one JSON line.

python -m edgeft.deploy.check URL SECONDS. The texts are fixed and of no meaning; each differs, so that no cache answers.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

WORDS = [
    "order",
    "refund",
    "delivery",
    "address",
    "invoice",
    "account",
    "card",
    "payment",
    "branch",
    "appointment",
    "receipt",
]
PROMPT_WORDS, OUTPUT_TOKENS, LEAST = 64, 32, 3


def body_of(number: int) -> dict[str, Any]:
    """The request of a number: another text each time, answers of at most OUTPUT_TOKENS."""
    words = [WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(PROMPT_WORDS)]
    text = f"Request {number}. Say something about: {' '.join(words)}."
    return {
        "model": "auto",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0.7,
    }


def measure(url: str, seconds: float) -> dict[str, Any]:
    """Medians of TTFT, TPOT and decode rate with their 95 % intervals, by the client; LEAST requests at least."""
    import httpx

    from edgeft.bench.stats import summary
    from edgeft.engines.client import chat

    replies: list[Any] = []
    started = time.monotonic()
    with httpx.Client() as client:
        chat(client, url, body_of(0))  # wakes the threads
        while len(replies) < LEAST or time.monotonic() - started < seconds:
            replies.append(chat(client, url, body_of(1 + len(replies))))
    rates = [r for reply in replies if (r := reply.decode_tok_per_s)]
    found: dict[str, Any] = {"requests": len(replies), "seconds": time.monotonic() - started}
    for name, samples in (
        ("ttft_s", [r.ttft_s for r in replies]),
        ("tpot_s", [1 / r for r in rates]),
        ("decode_tok_per_s", rates),
    ):
        if samples:
            figure = summary(samples)
            found[name] = {key: figure[key] for key in ("p50", "p95", "p50_ci95", "n")}
    return found


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], float(sys.argv[2]))))
