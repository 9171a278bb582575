"""Measure a set of models on this box and write the report."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgeft import child, console
from edgeft.bench import autotune, choices, context, fidelity, load, memory, pack, roofline, speed, sustained
from edgeft.bench.answers import ask_all, figures
from edgeft.bench.callers import caller
from edgeft.bench.energy import Meter
from edgeft.bench.energy import result as energy_of
from edgeft.bench.environment import environment
from edgeft.bench.index import after_run
from edgeft.bench.journal import Journal
from edgeft.bench.pack_compare import PackYardstick
from edgeft.bench.paired import pairs
from edgeft.bench.pool import Pool, drop_from_cache
from edgeft.bench.report import write_report
from edgeft.bench.score import check
from edgeft.bench.speed import Point
from edgeft.bench.stats import mcnemar, retention
from edgeft.bench.targets import Target, find
from edgeft.bench.verdict import verdicts
from edgeft.engines import run_profile
from edgeft.engines.local import default_threads
from edgeft.errors import EnvironmentFault
from edgeft.files import sha256_file, sha256_json
from edgeft.profiles import detect, get_profile
from edgeft.rows import Row, answer_of, load_rows, refuse_seen, row_hash, spread
from edgeft.types import BenchReport

REFERENCE, BASE = "merged", "(base)"
ERRORS = ("error", "load-error", "fidelity-error", "choices-error", "context-error")  # kinds of fact


@dataclass(frozen=True)
class Workload:
    """What is asked of every model."""

    tasks: Path  # rows
    limit: int | None = None  # rows to answer, spread over the file
    points: tuple[Point, ...] = (Point(128, 64), Point(512, 16))  # shapes of request that are timed
    repetitions: int = 5  # timed rounds at least
    speed_seconds: float = 10.0  # of each model's rounds at most
    max_tokens: int | None = None  # of an answer; from the longest expected answer if None
    fidelity_rows: int = 48
    context: int = 2048
    threads: int | None = None
    speed: bool = True
    fidelity: bool = True
    allow_seen_rows: bool = False
    base: Path | None = None  # the model before tuning, for retention
    load_levels: tuple[int, ...] = ()  # clients at once; none: the load test is left out
    load_seconds: float = 10.0  # of each level
    power_csv: Path | None = None  # of a wall meter
    autotune_seconds: float = 0.0  # of each artefact's search; 0: none
    speculate: bool = False  # let the search try drafts
    memory_limit: bool = False  # find the smallest limit that keeps the speed
    sustained_seconds: float = 0.0  # of one stream without a pause; 0: none
    pack: Path | None = None  # a reference pack, which KLD is taken against instead of the merged model
    context_lengths: tuple[int, ...] = ()  # prompts of the synthetic task, in tokens; none: it is left out
    context_repetitions: int = 4  # of each length and depth

    def key(self) -> dict[str, Any]:
        """What the facts of a run depend on, as JSON."""
        found = {**asdict(self), "tasks": sha256_file(self.tasks), "points": [str(p) for p in self.points]}
        found["pack"] = sha256_file(self.pack / pack.FACTS) if self.pack else None
        # The meter is read when the report is written; the base is a target, known by its hash.
        return found | {"power_csv": None, "base": None}


def bench(
    places: list[Path],
    models: list[str],
    workload: Workload,
    profile: str,
    out: Path,
    predict: tuple[str, ...] = (),
) -> BenchReport:
    """Measure every target and write `report.json`, `items.jsonl`, `report.md`, `report.csv` and `report.html` into `out`.

    An interrupted run goes on from the last round or answer. What breaks is told on its row and the others go on. Raises
    UsageError for wrong inputs before anything is started.
    """
    rows = spread(load_rows(workload.tasks), workload.limit)
    check(rows, workload.tasks)
    choices.check(rows, workload.tasks)
    targets = find(places, models) + ([base_of(workload.base)] if workload.base else [])
    if not workload.allow_seen_rows:
        for target in targets:
            refuse_seen(rows, target.seen_rows, f"measure {target.id}", workload.tasks)
    packed = pack.check(workload.pack, targets, workload.allow_seen_rows) if workload.pack else []
    meter = Meter(workload.power_csv)
    box, others = profile_of(profile), [asdict(get_profile(name)) for name in predict]
    state = out / ".work"
    threads = workload.threads or default_threads()
    max_tokens = workload.max_tokens or max(16, max(len(answer_of(row)) for row in rows) // 2)
    context.check(workload.context_lengths, max_tokens, workload.context)
    key = sha256_json([[t.id, t.sha256] for t in targets] + [workload.key(), threads])
    journal = Journal(state / "journal.jsonl", key)
    if not journal.empty():
        console.note("  going on with the interrupted run")
    reference = reference_of(targets)

    if workload.autotune_seconds:
        tune_all(targets, rows, workload, journal)
    measure(targets, rows, workload, max_tokens, box, meter, journal)
    if workload.fidelity:
        compare_logits(targets, reference, workload, threads, journal, state)
        choices.measure(targets, rows, threads, journal, state)
    items = [item for target in targets for item in journal.all(target.id, "answer")]
    items = choices.with_choices(items, journal)
    results = [entry_of(target, journal, workload, box, meter, others) for target in targets]
    compare_with_reference(results, items, REFERENCE)
    add_retention(results, items, REFERENCE, BASE)
    report = BenchReport(
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=environment(),
        profile=box,
        workload={
            **workload.key(), "tasks": workload.tasks.name, "tasks_sha256": sha256_file(workload.tasks), "rows": len(rows),
            "max_tokens": max_tokens, "threads": threads,
        },
        results=results,
        reference=REFERENCE if reference else None,
        seen_rows={"bench": list(dict.fromkeys([*(row_hash(row) for row in rows), *packed]))},
        pairs=pairs(items, [target.id for target in targets]),
    )  # fmt: skip
    write_report(report, items, out)
    journal.file.unlink()
    if note := after_run(out):
        console.note(f"  {note}")
    return report


def tune_all(targets: list[Target], rows: list[Row], workload: Workload, journal: Journal) -> None:
    """Search each artefact's options and keep them beside it as its run profile."""
    for target in targets:
        if target.kind != "artifact" or target.path is None or journal.last(target.id, "tuned"):
            continue
        log = journal.file.parent / f"{target.id.replace('/', '+')}.autotune.log"
        with console.step(f"tuning {target.id}") as say:
            found = autotune.tune(target, targets, rows, workload, log, say)
        run_profile.keep(target.path, found)
        journal.add(target.id, "tuned", found)


def measure(
    targets: list[Target], rows: list[Row], workload: Workload, max_tokens: int, box: dict[str, Any], meter: Meter,
    journal: Journal,
) -> None:  # fmt: skip
    """Speed in turns, then each target's answers and its load test; all that is found goes into the journal."""
    logs = {t.id: journal.file.parent / f"{t.id.replace('/', '+').replace(':', '_')}.log" for t in targets}
    local = [t for t in targets if t.path is not None]
    for target in local:
        if not journal.last(target.id, "start") and target.path:
            drop_from_cache(target.path)
    with Pool(workload.threads, workload.context, lambda t: logs[t.id]) as pool:
        if workload.speed and local:
            with console.step(f"speed of {len(local)} models, in turns") as say:
                speed.measure(
                    local,
                    pool,
                    journal,
                    rows,
                    workload.points,
                    workload.repetitions,
                    workload.speed_seconds,
                    meter,
                    say,
                )
        for target in targets:
            answers(target, pool, rows, max_tokens, journal)
            if workload.sustained_seconds and target.path:
                endure(target, pool, rows, workload, journal)
            if workload.fidelity:
                choices.read(target, pool, rows, journal)
            if workload.context_lengths:
                with console.step(f"context of {target.id}") as say:
                    lengths, repetitions = workload.context_lengths, workload.context_repetitions
                    context.measure(target, pool, rows, lengths, repetitions, max_tokens, journal, say)
            pool.end(target)
    for target in local if workload.memory_limit else ():
        memory_of(target, rows, workload, journal, logs[target.id])
    for target in local if workload.load_levels else ():
        under_load(target, rows, workload, box.get("limits") or {}, journal, logs[target.id])


def answers(target: Target, pool: Pool, rows: list[Row], max_tokens: int, journal: Journal) -> None:
    """Ask the rows that are not answered yet; then keep what memory the target took."""
    left = rows[len(journal.all(target.id, "answer")) :]
    if journal.last(target.id, "error") or (not left and journal.last(target.id, "answered")):
        return
    try:
        with console.step(f"answers of {target.id}") as say, pool.use(target) as running:
            speed.keep_start(journal, target, running.local)
            ask_all(
                target,
                running.ask,
                left,
                max_tokens,
                say,
                lambda item: journal.add(target.id, "answer", item),
            )
            peak = running.local.memory.peak if running.local and running.local.memory else None
            journal.add(target.id, "answered", {"memory": peak})
    except EnvironmentFault as error:
        journal.add(target.id, "error", error.message)


def endure(target: Target, pool: Pool, rows: list[Row], workload: Workload, journal: Journal) -> None:
    """One stream without a pause, for a box that gets hot."""
    if journal.last(target.id, "sustained") or journal.last(target.id, "error"):
        return
    try:
        with console.step(f"{target.id} without a pause") as say, pool.use(target) as running:
            journal.add(target.id, "sustained", sustained.run(running, rows, workload.sustained_seconds, say))
    except EnvironmentFault as error:
        journal.add(target.id, "error", error.message)


def memory_of(target: Target, rows: list[Row], workload: Workload, journal: Journal, log: Path) -> None:
    """Room of keys and values, and the smallest memory limit."""
    peak = (journal.last(target.id, "answered") or {}).get("memory")
    if journal.last(target.id, "memory") or journal.last(target.id, "error") or not peak:
        return
    with console.step(f"memory of {target.id}") as say:
        kept = memory.kept_tokens(target, workload.threads, log)
        least = memory.smallest_limit(
            target, rows, peak["rss_bytes"], workload.threads, workload.context, log, say
        )
    journal.add(target.id, "memory", {"kv_per_1k_tokens": kept, "smallest_limit": least})


def under_load(
    target: Target, rows: list[Row], workload: Workload, limits: dict[str, float], journal: Journal, log: Path
) -> None:
    """Many requests at once, in a process of its own with as many slots."""
    if any(journal.last(target.id, kind) for kind in ("load", "load-error", "error")):
        return
    slots = max(workload.load_levels)
    try:
        with (
            console.step(f"load on {target.id}") as say,
            caller(target, log, workload.threads, workload.context * slots, {"parallel": slots}) as (ask, _),
        ):
            found = load.sweep(ask, rows, list(workload.load_levels), workload.load_seconds, limits, say)
        journal.add(target.id, "load", {**found, "slots": slots})
    except EnvironmentFault as error:
        journal.add(target.id, "load-error", error.message)


def compare_logits(
    targets: list[Target],
    reference: Target | None,
    workload: Workload,
    threads: int,
    journal: Journal,
    state: Path,
) -> None:
    """KLD and its like of every artefact that has none yet."""
    with tempfile.TemporaryDirectory(prefix="edgeft-") as scratch:
        yardstick = (
            PackYardstick(workload.pack, threads)
            if workload.pack
            else Yardstick(reference, workload, threads, Path(scratch), state / "reference.log")
        )
        for target in targets:
            if target.path is None or journal.all(target.id, "fidelity") or target == reference:
                continue
            log = state / f"{target.id.replace('/', '+')}.logits.log"
            try:
                with console.step(f"logits of {target.id}"):
                    journal.add(target.id, "fidelity", yardstick.compare(target, log))
            except EnvironmentFault as error:
                journal.add(target.id, "fidelity-error", error.message)


def entry_of(
    target: Target, journal: Journal, workload: Workload, box: dict[str, Any], meter: Meter, others: list[dict[str, Any]]
) -> dict[str, Any]:  # fmt: skip
    """A target's entry in the report, from what the journal holds."""
    start, items = journal.last(target.id, "start"), journal.all(target.id, "answer")
    found_speed, flags = speed.result(journal, target, workload.points, workload.speed_seconds)
    result: dict[str, Any] = {
        "id": target.id, "kind": target.kind, "engine": target.engine, "path": str(target.path) if target.path else None,
        "artifact_sha256": target.sha256, "size_bytes": target.size_bytes, **target.facts,
        "load": None, "speed": found_speed, "memory": None, "price": None,
        "accuracy": figures(items) if items else None,
        "fidelity": journal.last(target.id, "fidelity"),
        "choices": choices.result(journal, target),
        "context": context.result(journal, target),
        "load_test": journal.last(target.id, "load"),
        "sustained": journal.last(target.id, "sustained"),
        "energy": energy_of(journal.all(target.id, "block"), meter),
        "flags": flags,
        "run_profile": (start or {}).get("run_profile") or {},
        "autotune": journal.last(target.id, "tuned"),
        "error": next((e for kind in ERRORS if (e := journal.last(target.id, kind))), None),
    }  # fmt: skip
    if start:
        first = journal.all(target.id, "start")[0]
        result["engine_build"] = start["engine_build"]
        result["load"] = {
            **{k: first[k] for k in ("cold_start_s", "load_s", "load_mode")},
            "page_cache": "the kernel was asked to drop the model's files first",
        }
    if peak := (journal.last(target.id, "answered") or {}).get("memory"):
        result["memory"] = {f"peak_{k}": v for k, v in peak.items()}
        result["memory"]["over"] = "process tree, sampled every 50 ms; load, speed and accuracy runs"
        result["memory"] |= journal.last(target.id, "memory") or {}
    if target.kind == "api" and result["accuracy"]:
        result |= price_of(target, result["accuracy"])
    result["roofline"] = roofline.share(result, target, box.get("measured_on") or box)
    result["predictions"] = [p for other in others if (p := roofline.predict(result, other))]
    result["verdict"] = verdicts(result, box.get("limits") or {}) if target.path else []
    return result


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


def base_of(folder: Path) -> Target:
    """The model before tuning, which retention needs: a folder or a GGUF file, measured as '(base)'."""
    (target,) = find([folder], [])
    return replace(target, id=BASE)


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


def add_retention(
    results: list[dict[str, Any]], items: list[dict[str, Any]], reference: str, base: str
) -> None:
    """Add to each result the share of the adapter's gain that it keeps: (this - base)/(merged - base) of the mean score.

    Over the rows that all three answered, with a bootstrap interval; None without a base or where merged is not better.
    """
    scores: dict[str, dict[str, float]] = {}
    for item in items:
        if item["score"] is not None:
            scores.setdefault(item["model_id"], {})[item["item_id"]] = item["score"]
    for result in results:
        result["retention"] = None
        known = [scores.get(name, {}) for name in (result["id"], reference, base)]
        shared = sorted(set.intersection(*(set(k) for k in known)))
        if result["id"] in (reference, base) or not shared:
            continue
        own, merged, before = ([k[row] for row in shared] for k in known)
        value, interval = retention(own, merged, before)
        result["retention"] = None if value is None else {"value": value, "ci95": interval, "n": len(shared)}


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
    """The box: `auto` looks at this one and measures it; else a profile by its id, this box as measured beside it.

    `doubt` says where the two can't be the same box.
    """
    if name == "auto":
        return {"id": "this-box", **detect(measure=True)}
    profile, here = get_profile(name), detect(measure=True)
    doubt = None
    if profile.ram_gb and here["ram_gb"] and not 0.7 < here["ram_gb"] / profile.ram_gb < 1.3:
        doubt = f"this box has {here['ram_gb']:.0f} GB of RAM and {profile.id} {profile.ram_gb:.0f}"
    return {**asdict(profile), "measured_on": here, "doubt": doubt}
