"""Adapter + base -> artefacts, each with its `artifact.json`.

    dist/merged/          safetensors, the reference
    dist/gguf-q4_k_m/     …one folder a format
    dist/.work/           scratch and logs, safe to delete
    dist/.rejected/ID/    what failed its check, with reasons.json

What stands there already and was made from the same inputs by the same recipe is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgeft import child, console
from edgeft.compress import formats, preflight, proof, provenance, resume
from edgeft.compress.adapter import header_of
from edgeft.compress.card import CARD, card
from edgeft.compress.formats import Job, Spec
from edgeft.compress.merge import Source, plan
from edgeft.compress.recipe import Recipe
from edgeft.compress.sbom import SBOM, bill
from edgeft.errors import GateError, UsageError
from edgeft.files import (
    list_files,
    read_json,
    replace_folder,
    sha256_file,
    sha256_json,
    staged_folder,
    write_json,
    write_text,
)
from edgeft.pull import origin_of
from edgeft.rows import load_rows, refuse_seen, row_hash, spread
from edgeft.types import Artifact

MANIFEST = "artifact.json"
REJECTED = ".rejected"
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
    checks: bool = True


def compress(
    base: Path, adapter: Path | Sequence[Source] | None, recipe: Recipe, *, checks: bool = True
) -> list[Artifact]:
    """Merge `adapter` into `base` and write every asked format; returns the artefacts, the merged model first.

    `adapter` is one folder, or several with their shares: W + sum of share * (what each makes of W - W).
    Without `checks` nothing is proven of what is made: for a copy that is compared byte by byte with a checked one.
    Raises UsageError for wrong inputs before anything is written, EnvironmentFault where a package,
    a tool, memory or disk space is missing.
    """
    ready = replace(prepare(base, adapter, recipe), checks=checks)
    preflight.refuse(ready.forecast, recipe.out)
    with resume.only_run(recipe.out):
        return _make_all(ready)


def prepare(base: Path, adapter: Path | Sequence[Source] | None, recipe: Recipe) -> Prepared:
    """Check what was asked for, hash the inputs, and predict memory, disk and time. Writes nothing."""
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
    with console.step("hashing the inputs"):
        made_from = provenance.inputs_of(base, adapters)
    name = recipe.name or default_name(base, adapters)
    forecast = preflight.forecast(planned, specs, recipe, made_from)
    return Prepared(base, adapters, recipe, specs, name, calibration, seen, made_from, forecast)


def _make_all(ready: Prepared) -> list[Artifact]:
    """The merged model and every format, one after the other."""
    out = ready.recipe.out
    work = out / ".work"
    provenance.remember_places(work, ready.base, ready.adapters, ready.recipe)
    merged = _merged(ready, work)
    made = [merged]
    for spec in ready.specs:
        job = Job(
            spec=spec,
            merged=out / "merged",
            out=out / spec.id,
            work=work,
            log=work / f"{spec.id}.log",
            model_name=ready.name,
            calibration=ready.calibration,
            threads=ready.recipe.threads,
        )
        made.append(_artifact(job, merged, ready))
    resume.forget_all(work)
    return made


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


def _merged(ready: Prepared, work: Path) -> Artifact:
    """`dist/merged`: the adapters added to their base."""
    base, adapters, recipe = ready.base, ready.adapters, ready.recipe
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
        id="merged", format="safetensors", variant="merged", engine="transformers", model_name=ready.name, created_at="",
        made_from=ready.made_from, recipe=settings, recipe_sha256="", versions=versions_of(("torch", "safetensors")), files={},
        size_bytes=0, parameters=0, bits_per_weight=0.0, tensor_types={}, fallback_share=None, seen_rows=ready.seen, cost={},
        asked=provenance.asked_of(recipe, ready.made_from, "merged", ready.name),
    )  # fmt: skip

    def check(out: Path) -> dict[str, Any]:
        return _prove(base, adapters, out, recipe, work) if adapters and ready.checks else {}

    title = "merging the adapter" if adapters else "copying the base"
    return _make(blank, recipe.out / "merged", build, inspect, title, check, ready.forecast)


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
    rows = spread(load_rows(recipe.calibration), proof.PROMPTS) if recipe.calibration else []
    return {"proof": {**held, "rows": [row_hash(row) for row in rows], "cost": cost}}


def weight_parameters(file: Path) -> int:
    """Parameters in a safetensors file."""
    return sum(math.prod(entry["shape"]) for entry in header_of(file).values())


def _artifact(job: Job, merged: Artifact, ready: Prepared) -> Artifact:
    """One format's folder."""
    module = formats.module_of(job.spec.format)
    seen = dict(merged.seen_rows)
    settings = module.settings(job)
    if "calibration_sha256" in settings and job.calibration:
        seen["calibrate"] = [row_hash(row) for row in load_rows(job.calibration)]
    blank = Artifact(
        id=job.spec.id, format=job.spec.format, variant=job.variant, engine=module.ENGINE, model_name=job.model_name, created_at="",
        made_from={**merged.made_from, "merged_sha256": merged.sha256}, recipe=settings, recipe_sha256="",
        versions=versions_of(module.PACKAGES), files={}, size_bytes=0, parameters=merged.parameters, bits_per_weight=0.0,
        tensor_types={}, fallback_share=None, seen_rows=seen, cost={},
        asked=provenance.asked_of(ready.recipe, ready.made_from, str(job.spec), job.model_name),
    )  # fmt: skip

    def build(out: Path) -> dict[str, Any]:
        job.log.unlink(missing_ok=True)
        return module.build(replace(job, out=out))

    def inspect(out: Path, _: dict[str, Any]) -> dict[str, Any]:
        return module.inspect(replace(job, out=out))

    artifact = _make(blank, job.out, build, inspect, f"making {job.spec}", forecast=ready.forecast)
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
    forecast: preflight.Forecast | None = None,
) -> Artifact:
    """Build `target` under a temporary name, look at what was made, write its manifest, rename; or keep what stands there.

    What was built stays in `.work` under its key until then, so that a kill during the checks does not lose it.
    """
    key = sha256_json(
        [blank.format, blank.variant, blank.model_name, blank.made_from, blank.recipe, blank.versions]
    )
    built = target.parent / ".work" / f"made-{blank.id}-{key[:16]}"
    if (target / MANIFEST).is_file():
        try:
            standing = load_artifact(target, verify=True)
        except UsageError:
            standing = None
        if standing and standing.recipe_sha256 == key:
            console.note(f"  {blank.id}: kept, made from the same inputs before")
            describe(standing, target)
            return standing
    with console.step(title), staged_folder(target) as staging, child.recorded() as looked:
        spent, steps = resume.kept(built, staging, build)
        facts = inspect(staging, spent)
        try:
            checks = check(staging)
        except GateError as error:
            reject(staging, target, error)
            resume.forget(built)
            raise
        parameters = blank.parameters or int(facts["parameters"])
        files = list_files(staging, leave_out=frozenset((CARD, SBOM)))
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
            made_on=provenance.made_on(),
        )
        artifact = preflight.beside(artifact, [*steps, *looked], forecast)
        artifact.save(staging / MANIFEST)
        describe(artifact, staging)
    resume.forget(built)
    return artifact


def describe(artifact: Artifact, folder: Path) -> None:
    """Write the model card and the bill of materials, each where it is not there yet: a person may have edited it."""
    if not (folder / CARD).exists():
        write_text(folder / CARD, card(artifact))
    if not (folder / SBOM).exists():
        write_json(folder / SBOM, bill(artifact))


def reject(staging: Path, target: Path, error: GateError) -> None:
    """Keep what failed its check where nobody takes it for an artefact, with the reason beside it."""
    place = target.parent / REJECTED / target.name
    write_json(staging / "reasons.json", {"seen": error.message, "next": error.hint})
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
    return provenance.installed(packages)
