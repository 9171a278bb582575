"""Does an artefact, in the engine that serves it, read texts and chats as its source does, and does it answer at all?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from edgeft.compress.gate_limits import FAIL, NOT_RUN, PASS
from edgeft.compress.gate_reference import CORPUS_SHA256, ids_hash, today
from edgeft.compress.gate_texts import CHATS, TOKEN_TEXTS
from edgeft.engines.client import Reply, chat
from edgeft.engines.local import LocalModel
from edgeft.errors import EnvironmentFault

SMOKE_TOKENS = 8
PLAIN = "user"
Line = dict[str, Any]


@dataclass(frozen=True)
class Running:
    """A loaded model and how to ask it."""

    model: LocalModel
    client: httpx.Client

    def answer(
        self,
        messages: list[dict[str, Any]],
        max_tokens: int,
        leave: Callable[[str], bool] = lambda text: False,
    ) -> Reply:
        """A greedy answer through the chat interface, left where `leave` says so of its text."""
        body = {
            "model": self.model.options["name"], "messages": messages, "max_tokens": max_tokens, "temperature": 0,
            "cache_prompt": False,
        }  # fmt: skip
        return chat(self.client, self.model.url, body, self.model.key, leave)

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """One of llama.cpp's own paths; None where the engine does not have it, or refuses what it was given."""
        head = {"Authorization": f"Bearer {self.model.key}"}
        reply = self.client.post(f"{self.model.url}{path}", json=body, headers=head, timeout=60)
        value = reply.json() if reply.status_code == 200 else None
        return value if isinstance(value, dict) else None


def check(running: Running, reading: dict[str, Any] | None) -> list[Line]:
    """The lines `tokens`, `template` and `smoke`; `reading` is what `gate_reference.reading` says of the source."""
    why = unusable(reading)
    # Shapes that the source's template takes; where nothing is known of it the plainest alone.
    shapes = [n for n, shape in reading["chats"].items() if shape] if reading and not why else [PLAIN]
    replies: dict[str, Reply | str] = {}
    for name in shapes:
        try:
            replies[name] = running.answer(CHATS[name], SMOKE_TOKENS)
        except EnvironmentFault as error:
            replies[name] = error.message
    if reading is None or why:
        lines = [_not_run("tokens", why), _not_run("template", why)]
    else:
        lines = [tokens(running, reading), template(running, reading, replies)]
    return [*lines, smoke(replies)]


def unusable(reading: dict[str, Any] | None) -> str:
    """Why a stored reading can't be compared with, or nothing."""
    if reading is None:
        return "nothing says how the source reads: the merged model is not beside, and artifact.json keeps no reading"
    if reading["corpus_sha256"] != CORPUS_SHA256:
        return "the reading in artifact.json is of another edgeft's texts"
    return ""


def _not_run(check: str, why: str) -> Line:
    return {"check": check, "verdict": NOT_RUN, "why": why}


def tokens(running: Running, reading: dict[str, Any]) -> Line:
    """The same ids as the source on every text. Texts that the source normalizes first are only noted: llama.cpp does not."""
    line: Line = {
        "check": "tokens",
        "what": "texts whose token ids are not the source's",
        "limit": 0,
        "rule": "at most",
    }
    differ: list[str] = []
    noted: list[str] = []
    for index, (text, wanted) in enumerate(zip(TOKEN_TEXTS, reading["texts"], strict=True)):
        body = {"content": text, "add_special": False, "parse_special": True}
        found = running.ask("/tokenize", body)
        if found is None and running.ask("/tokenize", {"content": "a"}) is None:
            return _not_run("tokens", "the engine does not say how it splits text (/tokenize)")
        if found is None or ids_hash(found["tokens"]) != wanted:
            (noted if index in reading["normalized"] else differ).append(text)
    line |= {"seen": len(differ), "n": len(TOKEN_TEXTS), "verdict": FAIL if differ else PASS}
    if differ:
        line["first"] = differ[0]
    if noted:
        line["noted"] = noted
    return line


def template(running: Running, reading: dict[str, Any], replies: dict[str, Reply | str]) -> Line:
    """The rendered chat byte for byte, and as many tokens in front of the model.

    A beginning-of-text that the engine's tokenizer adds by itself may be missing in the text; the count then shows it.
    """
    line: Line = {
        "check": "template",
        "what": "chats that are not rendered as the source does",
        "limit": 0,
        "rule": "at most",
    }
    wanted = {name: shape for name, shape in reading["chats"].items() if shape}
    if not wanted:
        return _not_run("template", "the source has no chat template")
    if reading["today"] not in (None, today()):
        return _not_run(
            "template", f"the template writes the date, and what is known of it is of {reading['today']}"
        )
    wrong: list[tuple[str, str]] = []
    for name, shape in wanted.items():
        found = running.ask("/apply-template", {"messages": CHATS[name]})
        if (
            found is None
            and len(wrong) == 0
            and running.ask("/apply-template", {"messages": [{"role": "user", "content": "a"}]}) is None
        ):
            return _not_run("template", "the engine does not say how it renders a chat (/apply-template)")
        text, reply = found["prompt"] if found else "", replies[name]
        count = reply.prompt_tokens if isinstance(reply, Reply) else None
        same = text == shape["prompt"] or reading["bos"] + text == shape["prompt"]
        if not same or (count is not None and count != shape["tokens"]):
            wrong.append(
                (
                    name,
                    _difference(shape["prompt"], text)
                    if not same
                    else f"{count} tokens, not {shape['tokens']}",
                )
            )
    line |= {"seen": len(wrong), "n": len(wanted), "verdict": FAIL if wrong else PASS}
    if wrong:
        line["first"] = f"{wrong[0][0]}: {wrong[0][1]}"
    return line


def _difference(wanted: str, found: str) -> str:
    """Where two texts part."""
    at = next(
        (i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b),
        min(len(wanted), len(found)),
    )
    part = slice(max(0, at - 16), at + 16)
    return f"at character {at} {found[part]!r} and not {wanted[part]!r}"


def smoke(replies: dict[str, Reply | str]) -> Line:
    """It answers: no error, an end or a full answer, and not always nothing."""
    errors = [reply for reply in replies.values() if isinstance(reply, str)]
    good = [reply for reply in replies.values() if isinstance(reply, Reply)]
    line: Line = {
        "check": "smoke",
        "what": "chats without an answer",
        "limit": 0,
        "rule": "at most",
        "n": len(replies),
    }
    unfinished = [r for r in good if r.finish_reason not in ("stop", "length")]
    silent = good and not any(reply.text.strip() for reply in good)
    line["seen"] = len(errors) + len(unfinished) + (len(good) if silent else 0)
    line["verdict"] = FAIL if line["seen"] else PASS
    if line["seen"]:
        line["first"] = (
            errors[0]
            if errors
            else "every answer is empty"
            if silent
            else f"ended by {unfinished[0].finish_reason}"
        )
    elif good:
        line["example"] = good[0].text[:120]
    return line
