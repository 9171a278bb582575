"""What the router reads of a report: the candidates and the items that both answered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.errors import UsageError, unknown
from edgeft.router.features import content_text
from edgeft.types import BenchReport

MIN_ITEMS = 20
USED_BEFORE = ("train", "calibrate")  # steps whose rows say nothing about unseen requests


@dataclass(frozen=True)
class Pair:
    """One item that both candidates answered. Scores are in 0..1."""

    item_id: str
    hashes: tuple[str, ...]  # of the prompt, and of the row where the report has it
    request: str  # the text of the last user message
    weak: float
    strong: float


@dataclass(frozen=True)
class Joined:
    """The items of both candidates, and who these are."""

    weak: dict[str, Any]
    strong: dict[str, Any]
    pairs: list[Pair]
    unscored: int  # joined items left out because one of the two has no score


def join(folders: Sequence[Path], weak_id: str, strong_id: str) -> Joined:
    """Read reports and join the two candidates on item_id.

    Raises UsageError for an unknown id, an item measured twice, an artefact that differs between
    reports, items without scores, and fewer than MIN_ITEMS joined items.
    """
    if weak_id == strong_id:
        raise UsageError(f"weak and strong are both '{weak_id}'.", "name two models of the report")
    results = [(folder, result) for folder in folders for result in _report(folder).results]
    items = [item for folder in folders for item in _items(folder)]
    weak, strong = (_candidate(name, results, items) for name in (weak_id, strong_id))
    weak_items, strong_items = (_by_item(name, items) for name in (weak_id, strong_id))
    both = [item_id for item_id in weak_items if item_id in strong_items]
    scored = [
        i for i in both if weak_items[i].get("score") is not None and strong_items[i].get("score") is not None
    ]
    where = ", ".join(str(folder) for folder in folders)
    if both and not scored:
        raise UsageError(
            f"none of the {len(both)} items in {where} has a score.",
            "edgeft bench … --tasks rows.jsonl, with rows whose task can be graded",
        )
    if len(scored) < MIN_ITEMS:
        left_out = f", {len(both) - len(scored)} left out without a score" if len(both) > len(scored) else ""
        raise UsageError(
            f"{where}: {len(scored)} items were answered by both '{weak_id}' and '{strong_id}'{left_out}; "
            f"{MIN_ITEMS} are needed.",
            "edgeft bench … --tasks rows.jsonl, with more rows",
        )
    pairs = [_pair(weak_items[item_id], strong_items[item_id]) for item_id in scored]
    return Joined(weak, strong, pairs, len(both) - len(scored))


def refuse_used(pairs: Sequence[Pair], seen: dict[str, list[str]], doing: str) -> None:
    """Refuse items that an earlier step has seen. `seen` maps a kind of step to hashes."""
    where = {digest: kind for kind, digests in seen.items() for digest in digests}
    clashes = [(pair, where[h]) for pair in pairs for h in pair.hashes if h in where]
    if clashes:
        pair, kind = clashes[0]
        count = len({pair.item_id for pair, _ in clashes})
        raise UsageError(
            f"{count} item(s) were used to {kind} already (first: '{pair.item_id}') "
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


def _report(folder: Path) -> BenchReport:
    if not (folder / "report.json").is_file():
        raise UsageError(
            f"{folder} holds no report.json.", "edgeft bench dist/ --tasks rows.jsonl --out report/"
        )
    return BenchReport.load(folder / "report.json")


def _items(folder: Path) -> list[dict[str, Any]]:
    path = folder / "items.jsonl"
    if not path.is_file():
        raise UsageError(
            f"{folder} holds no items.jsonl.", "edgeft bench dist/ --tasks rows.jsonl --out report/"
        )
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            item["item_id"], item["model_id"], item["prompt_hash"], item["request"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path} line {number} is not an item of a report: {type(error).__name__} {error}.",
                f"sed -n {number}p {path}",
            ) from None
        items.append(item)
    return items


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
        "engine": result.get("engine"),
        "path": _path(folder, result.get("path")),
        "artifact_sha256": result.get("artifact_sha256"),
        "price": result.get("price"),
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


def _pair(weak: dict[str, Any], strong: dict[str, Any]) -> Pair:
    hashes = tuple(h for h in (weak["prompt_hash"], weak.get("row_hash")) if h)
    return Pair(
        weak["item_id"], hashes, content_text(weak["request"]), float(weak["score"]), float(strong["score"])
    )
