"""`edgeft tune`: train an adapter, or turn a CSV into rows."""

from pathlib import Path

import click

from edgeft import console
from edgeft.cli import Group, options


@click.group("tune", cls=Group, default="run")
def command() -> None:
    """Train a LoRA adapter on rows.

    `edgeft tune BASE --data rows.jsonl --out adapter/` is short for `edgeft tune run BASE …`.
    """


@command.command("run")
@click.argument("base")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Rows (JSON lines) to train on.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("adapter"),
    show_default=True,
    help="Folder for the adapter.",
)
@click.option("--epochs", type=click.IntRange(1), default=3, show_default=True)
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=2e-3, show_default=True)
@click.option("--rank", type=click.IntRange(1), default=16, show_default=True)
@click.option("--alpha", type=click.IntRange(1), default=32, show_default=True)
@click.option("--dropout", type=click.FloatRange(0, 1, max_open=True), default=0.0, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Rows a step.")
@click.option(
    "--max-length",
    type=click.IntRange(8),
    default=512,
    show_default=True,
    help="Tokens; longer rows are left out.",
)
@click.option(
    "--max-seconds",
    type=click.FloatRange(1),
    help="End training in this time; the learning rate falls to suit.",
)
@click.option("--last-layers", type=click.IntRange(1), help="Adapt only the last layers (all if left out).")
@click.option("--seed", type=int, default=7, show_default=True)
@options
def run(base: str, data: Path, out: Path, **changed: object) -> None:
    """Train a LoRA adapter: loss on the answer only, a tenth held out, early stopping.

    BASE is what `edgeft pull` takes. Saves the adapter with the best held-out loss, and the curve as
    curve.csv and curve.png.
    """
    from edgeft.pull import pull
    from edgeft.rows import load_rows
    from edgeft.tune import tune

    load_rows(data)  # wrong rows are told before a base is fetched
    manifest = tune(pull(base), data, out, **changed)
    best = manifest["result"]["best"]
    console.result(
        {"path": str(out), **manifest["result"]},
        f"{out}: held-out loss {best['held_out_loss']:.3f} nats, {best['held_out_accuracy']:.1%} of "
        f"{manifest['result']['rows_held_out']} held-out rows right, after {best['epoch']:.1f} epochs",
    )


@command.command("rows")
@click.argument("csv_file", type=click.Path(path_type=Path))
@click.option("--text", default="text", show_default=True, help="Column of the question.")
@click.option("--label", required=True, help="Column of the answer.")
@click.option("--system", required=True, help="System prompt put before every question.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("rows"),
    show_default=True,
    help="Folder for the parts.",
)
@options
def rows(csv_file: Path, text: str, label: str, system: str, out: Path) -> None:
    """Turn a CSV into rows, in five parts.

    Writes train, calibrate, select, certify and report .jsonl; a row's part is a hash, and
    near-duplicates stay together.
    """
    from edgeft.tune.rows import rows_from_csv, split, write_parts

    counts = write_parts(split(rows_from_csv(csv_file, text, label, system)), out)
    console.result(
        {"path": str(out), "rows": counts},
        "\n".join(f"{out / name}.jsonl: {n}" for name, n in counts.items()),
    )
