"""Check finished artefacts again, on any box.

Files by their hashes, tensors by their counts, and every check of the gate that this box has the means for: the engine for
tokens, template and smoke; the merged model beside for KLD; rows for the task. What can't be run is said, never passed.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgeft import console
from edgeft.compress import formats, gate, gate_limits
from edgeft.compress import gate_quality as quality
from edgeft.compress.adapter import header_of
from edgeft.compress.gate_limits import FAIL, NOT_RUN, PASS, bits_of, of_width
from edgeft.compress.gate_reading import Line
from edgeft.compress.gate_reference import OWN, reference
from edgeft.compress.make import MANIFEST, load_artifact
from edgeft.engines import engine as engine_module
from edgeft.engines.local import default_threads
from edgeft.errors import EdgeftError, EnvironmentFault, UsageError
from edgeft.files import list_files, sha256_file
from edgeft.rows import Row, load_rows, row_hash, spread
from edgeft.types import Artifact

REFERENCE_NEEDS = ("torch", "transformers")
MERGED = "merged"


@dataclass(frozen=True)
class Verified:
    """What was found of one artefact. `status`: passed, failed, or unable where this box lacks its engine."""

    id: str
    path: str
    status: str
    checks: list[Line]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


@dataclass
class Means:
    """What this run of `verify` has to check with."""

    rows: list[Row]
    limits: gate_limits.Limits | None  # None: those of each manifest
    threads: int
    scratch: Path
    references: dict[Path, dict[str, Any] | str] = field(default_factory=dict)  # or why there is none


def verify(
    places: list[Path],
    evaluation: Path | None = None,
    own_limits: Path | Mapping[Any, Any] | None = None,
    threads: int | None = None,
) -> list[Verified]:
    """Check every artefact in `places` (folders of one artefact, or of several) as far as this box can.

    `evaluation`: a file that holds the rows that the gate asked; without it the task is not asked again.
    Changes nothing. Raises UsageError for a place without an artefact.
    """
    folders = list(dict.fromkeys(folder for place in places for folder in _artefacts_in(place)))
    limits = gate_limits.load(own_limits) if own_limits is not None else None
    rows = load_rows(evaluation) if evaluation else []
    with tempfile.TemporaryDirectory(prefix="edgeft-") as scratch:
        means = Means(rows, limits, threads or default_threads(), Path(scratch))
        found = []
        for folder in folders:
            with console.step(f"verifying {folder.name}"):
                found.append(one(folder, means))
    return found


def _artefacts_in(place: Path) -> list[Path]:
    if (place / MANIFEST).is_file():
        return [place]
    inside = sorted(path.parent for path in place.glob(f"*/{MANIFEST}")) if place.is_dir() else []
    if not inside:
        raise UsageError(f"{place} holds no artefact (no {MANIFEST}).", "edgeft compress … --out dist/")
    return inside


def one(folder: Path, means: Means) -> Verified:
    """All checks of one artefact. Where a file was changed nothing of it is run."""
    artifact = Artifact.load(folder / MANIFEST)
    lines = [files_line(folder, artifact)]
    unable = False
    if lines[0]["verdict"] != FAIL:
        lines.append(tensors_line(folder, artifact, means.scratch))
        try:
            engine_module(artifact.engine)
        except EdgeftError as error:
            unable = True
            lines.append(_not_run("gate", f"{error.message} {error.hint}"))
        else:
            lines += gate_lines(folder, artifact, means)
    status = "failed" if any(line["verdict"] == FAIL for line in lines) else "unable" if unable else "passed"
    return Verified(artifact.id, str(folder), status, lines)


def _not_run(check: str, why: str) -> Line:
    return {"check": check, "verdict": NOT_RUN, "why": why}


def files_line(folder: Path, artifact: Artifact) -> Line:
    """Every file of the manifest is there, of its size and hash; files that it does not name are noted."""
    wrong = [
        name
        for name, entry in artifact.files.items()
        if not (folder / name).is_file()
        or (folder / name).stat().st_size != entry["bytes"]
        or sha256_file(folder / name) != entry["sha256"]
    ]
    line: Line = {
        "check": "files",
        "what": f"files that are not as {MANIFEST} says",
        "limit": 0,
        "rule": "at most",
    }
    line |= {"seen": len(wrong), "n": len(artifact.files), "verdict": FAIL if wrong else PASS}
    if wrong:
        line["first"] = wrong[0]
    if extra := sorted(set(list_files(folder)) - set(artifact.files) - {MANIFEST}):
        line["noted"] = extra
    return line


def tensors_line(folder: Path, artifact: Artifact, scratch: Path) -> Line:
    """As many tensors and parameters of each type as the manifest counts."""
    line: Line = {
        "check": "tensors",
        "what": f"types whose tensors are not those of {MANIFEST}",
        "limit": 0,
        "rule": "at most",
    }
    try:
        found = _types_of(folder, artifact, scratch)
    except (ImportError, EnvironmentFault) as error:
        return _not_run("tensors", f"the file can't be read here: {error}")
    wrong = sorted(
        k for k in {*found, *artifact.tensor_types} if found.get(k) != artifact.tensor_types.get(k)
    )
    line |= {"seen": len(wrong), "n": len(artifact.tensor_types), "verdict": FAIL if wrong else PASS}
    if wrong:
        line["first"] = f"{wrong[0]}: {found.get(wrong[0])}, not {artifact.tensor_types.get(wrong[0])}"
    return line


def _types_of(folder: Path, artifact: Artifact, scratch: Path) -> dict[str, Any]:
    """Type -> {tensors, parameters} of what lies in a folder."""
    if artifact.format in formats.FORMATS:
        spec = formats.Spec(artifact.format, artifact.variant)
        job = formats.Job(
            spec, folder.parent / MERGED, folder, scratch, scratch / "log", artifact.model_name, None, 1
        )
        return dict(formats.module_of(artifact.format).inspect(job)["tensor_types"])
    tensors, parameters = Counter[str](), Counter[str]()
    for file in folder.glob("*.safetensors"):
        for entry in header_of(file).values():
            count = 1
            for size in entry["shape"]:
                count *= size
            tensors[entry["dtype"].lower()] += 1
            parameters[entry["dtype"].lower()] += count
    return {kind: {"tensors": tensors[kind], "parameters": parameters[kind]} for kind in tensors}


def gate_lines(folder: Path, artifact: Artifact, means: Means) -> list[Line]:
    """The gate's checks, as far as merged model, rows and packages are at hand."""
    if artifact.format in formats.FORMATS and not formats.gated(artifact.format):
        return [_not_run("gate", "what can't be run alone has no gate")]
    kept = artifact.checks.get(gate.NAME, {})
    log = means.scratch / f"{artifact.id}.log"
    if artifact.id == MERGED:
        lines, _, _ = gate.run_engine(folder, artifact.engine, None, [], 0, log, means.threads)
        return [line for line in lines if line["check"] in ("smoke", "load")]
    limits = of_width(means.limits, bits_of(artifact.variant)) if means.limits else kept.get("limits")
    limits = limits or of_width(gate_limits.load(), bits_of(artifact.variant))
    source = _reference_of(folder, artifact, means)
    reading = source["reading"] if isinstance(source, dict) else kept.get("reading")
    scores = kept.get("scores") or {"rows": [], "max_tokens": 0}
    asked = [row for row in means.rows if row_hash(row) in scores["rows"]]
    lines, answered, _ = gate.run_engine(
        folder, artifact.engine, reading, asked, scores["max_tokens"], log, means.threads
    )
    if isinstance(source, str):
        lines.append(_not_run("kld", source))
    elif not any(line["check"] == "load" for line in lines):
        lines += _kld_lines(folder, artifact, source, limits, means, log)
    return [*lines, *_task_lines(asked, answered, scores, limits, means)]


def _reference_of(folder: Path, artifact: Artifact, means: Means) -> dict[str, Any] | str:
    """The merged model's log-probabilities, or why they can't be had here."""
    merged = (folder.parent / MERGED).resolve()
    if merged not in means.references:
        means.references[merged] = _make_reference(merged, means)
    source = means.references[merged]
    if isinstance(source, dict) and source["merged_sha256"] != artifact.made_from.get("merged_sha256"):
        return f"{merged} is not the model that this was made from"
    return source


def _make_reference(merged: Path, means: Means) -> dict[str, Any] | str:
    if not (merged / MANIFEST).is_file():
        return "the merged model is not beside it (a folder 'merged')"
    if missing := [p for p in REFERENCE_NEEDS if importlib.util.find_spec(p) is None]:
        return f"the merged model needs {', '.join(missing)}: pip install 'edgeft[compress]'"
    try:
        digest = load_artifact(merged, verify=True).sha256
    except UsageError as error:
        return error.message
    rows = spread(means.rows, gate.KLD_ROWS)
    return {**reference(merged, digest, rows, means.scratch, means.threads), "merged_sha256": digest}


def _kld_lines(
    folder: Path, artifact: Artifact, source: dict[str, Any], limits: dict[str, Any], means: Means, log: Path
) -> list[Line]:  # fmt: skip
    try:
        found = quality.distances(folder, artifact.engine, source, log, means.threads)
    except EnvironmentFault as error:
        return [_not_run("kld", error.message)]
    lines = quality.kld_lines(found, limits)
    return lines if OWN in found else [*lines, _not_run("kld own", "no rows were given: --eval rows.jsonl")]


def _task_lines(
    asked: list[Row], answered: list[float | None], scores: dict[str, Any], limits: dict[str, Any], means: Means
) -> list[Line]:  # fmt: skip
    """Retention and task drop on the gate's rows, against what artifact.json keeps of merged and base."""
    if not scores["rows"]:
        why = f"{MANIFEST} keeps no scores of the merged model"
    elif not means.rows:
        why = "no rows were given: --eval with the rows of the gate"
    elif not asked:
        why = "none of the rows are those that the gate asked"
    elif not answered:
        why = "it does not answer"
    else:
        at = [scores["rows"].index(row_hash(row)) for row in asked]
        merged = [scores["merged"][i] for i in at]
        base = [scores["base"][i] for i in at] if scores["base"] else None
        return quality.task_lines([float(v or 0) for v in answered], merged, base, limits)
    return [_not_run(check, why) for check in ("retention", "task drop")]
