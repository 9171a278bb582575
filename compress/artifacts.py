"""Adapter + base -> artefacts, each with its `artifact.json`.

    dist/merged/          safetensors, the reference
    dist/gguf-q4_k_m/     …one folder a format
    dist/.work/           scratch and logs, safe to delete
    dist/.rejected/ID/    what failed its check, with reasons.json

What stands there already and was made from the same inputs by the same recipe is kept.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft import child, console
from edgeft.compress import formats, gate_limits, gate_rows, proof
from edgeft.compress.adapter import header_of
from edgeft.compress.formats import Job
from edgeft.compress.merge import Source, plan
from edgeft.errors import GateError, UsageError
from edgeft.files import (
    list_files,
    need_disk,
    read_json,
    replace_folder,
    sha256_file,
    sha256_json,
    staged_folder,
    tree_bytes,
    write_json,
)
from edgeft.pull import origin_of, weights_sha256
from edgeft.rows import load_rows, refuse_seen, row_hash
from edgeft.types import Artifact

if TYPE_CHECKING:
    from edgeft.compress import gate  # imported when used: it brings the bench, and with it numpy

MANIFEST = "artifact.json"
REJECTED = ".rejected"
TUNE_MANIFEST = "edgeft-tune.json"


@dataclass(frozen=True)
class Recipe:
    """What `compress` makes and where."""

    out: Path
    formats: tuple[str, ...]  # format:variant[,option=value…]
    calibration: Path | None = None  # rows for the formats that calibrate
    name: str | None = None  # the model's name in files and metadata
    threads: int = os.cpu_count() or 1
    allow_seen_rows: bool = False
    eval: Path | None = (
        None  # rows of kind select for the gate; else a part of the calibration rows is kept aside
    )
    eval_limit: int = gate_limits.TASK_ROWS  # rows that the gate asks, spread over the file
    gate: Path | Mapping[Any, Any] | None = None  # limits that differ from gate.yaml
    no_gate: bool = False


def compress(base: Path, adapter: Path | Sequence[Source] | None, recipe: Recipe) -> list[Artifact]:
    """Merge `adapter` into `base` and write every asked format; returns the artefacts, the merged model first.

    `adapter` is one folder, or several with their shares: W + sum of share * (what each makes of W - W).
    Raises UsageError for wrong inputs before anything is written, EnvironmentFault where a package,
    a tool or disk space is missing. An artefact that fails the gate goes to `.rejected/` and the others are made all
    the same; GateError then names what was rejected at the end, with the others under `details["made"]`.
    """
    from edgeft.compress import gate, grid

    specs = [formats.parse(spec) for spec in dict.fromkeys(recipe.formats) if spec != "merged"]
    adapters = [(adapter, 1.0)] if isinstance(adapter, Path) else list(adapter or [])
    planned = plan(base, adapters)
    if planned.tied and planned.tied != "kept":
        console.note(f"  the head was tied to the embedding and is now {planned.tied}")
    seen = seen_by_adapters(adapters)
    calibration = recipe.calibration.resolve() if recipe.calibration else None
    if calibration:
        rows = load_rows(calibration)
        if not recipe.allow_seen_rows:
            # Rows the adapter was trained on may calibrate; rows kept for a later purpose must not have been seen.
            refuse_seen(
                rows,
                {k: v for k, v in seen.items() if k not in ("train", "calibrate")},
                "calibrate",
                calibration,
            )
    for spec in specs:
        if calibration is None and (why := formats.module_of(spec.format).NEEDS_ROWS.get(spec.variant)):
            raise UsageError(f"{spec} needs {why}.", "--calibration rows.jsonl")
    chosen = gate_rows.GateRows([], None, "the gate was skipped")
    limits = gate_limits.load(recipe.gate)
    if specs and not recipe.no_gate:
        gate.need_engines(
            [formats.module_of(spec.format).ENGINE for spec in specs if formats.gated(spec.format)]
        )
        chosen = gate_rows.choose(recipe.eval, calibration, seen, recipe.allow_seen_rows)
        if not chosen.rows:
            console.note(f"  task score and adapter-gain retention are not measured: {chosen.why_none}")
    if (coarse := grid.grid_of(base)) and (said := grid.warning(coarse, specs)):
        console.note(f"  {said}")
    need_disk(recipe.out, int(tree_bytes(base) * (1.2 + 0.8 * len(specs))))

    work = recipe.out / ".work"
    work.mkdir(parents=True, exist_ok=True)
    name = recipe.name or default_name(base, adapters)
    merged = _merged(base, adapters, recipe, name, seen, work)
    calibration = gate_rows.calibration_file(chosen, calibration, work / "gate")
    held = (
        None if recipe.no_gate else _gate(base if adapters else None, recipe, chosen, limits, coarse, merged)
    )
    made, rejected = [merged], []
    for spec in specs:
        job = Job(
            spec=spec,
            merged=recipe.out / "merged",
            out=recipe.out / spec.id,
            work=work,
            log=work / f"{spec.id}.log",
            model_name=name,
            calibration=calibration,
            threads=recipe.threads,
        )
        try:
            made.append(_artifact(job, merged, held))
        except GateError as error:
            console.note(f"  {error.message}")
            rejected.append(error)
    for leftover in work.glob("source-*"):
        leftover.unlink()
    if rejected:
        raise _rejected(rejected, made, recipe.out)
    return made


def _gate(
    base: Path | None, recipe: Recipe, chosen: gate_rows.GateRows, limits: gate_limits.Limits, coarse: Any, merged: Artifact
) -> gate.Gate:  # fmt: skip
    """What this run's artefacts are held to."""
    from edgeft.compress import gate

    return gate.Gate(
        merged=recipe.out / "merged",
        merged_sha256=merged.sha256,
        base=base,
        base_sha256=gate.model_sha256(base) if base else "",
        rows=chosen,
        limits=limits,
        grid=coarse,
        work=recipe.out / ".work" / "gate",
        threads=recipe.threads,
        task_rows=recipe.eval_limit,
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


def load_artifact(folder: Path, verify: bool = False) -> Artifact:
    """Read a folder's `artifact.json`; with `verify` every file's size and hash is compared.

    Raises UsageError naming the file that is missing or changed.
    """
    artifact = Artifact.load(folder / MANIFEST)
    for name, entry in artifact.files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            raise UsageError(
                f"{file} is not as {MANIFEST} says: missing or of another size.",
                "edgeft compress … (makes it again)",
            )
        if verify and sha256_file(file) != entry["sha256"]:
            raise UsageError(
                f"{file} was changed: its hash is not the one in {MANIFEST}.",
                "edgeft compress … (makes it again)",
            )
    return artifact


def _merged(
    base: Path, adapters: Sequence[Source], recipe: Recipe, name: str, seen: dict[str, list[str]], work: Path
) -> Artifact:
    """`dist/merged`: the adapters added to their base."""
    made_from: dict[str, Any] = {
        "base": {**origin_without_files(base), "weights_sha256": weights_sha256(base)}
    }
    if adapters:
        made_from["adapters"] = [
            {
                "name": folder.resolve().name,
                "share": share,
                "weights_sha256": weights_sha256(folder),
                "config_sha256": sha256_file(folder / "adapter_config.json"),
            }
            for folder, share in adapters
        ]
    settings = {"merge": "float32, rounded once"}

    def build(out: Path) -> dict[str, Any]:
        return child.call(
            "edgeft.compress.merge:merge",
            log=work / "merge.log",
            title="merging",
            base=str(base),
            adapters=[[str(folder), share] for folder, share in adapters],
            out=str(out),
        )

    def inspect(out: Path, spent: dict[str, Any]) -> dict[str, Any]:
        tensor_bytes = tree_bytes_of(out, "*.safetensors")
        return {**spent, "tensor_bytes": tensor_bytes, "fallback_share": None}

    blank = Artifact(
        id="merged", format="safetensors", variant="merged", engine="transformers", model_name=name, created_at="",
        made_from=made_from, recipe=settings, recipe_sha256="", versions=versions_of(("torch", "safetensors")), files={},
        size_bytes=0, parameters=0, bits_per_weight=0.0, tensor_types={}, fallback_share=None, seen_rows=seen, cost={},
    )  # fmt: skip

    def check(out: Path) -> dict[str, Any]:
        return _prove(base, adapters, out, recipe, work) if adapters else {}

    title = "merging the adapter" if adapters else "copying the base"
    return _make(blank, recipe.out / "merged", build, inspect, title, check)


def _prove(
    base: Path, adapters: Sequence[Source], merged: Path, recipe: Recipe, work: Path
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
    )
    cost = {key: found.pop(key) for key in child.COST}
    held = proof.judge(found, str(recipe.out / REJECTED / "merged"))
    if held["status"] != "held":
        console.note(f"  the proof {held['status']}")
    return {"proof": {**held, "cost": cost}}


def weight_parameters(file: Path) -> int:
    """Parameters in a safetensors file."""
    return sum(math.prod(entry["shape"]) for entry in header_of(file).values())


def _artifact(job: Job, merged: Artifact, held: gate.Gate | None) -> Artifact:
    """One format's folder."""
    from edgeft.compress import gate

    module = formats.module_of(job.spec.format)
    seen = dict(merged.seen_rows)
    settings = module.settings(job)
    if "calibration_sha256" in settings and job.calibration:
        seen["calibrate"] = [row_hash(row) for row in load_rows(job.calibration)]
    gated = held if formats.gated(job.spec.format) else None
    if gated:
        seen = gate.seen_with(seen, gated.rows)
    blank = Artifact(
        id=job.spec.id, format=job.spec.format, variant=job.variant, engine=module.ENGINE, model_name=job.model_name, created_at="",
        made_from={**merged.made_from, "merged_sha256": merged.sha256}, recipe=settings, recipe_sha256="",
        versions=versions_of(module.PACKAGES), files={}, size_bytes=0, parameters=merged.parameters, bits_per_weight=0.0,
        tensor_types={}, fallback_share=None, seen_rows=seen, cost={},
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

    artifact = _make(blank, job.out, build, inspect, f"making {job.spec}", check)
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


def _make(
    blank: Artifact,
    target: Path,
    build: Callable[[Path], dict[str, Any]],
    inspect: Callable[[Path, dict[str, Any]], dict[str, Any]],
    title: str,
    check: Callable[[Path], dict[str, Any]] = lambda _: {},
) -> Artifact:
    """Build `target` under a temporary name, look at what was made, write its manifest, rename; or keep what stands there."""
    key = sha256_json(
        [blank.format, blank.variant, blank.model_name, blank.made_from, blank.recipe, blank.versions]
    )
    if (target / MANIFEST).is_file():
        try:
            standing = load_artifact(target, verify=True)
        except UsageError:
            standing = None
        if standing and standing.recipe_sha256 == key:
            console.note(f"  {blank.id}: kept, made from the same inputs before")
            return standing
    with console.step(title) as say, staged_folder(target) as staging:
        spent = build(staging)
        facts = inspect(staging, spent)
        say("checking it")
        try:
            checks = check(staging)
        except GateError as error:
            reject(staging, target, error)
            raise
        parameters = blank.parameters or int(facts["parameters"])
        files = list_files(staging)
        artifact = replace(
            blank,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            recipe_sha256=key,
            files=files,
            size_bytes=sum(f["bytes"] for f in files.values()),
            parameters=parameters,
            bits_per_weight=8 * facts["tensor_bytes"] / parameters,
            tensor_types=facts["tensor_types"],
            fallback_share=facts["fallback_share"],
            cost={"wall_s": spent["wall_s"], "peak_rss_bytes": spent["peak_rss_bytes"]},
            checks=checks,
        )
        artifact.save(staging / MANIFEST)
    return artifact


def reject(staging: Path, target: Path, error: GateError) -> None:
    """Keep what failed its check where nobody takes it for an artefact, with the reason beside it."""
    place = target.parent / REJECTED / target.name
    (staging / MANIFEST).unlink(missing_ok=True)
    write_json(staging / "reasons.json", {"seen": error.message, "next": error.hint, **error.details})
    replace_folder(staging, place)
    staging.mkdir()  # the caller removes it


def origin_without_files(base: Path) -> dict[str, Any]:
    """Where the base came from, without the list of its files."""
    return {k: v for k, v in origin_of(base).items() if k != "files"}


def tree_bytes_of(folder: Path, pattern: str) -> int:
    """Bytes of the tensors in a folder's safetensors, headers left out."""
    return sum(max(e["data_offsets"][1] for e in header_of(f).values()) for f in folder.glob(pattern))


def versions_of(packages: tuple[str, ...]) -> dict[str, str]:
    """Installed versions of packages; those absent are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
