"""`--fit`: the artefact that loses least within a number of bytes.

Sizes are exact, from the quantizer's dry run; what each tensor costs in each type is estimated once and kept; a
knapsack makes the layouts; the best few are built, gated and measured, across formats. It chooses on one half of the
eval rows and reports on the other: what it chose by is never what it reports on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgeft import child, console
from edgeft.compress import (
    check_costs,
    fit_before,
    formats,
    gate_limits,
    knapsack,
    preflight,
    resume,
    sizes,
)
from edgeft.compress.artifacts import compress
from edgeft.compress.fit_advice import nothing_holds
from edgeft.compress.fit_choice import Wanted, choose, row_of
from edgeft.compress.fit_report import frontier, plot, reported
from edgeft.compress.formats import Job, Spec, gguf
from edgeft.compress.formats.gguf_types import TensorTypes
from edgeft.compress.make import load_artifact
from edgeft.compress.merge import Source
from edgeft.compress.recipe import Recipe
from edgeft.errors import GateError
from edgeft.files import read_json, sha256_json, write_json, write_jsonl
from edgeft.rows import row_hash
from edgeft.types import Artifact


@dataclass(frozen=True)
class Scored:
    """What is known of the tensors: their choices, the file around them, llama.cpp's own mixtures."""

    choices: knapsack.Choices  # bytes with padding, estimated KL in nats
    around_bytes: dict[str, int]  # of header and other tensors, by the variant that decides those
    stock_bytes: dict[str, int]  # variant -> bytes of its file
    header_bytes: int = 0


def fit(base: Path, adapters: Sequence[Source], recipe: Recipe, wanted: Wanted) -> dict[str, Any]:
    """Build what fits, measure, choose; returns what OUT/fit.json holds.

    Raises UsageError and EnvironmentFault for what is wrong with the inputs or does not fit, before any work; GateError
    where nothing fits or holds, naming what would, with the report under `details["fit"]` where there is one.
    """
    seen, others = fit_before.foresee(base, adapters, recipe, wanted)
    preflight.refuse(seen, recipe.out)
    assert recipe.calibration and recipe.eval
    out = recipe.out
    halves = halved(recipe.eval, out / ".work" / "fit")
    recipe = replace(recipe, eval=halves["choose"])
    (merged,) = compress(base, adapters, replace(recipe, formats=()), keep_work=True)
    with resume.only_run(out):
        scored = score(base, adapters, recipe, merged)
    layouts = candidates(scored, wanted.size_bytes, out / ".work" / "fit")
    asked = tuple(dict.fromkeys([*layouts, *others, *recipe.formats]))
    made = built(base, adapters, replace(recipe, formats=asked))
    rows = [row_of(a, out, wanted, recipe) for a in made if a.id != "merged"]
    chosen = choose(rows, wanted)
    sizes_and_losses = frontier(
        scored.choices, min(scored.around_bytes.values()), scored.header_bytes, merged.parameters
    )
    report = {
        "schema": "edgeft/fit@1",
        "wanted": asdict(wanted),
        "chosen": chosen["id"] if chosen else None,
        "candidates": rows,
        "rejected": sorted(set(_ids(asked)) - {row["id"] for row in rows}),
        "frontier": sizes_and_losses,
        "report": reported(chosen, base if adapters else None, recipe, halves["report"], merged)
        if chosen
        else None,
    }
    write_json(out / "fit.json", report)
    plot(report, out / "fit.svg")
    resume.forget_all(out / ".work")
    if chosen is None:
        limits = gate_limits.load(recipe.gate)
        raise GateError(*nothing_holds(rows, wanted, sizes_and_losses, limits), details={"fit": report})
    return report


def halved(rows_file: Path, work: Path) -> dict[str, Path]:
    """The halves of the eval rows as files, `choose` and `report`."""
    files = {}
    for name, part in fit_before.halves(rows_file).items():
        files[name] = work / f"{sha256_json([row_hash(r) for r in part])[:16]}" / f"{name}.jsonl"
        if not files[name].is_file():
            write_jsonl(files[name], part)
    return files


def score(base: Path, adapters: Sequence[Source], recipe: Recipe, merged: Artifact) -> Scored:
    """Sizes and sensitivities of the merged model's tensors; what was scored before is kept in `.work`."""
    assert recipe.calibration
    out, calibration = recipe.out, recipe.calibration.resolve()
    work = out / ".work"
    job = Job(
        spec=Spec("gguf", "q4_k_m"), merged=out / "merged", out=out / "gguf-q4_k_m", work=work, log=work / "fit.log",
        model_name=merged.model_name, calibration=calibration, threads=recipe.threads, base=base, adapters=tuple(adapters),
    )  # fmt: skip
    with console.step("scoring the tensors", job.log):
        source, _ = gguf.unquantized(job)
        imatrix, _, _ = gguf.seen_by_layers(job, source, with_moments=True)
        dry = child.call("edgeft.compress.sizes:dry_run", log=work / "sizes.log", title="the quantizer's dry run",
                         source=str(source), variants=list(fit_before.STOCK))  # fmt: skip
        kept = fit_before.scores_file(merged, recipe)
        if not kept.is_file():
            found = child.call(
                "edgeft.compress.sensitivity:score",
                log=job.log,
                title=check_costs.SCORES,
                merged=str(job.merged),
                rows_file=str(calibration),
                source=str(source),
                imatrix=str(imatrix),
                threads=recipe.threads,
            )
            write_json(kept, found["kl_nats"])
    return scored_of(dry, read_json(kept))


def scored_of(dry: Mapping[str, Any], kl_nats: Mapping[str, Mapping[str, float]]) -> Scored:
    """Choices with their sizes, out of the dry run and the sensitivities."""
    shapes = dry["source"]["shapes"]

    def padded(kind: str, name: str) -> int:
        return -(-sizes.tensor_bytes(kind, shapes[name]) // sizes.ALIGNMENT) * sizes.ALIGNMENT

    choices = {n: {k: (padded(k, n), loss) for k, loss in kinds.items()} for n, kinds in kl_nats.items()}
    around = {
        variant: int(dry["source"]["header_bytes"])
        + sum(padded(types[n], n) for n in shapes if n not in choices)
        for variant, types in dry["types"].items()
    }
    stock = {variant: sizes.file_bytes(dry["source"], types) for variant, types in dry["types"].items()}
    return Scored(choices, around, stock, int(dry["source"]["header_bytes"]))


def candidates(scored: Scored, size_bytes: int, work: Path) -> list[str]:
    """What to build in GGUF: llama.cpp's largest mixture that fits, and the knapsack's layout, as `--to` has them.

    Raises GateError with the smallest size that would do where nothing fits.
    """
    fitting = [v for v, size in scored.stock_bytes.items() if size <= size_bytes]
    stock = max(fitting, key=lambda v: scored.stock_bytes[v], default=None)
    around = stock or min(scored.stock_bytes, key=lambda v: scored.stock_bytes[v])
    layout = knapsack.fill(scored.choices, size_bytes - scored.around_bytes[around])
    if layout is None:
        smallest = scored.around_bytes[around] + sum(
            min(s for s, _ in c.values()) for c in scored.choices.values()
        )
        raise GateError(
            f"nothing fits in {size_bytes / 1e6:.1f} MB: the smallest types of every tensor take {smallest / 1e6:.1f} MB.",
            f"--fit {-(-smallest // 100_000) / 10:.1f}MB, or a smaller base",
        )
    types = TensorTypes(sorted(layout.items()))
    file = work / f"types-{types}.json"
    write_json(file, types)
    return [*([f"gguf:{stock}"] if stock else []), f"gguf:{around},types={file}"]


def _ids(asked: Sequence[str]) -> list[str]:
    return [formats.parse(text).id for text in asked if text != "merged"]


def built(base: Path, adapters: Sequence[Source], recipe: Recipe) -> list[Artifact]:
    """The candidates that passed the gate."""
    try:
        return compress(base, adapters, recipe, keep_work=True)
    except GateError as error:
        if "made" not in error.details:
            raise
        return [load_artifact(recipe.out / name) for name in error.details["made"]]
