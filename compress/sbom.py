"""The bill of materials beside an artefact: CycloneDX 1.6 (ECMA-424), as JSON.

Base, adapters and the artefact are `machine-learning-model` components with their files and hashes below them, the
packages that made it are libraries with their purl. Nothing in it is a date or a random number: the serial number is
a name-based UUID over the contents, so the same artefact has the same bill.
"""

from __future__ import annotations

import json
import uuid
from typing import Any
from urllib.parse import quote

from edgeft.types import Artifact

SBOM = "sbom.cdx.json"
SPEC_VERSION = "1.6"
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://cyclonedx.org/schema/bom-1.6.schema.json")


def bill(artifact: Artifact) -> dict[str, Any]:
    """The bill of materials of an artefact as plain JSON types."""
    base = artifact.made_from.get("base", {})
    adapters = artifact.made_from.get("adapters", [])
    models = [_model("base", 0, base), *(_model("adapter", i, a) for i, a in enumerate(adapters))]
    packages = [_package(name, v) for name, v in sorted(_versions(artifact).items())]
    libraries = [_llama_cpp(name, build) for name, build in sorted(_builds(artifact).items())]
    subject = _subject(artifact)
    components = [*models, *packages, *libraries]
    made: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "version": 1,
        "metadata": {"component": subject},
        "components": components,
        "dependencies": [
            {"ref": subject["bom-ref"], "dependsOn": [c["bom-ref"] for c in components]},
            *({"ref": c["bom-ref"]} for c in components),
        ],
    }
    serial = uuid.uuid5(NAMESPACE, json.dumps(made, sort_keys=True))
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "serialNumber": f"urn:uuid:{serial}",
        **made,
    }


def _subject(artifact: Artifact) -> dict[str, Any]:
    kinds = {
        "edgeft:id": artifact.id,
        "edgeft:format": f"{artifact.format}:{artifact.variant}",
        "edgeft:recipe_sha256": artifact.recipe_sha256,
        "edgeft:bits_per_weight": f"{artifact.bits_per_weight:.4f}",
        "edgeft:parameters": str(artifact.parameters),
    }
    return {
        "type": "machine-learning-model",
        "bom-ref": f"artifact:{artifact.sha256}",
        "name": f"{artifact.model_name} ({artifact.id})",
        "version": artifact.sha256[:16],
        "components": _files("artifact", {name: f["sha256"] for name, f in artifact.files.items()}),
        "properties": [{"name": k, "value": v} for k, v in kinds.items()],
    }


def _model(role: str, index: int, made_from: dict[str, Any]) -> dict[str, Any]:
    """The base or an adapter: what is known of it, its files below it."""
    digest = made_from["weights_sha256"]
    known = {k: v for k, v in made_from.items() if k not in ("name", "files", "license")}
    component: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": f"{role}:{index}:{digest}",
        "name": str(made_from["name"]),
        "version": str(made_from.get("revision") or digest[:16]),
        "description": f"the {role} that was merged" if role == "adapter" else "the base model",
        "components": _files(f"{role}:{index}", made_from.get("files", {})),
        "properties": [
            {"name": f"edgeft:{k}", "value": v if isinstance(v, str) else json.dumps(v, sort_keys=True)}
            for k, v in sorted(known.items())
        ],
    }
    if license_id := made_from.get("license"):
        component["licenses"] = [{"license": {"id": license_id}}]
    return component


def _files(owner: str, hashes: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "type": "file",
            "bom-ref": f"file:{owner}:{name}",
            "name": name,
            "hashes": [{"alg": "SHA-256", "content": digest}],
        }
        for name, digest in sorted(hashes.items())
    ]


def _package(name: str, version: str) -> dict[str, Any]:
    # purl: PyPI names are lower case with dashes, and a version's + is escaped.
    purl = f"pkg:pypi/{name.lower().replace('_', '-')}@{quote(version, safe='')}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def _llama_cpp(package: str, build: dict[str, Any]) -> dict[str, Any]:
    """The llama.cpp inside a package; without a purl, since what the library tells of itself is no released version."""
    told = {k: str(v) for k, v in sorted(build.items()) if k != "version"}
    return {
        "type": "library",
        "bom-ref": f"llama.cpp in {package} {build['version']}",
        "name": "llama.cpp",
        "version": told.get("commit", "unknown"),
        "description": f"as built into {package} {build['version']}",
        "properties": [{"name": f"edgeft:{k}", "value": v} for k, v in told.items()],
    }


def _versions(artifact: Artifact) -> dict[str, str]:
    return {**artifact.made_on.get("packages", {}), **artifact.versions}


def _builds(artifact: Artifact) -> dict[str, dict[str, Any]]:
    return artifact.made_on.get("llama_cpp", {})
