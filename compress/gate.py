"""The gate: an artefact gets its final name when it reads, speaks and answers as the merged model does.

    tokens, template, smoke      through the engine that will serve it
    kld, same top-1              against merged, on the gate's rows and on built-in text
    effect, retention, task drop on the gate's rows: is the adapter still there?

What is measured of the merged model and its base is measured once a run and kept in `dist/.work/gate/`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from edgeft import console
from edgeft.compress import gate_quality as quality
from edgeft.compress import gate_reading as reading
from edgeft.compress.gate_limits import FAIL, NOT_RUN, TASK_ROWS, Limits, bits_of, of_width
from edgeft.compress.gate_reading import Line, Running
from edgeft.compress.gate_reference import CORPUS_SHA256, MEASURES, OWN, kept, reference
from edgeft.compress.gate_rows import GateRows
from edgeft.engines import engine as engine_module
from edgeft.engines.local import LocalModel
from edgeft.errors import EdgeftError, EnvironmentFault, GateError
from edgeft.files import sha256_file, sha256_json
from edgeft.pull import weights_sha256
from edgeft.rows import Row, row_hash, spread
from edgeft.types import Artifact

NAME = "gate"
KLD_ROWS, CONTEXT = 16, 2048
MERGED_ENGINE = "transformers"


@dataclass(frozen=True)
class Gate:
    """What the artefacts of one run are held to."""

    merged: Path
    merged_sha256: str
    base: Path | None  # None where no adapter was merged
    base_sha256: str
    rows: GateRows
    limits: Limits
    grid: dict[str, Any] | None  # what `grid_of` says of the base
    work: Path
    threads: int
    task_rows: int = TASK_ROWS

    def asked(self) -> list[Row]:
        """The rows that are answered."""
        return spread(quality.scored(self.rows.rows), self.task_rows)

    def compared(self) -> list[Row]:
        """The rows whose distributions are compared."""
        return spread(self.rows.rows, min(KLD_ROWS, self.task_rows))

    def key(self, variant: str) -> str:
        """A hash over all that decides a verdict besides the artefact."""
        rows = [[row_hash(row) for row in part] for part in (self.asked(), self.compared())]
        limits = of_width(self.limits, bits_of(variant))
        return sha256_json([CORPUS_SHA256, self.merged_sha256, self.base_sha256, rows, limits])


def model_sha256(folder: Path) -> str:
    """A hash over a model folder's weights and all that decides how it reads."""
    read = (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    )
    texts = {name: sha256_file(folder / name) for name in read if (folder / name).is_file()}
    return sha256_json([weights_sha256(folder), texts])


def need_engines(engines: list[str]) -> None:
    """Refuse before the work begins where an artefact made here could not be checked here."""
    for name in dict.fromkeys(engines):
        try:
            engine_module(name)
        except EnvironmentFault as error:
            raise EnvironmentFault(
                f"the gate runs what is made: {error.message}", f"{error.hint}, or --no-gate"
            ) from None


def check(gate: Gate, folder: Path, artefact: str, engine: str, variant: str) -> dict[str, Any]:
    """The gate's entry in artifact.json for what lies in `folder`. Raises GateError where a limit is broken."""
    started = time.monotonic()
    limits = of_width(gate.limits, bits_of(variant))
    source = reference(gate.merged, gate.merged_sha256, gate.compared(), gate.work, gate.threads)
    log = gate.work / f"{artefact}.log"
    log.unlink(missing_ok=True)
    asked = gate.asked()
    lines, answered, build = run_engine(
        folder, engine, source["reading"], asked, quality.max_tokens(asked), log, gate.threads
    )
    if not any(line["check"] == "load" for line in lines):
        found = quality.distances(folder, engine, source, log, gate.threads)
        lines += quality.kld_lines(found, limits)
        lines += _rows_lines(gate, found, answered, asked, source, limits)
    entry = {
        "status": "failed" if quality.failed(lines) else "passed",
        "key": gate.key(variant),
        "measures": MEASURES,
        "bits": bits_of(variant),
        "limits": limits,
        "checks": lines,
        "rows": {
            "from": gate.rows.source,
            "why_none": gate.rows.why_none,
            "asked": len(asked),
            "compared": len(gate.compared()),
        },
        "base_grid": gate.grid,
        "engine_build": build,
        "reading": source["reading"],
        "scores": _stored_scores(gate, asked, answered),
        "wall_s": time.monotonic() - started,
    }
    if entry["status"] == "failed":
        place = gate.work.parent.parent / ".rejected" / artefact
        raise GateError(*explain(artefact, variant, lines, gate.grid, place), details={"gate": entry})
    return entry


def run_engine(
    folder: Path,
    engine: str,
    expected: dict[str, Any] | None,
    asked: list[Row],
    room: int,
    log: Path,
    threads: int,
) -> tuple[list[Line], list[float | None], str | None]:
    """(lines of reading and smoke, scores of the asked rows, the engine's build) of one loaded artefact.

    An answer has at most `room` tokens.
    """
    engine_module(engine)
    try:
        with (
            LocalModel(folder, engine, log=log, threads=threads, context=CONTEXT) as model,
            httpx.Client() as client,
        ):
            running = Running(model, client)
            lines = reading.check(running, expected)
            broken = any(line["check"] == "smoke" and line["verdict"] == FAIL for line in lines)
            if broken or not asked:
                return lines, [], model.build
            return lines, quality.scores(running, asked, room), model.build
    except (EnvironmentFault, httpx.HTTPError) as error:
        said = error.message if isinstance(error, EdgeftError) else f"{type(error).__name__} {error}"
        line: Line = {
            "check": "load",
            "what": "loads and answers in its engine",
            "verdict": FAIL,
            "first": said,
        }
        return [line], [], None


def _rows_lines(
    gate: Gate, found: dict[str, Any], answered: list[float | None], asked: list[Row], source: dict[str, Any], limits: dict[str, Any]
) -> list[Line]:  # fmt: skip
    """The lines that need rows: effect, retention, task drop."""
    lines: list[Line] = []
    if gate.base is None:
        lines.append({"check": "effect", "verdict": NOT_RUN, "why": "no adapter was merged"})
    elif OWN not in found:
        lines.append(
            {"check": "effect", "verdict": NOT_RUN, "why": gate.rows.why_none or "no row is short enough"}
        )
    else:
        lines.append(quality.effect_line(found[OWN], _base_sums(gate, source), limits["effect"]))
    if not answered:
        why = gate.rows.why_none or (
            "the tasks of the rows are not scored" if not asked else "it does not answer"
        )
        return [
            *lines,
            *({"check": check, "verdict": NOT_RUN, "why": why} for check in ("retention", "task drop")),
        ]
    merged = _scores(gate, "merged", asked)
    base = _scores(gate, "base", asked) if gate.base else None
    return [*lines, *quality.task_lines([float(v or 0) for v in answered], merged, base, limits)]


def _base_sums(gate: Gate, source: dict[str, Any]) -> list[float]:
    """KL(merged || base) of each own row's answer, nats."""
    plan = {**source["plan"], "rows": [row for row in source["plan"]["rows"] if row["domain"] == OWN]}

    def make() -> list[float]:
        assert gate.base is not None
        narrowed = {**source, "plan": plan}
        log = gate.work / "base.log"
        return quality.answer_sums(
            quality.distances(gate.base, MERGED_ENGINE, narrowed, log, gate.threads)[OWN]
        )

    return kept(gate.work, "base-effect", [gate.base_sha256, gate.merged_sha256, plan["rows"]], make)


def _scores(gate: Gate, which: str, asked: list[Row]) -> list[float]:
    """Scores of the merged model or of its base, through transformers as the bench runs them."""
    folder = gate.merged if which == "merged" else gate.base
    digest = gate.merged_sha256 if which == "merged" else gate.base_sha256
    assert folder is not None
    log = gate.work / f"{which}.log"

    def make() -> list[float]:
        with LocalModel(folder, MERGED_ENGINE, log=log, threads=gate.threads, context=CONTEXT) as model:
            with httpx.Client() as client:
                found = quality.scores(Running(model, client), asked, quality.max_tokens(asked))
                return [float(v or 0) for v in found]

    inputs = [MEASURES, digest, [[row_hash(row), row["task"]] for row in asked]]
    return kept(gate.work, f"scores-{which}", inputs, make)


def _stored_scores(gate: Gate, asked: list[Row], answered: list[float | None]) -> dict[str, Any] | None:
    """Per row what merged and base scored, so that another box can judge retention without either."""
    if not answered:
        return None
    return {
        "rows": [row_hash(row) for row in asked],
        "max_tokens": quality.max_tokens(asked),
        "merged": _scores(gate, "merged", asked),
        "base": _scores(gate, "base", asked) if gate.base else None,
        "artefact": [float(v or 0) for v in answered],
    }


def explain(
    artefact: str, variant: str, lines: list[Line], grid: dict[str, Any] | None, place: Path
) -> tuple[str, str]:
    """The two lines of the error: what failed with figure and limit, and what to type."""
    wrong = quality.failed(lines)
    text = f"{artefact} is rejected: {'; '.join(say(line) for line in wrong[:2])}"
    if len(wrong) > 2:
        text += f"; and {len(wrong) - 2} checks more"
    if any(line["check"] in ("retention", "effect", "task drop") for line in wrong):
        text += ". Quantizing took away what the adapter brought"
        if grid and bits_of(variant) <= grid["bits"] + 1:
            text += (
                f": the base's weights sit on a {grid['bits']}-bit grid, and {variant} rounds them back to it"
            )
    return f"{text}.", f"less {place}/reasons.json; a wider --to keeps more, --gate FILE sets other limits"


def say(line: Line) -> str:
    """A failed line in words."""
    if "limit" not in line or line.get("ci95") is None:
        head = f"{line['check']}: {line.get('seen', '')} {line['what']}" if "seen" in line else line["check"]
        return f"{head} ({line['first']})" if line.get("first") else head
    low, high = line["ci95"]
    side = "below" if line["rule"] == "at least" else "above"
    figures = f"{line['check']} {line['seen']:.3g} ({low:.3g} to {high:.3g}, n={line['n']}) is {side} {line['limit']:g}"
    if "base" in line:
        figures += f": merged answers {line['merged']:.0%} right, base {line['base']:.0%}, this one {line['artefact']:.0%}"
    return figures


def again(gate: Gate, folder: Path, artifact: Artifact) -> Artifact:
    """Check an artefact that stands already and was made before this gate; its manifest is written anew."""
    with console.step(f"checking {artifact.id}"):
        entry = check(gate, folder, artifact.id, artifact.engine, artifact.variant)
    checked = replace(
        artifact, checks={**artifact.checks, NAME: entry}, seen_rows=seen_with(artifact.seen_rows, gate.rows)
    )
    checked.save(folder / "artifact.json")
    return checked


def seen_with(seen: dict[str, list[str]], rows: GateRows) -> dict[str, list[str]]:
    """Row hashes by kind of step, the gate's own added."""
    if not rows.rows:
        return seen
    return {**seen, "select": sorted({*seen.get("select", []), *rows.hashes})}


def summary(entry: dict[str, Any]) -> str:
    """The gate's result in a word for a table."""
    if "checks" not in entry:
        return str(entry.get("status", "not checked"))
    counts = [
        sum(line["verdict"] == verdict for line in entry["checks"])
        for verdict in ("PASS", "INCONCLUSIVE", NOT_RUN)
    ]
    words = (
        f"{counts[0]} pass",
        f"{counts[1]} open" if counts[1] else "",
        f"{counts[2]} not run" if counts[2] else "",
    )
    return ", ".join(filter(None, words))
