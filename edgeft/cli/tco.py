"""`edgeft tco`."""

from pathlib import Path

import click

from edgeft import console
from edgeft.cli import options


def _pairs(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    """NAME=VALUE words as a dict."""
    found = {}
    for word in values:
        name, _, number = word.partition("=")
        try:
            found[name.strip().replace("-", "_")] = float(number)
        except ValueError:
            raise click.BadParameter(f"'{word}' is not NAME=NUMBER.") from None
    return found


@click.command("tco")
@click.option(
    "--report", type=click.Path(path_type=Path), required=True, help="Folder of a report, or its report.json."
)
@click.option("--profile", "profile_id", metavar="ID", required=True, help="The own box; auto for this one.")
@click.option("--model", metavar="ARTIFACT_ID", help="Which artefact; else the one that solves most.")
@click.option(
    "--api", "apis", metavar="NAME", multiple=True, help="An API model in litellm's price table. Repeatable."
)
@click.option("--requests-per-month", type=float, default=100_000, show_default=True, metavar="N")
@click.option("--usd-per-kwh", type=float, default=0.15, show_default=True, metavar="X")
@click.option(
    "--assume",
    metavar="NAME=VALUE",
    multiple=True,
    callback=_pairs,
    help="Change an assumed value. Repeatable.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the comparison as Markdown, too.")
@options
def command(
    report: Path,
    profile_id: str,
    model: str | None,
    apis: tuple[str, ...],
    requests_per_month: float,
    usd_per_kwh: float,
    assume: dict[str, float],
    out: Path | None,
) -> None:
    """Show what own hardware and API calls cost.

    Each cell is tagged measured, list price or assumed; the assumed values stand under the table.
    """
    from edgeft.files import write_text
    from edgeft.tco import compare, markdown, terminal
    from edgeft.tco.box import profile_of
    from edgeft.tco.render import grid, to_json
    from edgeft.types import BenchReport

    found = compare(
        BenchReport.load(report / "report.json" if report.is_dir() else report),
        profile_of(profile_id),
        model=model,
        apis=apis,
        requests_per_month=requests_per_month,
        usd_per_kwh=usd_per_kwh,
        assume=assume,
    )
    if out is not None:
        write_text(out, markdown(found))
    if not console.output.json:
        print("\n".join(found["verdict"]))
    console.table(*grid(found), title=f"{requests_per_month:,g} requests a month")
    text = terminal(found)
    console.result(
        to_json(found) | {"written_to": str(out) if out else None}, f"{text}\nwrote {out}" if out else text
    )
