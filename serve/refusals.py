"""What a client is told of an upstream that failed, refused, or is not there yet."""

from __future__ import annotations

import random

from edgeft.serve.protocol import Refusal

SPREAD = 1.5
MOST_TOLD_S = 120.0


def unreachable(error: Exception) -> Refusal:
    """What is told of an upstream that gave no answer."""
    if isinstance(error, TimeoutError):
        return Refusal(
            504,
            "The model did not answer in time.",
            kind="upstream_error",
            code="upstream_timeout",
            elsewhere=True,
        )
    return Refusal(
        502, f"The engine did not answer ({type(error).__name__}).", kind="upstream_error", code="upstream_unreachable", elsewhere=True
    )  # fmt: skip


def refused(status: int, message: str, retry_after: str | None) -> Refusal:
    """What the client is told of an upstream's status: its own fault as it is, ours as a 502."""
    if status == 429:
        return at_limit(seconds(retry_after) or 1.0)
    if status in (400, 404, 413, 415, 422, 501):
        shown = {404: 400, 501: 400}.get(status, status)
        return Refusal(shown, f"The model refused the request: {message}", code=f"upstream_{status}")
    if status in (401, 403):
        return Refusal(
            502, "The upstream refused edgeft's key.", kind="upstream_error", code=f"upstream_{status}", elsewhere=True
        )  # fmt: skip
    wait = seconds(retry_after) if status == 503 else None
    return Refusal(
        502, "The model failed.", kind="upstream_error", code=f"upstream_{status}", retry_after_s=wait, elsewhere=True
    )  # fmt: skip


def not_ready(candidate_id: str, state: str, retry_after_s: float = 2.0) -> Refusal:
    """The candidate can't answer now; another one may."""
    return Refusal(
        503,
        f"The model '{candidate_id}' is not ready ({state}).",
        kind="server_error",
        code=f"model_{state}",
        retry_after_s=retry_after_s,
        elsewhere=True,
    )


def told_s(wait_s: float) -> float:
    """When a client is told to come back: each at a time of its own, up to half as long again. Told the same they would all come back in one
    moment, again and again. OpenAI's client does not come back at all after more than MOST_TOLD_S, so none is pushed over that."""
    wait_s = max(1.0, wait_s)
    return min(wait_s * random.uniform(1.0, SPREAD), max(wait_s, MOST_TOLD_S))


def at_limit(retry_after_s: float) -> Refusal:
    """The upstream wants fewer requests."""
    return Refusal(
        429,
        "The model is at its limit.",
        kind="rate_limit_error",
        code="upstream_429",
        retry_after_s=retry_after_s,
        elsewhere=True,
    )


def seconds(retry_after: str | None) -> float | None:
    """A Retry-After header (RFC 9110: seconds, or a date) in seconds from now; None where there is none or it is nonsense."""
    import time
    from email.utils import parsedate_to_datetime

    if not retry_after:
        return None
    if retry_after.strip().isdigit():
        return float(min(int(retry_after), 86400))
    try:
        return min(max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time()), 86400.0)
    except (ValueError, TypeError):
        return None
