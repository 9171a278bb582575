"""A fitted policy on disk and in memory.

policy/policy.json           edgeft.types.Policy
policy/weights.safetensors   see TENSORS
policy/certificate.json      what `edgeft route calibrate` found; absent until then
policy/encoder/              routing.onnx and tokenizer.json, where it has heads on an embedding
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from edgeft.errors import UsageError, missing_extra
from edgeft.files import read_json, sha256_file, sha256_json, staged_folder, write_json
from edgeft.router import privacy, rule
from edgeft.router.features import SPEC
from edgeft.router.kernel import squared
from edgeft.router.minilm_export import ROUTING, TOKENIZER
from edgeft.router.surface import KINDS
from edgeft.types import Policy

MANIFEST, WEIGHTS, CERTIFICATE = "policy.json", "weights.safetensors", "certificate.json"
ENCODER = "encoder"  # folder within a policy that has an embedding head
FIT_AGAIN = "edgeft route fit report/ --weak ID --strong ID --out policy/"
# K candidates, D hashed columns, E dimensions of the embedding, m landmarks, n fitting rows. Float32 where not said.
# Column 0 of an output is the cheapest candidate's score; column i the gain of candidate i over it.
TENSORS = {
    "text.weights": "[K, D]",
    "text.bias": "[K]",
    "tokens.weights": "[K, D], of log(1 + output tokens)",
    "tokens.bias": "[K]",
    "landmark.vectors": "[m, E]",
    "landmark.weights": "[m, K]",
    "landmark.bias": "[K]",
    "embedding.mean": "[E], of the fitting rows; taken off before anything else",
    "memory.vectors": "float16 [n, E]",
    "memory.targets": "[n, K]",
    "looks.landmarks, .weights, .bias, .mean, .scale": "the head on what a text is made of; surface.*, that on its numbers",
    "blend": "[heads, K], those of hashed, kernel, neighbours, looks, surface that there are",
    "blend.means": "[K]",
    "judge.landmarks, .weights, .bias, .mean, .scale": "the judge of drafts: router/cascade.py",
    "clusters": "int8 [k, D], centres of the fitting rows: router/clusters.py",
    "seen.columns": "uint8 [D], 1 where a fitting row had the column",
    "seen.signatures": "uint32 [n, 32], MinHash of the fitting rows",
}


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy with its weights in memory."""

    policy: Policy
    weights: tuple[
        tuple[float, ...], ...
    ]  # one row a candidate: its score (the first), or its gain over the first
    bias: tuple[float, ...]
    arrays: dict[str, Any] = field(default_factory=dict, compare=False)  # the other tensors, by their names
    certificate: dict[str, Any] | None = None
    judge: Any = field(default=None, compare=False)  # cascade.Judge, where the policy drafts first
    encoder: Any = field(default=None, compare=False)  # text -> embedding, where the policy has such a head

    @cached_property
    def by_column(self) -> np.ndarray:
        """The weights as float64 [D, K]: what a hashed column adds lies side by side."""
        return np.ascontiguousarray(np.array(self.weights).T)

    @cached_property
    def bias_row(self) -> np.ndarray:
        """The biases as float64 [K]."""
        return np.array(self.bias)

    @cached_property
    def candidates(self) -> dict[str, dict[str, Any]]:
        """Id -> candidate, cheapest first; the last one is the strongest."""
        return {c["id"]: c for c in self.policy.candidates}

    @cached_property
    def places(self) -> dict[str, int]:
        """Id -> place in that order."""
        return {name: place for place, name in enumerate(self.candidates)}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The rule with defaults for what it does not say; not to be changed."""
        return {**rule.DEFAULTS, **self.policy.rule}

    @cached_property
    def sha256(self) -> str:
        """A hash of everything that decides: what a certificate and a log line name."""
        return policy_sha256(self.policy)


def policy_sha256(policy: Policy) -> str:
    """Hash of candidates, features, rule and privacy, without the dates and figures. Where an artefact lies does not count."""
    candidates = [{k: v for k, v in c.items() if k != "path"} for c in policy.candidates]
    return sha256_json([candidates, policy.features, policy.rule, policy.privacy, policy.cost])


def save_policy(
    policy: Policy, tensors: dict[str, Any], out: Path, encoder: Path | None = None
) -> LoadedPolicy:
    """Write the folder whole or not at all, with what it needs of an encoder's folder; returns the policy as it reads back."""
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is no policy; it is left alone.", "--out policy/")
    save_file = _safetensors().save_file
    with staged_folder(out) as staging:
        plain = {
            n: np.ascontiguousarray(v, np.float32) if v.dtype == np.float64 else v for n, v in tensors.items()
        }
        save_file(plain, staging / WEIGHTS)
        policy.features["weights_sha256"] = sha256_file(staging / WEIGHTS)
        if encoder:
            (staging / ENCODER).mkdir()
            for name in (ROUTING, TOKENIZER):
                shutil.copyfile(encoder / name, staging / ENCODER / name)
            policy.features["embedding"].pop("path")
        policy.save(staging / MANIFEST)
    return load_policy(out)


def load_policy(folder: Path, encoder: Any = None) -> LoadedPolicy:
    """Read a policy folder. Raises UsageError where it is absent, damaged, of other features, or holds a setting that is
    not known. `encoder` (text -> vector) is for tests; by default the policy's own is loaded when it has one.
    """
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} holds no {MANIFEST}.", FIT_AGAIN)
    policy = Policy.load(folder / MANIFEST)
    check(policy, folder)
    path = folder / WEIGHTS
    if not path.is_file() or sha256_file(path) != policy.features.get("weights_sha256"):
        raise UsageError(f"{path} is missing or not the one that {MANIFEST} names.", FIT_AGAIN)
    tensors = dict(_safetensors().load_file(path))
    k, columns = len(policy.candidates), SPEC["dimensions"]
    weights, bias = tensors.pop("text.weights"), tensors.pop("text.bias")
    if weights.shape != (k, columns) or bias.shape != (k,):
        raise UsageError(f"{path} has weights of shape {weights.shape} and {k} candidates.", FIT_AGAIN)
    if encoder is None and policy.features.get("embedding"):
        from edgeft.router.embedding import load_encoder

        encoder = load_encoder(policy.features["embedding"], folder / ENCODER)
    # What follows is computed once, not at every decision.
    for name in ("seen.columns", "tokens.weights", "tokens.bias"):
        if name in tensors:
            tensors[name] = tensors[name].astype(np.float64)
    if "memory.vectors" in tensors:
        tensors["memory.vectors"] = tensors["memory.vectors"].astype(np.float32)
    for name in ("landmark.vectors", *(f"{kind}.landmarks" for kind in KINDS)):
        if name in tensors:
            tensors[f"{name}.squared"] = squared(tensors[name])
    judge = None
    if block := policy.features.get("cascade"):
        from edgeft.router.cascade import load_judge

        try:
            judge = load_judge(tensors, block)
        except (KeyError, ValueError) as error:
            raise UsageError(f"{folder}: the policy's judge is not whole: {error}.", FIT_AGAIN) from None
    certificate = read_certificate(folder, policy)
    return LoadedPolicy(
        policy,
        tuple(map(tuple, weights.tolist())),
        tuple(bias.tolist()),
        tensors,
        certificate,
        judge,
        encoder,
    )


def read_certificate(folder: Path, policy: Policy) -> dict[str, Any] | None:
    """The folder's certificate with `void` telling why it does not hold for this policy (None where it does)."""
    if not (folder / CERTIFICATE).is_file():
        return None
    found = read_json(folder / CERTIFICATE)
    void = None
    if not isinstance(found, dict) or found.get("schema") != "edgeft/certificate@1":
        found, void = {}, "it is no certificate of this edgeft"
    elif found.get("policy_sha256") != policy_sha256(policy):
        void = "the policy, or an artefact of it, is another one than was certified"
    return {**found, "void": void}


def write_certificate(folder: Path, certificate: dict[str, Any]) -> None:
    """Put a certificate beside its policy."""
    write_json(folder / CERTIFICATE, certificate)


def check(policy: Policy, folder: Path) -> None:
    """Refuse what decide could misread: an unknown setting must not pass as none."""
    from edgeft.errors import unknown

    features = {
        k: v
        for k, v in policy.features.items()
        if k not in ("weights_sha256", "embedding", "cascade", *KINDS)
    }
    named = {kind: policy.features[kind].get("names") for kind in KINDS if kind in policy.features}
    if features != SPEC or any(names != list(KINDS[kind][0]) for kind, names in named.items()):
        raise UsageError(f"{folder}: the policy's features are not those of this edgeft.", FIT_AGAIN)
    if not policy.candidates or len({c["id"] for c in policy.candidates}) < len(policy.candidates):
        raise UsageError(f"{folder}: a policy needs candidates with names of their own.", FIT_AGAIN)
    for kind, given, known in (
        ("rule", policy.rule, rule.DEFAULTS),
        ("privacy", policy.privacy, privacy.DEFAULTS),
    ):
        for name in given:
            if name not in known:
                raise unknown(f"{folder}: the {kind} setting", name, known, f"{folder / MANIFEST}")
    for name in policy.privacy.get("patterns", ()):
        if name not in privacy.PATTERNS:
            raise unknown(f"{folder}: the pattern", name, privacy.PATTERNS, f"{folder / MANIFEST}")
    if policy.rule.get("kind") not in ("loss", "tradeoff"):
        raise UsageError(
            f"{folder}: the rule's kind {policy.rule.get('kind')!r} is neither 'loss' nor 'tradeoff'.",
            FIT_AGAIN,
        )


def _safetensors() -> Any:
    try:
        import safetensors.numpy as module
    except ImportError:
        raise missing_extra("safetensors", "serve") from None
    return module
