"""What engines without a server share: what a request asks of decoding, stop strings, a prompt read in pieces."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

MAX_TOP_LOGPROBS = 20
SMALLEST_PIECE = 8  # tokens; below it the weights are read for too little
# A batch takes longer the more stands before it: attention. Speed is measured near a prompt's beginning.
DEPTH = 1.5


@dataclass(frozen=True)
class Sampling:
    """What a request asks of decoding."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    logprobs: bool = False
    top_logprobs: int = 0
    schema: str | None = None  # a JSON schema that the answer must satisfy
    reuse: bool = False  # what the request before left may be used (`cache_prompt`)


@dataclass(frozen=True)
class Token:
    """One generated token: the text that it completes (may be empty), its log-probability in nats if known, and the likeliest."""

    text: str
    logprob: float | None
    top: tuple[tuple[str, float], ...] = ()


# What an engine's generator yields: None after each piece of the prompt that was read, then tokens.
Steps = Iterator[Token | None]


@dataclass(frozen=True)
class Piece:
    """What goes out next: text, the token it came with, and in the last one the reason to finish."""

    text: str
    token: Token | None
    finish_reason: str | None = None


class BadRequest(ValueError):
    """A request that this engine can't do; its text is told to the client."""


def sampling_of(body: dict[str, Any]) -> Sampling:
    """The fields of a request that are understood; others are ignored. Raises BadRequest for values that mean nothing."""
    try:
        stop = body.get("stop") or []
        found = Sampling(
            max_tokens=int(body.get("max_completion_tokens") or body.get("max_tokens") or 256),
            temperature=float(_given(body, "temperature", 1.0)),
            top_p=float(_given(body, "top_p", 1.0)),
            seed=None if body.get("seed") is None else int(body["seed"]),
            stop=(stop,) if isinstance(stop, str) else tuple(map(str, stop)),
            ignore_eos=bool(body.get("ignore_eos")),
            reuse=body.get("cache_prompt") is True,
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise BadRequest(f"bad request: {error}") from None
    if not (0 <= found.temperature <= 100 and 0 < found.top_p <= 1 and found.max_tokens > 0):
        raise BadRequest("temperature must be 0 or more, top_p in (0, 1], max_tokens 1 or more")
    return replace(found, stop=tuple(text for text in found.stop if text))


def _given(body: dict[str, Any], name: str, default: float) -> Any:
    return default if body.get(name) is None else body[name]


def until_stop(tokens: Iterator[Token], sampling: Sampling) -> Iterator[Piece]:
    """Pieces up to the token limit or a stop string; the last has no token and says why it ends.

    Text that could be the beginning of a stop string is held back until it is clear.
    """
    held, longest = "", max((len(s) for s in sampling.stop), default=0)
    for count, token in enumerate(tokens, 1):
        held += token.text
        found = [held.index(s) for s in sampling.stop if s in held]
        if found:
            yield Piece(held[: min(found)], token)
            yield Piece("", None, "stop")
            return
        safe = max(0, len(held) - longest + 1) if longest else len(held)
        yield Piece(held[:safe], token)
        held = held[safe:]
        if count >= sampling.max_tokens:
            yield Piece(held, None, "length")
            return
    yield Piece(held, None, "stop")


def beginning(row: list[int], last: list[int]) -> int:
    """How many ids two rows begin with alike, the row's last one left out: something must be computed."""
    same = 0
    for a, b in zip(row[:-1], last, strict=False):
        if a != b:
            break
        same += 1
    return same


def chosen(logits: Any, sampling: Sampling, chance: Any) -> int:
    """The next token of float logits [vocabulary]: the likeliest, or one drawn by temperature and nucleus with numpy's `chance`."""
    import numpy as np

    if sampling.temperature == 0:
        return int(logits.argmax())
    odds = np.exp(log_softmax(np.asarray(logits, dtype=np.float64) / sampling.temperature))
    if sampling.top_p < 1:
        order = np.argsort(-odds, kind="stable")
        ordered = odds[order]
        odds[order[ordered.cumsum() - ordered > sampling.top_p]] = 0
    edges = odds.cumsum()
    return int(np.searchsorted(edges, chance.random() * edges[-1], side="right"))


def tokens_in(speed: float, seconds: float) -> int:
    """Tokens that a batch may have so that it takes at most `seconds` also deep in a context, a power of two.

    `speed`: tokens a second, measured near a prompt's beginning.
    """
    return int(max(SMALLEST_PIECE, 2 ** math.floor(math.log2(max(1.0, speed * seconds / DEPTH)))))


class Pace:
    """How many tokens of a prompt are read at once, so that a piece takes at most `seconds`; None: the whole prompt."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds, self.size = seconds, 32

    def pieces(self, ids: list[int]) -> Iterator[list[int]]:
        """The prompt's pieces. The time until the next one is asked for is taken as the time that a piece took."""
        at = 0
        while at < len(ids):
            part = ids[at:] if self.seconds is None else ids[at : at + self.size]
            begun = time.perf_counter()
            yield part
            at += len(part)
            if self.seconds is not None and len(part) == self.size:
                self.size = tokens_in(len(part) / (time.perf_counter() - begun), self.seconds)


def likeliest(logprobs: Any, count: int) -> list[int]:
    """Indices of the `count` largest of a numpy array [vocabulary], the largest first."""
    import numpy as np

    if count <= 0:
        return []
    chosen = np.argpartition(logprobs, -count)[-count:]
    return [int(i) for i in chosen[np.argsort(logprobs[chosen])[::-1]]]


def log_softmax(logits: Any) -> Any:
    """Log-probabilities in nats of a numpy array of logits [vocabulary]."""
    import numpy as np

    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
