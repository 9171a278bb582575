"""What artefacts are compared with: the merged model, a pack of it, and the model before tuning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.bench import fidelity
from edgeft.bench.targets import BASE, REFERENCE, Target, find
from edgeft.bench.workload import Workload


class Yardstick:
    """The reference's log-probabilities, computed when the first artefact asks for them."""

    def __init__(self, reference: Target, workload: Workload, threads: int, scratch: Path, log: Path) -> None:
        self.reference, self.workload, self.threads, self.scratch, self.log = (
            reference,
            workload,
            threads,
            scratch,
            log,
        )
        self.plan: dict[str, Any] | None = None

    def compare(self, target: Target, log: Path) -> dict[str, Any]:
        """The target's fidelity figures."""
        if self.plan is None:
            self.plan = child.call(
                "edgeft.bench.fidelity:prepare",
                log=self.log,
                title="the reference's logits",
                reference=str(self.reference.path),
                rows_file=str(self.workload.tasks),
                limits=[self.workload.limit, self.workload.fidelity_rows],
                out=str(self.scratch),
                threads=self.threads,
            )
        found = child.call(
            "edgeft.bench.fidelity:compare",
            log=log,
            title=f"the logits of {target.id}",
            engine=target.engine,
            folder=str(target.path),
            plan={k: self.plan[k] for k in ("rows", "vocabulary")},
            reference=str(self.scratch / "reference.npy"),
            threads=self.threads,
        )
        figures = fidelity.summarize({k: v for k, v in found.items() if k not in child.COST})
        return {**figures, "of_another_model": of_another_model(target, self.reference)}


def of_another_model(target: Target, reference: Target) -> bool:
    """Was the artefact made of another merged model (another adapter, or none)? Its KLD is not of quantizing alone."""
    return target.facts.get("merged_sha256") not in (None, reference.sha256)


def base_of(folder: Path) -> Target:
    """The model before tuning, which retention needs: a folder or a GGUF file, measured as '(base)'."""
    (target,) = find([folder], [])
    return replace(target, id=BASE)


def reference_of(targets: list[Target]) -> Target | None:
    """The merged model: among the targets, or beside the first artefact."""
    for target in targets:
        if target.id == REFERENCE:
            return target
    for target in targets:
        if (
            target.kind == "artifact"
            and target.path
            and (target.path.parent / REFERENCE / "artifact.json").is_file()
        ):
            return find([target.path.parent / REFERENCE], [])[0]
    return None
