"""Measure a set of models on this box and write the report."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgeft import child, console
from edgeft.bench import fidelity, measure
from edgeft.bench.callers import caller
from edgeft.bench.environment import environment
from edgeft.bench.report import write_report
from edgeft.bench.stats import mcnemar
from edgeft.bench.targets import Target, find
from edgeft.engines.local import default_threads
from edgeft.files import read_json, sha256_file, sha256_json, write_json
from edgeft.rows import Row, answer_of, load_rows, refuse_seen, row_hash, spread
from edgeft.types import BenchReport

REFERENCE = "merged"


@dataclass(frozen=True)
class Workload:
    """What is asked of every model."""

    tasks: Path  # rows
    limit: int | None = None  # rows to answer, spread over the file
    repetitions: int = 5  # timed runs of the speed workload
    output_tokens: int = 64  # forced in each
    prompt_chars: int = 600  # about 130 tokens of English
    max_tokens: int | None = None  # of an answer; from the longest expected answer if None
    fidelity_rows: int = 48
    context: int = 2048
    threads: int | None = None
    speed: bool = True
    fidelity: bool = True
    allow_seen_rows: bool = False


def bench(places: list[Path], models: list[str], workload: Workload, profile: str, out: Path) -> BenchReport:
    """Measure every target and write `report.json`, `items.jsonl`, `report.md` and `report.html` into `out`.

    An interrupted run goes on from the last model that was finished. Raises UsageError for wrong
    inputs before anything is started.
    """
    rows = spread(load_rows(workload.tasks), workload.limit)
    targets = find(places, models)
    if not workload.allow_seen_rows:
        for target in targets:
            refuse_seen(rows, target.seen_rows, f"measure {target.id}", workload.tasks)
    box = profile_of(profile)
    state = out / ".work"
    state.mkdir(parents=True, exist_ok=True)
    threads = workload.threads or default_threads()
    max_tokens = workload.max_tokens or max(16, max(len(answer_of(row)) for row in rows) // 2)
    reference = reference_of(targets)

    results: list[dict[str, Any]] = []
    items: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="edgeft-") as scratch:
        yardstick = Yardstick(reference, workload, threads, Path(scratch), state / "reference.log")
        for target in targets:
            key = sha256_json(
                [
                    target.id,
                    target.sha256,
                    {**asdict(workload), "tasks": sha256_file(workload.tasks)},
                    threads,
                ]
            )
            kept = state / f"{target.id.replace('/', '+')}.json"
            if kept.is_file() and (done := read_json(kept))["key"] == key:
                console.note(f"  {target.id}: kept from the interrupted run")
            else:
                result, answers = one(target, rows, workload, threads, max_tokens, yardstick, state)
                done = {"key": key, "result": result, "items": answers}
                write_json(kept, done)
            results.append(done["result"])
            items += done["items"]
    compare_with_reference(results, items, REFERENCE)
    report = BenchReport(
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=environment(),
        profile=box,
        workload={
            **asdict(workload), "tasks": workload.tasks.name, "tasks_sha256": sha256_file(workload.tasks), "rows": len(rows),
            "max_tokens": max_tokens, "threads": threads,
        },
        results=results,
        reference=REFERENCE if reference else None,
        seen_rows={"bench": [row_hash(row) for row in rows]},
    )  # fmt: skip
    write_report(report, items, out)
    for file in state.glob("*.json"):
        file.unlink()
    return report


def one(
    target: Target,
    rows: list[Row],
    workload: Workload,
    threads: int,
    max_tokens: int,
    yardstick: Yardstick,
    state: Path,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All measurements of one target: (its entry in the report, its lines of items.jsonl)."""
    log = state / f"{target.id.replace('/', '+').replace(':', '_')}.log"
    log.unlink(missing_ok=True)
    result: dict[str, Any] = {
        "id": target.id, "kind": target.kind, "engine": target.engine, "path": str(target.path) if target.path else None,
        "artifact_sha256": target.sha256, "size_bytes": target.size_bytes, **target.facts,
        "load": None, "speed": None, "memory": None, "fidelity": None, "price": None,
    }  # fmt: skip
    with console.step(f"measuring {target.id}") as say:
        with caller(target, log, threads, workload.context) as (ask, local):
            if local:
                result["engine_build"] = local.build
                result["load"] = {
                    "cold_start_s": local.cold_start_s,
                    "load_s": local.load_s,
                    "load_mode": local.load_mode,
                }
                if workload.speed:
                    say("speed")
                    result["speed"] = measure.speed(
                        ask, rows, workload.repetitions, workload.output_tokens, workload.prompt_chars
                    )
            result["accuracy"], answers = measure.accuracy(target, ask, rows, max_tokens, say)
        if local and local.memory:
            result["memory"] = {f"peak_{k}": v for k, v in local.memory.peak.items()}
            result["memory"]["over"] = "process tree, sampled every 50 ms; load, speed and accuracy runs"
        if target.kind == "api":
            result |= price_of(target, result["accuracy"])
        if workload.fidelity and local:
            say("KLD")
            result["fidelity"] = yardstick.compare(target, log)
    return result, answers


class Yardstick:
    """The reference's log-probabilities, computed when the first artefact asks for them."""

    def __init__(
        self, reference: Target | None, workload: Workload, threads: int, scratch: Path, log: Path
    ) -> None:
        self.reference, self.workload, self.threads, self.scratch, self.log = (
            reference,
            workload,
            threads,
            scratch,
            log,
        )
        self.plan: dict[str, Any] | None = None

    def compare(self, target: Target, log: Path) -> dict[str, Any] | None:
        """The target's fidelity figures, or None where there is no reference or the target is it."""
        if self.reference is None or target is self.reference:
            return None
        if self.plan is None:
            self.plan = child.call(
                "edgeft.bench.fidelity:prepare",
                log=self.log,
                title="the reference's logits",
                reference=str(self.reference.path),
                rows_file=str(self.workload.tasks),
                limits=[self.workload.limit, self.workload.fidelity_rows],
                out=str(self.scratch),
                threads=self.threads,
            )
        found = child.call(
            "edgeft.bench.fidelity:compare",
            log=log,
            title=f"the logits of {target.id}",
            engine=target.engine,
            folder=str(target.path),
            plan={k: self.plan[k] for k in ("rows", "vocabulary")},
            reference=str(self.scratch / "reference.npy"),
            threads=self.threads,
        )
        figures = fidelity.summarize({k: v for k, v in found.items() if k not in child.COST})
        return {**figures, "of_another_model": of_another_model(target, self.reference)}


def of_another_model(target: Target, reference: Target) -> bool:
    """Was the artefact made of another merged model (another adapter, or none)? Its KLD is not of quantizing alone."""
    return target.facts.get("merged_sha256") not in (None, reference.sha256)


def reference_of(targets: list[Target]) -> Target | None:
    """The merged model: among the targets, or beside the first artefact."""
    for target in targets:
        if target.id == REFERENCE:
            return target
    for target in targets:
        if (
            target.kind == "artifact"
            and target.path
            and (target.path.parent / REFERENCE / "artifact.json").is_file()
        ):
            return find([target.path.parent / REFERENCE], [])[0]
    return None


def compare_with_reference(
    results: list[dict[str, Any]], items: list[dict[str, Any]], reference: str
) -> None:
    """Add to each result the paired comparison of its right answers with the reference's (exact McNemar)."""
    right = {(i["model_id"], i["item_id"]): i["correct"] for i in items}
    base = {item: value for (model, item), value in right.items() if model == reference}
    for result in results:
        pairs = [
            (base[i], v)
            for (m, i), v in right.items()
            if m == result["id"] and i in base and None not in (base[i], v)
        ]
        if result["id"] == reference or not pairs:
            result["against_reference"] = None
            continue
        lost, gained = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
        result["against_reference"] = {
            "lost": lost,
            "gained": gained,
            "n": len(pairs),
            "mcnemar_p": mcnemar(lost, gained),
        }


def price_of(target: Target, accuracy: dict[str, Any]) -> dict[str, Any]:
    """An API model's list price and what this run's tokens cost at it."""
    if target.engine != "litellm":
        return {"price": None, "run_cost_usd": None}
    from edgeft.bench.prices import list_price

    price = list_price(target.facts["model"])
    if price is None:
        return {"price": None, "run_cost_usd": None}
    cost = (
        accuracy["prompt_tokens"] * price["usd_per_mtok_in"]
        + accuracy["output_tokens"] * price["usd_per_mtok_out"]
    )
    return {"price": price, "run_cost_usd": cost / 1e6}


def profile_of(name: str) -> dict[str, Any]:
    """The box: `auto` looks at this one and measures its bandwidth; else a profile by its id, this box's facts beside it."""
    from edgeft import profiles

    if name == "auto":
        return {"id": "this-box", **profiles.detect(measure=True)}
    return {**asdict(profiles.get_profile(name)), "measured_on": profiles.detect(measure=False)}
