"""`edgeft bench compare|runs|merge|import|baseline`: what is done with finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeft import console
from edgeft.cli import options


@click.command("compare")
@click.argument("places", nargs=-1, required=True, metavar="A B...")
@click.option("--baseline", metavar="NAME", help="A named run of the index stands for A.")
@click.option("--gate", is_flag=True, help="Exit 1 where B is worse, 4 where a 5 % slowdown is not excluded.")
@options
def compare_command(places: tuple[str, ...], baseline: str | None, gate: bool) -> None:
    """Hold results against each other, with significance.

    A and B are folders of reports, or FOLDER#ID for one result. Two folders are compared by the ids that both have; one
    result is held against each of many. TTFT and prefill are one test; p is corrected over all tests made (Holm).
    """
    from edgeft.bench import compare, compare_text, reading
    from edgeft.errors import GateError, Inconclusive, UsageError

    if len(places) + bool(baseline) < 2:
        raise UsageError(
            f"{len(places)} thing to compare was named, and two are needed.",
            "edgeft bench compare A B, or edgeft bench compare B --baseline NAME",
        )
    found = [reading.sides(place) for place in places]
    first = _baseline(baseline) if baseline else found.pop(0)
    pairs = reading.pairs(first, [side for sides in found for side in sides])
    comparisons = []
    for comparison in compare.compare_many(_with_repeats(pairs)):
        console.table(
            compare_text.COLUMNS,
            compare_text.table_rows(comparison),
            title=f"A {comparison['a']['name']}\nB {comparison['b']['name']}",
        )
        code, why = compare.gate(comparison)
        comparisons.append({**comparison, "gate": {"exit": code, "why": why}})
        if not console.output.json:
            click.echo("\n".join(compare_text.sentences(comparison)) + "\n")
    console.result({"comparisons": comparisons})
    verdicts = [c["gate"] for c in comparisons]
    if gate and any(v["exit"] == 1 for v in verdicts):
        raise GateError(next(v["why"] for v in verdicts if v["exit"] == 1), _again(places, baseline))
    if gate and any(v["exit"] == 4 for v in verdicts):
        raise Inconclusive(
            next(v["why"] for v in verdicts if v["exit"] == 4),
            "edgeft bench run … with more --restarts or --repetitions",
        )


def _with_repeats(pairs: list[Any]) -> list[Any]:
    """The pairs with what the index knows of repeated runs; a box whose index cannot be read compares without."""
    from dataclasses import replace

    from edgeft.bench import index
    from edgeft.errors import EnvironmentFault

    compared = tuple(side.report_sha256 for pair in pairs for side in pair)
    try:
        return [
            tuple(replace(side, repeats=index.repeats(side, compared)) for side in pair) for pair in pairs
        ]
    except EnvironmentFault as error:
        console.note(f"  no repeated runs are known: {error.message}")
        return pairs


def _again(places: tuple[str, ...], baseline: str | None) -> str:
    return " ".join(["edgeft bench compare", *places, *(["--baseline", baseline] if baseline else [])])


def _baseline(name: str) -> list[Any]:
    from edgeft.bench import index, reading
    from edgeft.errors import UsageError, unknown

    known = index.baselines()
    if not known:
        raise UsageError("no baseline is named yet.", f"edgeft bench baseline {name} FOLDER#ID")
    if name not in known:
        raise unknown("the baseline", name, known, "edgeft bench baseline")
    digest, result_id = known[name]["report_sha256"], known[name]["result_id"]
    report, items = index.stored(digest)
    return reading.chosen(f"{name}={digest[:12]}", report, items, digest, result_id)


@click.command("runs")
@click.option("--model", metavar="WORD", help="Results whose id holds it.")
@click.option("--artifact", metavar="SHA256", help="Results of this artefact (the hash's beginning will do).")
@click.option("--box", metavar="WORD", help="Results of boxes whose name holds it.")
@click.option("--engine", metavar="WORD", help="Results of engines whose name holds it.")
@click.option("--since", metavar="DATE", help="Results from this day on, as 2026-01-31.")
@click.option("--limit", type=click.IntRange(1), default=40, show_default=True, help="Newest so many.")
@options
def runs_command(
    model: str | None,
    artifact: str | None,
    box: str | None,
    engine: str | None,
    since: str | None,
    limit: int,
) -> None:
    """List the runs in this machine's index, newest first."""
    from edgeft.bench import index

    found = index.runs(limit=limit, since=since, model=model, artifact=artifact, box=box, engine=engine)
    console.table(
        (
            "report",
            "result",
            "when (UTC)",
            "box",
            "right %",
            "KLD",
            "prefill tok/s",
            "decode tok/s",
            "peak MB",
            "MB",
        ),
        [_run(run) for run in found],
    )
    console.result(found, f"{len(found)} run(s); the index is {index.path()}")


def _run(run: dict[str, Any]) -> tuple[str, ...]:
    from edgeft.bench.report import number

    return (
        run["report_sha256"][:12],
        run["result_id"] + (" (failed)" if run["error"] else ""),
        run["created_at"][:16],
        run["box"] or "–",
        number(run["right_share"], 100, 1),
        number(run["kld_mean"], 1, 4),
        number(run["prefill_tok_per_s"], 1, 0),
        number(run["decode_tok_per_s"], 1, 1),
        number(run["peak_rss_bytes"], 1e-6, 0),
        number(run["size_bytes"], 1e-6, 0),
    )


@click.command("merge")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FOLDER...")
@options
def merge_command(folders: tuple[Path, ...]) -> None:
    """Add every report under FOLDERs to the index, as a stick with the reports of many boards.

    What is in the index already is left as it is; broken reports are listed and skipped.
    """
    from edgeft.bench import index

    done = index.merge(list(folders))
    for skipped in done["skipped"]:
        console.note(f"  skipped: {skipped['why']}")
    console.result(
        done,
        f"{len(done['added'])} report(s) added, {done['known']} known already, {len(done['skipped'])} skipped",
    )


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("report"),
    show_default=True,
    help="Folder for the report.",
)
@options
def import_command(file: Path, out: Path) -> None:
    """Turn llama-bench's JSON or a GuideLLM report into a report of ours.

    What the other tool did not measure stays empty. An existing report in the folder is not written over.
    """
    from edgeft.bench import index
    from edgeft.bench.importers import import_file
    from edgeft.errors import UsageError
    from edgeft.files import write_jsonl

    if (out / "report.json").exists():
        raise UsageError(f"{out / 'report.json'} is there already.", "--out ANOTHER-FOLDER")
    report = import_file(file)
    write_jsonl(out / "items.jsonl", [])
    report.save(out / "report.json")
    console.note(f"  {index.after_run(out)}")
    names = ", ".join(result["id"] for result in report.results)
    console.result(
        {"report": str(out / "report.json"), "results": report.results}, f"{out / 'report.json'}: {names}"
    )


@click.command("baseline")
@click.argument("name", required=False)
@click.argument("place", required=False, metavar="FOLDER#ID")
@options
def baseline_command(name: str | None, place: str | None) -> None:
    """Name a result to compare with later, or list the names.

    The report is added to the index, so its folder may go. A name given again means the newer result from then on.
    """
    from edgeft.bench import index, reading
    from edgeft.errors import UsageError

    if name and place:
        sides = reading.sides(place)
        if len(sides) > 1:
            raise UsageError(
                f"{place} has {len(sides)} results, and a baseline is one.",
                f"edgeft bench baseline {name} {sides[0].name}",
            )
        digest, _ = index.add(Path(place.partition("#")[0]))
        index.set_baseline(name, digest, sides[0].result["id"])
    elif name:
        raise UsageError(f"what '{name}' shall mean was not said.", f"edgeft bench baseline {name} FOLDER#ID")
    known = index.baselines()
    rows = [(n, k["report_sha256"][:12], k["result_id"], k["set_at"][:16]) for n, k in known.items()]
    if rows:
        console.table(("baseline", "report", "result", "set (UTC)"), rows)
    console.result(known, "" if known else "no baseline yet: edgeft bench baseline NAME FOLDER#ID")


COMMANDS = (compare_command, runs_command, merge_command, import_command, baseline_command)
