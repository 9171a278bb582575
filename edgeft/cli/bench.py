"""`edgeft bench`."""

from pathlib import Path

import click

from edgeft import console
from edgeft.cli import Group, bench_runs, options


@click.group("bench", cls=Group, default="run")
@options
def command() -> None:
    """Measure artefacts on this box.

    What is no command below goes to `run`: `edgeft bench dist/ --tasks rows.jsonl`.
    """


for _command in bench_runs.COMMANDS:
    command.add_command(_command)


@command.command("run")
@click.argument("places", nargs=-1, type=click.Path(path_type=Path))
@click.option("--tasks", required=True, type=click.Path(path_type=Path), help="Rows (JSON lines) to answer.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("report"),
    show_default=True,
    help="Folder for the report.",
)
@click.option(
    "--profile", default="auto", show_default=True, help="Hardware profile; auto describes this box."
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="MODEL",
    help="litellm:NAME or openai:URL#NAME; may be repeated.",
)
@click.option("--limit", type=click.IntRange(1), help="Answer so many rows, spread over the file.")
@click.option(
    "--repetitions",
    type=click.IntRange(2),
    default=5,
    show_default=True,
    help="Timed runs of the speed workload.",
)
@click.option(
    "--output-tokens",
    type=click.IntRange(8),
    default=64,
    show_default=True,
    help="Tokens generated in each timed run.",
)
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer (from the rows if left out).")
@click.option("--threads", type=click.IntRange(1), help="Threads of an engine (physical cores if left out).")
@click.option(
    "--context", type=click.IntRange(64), default=2048, show_default=True, help="Context in tokens."
)
@click.option(
    "--fidelity-rows",
    type=click.IntRange(1),
    default=48,
    show_default=True,
    help="Rows that KLD is taken on.",
)
@click.option("--no-speed", is_flag=True, help="Leave the speed workload out.")
@click.option("--no-fidelity", is_flag=True, help="Leave KLD out.")
@click.option("--allow-seen-rows", is_flag=True, help="Measure on rows that training or calibration saw.")
@options
def run_command(
    places: tuple[Path, ...],
    tasks: Path,
    out: Path,
    profile: str,
    models: tuple[str, ...],
    limit: int | None,
    repetitions: int,
    output_tokens: int,
    max_tokens: int | None,
    threads: int | None,
    context: int,
    fidelity_rows: int,
    no_speed: bool,
    no_fidelity: bool,
    allow_seen_rows: bool,
) -> None:
    """Measure artefacts on this box.

    PLACES are what `edgeft compress` wrote (the whole folder or single ones), model folders or GGUF
    files. Writes report.json, items.jsonl, report.md and report.html.
    """
    from edgeft.bench import Workload, bench
    from edgeft.bench.report import COLUMNS, table_rows

    workload = Workload(
        tasks=tasks,
        limit=limit,
        repetitions=repetitions,
        output_tokens=output_tokens,
        max_tokens=max_tokens,
        threads=threads,
        context=context,
        fidelity_rows=fidelity_rows,
        speed=not no_speed,
        fidelity=not no_fidelity,
        allow_seen_rows=allow_seen_rows,
    )
    report = bench(list(places), list(models), workload, profile, out)
    console.result(
        {"report": str(out / "report.json"), "html": str(out / "report.html"), "results": report.results}
    )
    console.table(COLUMNS, table_rows(report))
    console.note(f"  {out / 'report.html'}")
