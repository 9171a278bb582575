"""`edgeft compress`."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeft import console
from edgeft.cli import options, recipes
from edgeft.errors import UsageError

if TYPE_CHECKING:
    from edgeft.compress.preflight import Forecast


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
@click.option(
    "--eval",
    "evaluation",
    type=click.Path(path_type=Path),
    help="Rows to gate on (a part of the calibration rows is kept aside if left out).",
)
@click.option(
    "--eval-limit",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Rows that the gate asks, spread over the file.",
)
@click.option(
    "--gate",
    "limits",
    type=recipes.FileOrMap(),
    metavar="FILE|MAP",
    help="Limits that differ from the defaults: a YAML file, or {4: {kld: 0.1}} itself.",
)
@click.option("--no-gate", is_flag=True, help="Check no artefact.")
@click.option(
    "--merge-base",
    type=click.Choice(["16bit", "dequantized", "dequantized-double", "auto"]),
    default="16bit",
    show_default=True,
    help="What a QLoRA adapter is merged into; auto measures on the rows of --eval.",
)
@click.option(
    "--fit", "size", metavar="SIZE", help="The least loss within SIZE (100MB, 1.2GiB): docs/fit.md."
)
@click.option(
    "--min-retention", type=click.FloatRange(0, 1), help="With --fit: adapter-gain retention at least."
)
@click.option("--min-tps", type=click.FloatRange(0), help="With --fit: decode tok/s of one stream at least.")
@click.option(
    "--profile", help="With --fit: the box whose tok/s is meant, predicted (this box, measured, if left out)."
)
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
    evaluation: Path | None,
    eval_limit: int,
    limits: Path | Mapping[Any, Any] | None,
    no_gate: bool,
    merge_base: str,
    size: str | None,
    min_retention: float | None,
    min_tps: float | None,
    profile: str | None,
    dry_run: bool,
) -> None:
    """Merge an adapter into its base and quantize.

    BASE is what `edgeft pull` takes. Always writes OUT/merged, then a folder a format, each with its
    artifact.json; what was made from the same inputs before is kept. What fails the gate goes to
    OUT/.rejected, and the command ends with 1 after the other formats (docs/gate.md).
    """
    from edgeft.compress import Recipe, compress, load_artifact, prepare
    from edgeft.compress.gate import summary
    from edgeft.engines.local import usable_cores
    from edgeft.errors import GateError
    from edgeft.pull import pull

    recipe = Recipe(
        out=out,
        formats=formats,
        calibration=calibration,
        name=name,
        threads=threads or usable_cores(),
        allow_seen_rows=allow_seen_rows,
        eval=evaluation,
        eval_limit=eval_limit,
        gate=limits,
        no_gate=no_gate,
        merge_base=merge_base,
    )
    sources, rejected = [share_of(word) for word in adapters], None
    try:
        if size is not None:
            from edgeft.cli import fit

            wanted = fit.wanted_of(size, min_retention, min_tps, profile)
            if dry_run:
                from edgeft.compress.fit_before import foresee

                _show(foresee(pull(base), sources, recipe, wanted)[0], out)
            else:
                fit.run(pull(base), sources, recipe, wanted)
            return
        if min_retention is not None or min_tps is not None or profile:
            raise UsageError("--min-retention, --min-tps and --profile go with --fit.", "--fit 100MB")
        if dry_run:
            _show(prepare(pull(base), sources, recipe).forecast, out)
            return
        artifacts = compress(pull(base), sources, recipe)
    except UsageError as error:
        raise recipes.naming_its_line(ctx, error) from None
    except GateError as error:
        if "made" not in error.details:
            raise
        artifacts, rejected = [load_artifact(out / name) for name in error.details["made"]], error
    console.result([a.to_dict() for a in artifacts])
    console.table(
        ["artefact", "MB", "bits/weight", "types", "made in s", "peak MB", "gate"],
        [
            [
                a.id,
                f"{a.size_bytes / 1e6:.1f}",
                f"{a.bits_per_weight:.2f}",
                ", ".join(f"{k} x{v['tensors']}" for k, v in sorted(a.tensor_types.items())),
                f"{a.cost['wall_s']:.1f}",
                f"{a.cost['peak_rss_bytes'] / 1e6:.0f}",
                summary(a.checks["gate"]) if "gate" in a.checks else "",
            ]
            for a in artifacts
        ],
    )
    if rejected:
        raise rejected


def _show(seen: "Forecast", out: Path) -> None:
    """Print the pre-flight's table; raises EnvironmentFault where the work would not fit."""
    from edgeft.compress import preflight

    console.result(seen.to_dict())
    console.table(["artefact", "step", "peak MB", "about s", "disk MB", ""], preflight.rows_of(seen))
    console.note(
        f"  needs {seen.need_disk_bytes / 1e9:.2f} GB of disk, {seen.free_disk_bytes / 1e9:.2f} GB are free; "
        f"{seen.free_ram_bytes / 1e9:.2f} GB of memory are free"
    )
    preflight.refuse(seen, out)


def share_of(word: str) -> tuple[Path, float]:
    """DIR or DIR=SHARE."""
    folder, sign, share = word.rpartition("=")
    if sign and not Path(word).exists():
        try:
            number = float(share)
        except ValueError:
            return Path(word), 1.0
        if not math.isfinite(number) or number == 0:
            raise UsageError(
                f"--adapter {word}: a share of {share} merges nothing that can be said.",
                f"--adapter {folder}=0.5",
            )
        return Path(folder), number
    return Path(word), 1.0
