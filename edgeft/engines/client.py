"""One chat request to anything that speaks OpenAI's API, with the time of every chunk.

Always streamed, since the first token's time is wanted. A chunk is not a token: counts come from
the engine's own usage block.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from edgeft.errors import EnvironmentFault

TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Reply:
    """What came back. Times are seconds since the request was sent, on the client's clock."""

    text: str
    prompt_tokens: int | None
    output_tokens: int | None
    ttft_s: float  # to the first non-empty piece of text; the whole time where there was none
    e2e_s: float  # to the end of the stream
    chunk_s: list[float]
    mean_logprob: float | None  # nats a token, where the engine gives log-probabilities
    finish_reason: str | None

    @property
    def decode_tok_per_s(self) -> float | None:
        """(n-1)/(e2e - TTFT), or None for fewer than two tokens."""
        if not self.output_tokens or self.output_tokens < 2 or self.e2e_s <= self.ttft_s:
            return None
        return (self.output_tokens - 1) / (self.e2e_s - self.ttft_s)


def chat(
    client: httpx.Client,
    url: str,
    body: dict[str, Any],
    key: str | None = None,
    leave: Callable[[str], bool] = lambda text: False,
) -> Reply:
    """Send one streamed chat completion; `leave` may say of the text so far that the rest is not wanted.

    Raises EnvironmentFault where the server refuses or breaks off.
    """
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    started = time.perf_counter()
    try:
        with client.stream(
            "POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=TIMEOUT_S
        ) as response:
            if response.status_code != 200:
                detail = response.read().decode(errors="replace")[:300]
                raise EnvironmentFault(
                    f"{url} answered {response.status_code}: {detail}", f"curl {url}/health"
                )
            return gather(until(events(response), leave), started)
    except httpx.HTTPError as error:
        raise EnvironmentFault(
            f"{url} broke off: {type(error).__name__} {error}", f"curl {url}/health"
        ) from error


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event, up to [DONE]."""
    for line in response.iter_lines():
        if line.startswith("data:"):
            data = line[5:].strip()
            if data == "[DONE]":
                return
            yield json.loads(data)


def until(chunks: Iterator[dict[str, Any]], leave: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    """The chunks up to the one after which `leave` is true of the text."""
    text = ""
    for chunk in chunks:
        yield chunk
        pieces = [(choice.get("delta") or {}).get("content") or "" for choice in chunk.get("choices") or []]
        if any(pieces):
            text += "".join(pieces)
            if leave(text):
                return


def gather(chunks: Iterator[dict[str, Any]], started: float) -> Reply:
    """Read a stream to its end. `started` is `time.perf_counter()` when the request was sent."""
    pieces: list[str] = []
    times: list[float] = []
    logprobs: list[float] = []
    usage: dict[str, Any] = {}
    reason = None
    for chunk in chunks:
        if "error" in chunk:
            raise EnvironmentFault(f"the server broke off: {str(chunk['error'])[:300]}", "look at its log")
        usage = chunk.get("usage") or usage
        for choice in chunk.get("choices") or []:
            reason = choice.get("finish_reason") or reason
            entries = (choice.get("logprobs") or {}).get("content") or []
            logprobs += [e["logprob"] for e in entries if e.get("logprob") is not None]
            if text := (choice.get("delta") or {}).get("content"):
                times.append(time.perf_counter() - started)
                pieces.append(text)
    e2e = time.perf_counter() - started
    return Reply(
        text="".join(pieces),
        prompt_tokens=usage.get("prompt_tokens"),
        output_tokens=usage.get("completion_tokens"),
        ttft_s=times[0] if times else e2e,
        e2e_s=e2e,
        chunk_s=times,
        mean_logprob=sum(logprobs) / len(logprobs) if logprobs else None,
        finish_reason=reason,
    )
