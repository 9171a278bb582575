"""From artefacts to a bundle: everything a box needs to serve them, in one reproducible tar, checked to fit before it is made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeft import console
from edgeft.bench.targets import Target, find
from edgeft.deploy import archive, packages, preflight, templates
from edgeft.deploy.signing import sign
from edgeft.errors import UsageError
from edgeft.profiles import Profile
from edgeft.router.minilm_export import ROUTING, TOKENIZER
from edgeft.router.policy import ENCODER
from edgeft.types import Policy

# What llama.cpp's wheels for x86 are compiled for (its default where the builder's own machine is not the yardstick).
# What the wheels take from the system; a Debian of essential packages alone has neither.
LIBRARIES = {
    "gguf": ("libstdc++.so.6", "libgomp.so.1"),
    "onnx": ("libstdc++.so.6",),
    "encoder": ("libstdc++.so.6",),
}
CPU_FLAGS = {("gguf", "amd64"): ("avx2", "bmi2", "f16c", "fma")}


@dataclass(frozen=True)
class Wanted:
    """What a bundle is to hold and how it will be served."""

    artifacts: Sequence[Path]
    profile: Profile
    policy: Path | None = None
    packs: Sequence[Path] = ()
    context: int = 2048
    slots: int = 1
    threads: int | None = None
    port: int = 8080
    arch: str | None = None  # amd64, arm64; None: the profile's
    python: str = "3.11"
    lock_only: bool = False
    key: Path | None = None  # an SSH key that signs
    extra: Mapping[str, str] = field(default_factory=dict)


def bundle(wanted: Wanted, out: Path) -> dict[str, Any]:
    """Write the tar; returns its manifest. Raises UsageError where it would not run there, before anything is written."""
    files, manifest = contents(wanted)
    ordered: dict[str, archive.Source] = {archive.MANIFEST: archive.encode(manifest)}
    ordered[archive.SUMS] = archive.sums(manifest["files"], ordered[archive.MANIFEST])  # type: ignore[arg-type]
    if wanted.key:
        ordered[archive.SIGNATURE] = sign(ordered[archive.SUMS], wanted.key)  # type: ignore[arg-type]
    ordered |= {name: files[name] for name in sorted(files)}
    with console.step(f"writing {out.name}"):
        archive.write(out, ordered)
    return manifest


def contents(wanted: Wanted) -> tuple[dict[str, archive.Source], dict[str, Any]]:
    """(name -> file or content, manifest without it and its sums)."""
    arch = wanted.arch or preflight.arch_of(wanted.profile)
    targets, policy_files, policy_facts = _choose(wanted)
    encoder = {"encoder"} if f"{ENCODER}/{ROUTING}" in policy_files else set()
    need = preflight.memory_bytes(targets, wanted.context, wanted.slots, bool(encoder))
    preflight.refuse_too_big(need, wanted.profile, wanted.context, wanted.slots)
    files: dict[str, archive.Source] = {}
    for target in targets:
        assert target.path is not None
        folder = target.path
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            files[f"artifacts/{folder.resolve().name}/{path.relative_to(folder).as_posix()}"] = path
    files |= {f"policy/{name}": content for name, content in policy_files.items()}
    for pack in wanted.packs:
        for path in sorted(p for p in pack.rglob("*") if p.is_file()):
            files[f"packs/{pack.resolve().name}/{path.relative_to(pack).as_posix()}"] = path
    engines = {t.engine for t in targets}
    files |= _packages(engines | encoder, arch, wanted)
    config = {
        "host": "127.0.0.1", "port": wanted.port, "context": wanted.context, "threads": wanted.threads, "slots": wanted.slots,
    }  # fmt: skip
    venv = hashlib.sha256(files["requirements.lock"] + f"|{wanted.python}|{arch}".encode()).hexdigest()[:16]  # type: ignore[operator]
    files |= templates.scripts(config, venv, wanted.python)
    facts = archive.facts_of(files)
    manifest: dict[str, Any] = {
        "schema": archive.SCHEMA,
        "id": "",
        "for": {"profile": wanted.profile.id, "name": wanted.profile.name, "as_of": wanted.profile.as_of},
        "promised": {
            k: v for k, v in wanted.profile.limits.items() if k in ("ttft_s", "tpot_s", "decode_tok_per_s")
        },
        "config": config,
        "venv": venv,
        "needs": {
            "machine": packages.MACHINES[arch],
            "python": wanted.python,
            "memory_bytes": int(need["total"]),
            "memory": {k: v for k, v in need.items() if isinstance(v, dict)},
            "disk_bytes": preflight.disk_bytes(files),
            "libraries": sorted({name for e in engines | encoder for name in LIBRARIES.get(e, ())}),
            "cpu_flags": sorted({flag for e in engines for flag in CPU_FLAGS.get((e, arch), ())}),
        },
        "artifacts": [
            {"id": t.id, "sha256": t.sha256, "engine": t.engine, "bytes": t.size_bytes} for t in targets
        ],
        "policy": policy_facts,
        "packages": "lock" if wanted.lock_only else "wheels",
        "files": facts,
    }
    manifest["id"] = hashlib.sha256(json.dumps({**manifest, "id": ""}, sort_keys=True).encode()).hexdigest()[
        :16
    ]
    return files, manifest


def _choose(wanted: Wanted) -> tuple[list[Target], dict[str, archive.Source], dict[str, Any]]:
    """(artefacts that go in, the policy's files, what the manifest says of it)."""
    for place in wanted.artifacts:
        if place.is_file():
            raise UsageError(
                f"{place} is a file; a bundle takes artefacts.",
                "edgeft bundle dist/gguf-q4_k_m --for PROFILE",
            )
    there = find([*wanted.artifacts], [])
    if wanted.policy is None:
        if len(there) != 1:
            raise UsageError(
                f"{len(there)} artefacts and no policy: nothing says which answers.",
                f"edgeft bundle {there[0].path} --for PROFILE, or --policy policy/",
            )
        made: dict[str, archive.Source] = dict(templates.policy_of_one(there[0]))
        return there, made, {"kind": "one artefact", "candidates": [there[0].id]}
    from edgeft.router import load_policy

    policy = load_policy(wanted.policy).policy
    chosen = _candidates(policy, there)
    files = {
        p.relative_to(wanted.policy).as_posix(): p for p in sorted(wanted.policy.rglob("*")) if p.is_file()
    }
    if (
        policy.features.get("embedding")
        and not {f"{ENCODER}/{n}" for n in (ROUTING, TOKENIZER)} <= files.keys()
    ):
        raise UsageError(
            f"{wanted.policy} does not hold its sentence encoder, so it would not load on another box.",
            "edgeft route fit … --encoder DIR, which puts it there",
        )
    return chosen, dict(files), {"kind": "policy", "candidates": [c["id"] for c in policy.candidates]}


def _candidates(policy: Policy, there: Sequence[Target]) -> list[Target]:
    """The artefacts that a policy was fitted on, by their hashes. Raises UsageError for one that was not named."""
    by_hash, chosen = {t.sha256: t for t in there}, []
    for candidate in policy.candidates:
        if candidate["kind"] == "api":
            continue
        found = by_hash.get(candidate["artifact_sha256"])
        if found is None:
            raise UsageError(
                f"the policy's artefact '{candidate['id']}' is not among those named (or was changed since).",
                f"edgeft bundle … {candidate.get('path') or 'dist/'} --policy {'policy/'}",
            )
        if found not in chosen:
            chosen.append(found)
    if not chosen:
        raise UsageError("the policy names no artefact, only APIs.", "a box without a model needs no bundle")
    return chosen


def _packages(engines: set[str], arch: str, wanted: Wanted) -> dict[str, archive.Source]:
    """Wheels and a lock with their hashes; or, with lock_only, edgeft's wheel and the versions that the box is to fetch."""
    if not wanted.lock_only:
        found = packages.wheels(engines, arch, wanted.python)
        return {f"wheels/{p.name}": p for p in found} | {"requirements.lock": packages.lock(found)}
    name, content = packages.own_wheel()
    extras = ",".join(sorted({e for engine in engines for e in packages.EXTRAS[engine].split(",")}))
    lock = f"edgeft[{extras}] @ file:wheels/{name}\n".encode()
    return {
        f"wheels/{name}": content,
        "requirements.lock": lock,
        "constraints.txt": packages.installed().encode(),
    }
