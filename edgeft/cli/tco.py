"""`edgeft tco`."""

from pathlib import Path
from typing import Any

import click

from edgeft import console
from edgeft.cli import Group, options


def _pairs(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    """NAME=VALUE words as a dict."""
    found = {}
    for word in values:
        name, _, number = word.partition("=")
        try:
            found[name.strip().replace("-", "_") if "." not in name else name.strip()] = float(number)
        except ValueError:
            raise click.BadParameter(f"'{word}' is not NAME=NUMBER.") from None
    return found


@click.group("tco", cls=Group, default="table")
@options
def command() -> None:
    """Show what own hardware and API calls cost.

    What is no command below goes to `table`: `edgeft tco scenario.yaml`.
    """


@command.command("table")
@click.argument("scenario", required=False)
@click.option("--report", type=click.Path(path_type=Path), help="Folder of a report, or its report.json.")
@click.option("--profile", "profile_id", metavar="ID", help="The own box, with --report; auto for this one.")
@click.option("--model", metavar="ARTIFACT_ID", help="Which artefact; else the one that solves most.")
@click.option(
    "--api", "apis", metavar="NAME", multiple=True, help="An API model in litellm's price table. Repeatable."
)
@click.option(
    "--requests-per-month", type=float, metavar="N", help="100,000 unless a scenario says otherwise."
)
@click.option("--usd-per-kwh", type=float, metavar="X", help="0.15 unless a scenario says otherwise.")
@click.option(
    "--set",
    "--assume",
    "changed",
    metavar="NAME=VALUE",
    multiple=True,
    callback=_pairs,
    help="What if: a figure of all columns (NAME) or of one (COLUMN.NAME). Repeatable.",
)
@click.option("--draws", type=click.IntRange(100, 1_000_000), default=10_000, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=20261125, show_default=True)
@click.option(
    "--out",
    "outs",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Write the table, too: .md, .csv, .json or .html. Repeatable.",
)
@options
def table_command(
    scenario: str | None,
    report: Path | None,
    profile_id: str | None,
    model: str | None,
    apis: tuple[str, ...],
    requests_per_month: float | None,
    usd_per_kwh: float | None,
    changed: dict[str, float],
    draws: int,
    seed: int,
    outs: tuple[Path, ...],
) -> None:
    """The table of SCENARIO (a file, or a shipped name), or of a --report on the box of a --profile.

    Each cell is tagged measured, list price or assumed; what it rests on stands under the table.
    """
    from edgeft.tco import tabulate
    from edgeft.tco.render import grid, terminal, to_json
    from edgeft.tco.shipped import find

    asked = {"requests_per_month": requests_per_month, "usd_per_kwh": usd_per_kwh}
    changed = {**{k: v for k, v in asked.items() if v is not None}, **changed}
    writers = {out: _writer(out) for out in outs}
    if scenario is None:
        made = _from_flags(report, profile_id, model, apis, changed)
    else:
        from edgeft.errors import UsageError
        from edgeft.tco.scenario import read_scenario

        if profile_id or apis:
            raise UsageError(
                f"--profile and --api go with --report alone; '{scenario}' has columns of its own.",
                "edgeft tco SCENARIO.yaml --set NAME=VALUE, or edit its columns",
            )
        made = read_scenario(find(scenario), changed, (report, model))
    table = tabulate(made, draws, seed)
    for out, write in writers.items():
        write(out, table)
    if not console.output.json:
        print("\n".join(table.verdict))
    console.table(*grid(table), title=made.name)
    written = "".join(f"\nwrote {out}" for out in outs)
    console.result(to_json(table) | {"written_to": [str(o) for o in outs]}, terminal(table) + written)


def _from_flags(
    report: Path | None,
    profile_id: str | None,
    model: str | None,
    apis: tuple[str, ...],
    changed: dict[str, float],
) -> Any:
    from edgeft.errors import UsageError
    from edgeft.tco.from_report import from_report

    if report is None or profile_id is None:
        raise UsageError(
            "neither a scenario nor a --report with a --profile was given.",
            "edgeft tco init, then edgeft tco scenario.yaml; or edgeft tco --report report/ --profile auto",
        )
    return from_report(report, profile_id, model=model, apis=apis, changed=changed)


def _writer(out: Path) -> Any:
    """The function that writes a table in the format of a file's name; refused before anything is computed."""
    from edgeft.errors import unknown
    from edgeft.tco.render import FORMATS

    if out.suffix not in FORMATS:
        raise unknown(f"the format of {out}:", out.suffix, FORMATS, "edgeft tco … --out tco.html")

    def write(path: Path, table: Any) -> None:
        from edgeft.files import write_json, write_text
        from edgeft.tco import render

        if path.suffix == ".json":
            write_json(path, render.to_json(table))
        elif path.suffix == ".html":
            from edgeft.tco.html import page

            write_text(path, page(table))
        else:
            write_text(path, render.markdown(table) if path.suffix == ".md" else render.to_csv(table))

    return write


@command.command("init")
@click.argument("path", required=False, type=click.Path(path_type=Path), default=Path("scenario.yaml"))
@click.option("--like", metavar="NAME", default="support-desk", show_default=True, help="A shipped scenario.")
@click.option("--force", is_flag=True, help="Write over a file that is there.")
@options
def init_command(path: Path, like: str, force: bool) -> None:
    """Write a commented scenario to start from."""
    from edgeft.errors import UsageError
    from edgeft.files import write_text
    from edgeft.tco.shipped import shipped

    text = shipped(like).read_text(encoding="utf-8")
    if path.exists() and not force:
        raise UsageError(f"{path} is there already; it is left alone.", f"edgeft tco init {path} --force")
    write_text(path, text)
    console.result({"wrote": str(path), "like": like}, f"wrote {path}; edit it, then: edgeft tco {path}")
