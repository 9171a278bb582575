"""Where an artefact comes from: its inputs by hash, what was asked for, and the machine and packages that made it.

Nothing here names a place on the machine: inputs are known by their public name and their hashes. Where they lay is
kept in OUT/.work (`remember_places`), which stays behind when an artefact travels.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import fields
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edgeft.compress.merge import SKIPPED, TOKENIZER_FILES, Source
from edgeft.compress.recipe import Recipe
from edgeft.device import driver_seen
from edgeft.files import read_json, sha256_file, sha256_json, write_json
from edgeft.profiles.detection import gpu_facts
from edgeft.pull import BUILT_IN, origin_of

PACKAGES = (
    "edgeft", "torch", "transformers", "peft", "safetensors", "tokenizers", "numpy", "gguf", "llama-cpp-python", "xllamacpp",
    "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai", "onnxruntime-genai-cuda", "gptqmodel", "optimum", "auto-round",
)  # fmt: skip
PLACES = "inputs.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", *TOKENIZER_FILES)


def inputs_of(base: Path, adapters: Sequence[Source]) -> dict[str, Any]:
    """`made_from` of the merged model: base and adapters with the hash of every file that decides the result.

    A folder's own README is not among them: the artefact gets one of its own.
    """
    files = hashes_of(base, _decides)
    weights = {name: digest for name, digest in files.items() if name.endswith(".safetensors")}
    found: dict[str, Any] = {
        "base": {**origin_without_files(base), "weights_sha256": sha256_json(weights), "files": files}
    }
    if adapters:
        found["adapters"] = [_adapter(folder, share) for folder, share in adapters]
    return found


def origin_without_files(base: Path) -> dict[str, Any]:
    """Where the base came from, without the list of its files."""
    return {k: v for k, v in origin_of(base).items() if k != "files"}


def _adapter(folder: Path, share: float) -> dict[str, Any]:
    files = hashes_of(folder, lambda name: name in ADAPTER_FILES)
    weights = {name: digest for name, digest in files.items() if name.endswith(".safetensors")}
    return {
        "name": folder.resolve().name,
        "share": share,
        "weights_sha256": sha256_json(weights),
        "config_sha256": files["adapter_config.json"],
        "files": files,
    }


def _decides(name: str) -> bool:
    """Whether a file of the base reaches the merged model."""
    copied = not any(fnmatch(part, pattern) for part in Path(name).parts for pattern in SKIPPED)
    own = name.endswith((".safetensors", ".safetensors.index.json")) and "/" not in name
    return own or copied


def hashes_of(folder: Path, wanted: Any) -> dict[str, str]:
    """Relative path -> SHA-256 of the files that are wanted by their path."""
    names = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: sha256_file(path) for name, path in sorted(names.items()) if wanted(name)}


def asked_of(recipe: Recipe, made_from: dict[str, Any], to: str, name: str) -> dict[str, Any]:
    """The words of `edgeft compress` that make one artefact again; files by name and hash.

    `base` is there where the base can be pulled by a name.
    """
    words: dict[str, Any] = {"base": pull_name(made_from["base"]), "to": to}
    words["adapter"] = [f"{a['name']}={a['share']:g}" for a in made_from.get("adapters", [])]
    for field in fields(recipe):
        if field.name not in ("out", "formats"):
            value = getattr(recipe, field.name)
            words[field.name] = entry_of(value) if isinstance(value, Path) else value
    return {**words, "name": name}


def entry_of(path: Path) -> dict[str, str]:
    """A file or folder that went in, by name and hash."""
    digest = sha256_json(hashes_of(path, lambda _: True)) if path.is_dir() else sha256_file(path)
    return {"name": path.name, "sha256": digest}


def pull_name(origin: dict[str, Any]) -> str | None:
    """What to give `edgeft pull` for a base of this origin; None where it was a file or folder of the user's."""
    if origin.get("kind") == "built-in":
        return next((k for k, v in BUILT_IN.items() if v["requirement"] == origin.get("package")), None)
    return str(origin["name"]) if origin.get("kind") == "hub" else None


def remember_places(work: Path, base: Path, adapters: Sequence[Source], recipe: Recipe) -> None:
    """Note where the inputs lay, for `edgeft rebuild` on this machine."""
    places: dict[str, Any] = {
        "base": str(base.resolve()),
        "adapters": [str(a.resolve()) for a, _ in adapters],
    }
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if isinstance(value, Path) and field.name != "out":
            places[field.name] = str(value.resolve())
    write_json(work / PLACES, places)


def places_beside(folder: Path) -> dict[str, Any]:
    """What `remember_places` noted in the OUT that an artefact's folder lies in; empty where there is none."""
    file = folder.parent / ".work" / PLACES
    return read_json(file) if file.is_file() else {}


def made_on() -> dict[str, Any]:
    """The machine and the software: CPU, GPUs where a driver is, cores, Python, packages, and both builds of llama.cpp."""
    return {
        "cpu": cpu_name(),
        **({"gpus": [gpu["name"] for gpu in gpu_facts({}) or []]} if driver_seen() else {}),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": sys.version.split()[0],
        "packages": installed(PACKAGES),
        "llama_cpp": llama_builds(),
    }


def installed(packages: Sequence[str]) -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """The processor's own name, as the kernel reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor() or platform.machine()


def llama_builds() -> dict[str, dict[str, Any]]:
    """The two builds of llama.cpp, by package: the one that converts and quantizes, the one that runs.

    ggml's version and commit as the library of llama-cpp-python tells them; xllamacpp's BUILD_INFO, whose wheels
    may say `unknown`.
    """
    found: dict[str, dict[str, Any]] = {}
    for package, tell in (("llama-cpp-python", _ggml), ("xllamacpp", _xllamacpp)):
        if package in (versions := installed([package])):
            found[package] = {"version": versions[package], **tell()}
    return found


def _ggml() -> dict[str, str]:
    spec = importlib.util.find_spec("llama_cpp")
    folders = list(spec.submodule_search_locations or []) if spec else []
    library = next((f for folder in folders for f in Path(folder, "lib").glob("libggml-base.*")), None)
    if library is None:
        return {}
    try:
        loaded = ctypes.CDLL(str(library))
        loaded.ggml_version.restype = loaded.ggml_commit.restype = ctypes.c_char_p
        return {"ggml": loaded.ggml_version().decode(), "commit": loaded.ggml_commit().decode()}
    except (OSError, AttributeError):  # another build: says nothing of itself
        return {}


def _xllamacpp() -> dict[str, Any]:
    try:
        import xllamacpp

        return {k: v for k, v in dict(xllamacpp.BUILD_INFO).items() if k in ("build_number", "commit")}
    except (ImportError, AttributeError):
        return {}
