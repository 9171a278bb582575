"""The way back to a certificate: a sample of logged traffic, answered by every candidate, queued for grading.

FOLDER/answers.jsonl    who answered what; lines are in the random order of the sample
FOLDER/to_grade.jsonl   the same answers under letters, in an order that says nothing of who wrote them; a person fills in `scores`
FOLDER/judge.jsonl      the same shape, with a judge model's scores (router/grading.py)
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from edgeft.errors import UsageError
from edgeft.files import write_json, write_jsonl
from edgeft.router.decision import removed_for
from edgeft.router.features import content_text, request_text
from edgeft.router.policy import LoadedPolicy
from edgeft.router.privacy import why_private
from edgeft.router.request import as_request
from edgeft.rows import messages_hash

ANSWERS, TO_GRADE, SAMPLE = "answers.jsonl", "to_grade.jsonl", "sample.json"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MAX_TOKENS = 512
KEEP_EVERY = 20  # answers between two writes: an interrupted run goes on from there


def sample(
    policy: LoadedPolicy, log: Path, out: Path, addresses: Mapping[str, tuple[str, str]], n: int = 500, seed: int = 0,
    temperature: float = 0.0, max_tokens: int = MAX_TOKENS, told: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:  # fmt: skip
    """Draw `n` logged requests at random, ask every candidate, write ANSWERS and TO_GRADE into `out`; returns counts.

    The log is JSONL; only lines that hold a `request` text (or `messages`) are drawn from, which serving writes only where it was told
    to. `addresses` maps a candidate to (URL, model name) of an OpenAI-shaped API. Requests that not all candidates may answer (privacy,
    abilities) are left out, and so are texts that the policy has seen. A text drawn twice is asked once and counts twice. A run that was
    interrupted goes on where it was. Raises UsageError for a log without texts, EnvironmentFault where a candidate does not answer.
    """
    missing = [name for name in policy.candidates if name not in addresses]
    if missing:
        raise UsageError(
            f"nobody says where {', '.join(repr(name) for name in missing)} can be asked.",
            "--server URL for all, or --at ID=URL#NAME",
        )
    lines, counts = eligible(policy, log)
    if not lines:
        raise UsageError(
            f"{log}: of {counts['lines']} lines {counts['no_text']} hold no text, {counts['seen']} the policy has seen, "
            f"{counts['removed']} not every candidate may answer; none is left.",
            "log texts (opt-in) and route some traffic first",
        )
    graded, kept = out / TO_GRADE, out / ANSWERS
    if graded.is_file() and any(
        v is not None for line in read_lines(graded) for v in line["scores"].values()
    ):
        raise UsageError(
            f"{graded} holds grades already; it is left alone.", f"--out ANOTHER, or remove {graded}"
        )
    out.mkdir(parents=True, exist_ok=True, mode=0o700)  # texts of users lie in it
    drawn = random.Random(seed).sample(lines, min(n, len(lines)))
    known = {line["digest"]: line for line in read_lines(kept)} if kept.is_file() else {}
    found: list[dict[str, Any]] = []
    asked = {"temperature": temperature, "max_tokens": max_tokens}
    for place, line in enumerate(drawn):
        old = known.get(line["digest"])
        answers = (
            old["answers"]
            if old and old["asked"] == asked and set(old["answers"]) == set(policy.candidates)
            else None
        )
        new = answers is None
        if answers is None:
            answers = {name: ask(addresses[name], line["messages"], asked) for name in policy.candidates}
        found.append(
            {
                "id": f"{place:05d}-{line['digest'][:12]}",
                **line,
                "answers": answers,
                "asked": asked,
                "policy_sha256": policy.sha256,
            }
        )
        known[line["digest"]] = found[-1]
        if new and place % KEEP_EVERY == 0:
            write_jsonl(kept, found)
        told(place + 1, len(drawn))
    write_jsonl(kept, found)
    write_jsonl(graded, [blind(line) for line in found])
    told_of = {
        **counts,
        "drawn": len(found),
        "different_texts": len({line["digest"] for line in found}),
        "seed": seed,
    }
    write_json(out / SAMPLE, {**told_of, "date": datetime.now(UTC).isoformat(timespec="seconds"), **asked})
    return told_of


def eligible(policy: LoadedPolicy, log: Path) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """(the log's requests that every candidate may answer and the policy has not seen, how many others there were)."""
    if not log.is_file():
        raise UsageError(f"there is no file {log}.", f"ls {log.parent}")
    seen = {digest for digests in policy.policy.seen_rows.values() for digest in digests}
    counts = {"lines": 0, "no_text": 0, "seen": 0, "removed": 0}
    found = []
    for line in read_lines(log):
        counts["lines"] += 1
        asked = messages_of(line)
        text = request_text(asked)
        if not text.strip():
            counts["no_text"] += 1
            continue
        # By the whole conversation, as a report of bench knows a row, and by the text, as a table does.
        hashes = [messages_hash(asked), sha256(text.encode(errors="surrogatepass")).hexdigest()]
        request = as_request(asked)
        private = bool(line.get("private")) or why_private(policy.policy.privacy, request) is not None
        remote = any(c.get("remote", True) for c in policy.policy.candidates)
        if seen.intersection(hashes):
            counts["seen"] += 1
        elif removed_for(policy, request) or (private and remote):
            counts["removed"] += 1
        else:
            found.append(
                {
                    "digest": hashes[0],
                    "hashes": hashes,
                    "request": text,
                    "messages": asked,
                    "private": private,
                }
            )
    return found, counts


def messages_of(line: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a log line, or [] where it keeps no texts."""
    asked = line.get("messages") or line.get("request")
    if isinstance(asked, str):
        return [{"role": "user", "content": asked}]
    return asked if isinstance(asked, list) and all(isinstance(m, dict) for m in asked) else []


def ask(
    address: tuple[str, str], messages: Sequence[Mapping[str, Any]], asked: Mapping[str, Any]
) -> dict[str, Any]:
    """One candidate's answer with what a draft's judge reads of it."""
    import httpx

    from edgeft.engines.client import chat

    url, model = address
    key = os.environ.get("OPENAI_API_KEY")
    with httpx.Client() as client:
        reply = chat(client, url, {"model": model, "messages": list(messages), **asked}, key)
    return {
        "text": reply.text, "output_tokens": reply.output_tokens, "finish_reason": reply.finish_reason, "mean_logprob": reply.mean_logprob,
    }  # fmt: skip


def address_of(text: str) -> tuple[str, str]:
    """(URL without /v1, model) of URL#NAME. Raises UsageError for another form."""
    url, mark, model = text.partition("#")
    if not url.startswith(("http://", "https://")) or not mark or not model:
        raise UsageError(f"'{text}' is not URL#NAME.", "http://127.0.0.1:8000#gpt-4o")
    return url.rstrip("/").removesuffix("/v1"), model


def blind(line: Mapping[str, Any]) -> dict[str, Any]:
    """What a grader sees of a line: the answers under letters, scores (0 to 1) to fill in."""
    names = lettered(line["id"], line["answers"])
    return {
        "id": line["id"], "request": content_text(line["request"]),
        "answers": {letter: line["answers"][name]["text"] for letter, name in names.items()}, "scores": dict.fromkeys(names),
    }  # fmt: skip


def lettered(row_id: str, names: Mapping[str, Any]) -> dict[str, str]:
    """Letter -> candidate, in an order that the row's id fixes and that does not go by who it is."""
    order = sorted(names, key=lambda name: sha256(f"{row_id}:{name}".encode()).digest())
    return dict(zip(LETTERS, order, strict=False))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file. Raises UsageError naming the first line that is none."""
    found = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if text.strip():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                line = None
            if not isinstance(line, dict):
                raise UsageError(f"{path} line {number} is no JSON object.", f"sed -n {number}p {path}")
            found.append(line)
    return found
