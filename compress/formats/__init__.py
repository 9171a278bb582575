"""The formats that `edgeft compress --to` knows: one module each, imported when used.

A format module has
    VARIANTS        the names after the colon
    NEEDS_ROWS      variant -> what it needs calibration rows for
    ENGINE          the engine that runs what it makes
    PACKAGES        the packages whose versions decide the result
    REQUIRES        import name -> extra that brings it
    settings(job)   -> dict that decides the result besides the merged model (goes into the recipe's hash)
    build(job)      -> cost; writes its files into job.out
    inspect(folder) -> {"tensor_types", "tensor_bytes", "fallback_share"}
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from edgeft.errors import UsageError, missing_extra, nearest

FORMATS = {
    "gguf": "edgeft.compress.formats.gguf",
    "onnx": "edgeft.compress.formats.onnx",
    "gptq": "edgeft.compress.formats.gptq",
}


@dataclass(frozen=True)
class Job:
    """One artefact to be made."""

    format: str
    variant: str
    merged: Path  # the merged model's folder
    out: Path  # an empty folder for the artefact's files
    work: Path  # scratch that outlives a job, shared by the jobs of one run
    log: Path
    model_name: str
    calibration: Path | None  # rows
    threads: int

    @property
    def id(self) -> str:
        """The artefact's folder name."""
        return f"{self.format}-{self.variant}"


def module_of(name: str) -> ModuleType:
    """The module of a format."""
    return importlib.import_module(FORMATS[name])


def parse(spec: str) -> tuple[str, str]:
    """Split `format:variant`. Raises UsageError with the nearest right one; missing packages name their extra."""
    name, _, variant = spec.lower().partition(":")
    known = [f"{f}:{v}" for f in FORMATS for v in module_of(f).VARIANTS]
    if name not in FORMATS or variant not in module_of(name).VARIANTS:
        best = nearest(spec, known) or next((k for k in known if k.startswith(f"{name}:")), "gguf:q4_k_m")
        raise UsageError(
            f"the format '{spec}' is not known. Did you mean '{best}'?", f"edgeft compress … --to {best}"
        )
    for package, extra in module_of(name).REQUIRES.items():
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, extra)
    return name, variant
