"""Adapter + base -> artefacts, each with its `artifact.json`.

    dist/merged/          safetensors, the reference
    dist/gguf-q4_k_m/     …one folder a format
    dist/.work/           scratch and logs, safe to delete
    dist/.rejected/ID/    what failed its check, with reasons.json

What stands there already and was made from the same inputs by the same recipe is kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft import child, console
from edgeft.compress import (
    converter,
    formats,
    gate_limits,
    gate_rows,
    merge_base,
    pre_tokenizer,
    preflight,
    proof,
    provenance,
    resume,
    tokenizers,
)
from edgeft.compress.adapter import header_of
from edgeft.compress.formats import Job, Spec
from edgeft.compress.make import REJECTED, make, reject
from edgeft.compress.merge import Source, plan
from edgeft.compress.recipe import Recipe
from edgeft.errors import GateError, UsageError
from edgeft.files import read_json, sha256_file
from edgeft.pull import origin_of
from edgeft.rows import load_rows, refuse_seen, row_hash, spread
from edgeft.types import Artifact

if TYPE_CHECKING:  # it imports engines, which `edgeft doctor` does without
    from edgeft.compress.gate import Gate

TUNE_MANIFEST = "edgeft-tune.json"


@dataclass(frozen=True)
class Prepared:
    """What `compress` knows before the work begins: everything that could be wrong was looked at."""

    base: Path
    adapters: list[Source]
    recipe: Recipe
    specs: list[Spec]
    name: str
    calibration: Path | None
    seen: dict[str, list[str]]  # kind of step -> hashes of the rows that training saw
    made_from: dict[str, Any]
    forecast: preflight.Forecast
    gate_rows: gate_rows.GateRows
    limits: gate_limits.Limits
    grid: dict[str, Any] | None  # what `grid_of` says of the base
    checks: bool = True


def compress(
    base: Path,
    adapter: Path | Sequence[Source] | None,
    recipe: Recipe,
    *,
    checks: bool = True,
    keep_work: bool = False,
) -> list[Artifact]:
    """Merge `adapter` into `base` and write every asked format; returns the artefacts, the merged model first.

    `adapter` is one folder, or several with their shares: W + sum of share * (what each makes of W - W).
    Without `checks` nothing is proven of what is made: for a copy that is compared byte by byte with a checked one.
    With `keep_work` what the steps hand to each other stays in `.work` for a next call.
    Raises UsageError for wrong inputs before anything is written, EnvironmentFault where a package,
    a tool, memory or disk space is missing. An artefact that fails the gate goes to `.rejected/` and the others are
    made all the same; GateError then names what was rejected at the end, with the others under `details["made"]`.
    """
    from edgeft.compress import grid

    ready = replace(prepare(base, adapter, recipe), checks=checks)
    if ready.grid and (said := grid.warning(ready.grid, ready.specs)):
        console.note(f"  {said}")
    preflight.refuse(ready.forecast, recipe.out, checks)
    with resume.only_run(recipe.out):
        made, rejected = _make_all(ready)
        if not keep_work:
            resume.forget_all(recipe.out / ".work")
    if rejected:
        raise _rejected(rejected, made, recipe.out)
    return made


def prepare(base: Path, adapter: Path | Sequence[Source] | None, recipe: Recipe) -> Prepared:
    """Check what was asked for, hash the inputs, and predict memory, disk and time. Writes nothing."""
    from edgeft.compress import gate, grid

    specs = [formats.parse(spec) for spec in dict.fromkeys(recipe.formats) if spec != "merged"]
    adapters = [(adapter, 1.0)] if isinstance(adapter, Path) else list(adapter or [])
    _refuse_names(recipe)
    planned = plan(base, adapters)
    tokenizers.refuse(base, [folder for folder, _ in adapters], planned)
    for adapter_folder, said in _of_other_bases(base, planned.adapters):
        console.note(
            f"  {adapter_folder} says it was trained on {said}; the base here is {default_name(base, [])}"
        )
    if planned.tied and planned.tied != "kept":
        console.note(f"  the head was tied to the embedding and is now {planned.tied}")
    seen = seen_by_adapters(adapters)
    calibration = recipe.calibration.resolve() if recipe.calibration else None
    _refuse_rows(recipe, calibration, seen)
    merge_base.refuse(recipe.merge_base, base, adapters, recipe.eval, [spec.format for spec in specs])
    for spec in specs:
        module = formats.module_of(spec.format)
        if calibration is None and (why := formats.needs_rows(spec)):
            raise UsageError(f"{spec} needs {why}.", "--calibration rows.jsonl")
        if hasattr(module, "refuse"):
            module.refuse(spec, base, planned)
    if any(spec.format.startswith("gguf") for spec in specs):
        pre_tokenizer.refuse(base, [folder for folder, _ in adapters], converter.location())
    chosen = gate_rows.GateRows([], None, "the gate was skipped")
    limits = gate_limits.load(recipe.gate)
    if specs and not recipe.no_gate:
        gate.need_engines([formats.module_of(s.format).ENGINE for s in specs if formats.gated(s.format)])
        chosen = gate_rows.choose(recipe.eval, calibration, seen, recipe.allow_seen_rows)
        if not chosen.rows:
            console.note(f"  task score and adapter-gain retention are not measured: {chosen.why_none}")
    with console.step("hashing the inputs"):
        made_from = provenance.inputs_of(base, adapters)
    name = recipe.name or default_name(base, adapters)
    forecast = preflight.forecast(planned, specs, recipe, made_from, chosen.rows)
    return Prepared(
        base, adapters, recipe, specs, name, calibration, seen, made_from, forecast, chosen, limits, grid.grid_of(base)
    )  # fmt: skip


def _of_other_bases(base: Path, adapters: Sequence[Any]) -> list[tuple[str, str]]:
    """(adapter, the base that it names) where that is neither this base's name nor its folder's.

    A note and no refusal: a name says little, and shapes are held to the base's anyway.
    """

    def last(name: Any) -> str:
        return str(name).rstrip("/").rsplit("/", 1)[-1].lower()

    here = {last(origin_of(base).get("name")), last(base.resolve())}
    told = [(a.folder.name, a.config.get("base_model_name_or_path")) for a in adapters]
    return [(name, str(said)) for name, said in told if said and last(said) not in here]


def _refuse_names(recipe: Recipe) -> None:
    """Refuse a model's name that can't be a file's, and a file in the place of the folder."""
    if recipe.name is not None and not re.fullmatch(r"[^/\\\0.][^/\\\0]*", recipe.name):
        raise UsageError(
            f"--name {recipe.name!r} can't be a file's name.",
            "--name support-desk (no slash, no dot in front)",
        )
    if recipe.out.exists() and not recipe.out.is_dir():
        raise UsageError(f"{recipe.out} is a file, and a folder for the artefacts is wanted.", "--out dist/")


def _refuse_rows(recipe: Recipe, calibration: Path | None, seen: dict[str, list[str]]) -> None:
    """Refuse rows that an earlier step of another kind has seen."""
    if recipe.allow_seen_rows:
        return
    if calibration:
        # Rows the adapter was trained on may calibrate; rows kept for a later purpose must not have been seen.
        kinds = {k: v for k, v in seen.items() if k not in ("train", "calibrate")}
        refuse_seen(load_rows(calibration), kinds, "calibrate", calibration)
    if recipe.merge_base == "auto" and recipe.eval:
        kinds = {k: v for k, v in seen.items() if k != "select"}
        refuse_seen(load_rows(recipe.eval), kinds, "choose the merge base", recipe.eval)


def _make_all(ready: Prepared) -> tuple[list[Artifact], list[GateError]]:
    """The merged model and every format, one after the other; (what was made, why others were rejected)."""
    out = ready.recipe.out
    work = out / ".work"
    provenance.remember_places(work, ready.base, ready.adapters, ready.recipe)
    merged = _merged(ready, work)
    held = None if ready.recipe.no_gate or not ready.checks else _gate(ready, merged)
    calibration = gate_rows.calibration_file(ready.gate_rows, ready.calibration, work / "gate")
    made, rejected = [merged], []
    done: list[Spec] = []
    for spec in ready.specs:
        job = Job(
            spec=spec,
            merged=out / "merged",
            out=out / spec.id,
            work=work,
            log=work / f"{spec.id}.log",
            model_name=ready.name,
            calibration=calibration,
            threads=ready.recipe.threads,
            base=ready.base,
            adapters=tuple(ready.adapters),
        )
        module = formats.module_of(spec.format)
        for each in [*(module.needs(job) if hasattr(module, "needs") else []), job]:
            if each.spec in done:
                continue
            done.append(each.spec)
            try:
                made.append(_artifact(each, merged, ready, held))
            except GateError as error:
                console.note(f"  {error.message}")
                rejected.append(error)
    return made, rejected


def _gate(ready: Prepared, merged: Artifact) -> Gate:
    """What this run's artefacts are held to."""
    from edgeft.compress import gate

    base = ready.base if ready.adapters else None
    return gate.Gate(
        merged=ready.recipe.out / "merged",
        merged_sha256=merged.sha256,
        base=base,
        base_sha256=gate.model_sha256(base) if base else "",
        rows=ready.gate_rows,
        limits=ready.limits,
        grid=ready.grid,
        work=ready.recipe.out / ".work" / "gate",
        threads=ready.recipe.threads,
        task_rows=ready.recipe.eval_limit,
    )


def _rejected(errors: list[GateError], made: list[Artifact], out: Path) -> GateError:
    """One error for all that was rejected in a run."""
    details = {"made": [artifact.id for artifact in made]}
    if len(errors) == 1:
        return GateError(errors[0].message, errors[0].hint, details)
    return GateError(
        f"{len(errors)} of {len(errors) + len(made) - 1} artefacts were rejected: {' '.join(e.message for e in errors)}",
        f"less {out / REJECTED}/*/reasons.json; wider formats keep more, --gate FILE sets other limits",
        details,
    )


def default_name(base: Path, adapters: Sequence[Source]) -> str:
    """A file name for the model: the base's, then the adapters' folders."""
    origin = origin_of(base).get("name", base.resolve().name).rsplit("/", 1)[-1]
    return "-".join([str(origin), *(folder.resolve().name for folder, _ in adapters)])


def seen_by_adapters(adapters: Sequence[Source]) -> dict[str, list[str]]:
    """Hashes of the rows that training saw, where `edgeft tune` recorded them."""
    seen: dict[str, list[str]] = {}
    for folder, _ in adapters:
        if (folder / TUNE_MANIFEST).is_file():
            for kind, hashes in read_json(folder / TUNE_MANIFEST).get("seen_rows", {}).items():
                seen.setdefault(kind, []).extend(hashes)
    return seen


def _merged(ready: Prepared, work: Path) -> Artifact:
    """`dist/merged`: the adapters added to their base."""
    base, adapters, recipe, seen = ready.base, ready.adapters, ready.recipe, ready.seen
    settings = {"merge": "float32, rounded once"}
    if recipe.merge_base != "16bit":
        settings["merge_base"] = recipe.merge_base
    if recipe.merge_base == "auto" and recipe.eval:
        settings["eval_sha256"] = sha256_file(recipe.eval)
        seen = {**seen, "select": [*seen.get("select", []), *map(row_hash, load_rows(recipe.eval))]}
    elif recipe.merge_base == "16bit":
        for folder, _ in adapters:
            if why := merge_base.trained_on_4bit(folder):
                console.note(
                    f"  {folder.name} was trained beside 4-bit weights ({why}); --merge-base auto measures which base suits it"
                )
    taken: dict[str, str] = {}

    def build(out: Path) -> dict[str, Any]:
        return merge_base.build(base, adapters, out, recipe.merge_base, recipe.eval, work, recipe.threads)

    def inspect(out: Path, spent: dict[str, Any]) -> dict[str, Any]:
        taken["merge_base"] = spent["merge_base"]
        tensor_bytes = tree_bytes_of(out, "*.safetensors")
        return {**spent, "tensor_bytes": tensor_bytes, "fallback_share": None}

    blank = Artifact(
        id="merged", format="safetensors", variant="merged", engine="transformers", model_name=ready.name, created_at="",
        made_from=ready.made_from, recipe=settings, recipe_sha256="",
        versions=provenance.installed(("torch", "safetensors")), files={},
        size_bytes=0, parameters=0, bits_per_weight=0.0, tensor_types={}, fallback_share=None, seen_rows=seen, cost={},
        asked=provenance.asked_of(recipe, ready.made_from, "merged", ready.name),
    )  # fmt: skip

    def check(out: Path) -> dict[str, Any]:
        if not adapters or not ready.checks:
            return {}
        return _prove(base, adapters, out, recipe, work, taken["merge_base"])

    title = "merging the adapter" if adapters else "copying the base"
    return make(blank, recipe.out / "merged", build, inspect, title, check, ready.forecast)


def _prove(
    base: Path, adapters: Sequence[Source], merged: Path, recipe: Recipe, work: Path, taken_base: str
) -> dict[str, Any]:
    """That the merged model is base + live adapter; where this box can't say so, that the proof is owed."""
    parameters = sum(weight_parameters(file) for file in base.glob("*.safetensors"))
    if why := proof.owed(parameters, several=len(adapters) > 1 or adapters[0][1] != 1.0):
        console.note(f"  the proof that merging changed nothing else is owed: {why}")
        return {"proof": {"status": "owed", "why": why}}
    found = child.call(
        "edgeft.compress.proof:prove",
        log=work / "proof.log",
        title="proving the merge",
        base=str(base),
        adapter=str(adapters[0][0]),
        merged=str(merged),
        rows_file=str(recipe.calibration) if recipe.calibration else None,
        threads=recipe.threads,
        merge_base=taken_base,
    )
    cost = {key: found.pop(key) for key in child.COST}
    held = proof.judge(found, str(recipe.out / REJECTED / "merged"))
    rows = spread(load_rows(recipe.calibration), proof.PROMPTS) if recipe.calibration else []
    return {"proof": {**held, "rows": [row_hash(row) for row in rows], "cost": cost}}


def weight_parameters(file: Path) -> int:
    """Parameters in a safetensors file."""
    return sum(math.prod(entry["shape"]) for entry in header_of(file).values())


def _artifact(job: Job, merged: Artifact, ready: Prepared, held: Gate | None) -> Artifact:
    """One format's folder."""
    from edgeft.compress import gate

    module = formats.module_of(job.spec.format)
    of_base = getattr(module, "OF_BASE", False)
    seen = {} if of_base else dict(merged.seen_rows)
    made_from = {**merged.made_from, "merged_sha256": merged.sha256}
    if of_base:
        made_from = {"base": merged.made_from["base"]}
    settings = module.settings(job)
    if "calibration_sha256" in settings and job.calibration:
        seen["calibrate"] = [row_hash(row) for row in load_rows(job.calibration)]
    gated = held if formats.gated(job.spec.format) else None
    if gated:
        seen = gate.seen_with(seen, gated.rows)
    blank = Artifact(
        id=job.spec.id, format=job.spec.format, variant=job.variant, engine=module.ENGINE, model_name=job.model_name, created_at="",
        made_from=made_from, recipe=settings, recipe_sha256="",
        versions=provenance.installed(module.PACKAGES), files={}, size_bytes=0, parameters=merged.parameters, bits_per_weight=0.0,
        tensor_types={}, fallback_share=None, seen_rows=seen, cost={},
        asked=provenance.asked_of(ready.recipe, ready.made_from, job.spec.words, job.model_name),
    )  # fmt: skip

    def build(out: Path) -> dict[str, Any]:
        job.log.unlink(missing_ok=True)
        return module.build(replace(job, out=out))

    def inspect(out: Path, _: dict[str, Any]) -> dict[str, Any]:
        return module.inspect(replace(job, out=out))

    def check(out: Path) -> dict[str, Any]:
        if gated is None:
            return {gate.NAME: {"status": "skipped"}}
        return {gate.NAME: gate.check(gated, out, job.spec.id, module.ENGINE, job.variant)}

    artifact = make(blank, job.out, build, inspect, f"making {job.spec}", check, ready.forecast)
    if gated and artifact.checks.get(gate.NAME, {}).get("key") != gated.key(job.variant):
        try:  # it stood there already, checked against something else or not at all
            artifact = gate.again(gated, job.out, artifact)
        except GateError as error:
            reject(job.out, job.out, error)
            job.out.rmdir()
            raise
    if (artifact.fallback_share or 0.0) > 0.05:
        console.note(
            f"  {artifact.id}: {artifact.fallback_share:.0%} of the parameters stand in rows that are no multiple of 256 "
            f"and fell back to wider types; {artifact.bits_per_weight:.2f} bits a weight in all"
        )
    return artifact


def tree_bytes_of(folder: Path, pattern: str) -> int:
    """Bytes of the tensors in a folder's safetensors, headers left out."""
    return sum(max(e["data_offsets"][1] for e in header_of(f).values()) for f in folder.glob(pattern))
