"""Before `--fit` works: what could be wrong with what was given, and what all of it will take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgeft.compress import check_costs, costs, formats, gate_rows, preflight
from edgeft.compress.artifacts import prepare
from edgeft.compress.fit_choice import Wanted, bandwidth_of
from edgeft.compress.formats import Spec
from edgeft.compress.make import load_artifact
from edgeft.compress.merge import Source, plan
from edgeft.compress.recipe import Recipe
from edgeft.errors import EdgeftError, UsageError
from edgeft.files import sha256_file, sha256_json
from edgeft.rows import TASKS, Row, load_rows
from edgeft.types import Artifact

STOCK = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
OTHER_FORMATS = ("onnx:int4", "onnx:int8", "gptq:4")
LAYOUT = {"types": "…"}  # of the knapsack's layout, which is not known yet


def refuse(adapters: Sequence[Source], recipe: Recipe, wanted: Wanted) -> None:
    """Raise UsageError where what fitting needs is missing: rows, the gate, a bandwidth, scored tasks."""
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
    if wanted.profile:
        bandwidth_of(wanted.profile)
    to_choose = halves(recipe.eval)["choose"]
    if wanted.min_retention is not None:
        _refuse_retention(adapters, recipe.eval, to_choose)


def _refuse_retention(adapters: Sequence[Source], rows_file: Path, rows: list[Row]) -> None:
    from edgeft.compress.gate_quality import scored

    if not adapters:
        raise UsageError(
            "--min-retention is about what an adapter brought, and none was given.",
            "--adapter DIR, or leave out --min-retention",
        )
    if not scored(rows):
        raise UsageError(
            f"--min-retention needs rows whose task is scored, and the half of {rows_file} to choose on has none.",
            f'"task" of a row: {", ".join(TASKS)}, json_schema with its "schema"; or leave out --min-retention',
        )


def halves(rows_file: Path) -> dict[str, list[Row]]:
    """The eval rows in two parts, `choose` and `report`; near-duplicates stay on one side. Raises UsageError for too few."""
    rows = load_rows(rows_file)
    names = gate_rows.cluster_names(rows)
    ordered = sorted(set(names), key=lambda name: sha256_json(["fit", name]))
    if len(ordered) < 2:
        raise UsageError(
            f"{rows_file} is too small to choose on one half and report on the other.", "--eval rows.jsonl"
        )
    to_choose = set(ordered[: (len(ordered) + 1) // 2])
    return {
        "choose": [r for r, name in zip(rows, names, strict=True) if name in to_choose],
        "report": [r for r, name in zip(rows, names, strict=True) if name not in to_choose],
    }


def foresee(
    base: Path, adapters: Sequence[Source], recipe: Recipe, wanted: Wanted
) -> tuple[preflight.Forecast, list[str]]:
    """(what the merge, the scores, the candidates and the gate will take; the candidates in other formats). Writes nothing.

    Raises UsageError and EnvironmentFault for all that is wrong with the inputs; memory and disk are `preflight.refuse`'s.
    """
    from edgeft.compress import gate

    refuse(adapters, recipe, wanted)
    planned = plan(base, adapters)
    shape = costs.shape_of(planned, bool(adapters), recipe.calibration)
    box, free = costs.probe(recipe.out.absolute()), preflight.free_ram_bytes()

    def may_fit(text: str) -> bool:
        """Are its package and engine here, and its predicted size and memory such that it may be chosen?"""
        try:
            spec = formats.parse(text)
            gate.need_engines([formats.module_of(spec.format).ENGINE])
        except EdgeftError:
            return False
        steps = [s for s in costs.format_steps(spec, shape, box) if not s.may_be_owed]
        fits = all(s.need_bytes <= free for s in steps)
        return fits and wanted.size_bytes / 2 <= costs.artifact_bytes(spec, shape) <= wanted.size_bytes

    others = [text for text in OTHER_FORMATS if may_fit(text)]
    sizes = {v: costs.artifact_bytes(Spec("gguf", v), shape) for v in STOCK}
    fitting = [v for v in STOCK if sizes[v] <= wanted.size_bytes]
    asked = [f"gguf:{v}" for v in fitting[-1:]] + others + list(recipe.formats)
    ready = prepare(base, adapters, replace(recipe, formats=tuple(asked or ["gguf:q4_k_m"])))
    layout = Spec("gguf", (fitting or STOCK[:1])[-1], LAYOUT)
    specs = [layout, *(ready.specs if asked else [])]
    scored = not _scores_stand(recipe, ready.forecast)
    seen = preflight.forecast(planned, specs, recipe, ready.made_from, ready.gate_rows.rows, scored)
    return replace(seen, disk_bytes={**seen.disk_bytes, layout.id: wanted.size_bytes}), others


def _scores_stand(recipe: Recipe, seen: preflight.Forecast) -> bool:
    if "merged" not in seen.standing:
        return False
    return scores_file(load_artifact(recipe.out / "merged"), recipe).is_file()


def scores_file(merged: Artifact, recipe: Recipe) -> Path:
    """Where the sensitivities of a merged model on these calibration rows are kept."""
    assert recipe.calibration
    rows_sha256 = sha256_file(recipe.calibration.resolve())
    key = sha256_json([merged.sha256, rows_sha256, merged.model_name, "edgeft/sensitivity@1"])[:16]
    return recipe.out / check_costs.WORK / f"sensitivity-{key}.json"
