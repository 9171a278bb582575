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
    costs,
    formats,
    gate_rows,
    knapsack,
    preflight,
    resume,
    sensitivity,
    sizes,
)
from edgeft.compress.artifacts import compress
from edgeft.compress.fit_choice import Wanted, choose, nothing_holds, row_of
from edgeft.compress.fit_report import frontier, plot, reported
from edgeft.compress.formats import Job, Spec, gguf
from edgeft.compress.formats.gguf_types import TensorTypes
from edgeft.compress.make import load_artifact
from edgeft.compress.merge import Source, plan
from edgeft.compress.recipe import Recipe
from edgeft.errors import EdgeftError, EnvironmentFault, GateError, UsageError
from edgeft.files import read_json, sha256_file, sha256_json, write_json, write_jsonl
from edgeft.rows import load_rows, row_hash
from edgeft.types import Artifact

STOCK = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
OTHER_FORMATS = ("onnx:int4", "onnx:int8", "gptq:4")


@dataclass(frozen=True)
class Scored:
    """What is known of the tensors: their choices, the file around them, llama.cpp's own mixtures."""

    choices: knapsack.Choices  # bytes with padding, estimated KL in nats
    around_bytes: dict[str, int]  # of header and other tensors, by the variant that decides those
    stock_bytes: dict[str, int]  # variant -> bytes of its file


def fit(base: Path, adapters: Sequence[Source], recipe: Recipe, wanted: Wanted) -> dict[str, Any]:
    """Build what fits, measure, choose; returns what OUT/fit.json holds.

    Raises UsageError without rows to calibrate and to choose on, GateError where nothing fits or holds, naming what
    would.
    """
    refuse(recipe)
    assert recipe.calibration and recipe.eval
    out = recipe.out
    halves = halved(recipe.eval, out / ".work" / "fit")
    recipe = replace(recipe, eval=halves["choose"])
    (merged,) = compress(base, adapters, replace(recipe, formats=()), keep_work=True)
    with resume.only_run(out):
        scored = score(base, adapters, recipe, merged)
    layouts = candidates(scored, wanted.size_bytes, out / ".work" / "fit")
    others = [f for f in OTHER_FORMATS if _may_fit(f, base, adapters, wanted.size_bytes)]
    asked = tuple(dict.fromkeys([*layouts, *others, *recipe.formats]))
    made = built(base, adapters, replace(recipe, formats=asked))
    rows = [row_of(a, out, wanted, recipe) for a in made if a.id != "merged"]
    chosen = choose(rows, wanted)
    report = {
        "schema": "edgeft/fit@1",
        "wanted": asdict(wanted),
        "chosen": chosen["id"] if chosen else None,
        "candidates": rows,
        "rejected": sorted(set(_ids(asked)) - {row["id"] for row in rows}),
        "frontier": frontier(scored.choices, min(scored.around_bytes.values())),
        "report": reported(chosen, base if adapters else None, recipe, halves["report"], merged)
        if chosen
        else None,
    }
    write_json(out / "fit.json", report)
    plot(report, out / "fit.svg")
    resume.forget_all(out / ".work")
    if chosen is None:
        raise GateError(*nothing_holds(rows, wanted))
    return report


def refuse(recipe: Recipe) -> None:
    """Raise UsageError where the rows or the gate that fitting needs are missing."""
    if recipe.calibration is None:
        raise UsageError(
            "--fit scores tensors on calibration rows, and there are none.", "--calibration rows.jsonl"
        )
    if recipe.eval is None:
        raise UsageError(
            "--fit chooses and reports on rows of its own, and there are none.", "--eval rows.jsonl"
        )
    if recipe.no_gate:
        raise UsageError(
            "--fit chooses by what the gate measures, and --no-gate is given.", "leave out --no-gate"
        )


def halved(rows_file: Path, work: Path) -> dict[str, Path]:
    """The eval rows as two files, `choose` and `report`; near-duplicates stay on one side."""
    rows = load_rows(rows_file)
    names = gate_rows.cluster_names(rows)
    ordered = sorted(set(names), key=lambda name: sha256_json(["fit", name]))
    if len(ordered) < 2:
        raise UsageError(
            f"{rows_file} is too small to choose on one half and report on the other.", "--eval rows.jsonl"
        )
    to_choose = set(ordered[: (len(ordered) + 1) // 2])
    parts = {"choose": [r for r, name in zip(rows, names, strict=True) if name in to_choose]}
    parts["report"] = [r for r, name in zip(rows, names, strict=True) if name not in to_choose]
    files = {}
    for name, part in parts.items():
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
                         source=str(source), variants=list(STOCK))  # fmt: skip
        key = sha256_json(
            [merged.sha256, sha256_file(calibration), merged.model_name, "edgeft/sensitivity@1"]
        )[:16]
        kept = work / f"sensitivity-{key}.json"
        if not kept.is_file():
            _need_memory(merged.parameters)
            found = child.call(
                "edgeft.compress.sensitivity:score",
                log=job.log,
                title="sensitivity of the tensors",
                merged=str(job.merged),
                rows_file=str(calibration),
                source=str(source),
                imatrix=str(imatrix),
                threads=recipe.threads,
            )
            write_json(kept, found["kl_nats"])
    return scored_of(dry, read_json(kept))


def _need_memory(parameters: int) -> None:
    """Raise EnvironmentFault where scoring would not fit: weights, gradients and changes of the tensors at once."""
    changes = min((2 * len(sensitivity.WIDE) + 4) * parameters, sensitivity.HELD_BYTES)
    needed, free = 8 * parameters + int(1.4 * changes) + 1_000_000_000, preflight.free_ram_bytes()
    if needed > free:
        raise EnvironmentFault(
            f"--fit scores tensors in about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free.",
            "--to gguf:q4_k_m (needs no scores), or a box with more memory",
        )


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
    return Scored(choices, around, stock)


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


def _may_fit(text: str, base: Path, adapters: Sequence[Source], size_bytes: int) -> bool:
    """Is a format's package here, and its predicted size within the bytes and more than half of them?"""
    try:
        spec = formats.parse(text)
    except EdgeftError:
        return False
    shape = costs.shape_of(plan(base, adapters), bool(adapters), None)
    return size_bytes / 2 <= costs.artifact_bytes(spec, shape) <= size_bytes


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
