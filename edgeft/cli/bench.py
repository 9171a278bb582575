"""`edgeft bench`."""

from pathlib import Path

import click

from edgeft import console
from edgeft.cli import Group, bench_lm_eval, bench_pack, bench_runs, options
from edgeft.engines import GGUF


@click.group("bench", cls=Group, default="run")
@options
def command() -> None:
    """Measure artefacts on this box.

    What is no command below goes to `run`: `edgeft bench dist/ --tasks rows.jsonl`.
    """


for _command in (*bench_runs.COMMANDS, *bench_lm_eval.COMMANDS, bench_pack.pack_command):
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
    "--profile",
    default="auto",
    show_default=True,
    help="This box's profile, whose limits are judged; auto describes it and has none.",
)
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    help="The model before tuning: what of its gain is kept is told.",
)
@click.option(
    "--predict",
    multiple=True,
    metavar="PROFILE",
    help="Also predict for a box that is not here; may be repeated.",
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
    "--speed-points",
    default="128x64,512x16",
    show_default=True,
    metavar="PxO,…",
    help="Shapes that are timed: prompt x output tokens.",
)
@click.option(
    "--repetitions",
    type=click.IntRange(2),
    default=5,
    show_default=True,
    help="Timed rounds at least.",
)
@click.option(
    "--speed-seconds",
    type=click.FloatRange(0),
    default=10,
    show_default=True,
    help="Time of a model's rounds at most, unless its medians are known within 5 % before.",
)
@click.option(
    "--restarts",
    type=click.IntRange(1, 20),
    default=3,
    show_default=True,
    help="Processes that a model is timed in, one after another, within that time; intervals are over them from 3 on.",
)
@click.option(
    "--load",
    "load_levels",
    metavar="N,N,…",
    help="Also ask so many at once, as 1,2,4,8, and by Poisson arrivals.",
)
@click.option(
    "--load-seconds", type=click.FloatRange(1), default=10, show_default=True, help="Time of each level."
)
@click.option(
    "--sustained",
    "sustained_seconds",
    type=click.FloatRange(0),
    default=0,
    metavar="SECONDS",
    help="Also ask one stream without a pause, as 600: what heat leaves.",
)
@click.option(
    "--memory-limit", is_flag=True, help="Also find the smallest memory limit that keeps 95 % of the speed."
)
@click.option(
    "--power-csv",
    type=click.Path(path_type=Path),
    help="A wall meter's samples: the columns time and watts.",
)
@click.option(
    "--autotune",
    is_flag=True,
    help="First search each artefact's fastest options here; serving uses them too.",
)
@click.option(
    "--autotune-seconds",
    type=click.FloatRange(1),
    default=120,
    show_default=True,
    help="Time of each artefact's search.",
)
@click.option(
    "--speculate", is_flag=True, help="Let the search try drafts: n-grams and smaller artefacts named beside."
)
@click.option(
    "--gate", is_flag=True, help="Exit 1 where a limit of the profile fails, 4 where one is not decided."
)
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer (from the rows if left out).")
@click.option("--threads", type=click.IntRange(1), help="Threads of an engine (physical cores if left out).")
@click.option(
    "--gguf-engine",
    type=click.Choice(GGUF),
    default="gguf",
    show_default=True,
    help="What runs GGUF files: xllamacpp, llama-cpp-python, or the binary $EDGEFT_LLAMA_SERVER.",
)
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
@click.option(
    "--pack",
    type=click.Path(path_type=Path),
    help="Take KLD against this reference pack (`bench pack`), as on a box that can't load the merged model.",
)
@click.option(
    "--context-lengths",
    metavar="N,N,…",
    help="Also ask prompts of so many tokens, as 256,512,1024,1900, a fact at five depths (synthetic).",
)
@click.option(
    "--context-repetitions",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Prompts of each length and depth.",
)
@click.option("--no-speed", is_flag=True, help="Leave the speed workload out.")
@click.option("--no-fidelity", is_flag=True, help="Leave KLD and choices by log-probability out.")
@click.option(
    "--choosing",
    is_flag=True,
    help="For route fit: take rows that the gate or --fit chose by; no figure of quality.",
)
@click.option("--allow-seen-rows", is_flag=True, help="Measure on rows that training or calibration saw.")
@options
def run_command(
    places: tuple[Path, ...],
    tasks: Path,
    out: Path,
    profile: str,
    base: Path | None,
    predict: tuple[str, ...],
    models: tuple[str, ...],
    limit: int | None,
    speed_points: str,
    repetitions: int,
    speed_seconds: float,
    restarts: int,
    load_levels: str | None,
    load_seconds: float,
    sustained_seconds: float,
    memory_limit: bool,
    power_csv: Path | None,
    autotune: bool,
    autotune_seconds: float,
    speculate: bool,
    gate: bool,
    max_tokens: int | None,
    threads: int | None,
    gguf_engine: str,
    context: int,
    fidelity_rows: int,
    pack: Path | None,
    context_lengths: str | None,
    context_repetitions: int,
    no_speed: bool,
    no_fidelity: bool,
    choosing: bool,
    allow_seen_rows: bool,
) -> int:
    """Measure artefacts on this box.

    PLACES are what `edgeft compress` wrote (the whole folder or single ones), model folders or GGUF
    files. Writes report.json, items.jsonl, report.md and report.html.
    """
    from edgeft.bench import Workload, bench
    from edgeft.bench.context import read_lengths
    from edgeft.bench.load import read_levels
    from edgeft.bench.report import COLUMNS, table_rows
    from edgeft.bench.speed import read_points
    from edgeft.bench.verdict import gated

    workload = Workload(
        tasks=tasks,
        limit=limit,
        points=read_points(speed_points),
        repetitions=repetitions,
        speed_seconds=speed_seconds,
        restarts=restarts,
        load_levels=read_levels(load_levels),
        load_seconds=load_seconds,
        sustained_seconds=sustained_seconds,
        memory_limit=memory_limit,
        power_csv=power_csv,
        base=base,
        autotune_seconds=autotune_seconds if autotune else 0.0,
        speculate=speculate,
        max_tokens=max_tokens,
        threads=threads,
        gguf_engine=gguf_engine,
        context=context,
        fidelity_rows=fidelity_rows,
        pack=pack,
        context_lengths=read_lengths(context_lengths),
        context_repetitions=context_repetitions,
        speed=not no_speed,
        fidelity=not no_fidelity,
        choosing=choosing,
        allow_seen_rows=allow_seen_rows,
    )
    report = bench(list(places), list(models), workload, profile, out, predict)
    console.result(
        {"report": str(out / "report.json"), "html": str(out / "report.html"), "results": report.results}
    )
    console.table(COLUMNS, table_rows(report))
    console.note(f"  {out / 'report.html'}")
    if gate:
        gated(report)
    return 1 if all(r["error"] for r in report.results) else 0
