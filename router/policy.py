"""A fitted policy on disk and in memory, and the decision it takes.

policy/policy.json           types.Policy
policy/weights.safetensors   weights float32 [dimensions], bias float32 [1]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.errors import UsageError, missing_extra
from edgeft.files import sha256_file, staged_folder
from edgeft.router.features import DIMENSIONS, SPEC, request_text, vector
from edgeft.types import Decision, Policy

MANIFEST = "policy.json"
WEIGHTS = "weights.safetensors"
ALWAYS_STRONG, ALWAYS_WEAK = -2.0, 2.0  # thresholds beyond any gain, which lies in -1..1


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy with its weights in memory. `weights` is a tuple: one lookup is faster than numpy's."""

    policy: Policy
    weights: tuple[float, ...]
    bias: float

    @property
    def candidates(self) -> dict[str, dict[str, Any]]:
        """Id -> candidate, the weak one first."""
        return {c["id"]: c for c in (self.policy.weak, self.policy.strong)}


def decide(policy: LoadedPolicy, request: str | Sequence[dict[str, Any]]) -> Decision:
    """Where one request (its text, or its messages) goes. Pure: no I/O, no clock, no randomness."""
    gain = predicted_gain(policy, request_text(request))
    threshold = policy.policy.threshold
    role, candidate = ("strong", policy.policy.strong) if gain >= threshold else ("weak", policy.policy.weak)
    if threshold == ALWAYS_STRONG:
        reason = "policy sends every request to strong"
    elif threshold == ALWAYS_WEAK:
        reason = "policy sends every request to weak"
    else:
        reason = (
            f"predicted gain {gain:+.3f} is {'at or above' if role == 'strong' else 'below'} {threshold:+.3f}"
        )
    return Decision(candidate["id"], role, gain, threshold, reason)


def predicted_gain(policy: LoadedPolicy, text: str) -> float:
    """Expected score of strong minus weak, in -1..1."""
    gain = policy.bias + sum(policy.weights[column] * value for column, value in vector(text).items())
    return min(1.0, max(-1.0, gain))


def save_policy(policy: Policy, weights: Any, bias: float, out: Path) -> LoadedPolicy:
    """Write the folder whole or not at all; returns the policy as it reads back."""
    import numpy as np

    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is no policy; it is left alone.", "--out policy/")
    save_file = _safetensors().save_file
    with staged_folder(out) as staging:
        tensors = {"weights": np.asarray(weights, np.float32), "bias": np.asarray([bias], np.float32)}
        save_file(tensors, staging / WEIGHTS)
        policy.features["weights_sha256"] = sha256_file(staging / WEIGHTS)
        policy.save(staging / MANIFEST)
    return load_policy(out)


def load_policy(folder: Path) -> LoadedPolicy:
    """Read a policy folder. Raises UsageError where it is absent, damaged, or of other features."""
    again = "edgeft route fit report/ --weak ID --strong ID --out policy/"
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} holds no {MANIFEST}.", again)
    policy = Policy.load(folder / MANIFEST)
    features = {k: v for k, v in policy.features.items() if k != "weights_sha256"}
    if features != SPEC:
        raise UsageError(f"{folder}: the policy's features are not those of this edgeft.", again)
    path = folder / WEIGHTS
    if not path.is_file() or sha256_file(path) != policy.features.get("weights_sha256"):
        raise UsageError(f"{path} is missing or not the one that {MANIFEST} names.", again)
    tensors = _safetensors().load_file(path)
    if tensors["weights"].shape != (DIMENSIONS,):
        raise UsageError(f"{path} has weights of shape {tensors['weights'].shape}.", again)
    return LoadedPolicy(policy, tuple(tensors["weights"].tolist()), float(tensors["bias"][0]))


def _safetensors() -> Any:
    try:
        import safetensors.numpy as module
    except ImportError:
        raise missing_extra("safetensors", "serve") from None
    return module
