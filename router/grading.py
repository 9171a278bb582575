"""Grades of a recertification's answers, by a person or a judge model, and the certificate that they carry.

The lines stand in the random order of the sample, so the first k of them are a random sample of it. A line that was passed over before the
last graded one counts as lost whatever was answered: leaving out what is hard to grade would flatter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeft.errors import UsageError, unknown
from edgeft.files import read_json, write_jsonl
from edgeft.router.calibrate import LEAST_GRADES, certify_items, miss_bound
from edgeft.router.policy import load_policy
from edgeft.router.recertify import ANSWERS, KEEP_EVERY, SAMPLE, TO_GRADE, lettered, read_lines
from edgeft.router.reports import Item, Joined, is_remote, used_before

JUDGED = "judge.jsonl"
MARK = re.compile(r"\b([a-z])\s*[=:]\s*(10|\d)(?:\.(\d+))?\b", re.IGNORECASE)
ASKED = (
    "You grade answers to a request. Judge each answer by itself: is it right and does it do what was asked? Give every answer a whole "
    "number from 0 (useless or wrong) to 10 (right and complete). Reply with one line and nothing else, such as: a=7 b=10"
)
SHOWN_CHARACTERS = 8000  # of the request and of each answer


def judge(
    folder: Path,
    address: tuple[str, str],
    name: str,
    told: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Have a model grade every line of `folder` that it has not graded yet, into JUDGED. `name` (openai:URL#NAME) says whether it is
    remote: a remote judge never sees a private request. Returns counts."""
    rows = read_lines(folder / TO_GRADE)
    private = {line["id"]: line["private"] for line in read_lines(folder / ANSWERS)}
    known = {line["id"]: line for line in read_lines(folder / JUDGED)} if (folder / JUDGED).is_file() else {}
    remote, found, kept_back, unreadable = is_remote(name, "api"), [], 0, 0
    for place, row in enumerate(rows):
        old = known.get(row["id"])
        if (
            old is not None
            and old.get("judge") == name
            and all(v is not None for v in old["scores"].values())
        ):
            found.append(old)
            continue
        scores: dict[str, float | None] = dict.fromkeys(row["answers"])
        if private.get(row["id"], True) and remote:
            kept_back += 1
        else:
            scores = marks(_reply(address, row), list(row["answers"]))
            unreadable += None in scores.values()
        found.append({"id": row["id"], "scores": scores, "judge": name})
        if place % KEEP_EVERY == 0:
            write_jsonl(folder / JUDGED, found)
        told(place + 1, len(rows))
    write_jsonl(folder / JUDGED, found)
    return {"n": len(found), "private_kept_back": kept_back, "unreadable": unreadable, "judge": name}


def _reply(address: tuple[str, str], row: Mapping[str, Any]) -> str:
    import httpx

    from edgeft.engines.client import chat

    shown = [f"Request:\n{row['request'][:SHOWN_CHARACTERS]}"]
    shown += [f"Answer {letter}:\n{text[:SHOWN_CHARACTERS]}" for letter, text in row["answers"].items()]
    body = {
        "model": address[1], "temperature": 0, "max_tokens": 200,
        "messages": [{"role": "system", "content": ASKED}, {"role": "user", "content": "\n\n".join(shown)}],
    }  # fmt: skip
    with httpx.Client() as client:
        return chat(client, address[0], body, os.environ.get("OPENAI_API_KEY")).text


def marks(reply: str, letters: Sequence[str]) -> dict[str, float | None]:
    """Letter -> score in 0..1 out of "a=7 b=10"; all None where the reply does not name each letter once."""
    found: dict[str, float] = {}
    for letter, whole, part in MARK.findall(reply):
        if letter.lower() in found:
            return dict.fromkeys(letters)
        found[letter.lower()] = min(1.0, float(f"{whole}.{part or 0}") / 10)
    return (
        {letter: found[letter] for letter in letters}
        if set(found) == set(letters)
        else dict.fromkeys(letters)
    )


def issue(
    policy_folder: Path,
    folder: Path,
    alpha: float = 0.05,
    delta: float = 0.1,
    artifacts: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """Certify the policy in `policy_folder` on the graded answers in `folder` and return the certificate.

    Where a judge model graded (JUDGED), its scores count, and the losses that it misses are bounded on the lines that a person graded
    as well, at least LEAST_GRADES of them (calibrate.miss_bound). Else the person's scores count. `artifacts` maps a candidate to the
    folder of the artefact that answered, where it is another than the policy names. Raises UsageError for missing or strange grades,
    Inconclusive where they do not carry a certificate.
    """
    policy = load_policy(policy_folder)
    names = list(policy.candidates)
    rows = read_lines(folder / ANSWERS)
    for row in rows:
        if set(row["answers"]) != set(names):
            raise UsageError(
                f"{folder / ANSWERS} holds answers of {', '.join(row['answers'])}.",
                f"of {', '.join(names)}: sample again",
            )
    human = scores_of(folder / TO_GRADE, rows, names)
    graded = [i for i, row in enumerate(rows) if row["id"] in human]
    first = graded[-1] + 1 if graded else 0
    missed, counted = None, rows[:first]
    by_row = human
    if (folder / JUDGED).is_file():
        by_row = scores_of(folder / JUDGED, rows, names)
        counted = rows
        if first < LEAST_GRADES:
            raise UsageError(
                f"a person graded the first {first} lines; a judge's error is measured on {LEAST_GRADES} at least.",
                f"fill in scores (0 to 1) in {folder / TO_GRADE}, from the top",
            )
        missed = miss_bound([_missed(row["id"], by_row, human) for row in rows[:first]], delta / 2)
    if not counted:
        raise UsageError(
            f"nothing in {folder} is graded.",
            f"fill in scores (0 to 1) in {folder / TO_GRADE}, or edgeft route recertify judge",
        )
    lost = (*[0.0] * (len(names) - 1), 1.0)
    items = [_item(row, names, by_row.get(row["id"], lost)) for row in counted]
    rebound = _with_artifacts(policy.policy.candidates, artifacts or {})
    before = {k: sorted({*policy.policy.seen_rows.get(k, []), *v}) for k, v in used_before(rebound).items()}
    policy = replace(
        policy,
        policy=replace(policy.policy, candidates=rebound, seen_rows={**policy.policy.seen_rows, **before}),
    )
    asked = read_json(folder / SAMPLE)
    more = {
        "recertified": {
            "drawn": len(rows), "counted": len(items), "passed_over_counted_as_lost": sum(row["id"] not in by_row for row in counted),
            "graded_by_a_person": len(human), "sample": asked,
        }
    }  # fmt: skip
    return certify_items(
        policy_folder, policy, Joined(rebound, items, 0), alpha, delta, asked["temperature"], missed, more
    )


def scores_of(
    path: Path, rows: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> dict[str, tuple[float, ...]]:
    """Row id -> scores in the order of the candidates, of the lines that are graded whole. Raises UsageError for a line that is not of the
    sample or a score that is not in 0..1."""
    known = {row["id"]: row for row in rows}
    found = {}
    for number, line in enumerate(read_lines(path), 1):
        row, given = known.get(str(line.get("id"))), line.get("scores")
        if row is None or not isinstance(given, dict):
            raise UsageError(f"{path} line {number} is no line of this sample.", f"sed -n {number}p {path}")
        letters = lettered(row["id"], row["answers"])
        by_name = {letters[k]: v for k, v in given.items() if k in letters}
        if any(v is None for v in by_name.values()) or len(by_name) < len(names):
            continue
        if any(isinstance(v, str) or not 0 <= v <= 1 for v in by_name.values()):
            raise UsageError(
                f"{path} line {number}: scores are numbers from 0 to 1.", f"sed -n {number}p {path}"
            )
        found[row["id"]] = tuple(float(by_name[name]) for name in names)
    return found


def _missed(
    row_id: str, judged: Mapping[str, tuple[float, ...]], human: Mapping[str, tuple[float, ...]]
) -> bool:
    """Whether a person sees a loss of some candidate that the judge does not: it bounds what any choice loses unseen. A line that the judge
    left counts as lost, so nothing is missed on it; one that the person left counts as a loss of all."""
    if row_id not in judged:
        return False
    seen = [score < judged[row_id][-1] for score in judged[row_id][:-1]]
    real = [True] * len(seen) if row_id not in human else [s < human[row_id][-1] for s in human[row_id][:-1]]
    return any(r and not s for r, s in zip(real, seen, strict=True))


def _item(row: Mapping[str, Any], names: Sequence[str], scores: tuple[float, ...]) -> Item:
    answers = [row["answers"][name] for name in names]
    return Item(
        row["id"], tuple(row["hashes"]), row["request"], scores, tuple(a["output_tokens"] for a in answers),
        outputs=tuple(a["text"] for a in answers), logprobs=tuple(a["mean_logprob"] for a in answers),
    )  # fmt: skip


def _with_artifacts(candidates: list[dict[str, Any]], artifacts: Mapping[str, Path]) -> list[dict[str, Any]]:
    from edgeft.types import Artifact

    names = [c["id"] for c in candidates]
    for name in artifacts:
        if name not in names:
            raise unknown("the candidate", name, names, f"of: {', '.join(names)}")
    found = []
    for candidate in candidates:
        place = artifacts.get(candidate["id"])
        if place is not None:
            made = Artifact.load(place / "artifact.json")
            candidate = {
                **candidate,
                "path": str(place.resolve()),
                "artifact_sha256": made.sha256,
                "engine": made.engine,
            }
        found.append(candidate)
    return found
