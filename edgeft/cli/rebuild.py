"""`edgeft rebuild`."""

from pathlib import Path

import click

from edgeft import console
from edgeft.cli import options


@click.command("rebuild")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--base", help="What `edgeft pull` takes, where the base lies elsewhere now.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The adapter's folder, where it lies elsewhere now; as many as there were, in their order.",
)
@click.option(
    "--calibration", type=click.Path(path_type=Path), help="The rows, where they lie elsewhere now."
)
@click.option(
    "--eval",
    "evaluation",
    type=click.Path(path_type=Path),
    help="Likewise the rows of --eval, if there were any.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Keep what was made there (a temporary folder, removed, if left out).",
)
@options
def command(
    artifact: Path,
    base: str | None,
    adapters: tuple[Path, ...],
    calibration: Path | None,
    evaluation: Path | None,
    out: Path | None,
) -> int:
    """Make an artefact again and compare it bit by bit.

    ARTIFACT is an artifact.json or its folder. Inputs whose hashes are not the recorded ones are refused.
    Exits with 0 where every file is bit-identical, with 1 where one is not.
    """
    from edgeft.compress.rebuild import rebuild

    found = rebuild(artifact, base, adapters, calibration, out, evaluation)
    console.result(found.to_dict())
    console.table(
        ["file", "bytes", "verdict"], [[f["file"], str(f["bytes"]), f["verdict"]] for f in found.files]
    )
    for line in found.notes:
        console.note(f"  {line}")
    console.note(f"  {found.id} is {'' if found.identical else 'NOT '}bit-identical")
    return 0 if found.identical else 1
