"""The formats that `edgeft compress --to` knows: one module each, imported when used.

A format module has
    VARIANTS        the names after the colon
    OPTIONS         option -> (function that reads its text or raises ValueError, what it takes)
    NEEDS_ROWS      variant -> what it needs calibration rows for
    ENGINE          the engine that runs what it makes
    PACKAGES        the packages whose versions decide the result
    REQUIRES        import name -> extra that brings it
    settings(job)   -> dict that decides the result besides the merged model (goes into the recipe's hash)
    build(job)      -> cost; writes its files into job.out
    inspect(job)    -> {"tensor_types", "tensor_bytes", "fallback_share"} of what lies in job.out
and may have
    GATED                     False for what can't be run alone, so that the gate leaves it out
    refuse(spec, base, plan)  raises what is wrong with these options for this base and these adapters, before anything is written
    needs(job)                -> jobs of the artefacts that must stand beside this one
    OF_BASE = True            made of the base alone, whatever the adapters

What `build` found out or chose by measuring goes back as "checks" beside the cost and stands in `artifact.json` there.
What is asked for is written `format:variant[,option=value…]`, as `gguf:q4_k_m,ffn_down=q6_k`.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from edgeft.errors import UsageError, missing_extra, nearest, unknown

FORMATS = {
    "gguf": "edgeft.compress.formats.gguf",
    "gguf-base": "edgeft.compress.formats.gguf_base",
    "gguf-lora": "edgeft.compress.formats.gguf_lora",
    "onnx": "edgeft.compress.formats.onnx",
    "gptq": "edgeft.compress.formats.gptq",
}


@dataclass(frozen=True)
class Spec:
    """What is asked for: a format, its variant, and options that differ from the format's own defaults."""

    format: str
    variant: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The artefact's folder name."""
        return f"{self.format}-{self.variant}" + "".join(f"+{k}={v}" for k, v in sorted(self.options.items()))

    def __str__(self) -> str:
        return f"{self.format}:{self.variant}" + "".join(f",{k}={v}" for k, v in sorted(self.options.items()))

    @property
    def words(self) -> str:
        """What `parse` reads back, whole; `str` shortens what is long."""
        texts = ((k, getattr(v, "text", v)) for k, v in sorted(self.options.items()))
        return f"{self.format}:{self.variant}" + "".join(f",{k}={v}" for k, v in texts)


@dataclass(frozen=True)
class Job:
    """One artefact to be made."""

    spec: Spec
    merged: Path  # the merged model's folder
    out: Path  # an empty folder for the artefact's files
    work: Path  # scratch that outlives a job, shared by the jobs of one run
    log: Path
    model_name: str
    calibration: Path | None  # rows
    threads: int
    base: Path | None = None  # the base's folder
    adapters: tuple[tuple[Path, float], ...] = ()  # each with its share

    @property
    def variant(self) -> str:
        """The name after the colon."""
        return self.spec.variant

    @property
    def options(self) -> dict[str, Any]:
        """The options asked for."""
        return self.spec.options


def module_of(name: str) -> ModuleType:
    """The module of a format."""
    return importlib.import_module(FORMATS[name])


def gated(name: str) -> bool:
    """Does what a format makes go through the gate?"""
    return bool(getattr(module_of(name), "GATED", True))


def needs_rows(spec: Spec) -> str | None:
    """What calibration rows are needed for; None where they are not."""
    if spec.options.get("method") == "auto-round":
        return "rows, which auto-round fits its scales on"
    if spec.options.get("rounding") == "feedback":
        return "rows for its error feedback"
    if spec.options.get("smooth"):
        return "rows, which say how loud its channels are"
    needed: str | None = module_of(spec.format).NEEDS_ROWS.get(spec.variant)
    return needed


def parse(text: str) -> Spec:
    """Read `format:variant[,option=value…]`.

    Raises UsageError with the nearest right word, or with what an option takes; a missing package names its extra.
    """
    head, *words = text.split(",")
    name, _, variant = head.strip().lower().partition(":")
    known = [f"{f}:{v}" for f in FORMATS for v in module_of(f).VARIANTS]
    if name not in FORMATS or variant not in module_of(name).VARIANTS:
        best = nearest(head, known) or next((k for k in known if k.startswith(f"{name}:")), "gguf:q4_k_m")
        raise UsageError(
            f"the format '{head}' is not known. Did you mean '{best}'?", f"edgeft compress … --to {best}"
        )
    module = module_of(name)
    options = dict(_option(word.strip(), head, module.OPTIONS) for word in words)
    for package, extra in module.REQUIRES.items():
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, extra)
    return Spec(name, variant, options)


def _option(word: str, head: str, known: dict[str, Any]) -> tuple[str, Any]:
    """One `option=value`, read."""
    key, _, value = word.partition("=")
    if key not in known:
        raise unknown(f"{head}: the option", key, known, "see docs/formats.md")
    read, takes = known[key]
    try:
        return key, read(value)
    except ValueError:
        raise UsageError(
            f"{head}: {key} takes {takes}; '{value}' was given.", "see docs/formats.md"
        ) from None


def one_of(*values: Any) -> tuple[Any, str]:
    """An option that takes one of some values."""
    texts = {str(v).lower(): v for v in values}

    def read(text: str) -> Any:
        if text.lower() not in texts:
            raise ValueError(text)
        return texts[text.lower()]

    return read, ", ".join(texts)
