"""`edgeft verify`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from edgeft import console
from edgeft.cli import options, recipes


@click.command("verify")
@click.argument("places", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--eval",
    "evaluation",
    type=click.Path(path_type=Path),
    help="Rows (JSON lines) that the gate asked; without them the task is not asked again.",
)
@click.option(
    "--gate",
    "limits",
    type=recipes.FileOrMap(),
    metavar="FILE|MAP",
    help="Limits in place of those in each artifact.json: a YAML file, or a map.",
)
@click.option("--threads", type=click.IntRange(1), help="Threads of an engine (physical cores if left out).")
@options
def command(
    places: tuple[Path, ...],
    evaluation: Path | None,
    limits: Path | Mapping[Any, Any] | None,
    threads: int | None,
) -> None:
    """Check finished artefacts again.

    PLACES are folders of `edgeft compress`, the whole or single ones. File hashes, tensor counts, and
    what of the gate this box can run; what it can't is said with the reason. Ends with 1 where a check
    fails, with 3 where the engine of an artefact is missing.
    """
    from edgeft.compress.verify import verify
    from edgeft.errors import EnvironmentFault, GateError

    found = verify(list(places), evaluation, limits, threads)
    console.result([each.to_dict() for each in found])
    console.table(
        ["artefact", "check", "verdict", "seen", "limit"],
        [
            [each.id, line["check"], line["verdict"], *_figures(line)]
            for each in found
            for line in each.checks
        ],
    )
    for status, error, word in (
        ("failed", GateError, "does not hold what its artifact.json says"),
        ("unable", EnvironmentFault, "can't be run here"),
    ):
        if of_it := [each for each in found if each.status == status]:
            line = next(line for line in of_it[0].checks if line["verdict"] in ("FAIL", "NOT RUN"))
            seen = line.get("why") or line.get("first") or f"{line['seen']:.3g}, limit {line['limit']:g}"
            hint = "edgeft compress … (makes it again)" if status == "failed" else "edgeft doctor"
            raise error(f"{of_it[0].path} {word}: {line['check']}: {seen}", hint)


def _figures(line: dict) -> tuple[str, str]:
    """What was seen and its limit, or why nothing was."""
    if "seen" not in line:
        return line.get("why") or line.get("first", ""), ""
    sign = "≥" if line["rule"] == "at least" else "≤"
    seen = f"{line['seen']:.3g}"
    if line.get("ci95"):
        seen += f" ({line['ci95'][0]:.3g} to {line['ci95'][1]:.3g})"
    if line.get("first"):
        seen += f" {line['first']}"
    return seen, "" if line["limit"] is None else f"{sign} {line['limit']:g}"
