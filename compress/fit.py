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
    gate,
    gate_limits,
    gate_rows,
    knapsack,
    preflight,
    resume,
    sensitivity,
    sizes,
)
from edgeft.compress.artifacts import compress
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
FRONTIER_POINTS = 16
SPEED_RUNS, SPEED_TOKENS, SPEED_PROMPT_CHARS = 3, 32, 400


@dataclass(frozen=True)
class Wanted:
    """What has to hold: bytes of all files, adapter-gain retention (a share), decode tok/s of one stream."""

    size_bytes: int
    min_retention: float | None = None
    min_tok_per_s: float | None = None
    profile: str | None = None  # a box that is not this one: its tok/s is predicted, not measured


@dataclass(frozen=True)
class Scored:
    """What is known of the tensors: their choices, the file around them, llama.cpp's own mixtures."""

    choices: dict[
        str, dict[str, tuple[int, float]]
    ]  # tensor -> type -> (bytes with padding, estimated KL in nats)
    around_bytes: dict[
        str, int
    ]  # variant that decides the other tensors -> bytes of header and those tensors
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
        "frontier": frontier(scored),
        "report": reported(chosen, base, adapters, recipe, halves["report"], merged) if chosen else None,
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


def row_of(artifact: Artifact, out: Path, wanted: Wanted, recipe: Recipe) -> dict[str, Any]:
    """A candidate's line: size, the gate's figures on the rows to choose on, tok/s."""
    checks = {line["check"]: line for line in artifact.checks[gate.NAME].get("checks", [])}
    kld, kept = checks.get(f"kld {gate.OWN}", {}), checks.get("retention", {})
    speed, how = tok_per_s(artifact, out, wanted, recipe)
    return {
        "id": artifact.id,
        "size_bytes": artifact.size_bytes,
        "bits_per_weight": artifact.bits_per_weight,
        "kld_nats": kld.get("seen"),
        "kld_ci95": kld.get("ci95"),
        "retention": kept.get("seen"),
        "retention_ci95": kept.get("ci95"),
        "tok_per_s": speed,
        "tok_per_s_is": how,
    }


def tok_per_s(artifact: Artifact, out: Path, wanted: Wanted, recipe: Recipe) -> tuple[float, str]:
    """(decode tok/s of one stream, measured here or predicted for the profile).

    The prediction is the profile's bandwidth over the file's bytes, which is the most that memory allows.
    """
    if wanted.profile:
        from edgeft.profiles import get_profile

        bandwidth = get_profile(wanted.profile).bandwidth_gb_per_s
        if bandwidth is None:
            raise UsageError(
                f"the profile {wanted.profile} has no bandwidth.", "edgeft profiles show …; name another"
            )
        return bandwidth * 1e9 / artifact.size_bytes, f"at most, predicted from {wanted.profile}'s bandwidth"
    from edgeft.bench import measure
    from edgeft.bench.callers import caller
    from edgeft.bench.targets import find

    assert recipe.eval
    with console.step(f"timing {artifact.id}"):
        (target,) = find([out / artifact.id], [])
        with caller(target, out / ".work" / "fit-speed.log", recipe.threads, 1024) as (ask, _):
            rows = load_rows(recipe.eval)
            found = measure.speed(ask, rows, SPEED_RUNS, SPEED_TOKENS, SPEED_PROMPT_CHARS)
    return found["decode_tok_per_s"]["p50"], "measured here"


def choose(rows: Sequence[dict[str, Any]], wanted: Wanted) -> dict[str, Any] | None:
    """The candidate of least KLD that holds what is wanted."""
    held = [row for row in rows if not broken(row, wanted)]
    return min(held, key=lambda row: (row["kld_nats"], row["size_bytes"]), default=None)


def broken(row: dict[str, Any], wanted: Wanted) -> list[str]:
    """What a candidate does not hold, in words."""
    found = []
    if row["size_bytes"] > wanted.size_bytes:
        found.append(f"{row['size_bytes'] / 1e6:.1f} MB")
    if row["kld_nats"] is None:
        found.append("KLD not measured")
    if wanted.min_retention is not None and (
        row["retention"] is None or row["retention"] < wanted.min_retention
    ):
        found.append(
            "retention not measured" if row["retention"] is None else f"retention {row['retention']:.3f}"
        )
    if wanted.min_tok_per_s is not None and row["tok_per_s"] < wanted.min_tok_per_s:
        found.append(f"{row['tok_per_s']:.1f} tok/s")
    return found


def nothing_holds(rows: Sequence[dict[str, Any]], wanted: Wanted) -> tuple[str, str]:
    """The two lines where every candidate breaks something."""
    if not rows:
        return "every candidate was rejected by the gate.", "less …/.rejected/*/reasons.json; a larger --fit"
    why = "; ".join(f"{row['id']}: {', '.join(broken(row, wanted))}" for row in rows)
    best = max((row["retention"] for row in rows if row["retention"] is not None), default=None)
    fastest = max(row["tok_per_s"] for row in rows)
    would = [f"a larger --fit than {wanted.size_bytes / 1e6:.1f}MB"]
    if wanted.min_retention is not None and best is not None and best < wanted.min_retention:
        would.append(f"--min-retention {best:.3f}")
    if wanted.min_tok_per_s is not None and fastest < wanted.min_tok_per_s:
        would = [f"--min-tps {fastest:.1f}, or a faster box"]
    return f"nothing holds all that is wanted ({why}).", " or ".join(would)


def frontier(scored: Scored) -> list[dict[str, Any]]:
    """What the knapsack expects at sizes from the smallest to the largest, estimated KL beside each."""
    around = min(scored.around_bytes.values())
    least = around + sum(min(s for s, _ in c.values()) for c in scored.choices.values())
    most = around + sum(max(s for s, _ in c.values()) for c in scored.choices.values())
    points = []
    for step in range(FRONTIER_POINTS):
        size = least + (most - least) * step // (FRONTIER_POINTS - 1)
        layout = knapsack.fill(scored.choices, size - around)
        if layout:
            points.append({"size_bytes": size, "estimated_kl_nats": knapsack.loss_of(scored.choices, layout)})
    return points


def reported(
    chosen: dict[str, Any],
    base: Path,
    adapters: Sequence[Source],
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
        base=base if adapters else None,
        base_sha256=gate.model_sha256(base) if adapters else "",
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

    from edgeft.files import write_text

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    points = report["frontier"]
    axes.plot([p["size_bytes"] / 1e6 for p in points], [p["estimated_kl_nats"] for p in points], "--", color="#888",
              label="estimated, nearest rounding")  # fmt: skip
    for row in (r for r in report["candidates"] if r["kld_nats"] is not None):
        color = "#b2182b" if row["id"] == report["chosen"] else "#2166ac"
        axes.plot(row["size_bytes"] / 1e6, row["kld_nats"], "o", color=color)
        axes.annotate(row["id"].replace("+types=", "\n"), (row["size_bytes"] / 1e6, row["kld_nats"]),
                      textcoords="offset points", xytext=(6, 4), fontsize=8)  # fmt: skip
    axes.axvline(report["wanted"]["size_bytes"] / 1e6, color="#444", linewidth=0.8, label="asked for")
    axes.set(xlabel="MB", ylabel="KLD against merged, nats", yscale="log")
    axes.legend(fontsize=8)
    figure.tight_layout()
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    plt.close(figure)
    write_text(file, drawn.getvalue())
