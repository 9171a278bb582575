"""What the router reads: reports of `edgeft bench`, or a table of one's own, as candidates and the items that all answered."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from edgeft.engines import GGUF
from edgeft.errors import UsageError, unknown
from edgeft.router.features import content_text
from edgeft.router.reading import items_of, results_of

MIN_ITEMS = 20
USED_BEFORE = ("train", "calibrate")  # steps whose rows say nothing about unseen requests


@dataclass(frozen=True)
class Item:
    """One request that every candidate answered. Tuples are in the order of the candidates."""

    item_id: str
    hashes: tuple[str, ...]  # of the prompt, and of the row where the report has it
    request: str  # the text of the last user message
    scores: tuple[float, ...]  # 0..1
    output_tokens: tuple[float | None, ...]
    prompt_tokens: float | None = None
    group: str | None = None  # a domain, to report by; never a feature
    outputs: tuple[str | None, ...] = ()  # what each answered
    logprobs: tuple[float | None, ...] = ()  # mean log-probability of each answer's tokens


@dataclass(frozen=True)
class Joined:
    """The items of all candidates, and who these are."""

    candidates: list[dict[str, Any]]
    items: list[Item]
    unscored: int  # joined items left out because a candidate has no score

    @property
    def quality(self) -> np.ndarray:
        """Scores, float64 [items, candidates]."""
        return np.array([item.scores for item in self.items])


def join(places: Sequence[Path], ids: Sequence[str]) -> Joined:
    """Read reports (folders) or tables (CSV, JSONL) and join the candidates on item_id.

    Raises UsageError for an unknown id, an item measured twice, an artefact that differs between reports, items without
    scores, and fewer than MIN_ITEMS joined items.
    """
    if len(set(ids)) < max(2, len(ids)):
        raise UsageError(f"{' and '.join(f'{name!r}' for name in ids)}: two or more different candidates are needed.",
                         "name two models of the report")  # fmt: skip
    results = [(place, result) for place in places for result in results_of(place)]
    items = [item for place in places for item in items_of(place)]
    candidates = [_candidate(name, results, items) for name in ids]
    by_item = [_by_item(name, items) for name in ids]
    shared = [item_id for item_id in by_item[0] if all(item_id in other for other in by_item[1:])]
    scored = [i for i in shared if all(other[i].get("score") is not None for other in by_item)]
    where = ", ".join(str(place) for place in places)
    if shared and not scored:
        raise UsageError(
            f"none of the {len(shared)} items in {where} has a score.",
            "edgeft bench … --tasks rows.jsonl, with rows whose task can be graded",
        )
    if len(scored) < MIN_ITEMS:
        left_out = (
            f", {len(shared) - len(scored)} left out without a score" if len(shared) > len(scored) else ""
        )
        names = f"both '{ids[0]}' and '{ids[1]}'" if len(ids) == 2 else f"all of {', '.join(ids)}"
        raise UsageError(
            f"{where}: {len(scored)} items were answered by {names}{left_out}; {MIN_ITEMS} are needed.",
            "edgeft bench … --tasks rows.jsonl, with more rows",
        )
    return Joined(
        candidates, [_item([other[i] for other in by_item]) for i in scored], len(shared) - len(scored)
    )


def names_in(places: Sequence[Path]) -> list[str]:
    """The models that the reports or tables know, in their order."""
    return list(dict.fromkeys(result["id"] for place in places for result in results_of(place)))


def refuse_used(items: Sequence[Item], seen: Mapping[str, Sequence[str]], doing: str) -> None:
    """Refuse items that an earlier step has seen. `seen` maps a kind of step to hashes."""
    where = {digest: kind for kind, digests in seen.items() for digest in digests}
    clashes = [(item, where[h]) for item in items for h in item.hashes if h in where]
    if clashes:
        item, kind = clashes[0]
        count = len({item.item_id for item, _ in clashes})
        raise UsageError(
            f"{count} item(s) were used to {kind} already (first: '{item.item_id}') "
            f"and cannot be used to {doing}.",
            "edgeft bench … --tasks OTHER.jsonl, and the report of that",
        )


def used_before(candidates: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Hashes of the rows that training and calibration of the artefacts saw, by kind of step."""
    seen: dict[str, list[str]] = {}
    for candidate in candidates:
        manifest = Path(candidate["path"] or "") / "artifact.json"
        if candidate["kind"] == "artifact" and manifest.is_file():
            from edgeft.types import Artifact

            for kind, digests in Artifact.load(manifest).seen_rows.items():
                if kind in USED_BEFORE:
                    seen.setdefault(kind, []).extend(digests)
    return seen


def is_remote(candidate_id: str, kind: str) -> bool:
    """True unless a candidate is known to run on this box: API models, and servers at any address but loopback."""
    if kind in ("artifact", "folder"):
        return False
    name, _, rest = candidate_id.partition(":")
    if name == "openai" and "#" in rest:
        host = urlsplit(rest.partition("#")[0]).hostname or ""
        try:
            return not (host == "localhost" or ipaddress.ip_address(host).is_loopback)
        except ValueError:
            return True
    return True


def _candidate(
    name: str, results: list[tuple[Path, dict[str, Any]]], items: list[dict[str, Any]]
) -> dict[str, Any]:
    """What the policy records of a candidate."""
    found = [(folder, result) for folder, result in results if result["id"] == name]
    if not found:
        known = {result["id"] for _, result in results}
        raise unknown("the model", name, known, f"--weak ID --strong ID, of: {', '.join(sorted(known))}")
    folder, result = found[0]
    hashes = {other.get("artifact_sha256") for _, other in found}
    hashes |= {item.get("artifact_sha256") for item in items if item["model_id"] == name}
    if len(hashes) > 1:
        raise UsageError(
            f"'{name}' is not the same artefact in all reports.", "bench the artefact that will serve, once"
        )
    own = [item for item in items if item["model_id"] == name]
    return {
        "id": name,
        "kind": result["kind"],
        "remote": is_remote(name, result["kind"]),
        # What it was measured with may be another build: what serves GGUF files is for edgeft.yaml to say.
        "engine": "gguf" if result.get("engine") in GGUF else result.get("engine"),
        "path": _path(folder, result.get("path")),
        "artifact_sha256": result.get("artifact_sha256"),
        "price": result.get("price"),
        "tools": None,  # not known: asked all the same
        "context_tokens": None,
        "mean_score": _mean([item.get("score") for item in own]),
        "mean_prompt_tokens": _mean([item.get("prompt_tokens") for item in own]),
        "mean_output_tokens": _mean([item.get("output_tokens") for item in own]),
        "mean_e2e_s": _mean([item.get("e2e_s") for item in own]),
    }


def _path(folder: Path, written: str | None) -> str | None:
    """The artefact's folder as an absolute path: as the report has it, or seen from the report."""
    if written is None:
        return None
    places = [Path(written), folder / written, folder.parent / written]
    return str(next((p for p in places if p.exists()), places[0]).resolve())


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _by_item(name: str, items: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for item in items:
        if item["model_id"] != name:
            continue
        if item["item_id"] in found:
            raise UsageError(
                f"the item '{item['item_id']}' of '{name}' stands in the reports twice.",
                "name each report once",
            )
        found[item["item_id"]] = item
    return found


def _item(lines: Sequence[dict[str, Any]]) -> Item:
    first = lines[0]
    return Item(
        first["item_id"],
        tuple(h for h in (first["prompt_hash"], first.get("row_hash")) if h),
        content_text(first["request"]),
        tuple(float(line["score"]) for line in lines),
        tuple(line.get("output_tokens") for line in lines),
        first.get("prompt_tokens"),
        first.get("group"),
        tuple(line.get("output") for line in lines),
        tuple(line.get("mean_logprob") for line in lines),
    )
