"""`edgeft compress`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeft import console
from edgeft.cli import options, recipes
from edgeft.errors import UsageError

if TYPE_CHECKING:
    from edgeft.compress import Recipe


@click.command("compress")
@click.argument("base")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="DIR[=SHARE]",
    help="Folder of a LoRA adapter (peft); may be repeated, each with its share (1 if left out).",
)
@click.option(
    "--to",
    "formats",
    multiple=True,
    metavar="FORMAT",
    help="gguf:q4_k_m, onnx:int8, gptq:4, merged, …; may be repeated.",
)
@click.option(
    "--calibration", type=click.Path(path_type=Path), help="Rows (JSON lines) for the formats that calibrate."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("dist"),
    show_default=True,
    help="Folder for the artefacts.",
)
@click.option("--name", help="The model's name in file names and metadata.")
@click.option("--threads", type=click.IntRange(1), help="Threads to quantize with (all cores if left out).")
@click.option("--allow-seen-rows", is_flag=True, help="Take calibration rows that an earlier step has seen.")
@click.option("--dry-run", is_flag=True, help="Print what it would take in memory, disk and time, and stop.")
@recipes.option
@options
@click.pass_context
def command(
    ctx: click.Context,
    base: str,
    adapters: tuple[str, ...],
    formats: tuple[str, ...],
    calibration: Path | None,
    out: Path,
    name: str | None,
    threads: int | None,
    allow_seen_rows: bool,
    dry_run: bool,
) -> None:
    """Merge an adapter into its base and quantize.

    BASE is what `edgeft pull` takes. Always writes OUT/merged, then a folder a format, each with its
    artifact.json; what was made from the same inputs before is kept.
    """
    import os

    from edgeft.compress import Recipe, compress
    from edgeft.pull import pull

    recipe = Recipe(
        out=out,
        formats=formats,
        calibration=calibration,
        name=name,
        threads=threads or os.cpu_count() or 1,
        allow_seen_rows=allow_seen_rows,
    )
    sources = [share_of(word) for word in adapters]
    try:
        if dry_run:
            _foresee(pull(base), sources, recipe)
            return
        artifacts = compress(pull(base), sources, recipe)
    except UsageError as error:
        raise recipes.naming_its_line(ctx, error) from None
    console.result([a.to_dict() for a in artifacts])
    console.table(
        ["artefact", "MB", "bits/weight", "types", "made in s", "peak MB"],
        [
            [
                a.id,
                f"{a.size_bytes / 1e6:.1f}",
                f"{a.bits_per_weight:.2f}",
                ", ".join(f"{k} x{v['tensors']}" for k, v in sorted(a.tensor_types.items())),
                f"{a.cost['wall_s']:.1f}",
                f"{a.cost['peak_rss_bytes'] / 1e6:.0f}",
            ]
            for a in artifacts
        ],
    )


def _foresee(base: Path, sources: list[tuple[Path, float]], recipe: "Recipe") -> None:
    """Print the pre-flight's table; raises EnvironmentFault where the work would not fit."""
    from edgeft.compress import preflight, prepare

    seen = prepare(base, sources, recipe).forecast
    console.result(seen.to_dict())
    console.table(["artefact", "step", "peak MB", "about s", "disk MB", ""], preflight.rows_of(seen))
    console.note(
        f"  needs {seen.need_disk_bytes / 1e9:.2f} GB of disk, {seen.free_disk_bytes / 1e9:.2f} GB are free; "
        f"{seen.free_ram_bytes / 1e9:.2f} GB of memory are free"
    )
    preflight.refuse(seen, recipe.out)


def share_of(word: str) -> tuple[Path, float]:
    """DIR or DIR=SHARE."""
    folder, sign, share = word.rpartition("=")
    if sign and not Path(word).exists():
        try:
            return Path(folder), float(share)
        except ValueError:
            pass
    return Path(word), 1.0
