"""Measure a set of models on this box and write the report."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgeft import console
from edgeft.bench import choices, context, pack
from edgeft.bench.energy import Meter
from edgeft.bench.entries import add_retention, compare_with_reference, entry_of
from edgeft.bench.environment import environment
from edgeft.bench.index import after_run
from edgeft.bench.journal import Journal
from edgeft.bench.paired import pairs
from edgeft.bench.phases import compare_logits, measure, tune_all
from edgeft.bench.reference import base_of, reference_of
from edgeft.bench.report import write_report
from edgeft.bench.score import check
from edgeft.bench.targets import BASE, REFERENCE, Target, find, run_by
from edgeft.bench.workload import Workload
from edgeft.engines.local import default_threads
from edgeft.files import sha256_file, sha256_json
from edgeft.profiles import detect, get_profile
from edgeft.rows import Row, answer_of, load_rows, refuse_seen, row_hash, spread
from edgeft.types import BenchReport

CHOOSING = "select"  # the kind of step that an artefact's gate and --fit chose rows for


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
    targets = run_by(
        find(places, models) + ([base_of(workload.base)] if workload.base else []), workload.gguf_engine
    )
    if not workload.allow_seen_rows:
        for target in targets:
            seen = {
                kind: digests
                for kind, digests in target.seen_rows.items()
                if not (workload.choosing and kind == CHOOSING)
            }
            refuse_seen(rows, seen, f"measure {target.id}", workload.tasks)
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
        tune_all(targets, rows, workload, max_tokens, journal)
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
            "max_tokens": max_tokens, "threads": threads, "rows_chosen_by": chosen_by(rows, targets),
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


def chosen_by(rows: list[Row], targets: list[Target]) -> int:
    """How many of the rows some target's gate, or --fit, chose by."""
    digests = {digest for target in targets for digest in target.seen_rows.get(CHOOSING, ())}
    return sum(row_hash(row) in digests for row in rows)


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
