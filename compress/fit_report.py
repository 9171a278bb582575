"""What `--fit` tells: the frontier that the knapsack expects, the chosen artefact on rows of its own, the plot."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

from edgeft import console
from edgeft.compress import gate, gate_limits, gate_rows, knapsack
from edgeft.compress.make import load_artifact
from edgeft.compress.recipe import Recipe
from edgeft.errors import GateError
from edgeft.files import write_text
from edgeft.rows import load_rows, row_hash
from edgeft.types import Artifact

FRONTIER_POINTS = 46


def frontier(
    choices: knapsack.Choices, around: int, header_bytes: int, parameters: int
) -> list[dict[str, Any]]:
    """What the knapsack expects at sizes from the smallest to the largest, estimated KL beside each.

    `around` bytes of the file are no choice of it, `header_bytes` of them no weights.
    """
    least = around + sum(min(s for s, _ in c.values()) for c in choices.values())
    most = around + sum(max(s for s, _ in c.values()) for c in choices.values())
    points = []
    for step in range(FRONTIER_POINTS):
        size = least + (most - least) * step // (FRONTIER_POINTS - 1)
        layout = knapsack.fill(choices, size - around)
        if layout:
            points.append(
                {
                    "size_bytes": size,
                    "bits_per_weight": 8 * (size - header_bytes) / parameters,
                    "estimated_kl_nats": knapsack.loss_of(choices, layout),
                }
            )
    return points


def reported(
    chosen: dict[str, Any],
    base: Path | None,
    recipe: Recipe,
    rows_file: Path,
    merged: Artifact,
) -> dict[str, Any]:
    """The chosen artefact on the half of the rows that nothing was chosen by."""
    artifact = load_artifact(recipe.out / chosen["id"])
    rows = load_rows(rows_file)
    held = gate.Gate(
        merged=recipe.out / "merged",
        merged_sha256=merged.sha256,
        base=base,
        base_sha256=gate.model_sha256(base) if base else "",
        rows=gate_rows.GateRows(rows, rows_file.name),
        limits=gate_limits.load(recipe.gate),
        grid=None,
        work=recipe.out / ".work" / "fit" / "gate",
        threads=recipe.threads,
        task_rows=recipe.eval_limit,
    )
    with console.step(f"reporting {artifact.id} on rows it was not chosen by"):
        try:
            entry = gate.check(held, recipe.out / artifact.id, artifact.id, artifact.engine, artifact.variant)
        except GateError as error:
            entry = error.details["gate"]
    return {"rows": [row_hash(row) for row in rows], "status": entry["status"], "checks": entry["checks"]}


def plot(report: Mapping[str, Any], file: Path) -> None:
    """KLD over size: what the knapsack expects, what was measured, what was asked for."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    points = report["frontier"]
    axes.plot([p["size_bytes"] / 1e6 for p in points], [p["estimated_kl_nats"] for p in points], "--", color="#888",
              label="estimated, nearest rounding")  # fmt: skip
    measured = [r for r in report["candidates"] if r["kld_nats"] is not None]
    for row, marker in zip(measured, cycle("osD^vP*X"), strict=False):
        chosen = row["id"] == report["chosen"]
        axes.plot(row["size_bytes"] / 1e6, row["kld_nats"], marker, color="#b2182b" if chosen else "#2166ac", alpha=0.8,
                  linestyle="", label=f"{row['id']}: {row['kld_nats']:.3g} nats{', chosen' if chosen else ''}")  # fmt: skip
    axes.axvline(report["wanted"]["size_bytes"] / 1e6, color="#444", linewidth=0.8, label="asked for")
    axes.set(xlabel="MB", ylabel="KLD against merged, nats", yscale="log")
    axes.legend(fontsize=8)
    figure.tight_layout()
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    plt.close(figure)
    write_text(file, drawn.getvalue())
