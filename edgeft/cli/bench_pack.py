"""`edgeft bench pack`: the merged model's distributions for boxes that can't load it."""

from __future__ import annotations

from pathlib import Path

import click

from edgeft import console
from edgeft.cli import options


@click.command("pack")
@click.argument("reference", type=click.Path(path_type=Path))
@click.option("--tasks", required=True, type=click.Path(path_type=Path), help="Rows (JSON lines) to pack.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("pack"),
    show_default=True,
    help="Folder for the pack.",
)
@click.option(
    "--limit", type=click.IntRange(1), help="Of so many rows, spread over the file, as bench answers."
)
@click.option(
    "--fidelity-rows",
    type=click.IntRange(1),
    default=48,
    show_default=True,
    help="Rows to pack, spread over those.",
)
@click.option(
    "--top-k", type=click.IntRange(1), default=64, show_default=True, help="Likeliest tokens kept a position."
)
@click.option(
    "--tail-samples",
    type=click.IntRange(0),
    default=16,
    show_default=True,
    help="Tokens drawn from the rest a position; with 0 KLD is a lower bound.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the drawing.")
@click.option("--threads", type=click.IntRange(1), help="Threads of torch (physical cores if left out).")
@options
def pack_command(
    reference: Path,
    tasks: Path,
    out: Path,
    limit: int | None,
    fidelity_rows: int,
    top_k: int,
    tail_samples: int,
    seed: int,
    threads: int | None,
) -> None:
    """Write the merged model's likeliest tokens for rows, a few MB.

    REFERENCE is the merged model, or the folder that compress wrote. A box that could never load it measures its KLD
    with `edgeft bench … --pack DIR`. The pack holds the rows as token ids.
    """
    from edgeft.bench.pack import write_pack

    facts = write_pack(reference, tasks, out, [limit, fidelity_rows], top_k, tail_samples, seed, threads)
    shown = {k: v for k, v in facts.items() if k != "rows"}
    console.result(
        {"pack": str(out), **shown},
        f"{out}: {len(facts['rows'])} rows, {facts['positions']} positions ({facts['answer_positions']} of answers), "
        f"{facts['bytes'] / 1e6:.2f} MB",
    )
