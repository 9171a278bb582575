"""`edgeft route cache-calibrate`."""

from pathlib import Path

import click

from edgeft.cli import options

FOLDER = click.Path(path_type=Path)


@click.command("cache-calibrate")
@click.argument("pairs", type=FOLDER)
@click.option("--encoder", required=True, type=FOLDER, help="Folder of `edgeft route encoder`.")
@click.option(
    "--budget",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.01,
    show_default=True,
    help="Share of hits that may be wrong.",
)
@click.option(
    "--delta",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.05,
    show_default=True,
    help="1 - confidence.",
)
@click.option(
    "--out",
    type=FOLDER,
    default="semantic.json",
    show_default=True,
    help="The file for `cache: {semantic: …}`.",
)
@options
def command(pairs: Path, encoder: Path, budget: float, delta: float, out: Path) -> None:
    """Find the threshold at which the semantic cache keeps its promise.

    PAIRS has lines {"one": …, "two": …, "same": true or false}. Ends with exit code 4, and writes nothing, where no threshold holds.
    """
    from edgeft import console
    from edgeft.router.cache.calibration import calibrate_file

    with console.step("reading the pairs"):
        found = calibrate_file(pairs, encoder, budget, delta, out)
    console.result(
        found,
        f"{out}: threshold {found['threshold']:.4f}, {found['wrong']} of {found['hits']} hits wrong (at most {found['bound']:.2%} at "
        f"{1 - delta:.0%}), {found['share_of_pairs_hit']:.0%} of the pairs that mean the same are hit",
    )
