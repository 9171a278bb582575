"""What is put under test: artefacts, plain model folders, GGUF files, other servers, API models."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgeft.engines import GGUF, engine
from edgeft.engines.llama_server import binary_of
from edgeft.errors import UsageError
from edgeft.files import sha256_file, sha256_json, tree_bytes
from edgeft.types import Artifact

MANIFEST = "artifact.json"
REFERENCE, BASE = "merged", "(base)"  # what others are compared with, and the model before tuning


@dataclass(frozen=True)
class Target:
    """One model under test."""

    id: str
    kind: str  # artifact, folder, api
    engine: str  # gguf, onnx, transformers; openai, litellm for kind api
    path: Path | None
    sha256: str | None
    size_bytes: int | None
    facts: dict[str, Any] = field(
        default_factory=dict
    )  # format, variant, bits_per_weight, parameters, url, model
    seen_rows: dict[str, list[str]] = field(default_factory=dict)


def find(places: list[Path], models: list[str]) -> list[Target]:
    """The targets in folders and by name, the reference first; ids are made unique by their parent's name.

    Raises UsageError for a place that holds nothing to run.
    """
    found = [target for place in places for target in _in(place)] + [_api(name) for name in models]
    if not found:
        raise UsageError("nothing to measure was named.", "edgeft bench dist/ --tasks rows.jsonl")
    counts: dict[str, int] = {}
    for target in found:
        counts[target.id] = counts.get(target.id, 0) + 1
    named, used = [], set()
    for target in found:
        name = target.id
        if counts[name] > 1 and name in used and target.path:
            name = f"{target.path.resolve().parent.name}/{name}"
        if name in used:
            raise UsageError(
                f"{target.path} and another target are both called '{name}'.", "name each place once"
            )
        used.add(name)
        named.append(Target(**{**target.__dict__, "id": name}))
    return sorted(named, key=lambda t: t.id != "merged")


def run_by(targets: list[Target], gguf_engine: str) -> list[Target]:
    """The targets, GGUF files by this engine. Raises UsageError where it can't run here."""
    if gguf_engine != "gguf" and any(t.engine in GGUF for t in targets):
        engine(gguf_engine)
        if gguf_engine == "llama_server":
            binary_of({})
    return [replace(t, engine=gguf_engine) if t.engine in GGUF else t for t in targets]


def _in(place: Path) -> list[Target]:
    if place.is_file() and place.suffix == ".gguf":
        digest = sha256_json({place.name: sha256_file(place)})
        return [Target(place.stem, "folder", "gguf", place, digest, place.stat().st_size, {"format": "gguf"})]
    if not place.is_dir():
        raise UsageError(f"there is no folder {place}.", "edgeft compress … --out dist/")
    if (place / MANIFEST).is_file():
        return [_artifact(place)]
    inside = sorted(p.parent for p in place.glob(f"*/{MANIFEST}"))
    if inside:
        return [_artifact(folder) for folder in inside]
    if (place / "config.json").is_file() and any(place.glob("*.safetensors")):
        from edgeft.pull import weights_sha256

        name = place.resolve().name
        facts = {"format": "safetensors"}
        return [
            Target(name, "folder", "transformers", place, weights_sha256(place), tree_bytes(place), facts)
        ]
    raise UsageError(
        f"{place} holds no artefact (no {MANIFEST}) and no model.", "edgeft compress … --out dist/"
    )


def _artifact(folder: Path) -> Target:
    """An artefact, its files compared with its manifest by size."""
    artifact = Artifact.load(folder / MANIFEST)
    for name, entry in artifact.files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            raise UsageError(
                f"{file} is not as {MANIFEST} says: missing or of another size.",
                "edgeft compress … (makes it again)",
            )
    facts = {
        "format": artifact.format,
        "variant": artifact.variant,
        "bits_per_weight": artifact.bits_per_weight,
        "parameters": artifact.parameters,
        "model_name": artifact.model_name,
        "merged_sha256": artifact.made_from.get("merged_sha256"),
    }
    return Target(
        artifact.id,
        "artifact",
        artifact.engine,
        folder,
        artifact.sha256,
        artifact.size_bytes,
        facts,
        artifact.seen_rows,
    )


def _api(name: str) -> Target:
    kind, _, rest = name.partition(":")
    if kind == "litellm" and rest:
        return Target(name, "api", "litellm", None, None, None, {"model": rest})
    if kind == "openai" and "#" in rest:
        url, _, model = rest.partition("#")
        return Target(
            name,
            "api",
            "openai",
            None,
            None,
            None,
            {"url": url.rstrip("/").removesuffix("/v1"), "model": model},
        )
    raise UsageError(
        f"--model '{name}' is neither litellm:NAME nor openai:URL#NAME.",
        "--model openai:http://127.0.0.1:8080#auto",
    )
