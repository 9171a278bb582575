"""From a policy's candidates to upstreams: check that they are what was measured, then start them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from edgeft.errors import EdgeftError, UsageError
from edgeft.serve.upstream import HttpUpstream, LitellmUpstream, Upstream

FIT_AGAIN = "edgeft bench … and edgeft route fit …, on the artefact that will serve"


def check(candidate: dict[str, Any], artifacts: Path | None = None) -> dict[str, Any]:
    """The candidate with the path where it lies now. `artifacts` is a folder to look in instead of the
    policy's own path. Raises UsageError where it is missing or is not what the policy was fitted on.
    """
    if candidate["kind"] == "api":
        address_of(candidate["id"])
        return candidate
    if candidate["path"] is None:
        raise UsageError(
            f"the policy's candidate '{candidate['id']}' comes from a table and names nothing that could be served.",
            FIT_AGAIN,
        )
    path = Path(candidate["path"])
    if artifacts is not None:
        path = artifacts / path.name
    if not path.exists():
        raise UsageError(
            f"the policy's artefact '{candidate['id']}' is missing: there is no {path}.",
            "edgeft serve … --artifacts DIR, the folder that holds it",
        )
    try:
        found = _sha256(candidate, path)
    except EdgeftError as error:
        raise UsageError(
            f"the policy's artefact '{candidate['id']}' was changed: {error.message}", FIT_AGAIN
        ) from None
    if found != candidate["artifact_sha256"]:
        raise UsageError(
            f"the artefact '{candidate['id']}' in {path} is not the one that the policy was fitted on "
            f"({found[:12]} instead of {str(candidate['artifact_sha256'])[:12]}).",
            FIT_AGAIN,
        )
    return {**candidate, "path": str(path)}


def start(candidate: dict[str, Any], logs: Path, threads: int | None, context: int) -> Upstream:
    """Start a checked candidate; blocks until it is loaded. Raises EnvironmentFault where it can't be."""
    if candidate["kind"] == "api":
        kind, url, model = address_of(candidate["id"])
        if kind == "litellm":
            return LitellmUpstream(model)
        return HttpUpstream(url, model, os.environ.get("OPENAI_API_KEY"))
    from edgeft.engines.local import LocalModel

    name = "".join(c if c.isalnum() or c in "-_." else "+" for c in candidate["id"])
    local = LocalModel(
        Path(candidate["path"]),
        candidate["engine"],
        log=logs / f"{name}.log",
        threads=threads,
        context=context,
        name=candidate["id"],
    )
    return HttpUpstream(local.url, candidate["id"], local.key, slots=1, local=local)


def address_of(candidate_id: str) -> tuple[str, str, str]:
    """(litellm or openai, URL without /v1, model) of an API candidate's id."""
    kind, _, rest = candidate_id.partition(":")
    if kind == "litellm" and rest:
        return kind, "", rest
    url, sharp, model = rest.partition("#")
    if kind == "openai" and sharp and model:
        return kind, url.rstrip("/").removesuffix("/v1"), model
    raise UsageError(
        f"'{candidate_id}' is neither litellm:NAME nor openai:URL#NAME.", "edgeft route fit --help"
    )


def _sha256(candidate: dict[str, Any], path: Path) -> str:
    """The hash by which the report names an artefact, a GGUF file, or a model folder."""
    if candidate["kind"] == "artifact":
        from edgeft.compress import load_artifact

        return load_artifact(path, verify=True).sha256
    if path.is_file():
        from edgeft.files import sha256_file, sha256_json

        return sha256_json({path.name: sha256_file(path)})
    from edgeft.pull import weights_sha256

    return weights_sha256(path)
