"""An artefact's folder: built under its key, looked at, checked, described, renamed; or kept, or rejected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgeft import child, console
from edgeft.compress import preflight, provenance, resume
from edgeft.compress.card import CARD, card
from edgeft.compress.sbom import SBOM, bill
from edgeft.errors import GateError, UsageError
from edgeft.files import (
    list_files,
    replace_folder,
    sha256_file,
    sha256_json,
    staged_folder,
    write_json,
    write_text,
)
from edgeft.types import Artifact

MANIFEST = "artifact.json"
REJECTED = ".rejected"


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


def make(
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
    with console.step(title) as say, staged_folder(target) as staging, child.recorded() as looked:
        spent, steps = resume.kept(built, staging, build)
        facts = inspect(staging, spent)
        say("checking it")
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
            checks={**spent.get("checks", {}), **checks},
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
    """Keep what failed its check where nobody takes it for an artefact, with the reason beside it.

    What stood under its name was made of other inputs than were asked for now: it goes as well, to NAME.before.
    """
    place = target.parent / REJECTED / target.name
    reasons = {"seen": error.message, "next": error.hint, **error.details}
    if target != staging and target.exists():
        before = place.with_name(f"{place.name}.before")
        place.parent.mkdir(exist_ok=True)
        replace_folder(target, before)
        reasons["before"] = f"what stood here was made of other inputs and lies in {REJECTED}/{before.name}"
        console.note(f"  {target.name}: {reasons['before']}")
    write_json(staging / "reasons.json", reasons)
    replace_folder(staging, place)
    (place / MANIFEST).unlink(missing_ok=True)
    staging.mkdir()  # the caller removes it
