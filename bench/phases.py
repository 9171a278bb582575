"""The phases of a bench, in their order. Each keeps what it finds in the journal and leaves out what is there already."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from edgeft import console
from edgeft.bench import autotune, choices, context, load, memory, speed, sustained
from edgeft.bench.answers import ask_all
from edgeft.bench.callers import caller
from edgeft.bench.energy import Meter
from edgeft.bench.journal import Journal
from edgeft.bench.pack_compare import PackYardstick
from edgeft.bench.pool import Pool, drop_from_cache
from edgeft.bench.reference import Yardstick
from edgeft.bench.targets import Target
from edgeft.bench.workload import Workload
from edgeft.engines import run_profile
from edgeft.errors import EnvironmentFault
from edgeft.rows import Row

# What a first start found of the model's files, by whether the kernel could be asked.
CACHE = {
    True: "the kernel was asked to drop the model's files first",
    False: "as it was: the kernel can't be asked here",
}


def tune_all(
    targets: list[Target], rows: list[Row], workload: Workload, max_tokens: int, journal: Journal
) -> None:
    """Search each artefact's options and keep them beside it as its run profile."""
    for target in targets:
        if target.kind != "artifact" or target.path is None or journal.last(target.id, "tuned"):
            continue
        log = journal.file.parent / f"{target.id.replace('/', '+')}.autotune.log"
        try:
            with console.step(f"tuning {target.id}") as say:
                found = autotune.tune(target, targets, rows, workload, max_tokens, log, say)
        except EnvironmentFault as error:
            journal.add(target.id, "tuning-error", error.message)
            continue
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
            journal.add(target.id, "page cache", CACHE[drop_from_cache(target.path)])
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
                    workload.restarts,
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
            journal.add(target.id, "answered", memory.taken(running.local))
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
    try:
        with console.step(f"memory of {target.id}") as say:
            kept = memory.kept_tokens(target, workload.threads, log)
            least = memory.smallest_limit(
                target, rows, peak["rss_bytes"], workload.threads, workload.context, log, say
            )
        journal.add(target.id, "memory", {"kv_per_1k_tokens": kept, "smallest_limit": least})
    except EnvironmentFault as error:
        journal.add(target.id, "memory-error", error.message)


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
        yardstick: PackYardstick | Yardstick
        if workload.pack:
            yardstick = PackYardstick(workload.pack, threads)
        elif reference:
            yardstick = Yardstick(reference, workload, threads, Path(scratch), state / "reference.log")
        else:
            return
        for target in targets:
            if target.path is None or journal.all(target.id, "fidelity") or target == reference:
                continue
            log = state / f"{target.id.replace('/', '+')}.logits.log"
            try:
                with console.step(f"logits of {target.id}"):
                    journal.add(target.id, "fidelity", yardstick.compare(target, log))
            except EnvironmentFault as error:
                journal.add(target.id, "fidelity-error", error.message)
