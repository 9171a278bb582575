"""`edgeft bench lm-eval`: lm-eval's tasks on an artefact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeft import console
from edgeft.cli import options


@click.command("lm-eval")
@click.argument("artefact", type=click.Path(path_type=Path))
@click.option("--tasks", required=True, metavar="NAME,…", help="Tasks of lm-eval, or of --include-path.")
@click.option(
    "--include-path", type=click.Path(path_type=Path), help="A folder with task files (YAML) of your own."
)
@click.option("--limit", type=click.IntRange(1), help="Take so many items of each task, its first ones.")
@click.option("--chat", is_flag=True, help="Put prompts into the artefact's chat template.")
@click.option("--threads", type=click.IntRange(1), help="Threads of an engine (physical cores if left out).")
@click.option(
    "--context", type=click.IntRange(64), default=2048, show_default=True, help="Context in tokens."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("lm-eval"),
    show_default=True,
    help="Folder for results.json and samples.",
)
@options
def lm_eval_command(
    artefact: Path,
    tasks: str,
    include_path: Path | None,
    limit: int | None,
    chat: bool,
    threads: int | None,
    context: int,
    out: Path,
) -> None:
    """Run tasks of lm-eval on an artefact.

    Likelihoods come from the engine's logits, answers from the engine that serves. lm-eval loads data sets from the Hugging Face
    hub unless a task names local files. Needs the extra lm-eval.
    """
    from edgeft.bench.lm_eval import evaluate

    names = [word.strip() for word in tasks.split(",") if word.strip()]
    found = evaluate(artefact, names, out, include_path, limit, chat, threads, context)
    console.table(("task", "metric", "value", "stderr"), _rows(found["results"]), title=found["id"])
    console.result(found, f"{out / 'results.json'}")


def _rows(results: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """A line a task and metric; lm-eval writes metrics as 'acc,none' and their errors as 'acc_stderr,none'."""
    rows: list[tuple[str, ...]] = []
    for task, found in results.items():
        for key, value in found.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = found.get(f"{metric}_stderr,{chosen}")
            name = metric if chosen == "none" else f"{metric} ({chosen})"
            rows.append((task, name, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else "–"))
    return rows


COMMANDS = (lm_eval_command,)
