"""What a bundle brings that is no artefact: scripts for the box, the systemd unit, files for containers; and a policy of one model."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

HERE = Path(__file__).parent


def text(name: str, **values: str) -> bytes:
    """A template with its @{names} filled in."""

    class At(Template):
        delimiter = "@"

    return At((HERE / name).read_text(encoding="utf-8")).substitute(values).encode()


def serve_words(config: Mapping[str, Any]) -> str:
    """The options of `edgeft serve` that the bundle was made for."""
    words = ["--host", config["host"], "--port", str(config["port"]), "--context", str(config["context"])]
    if config.get("slots", 1) > 1:
        words += ["--slots", str(config["slots"])]
    if config.get("threads"):
        words += ["--threads", str(config["threads"])]
    return shlex.join(words)


def scripts(config: Mapping[str, Any], venv: str, python: str) -> dict[str, bytes]:
    """install.sh, service.sh and the unit."""
    values = {"venv": venv, "python": python, "serve": serve_words(config), "port": str(config["port"])}
    return {name: text(name, **values) for name in ("install.sh", "service.sh", "edgeft.service")}


def policy_of_one(target: Any) -> dict[str, bytes]:
    """A policy that sends every request to one artefact; its weights are zeros and decide nothing."""
    import hashlib

    import numpy as np
    from safetensors.numpy import save

    from edgeft.files import sha256_json
    from edgeft.router.features import DIMENSIONS, SPEC
    from edgeft.router.policy import MANIFEST, WEIGHTS
    from edgeft.router.rule import DEFAULTS
    from edgeft.types import Policy

    tensors = save(
        {"text.weights": np.zeros((1, DIMENSIONS), np.float32), "text.bias": np.zeros(1, np.float32)}
    )
    candidate = {
        "id": target.id, "kind": target.kind, "engine": target.engine, "path": target.path.resolve().name,
        "artifact_sha256": target.sha256, "price": None, "remote": False,
    }  # fmt: skip
    policy = Policy(
        created_at=f"for {sha256_json(candidate)[:12]}", candidates=[candidate],
        features={**SPEC, "weights_sha256": hashlib.sha256(tensors).hexdigest()}, rule=dict(DEFAULTS),
        fitted={"verdict": "one artefact, no routing"},
    )  # fmt: skip
    return {MANIFEST: (json.dumps(policy.to_dict(), indent=1) + "\n").encode(), WEIGHTS: tensors}
