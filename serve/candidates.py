"""From a policy's candidates to upstreams: check that they are what was measured, say how each is run or reached."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from edgeft.errors import EdgeftError, UsageError
from edgeft.home import cache_dir
from edgeft.serve.config import Config, secret
from edgeft.serve.pool import LocalSpec
from edgeft.serve.upstream import REMOTE_SLOTS, HttpUpstream, Upstream

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


def spec_of(candidate: dict[str, Any], config: Config) -> LocalSpec:
    """How a checked local candidate is run."""
    own, engines = config.model(candidate["id"]), config.engines
    path = own.path or Path(candidate["path"])
    name = "".join(c if c.isalnum() or c in "-_." else "+" for c in candidate["id"])
    binary = engines.llama_server if candidate["engine"] == "gguf" else None
    return LocalSpec(
        id=candidate["id"],
        path=path,
        engine="llama_server" if binary else candidate["engine"],
        context=own.context or engines.context,
        threads=own.threads or engines.threads,
        slots=own.slots or engines.slots,
        adapters={name: str(path) for name, path in own.adapters.items()},
        options={
            **({"binary": str(binary)} if binary else {}),
            **({"embeddings": True} if own.embeddings else {}),
        },
        log=cache_dir("logs") / f"{name}.log",
    )


def remote(candidate: dict[str, Any], config: Config) -> Upstream:
    """What answers for an API candidate or another server. Raises UsageError where its key is missing."""
    own = config.model(candidate["id"])
    kind, url, model = address_of(candidate["id"])
    key = secret(own.key_env, own.key_file, f"the key of '{candidate['id']}'")
    if kind == "litellm":
        from edgeft.serve.provider import LitellmUpstream

        return LitellmUpstream(model, key, own.silence_s)
    return HttpUpstream(
        url,
        model,
        key or os.environ.get("OPENAI_API_KEY"),
        always_stream=own.stream == "always",
        connect_s=own.connect_s,
        silence_s=own.silence_s,
        ca_file=own.ca_file,
        slots=own.slots or REMOTE_SLOTS,
        trust_env=candidate.get("remote", True),
    )


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
