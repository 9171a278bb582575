"""An artefact made again from what its `artifact.json` records, and compared file by file."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from edgeft import console
from edgeft.compress import provenance
from edgeft.compress.artifacts import compress
from edgeft.compress.make import MANIFEST
from edgeft.compress.recipe import Recipe
from edgeft.errors import UsageError
from edgeft.types import Artifact


@dataclass(frozen=True)
class Rebuilt:
    """What came of a rebuild."""

    id: str
    identical: bool
    files: list[dict[str, Any]]  # file, bytes, verdict: identical, differs, missing, new
    notes: list[str] = field(default_factory=list)  # what may explain a difference

    def to_dict(self) -> dict[str, Any]:
        """The result as plain JSON types."""
        return asdict(self)


def rebuild(
    path: Path,
    base: str | None = None,
    adapters: Sequence[Path] = (),
    calibration: Path | None = None,
    out: Path | None = None,
    evaluation: Path | None = None,
) -> Rebuilt:
    """Make the artefact of `path` (its manifest or folder) again in `out`, a temporary folder if None.

    The checks of the first run (proof, gate) are not repeated: the bytes are what is compared.
    Inputs are looked for where they are given, else where they lay on this machine, else by the base's public name.
    Raises UsageError for a manifest that does not say how to make it, an input that is not found or whose hash is
    another, and what `compress` raises.
    """
    if not path.exists():
        raise UsageError(f"there is no artefact {path}.", f"ls {path.parent}")
    folder = path if path.is_dir() else path.parent
    artifact = Artifact.load(folder / MANIFEST)
    if not artifact.asked:
        raise UsageError(
            f"{folder / MANIFEST} does not say what it was made with: it is of an older edgeft.",
            "edgeft compress … (makes it anew)",
        )
    if out and (standing := next((p for p in (out / "merged", out / artifact.id) if p.exists()), None)):
        raise UsageError(
            f"{standing} stands there already, and a rebuild is made from nothing.",
            "--out FOLDER (an empty or new one)",
        )
    base_folder, sources, inputs = _inputs(
        artifact, folder, base, adapters, {"calibration": calibration, "eval": evaluation}
    )
    place: AbstractContextManager[str] = (
        nullcontext(str(out)) if out else tempfile.TemporaryDirectory(prefix="edgeft-rebuild-")
    )
    with place as scratch:
        recipe = Recipe(
            out=Path(scratch),
            formats=() if artifact.id == "merged" else (artifact.asked["to"],),
            **_words(artifact, inputs),
        )
        made = next(a for a in compress(base_folder, sources, recipe, checks=False) if a.id == artifact.id)
    return compare(artifact, made)


def compare(then: Artifact, now: Artifact) -> Rebuilt:
    """File by file, by hash; where one differs, what else is not as it was."""
    files = []
    for name in sorted({*then.files, *now.files}):
        old, new = then.files.get(name), now.files.get(name)
        verdict = "missing" if old else "new"
        if old and new:
            verdict = "identical" if old["sha256"] == new["sha256"] else "differs"
        files.append({"file": name, "bytes": (old or new or {})["bytes"], "verdict": verdict})
    identical = all(f["verdict"] == "identical" for f in files)
    return Rebuilt(then.id, identical, files, [] if identical else _differences(then, now))


def _differences(then: Artifact, now: Artifact) -> list[str]:
    """What decides or may decide the bytes and is not as it was."""
    pairs = {
        **{f"package {k}": (then.versions.get(k), v) for k, v in now.versions.items()},
        **{f"recipe {k}": (then.recipe.get(k), v) for k, v in now.recipe.items()},
        "merged model": (then.made_from.get("merged_sha256"), now.made_from.get("merged_sha256")),
        "CPU": (then.made_on.get("cpu"), now.made_on.get("cpu")),
        "GPU": tuple(", ".join(made.made_on.get("gpus", [])) or None for made in (then, now)),
        "Python": (then.made_on.get("python"), now.made_on.get("python")),
    }
    return [f"{name}: {old} then, {new} now" for name, (old, new) in pairs.items() if old != new]


def _inputs(
    artifact: Artifact, folder: Path, base: str | None, adapters: Sequence[Path], rows: dict[str, Path | None]
) -> tuple[Path, list[tuple[Path, float]], dict[str, Path]]:
    """(base, adapters with shares, other files by the recipe's word), found and with the recorded hashes."""
    from edgeft.pull import pull

    places = provenance.places_beside(folder)
    recorded = artifact.made_from
    listed = recorded.get("adapters", [])
    given = [str(a) for a in adapters] or places.get("adapters", [])
    if len(given) != len(listed):
        raise UsageError(
            f"{artifact.id} was made with {len(listed)} adapter(s) ({', '.join(a['name'] for a in listed)}); "
            f"{len(given)} are given or known here.",
            " ".join(["edgeft rebuild …", *(f"--adapter {a['name']}" for a in listed)]),
        )
    named = base or _present(places.get("base")) or artifact.asked.get("base")
    if not named:
        raise UsageError(
            f"where the base '{recorded['base']['name']}' lies is not known here.",
            "edgeft rebuild … --base DIR",
        )
    base_folder = pull(str(named))
    sources = [(Path(place), entry["share"]) for place, entry in zip(given, listed, strict=True)]
    for place, entry in zip(given, listed, strict=True):
        if not Path(place).is_dir():
            raise UsageError(
                f"the adapter '{entry['name']}' is not at {place}.", "edgeft rebuild … --adapter DIR"
            )
    _same_hashes(provenance.inputs_of(base_folder, sources), recorded)
    return base_folder, sources, _files(artifact, places, rows)


def _present(place: str | None) -> str | None:
    return place if place and Path(place).exists() else None


def _files(artifact: Artifact, places: dict[str, Any], rows: dict[str, Path | None]) -> dict[str, Path]:
    """The recorded files of the recipe (calibration rows and others) that are found, each with the recorded hash."""
    found: dict[str, Path] = {}
    for word, entry in artifact.asked.items():
        if not (isinstance(entry, dict) and set(entry) == {"name", "sha256"}):
            continue
        place = rows.get(word) or places.get(word)
        if place is None or not Path(place).exists():
            if word in rows:  # without --eval a part of the calibration rows would be kept aside
                raise UsageError(
                    f"where the rows '{entry['name']}' lie is not known here.",
                    f"edgeft rebuild … --{word} FILE",
                )
            console.note(
                f"  {word}: '{entry['name']}' is not found and left out; it decides no byte of the files"
            )
            continue
        if provenance.entry_of(Path(place))["sha256"] != entry["sha256"]:
            raise UsageError(
                f"{place} is not the '{entry['name']}' of {word} that {artifact.id} was made with: its hash is another.",
                f"give the right one; its SHA-256 is {entry['sha256']}",
            )
        found[word] = Path(place)
    return found


def _same_hashes(here: dict[str, Any], recorded: dict[str, Any]) -> None:
    """Raise UsageError naming the first input file whose hash is not the recorded one."""
    pairs = [("the base", here["base"], recorded["base"])]
    pairs += [
        (f"the adapter '{old['name']}'", new, old)
        for new, old in zip(here.get("adapters", []), recorded.get("adapters", []), strict=True)
    ]
    for role, new, old in pairs:
        for name in sorted({*new["files"], *old["files"]}):
            if new["files"].get(name) != old["files"].get(name):
                seen = "is not there" if name not in new["files"] else "has another hash"
                seen = "was not there then" if name not in old["files"] else seen
                raise UsageError(
                    f"{role} is not the one that was used: {name} {seen}.",
                    f"give the right one; the SHA-256 of {name} was {old['files'].get(name, 'none')}",
                )


def _words(artifact: Artifact, inputs: dict[str, Path]) -> dict[str, Any]:
    """The recipe's other fields as they were; files by where they lie now."""
    known = {f.name for f in fields(Recipe)} - {"out", "formats"}
    words: dict[str, Any] = {}
    for word, value in artifact.asked.items():
        if word not in known:
            continue
        if isinstance(value, dict) and set(value) == {"name", "sha256"}:
            if word in inputs:
                words[word] = inputs[word]
        else:
            words[word] = tuple(value) if isinstance(value, list) else value
    return words
