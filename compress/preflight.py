"""Before the work begins: how much memory, disk and time each step will take, and whether this box has it.

Predicted from the shapes in the safetensors headers, from coefficients that were fitted on measured runs (`costs`),
and from a small matrix product, a loop in Python and a small file timed on the spot. What is then seen stands beside it in `artifact.json`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from edgeft.compress import check_costs, costs, formats
from edgeft.compress.costs import Shape, Step
from edgeft.compress.formats import Spec
from edgeft.compress.merge import Plan
from edgeft.compress.recipe import Recipe
from edgeft.errors import EnvironmentFault
from edgeft.files import read_json
from edgeft.rows import Row
from edgeft.types import Artifact

# What may be offered where the asked format does not fit, best first; nothing that can't do without rows.
OFFERED = (
    "onnx:int8", "gguf:q8_0", "onnx:int4", "gguf:q6_k", "gguf:q5_k_m", "gguf:q4_k_m", "gguf:q3_k_m",
)  # fmt: skip


@dataclass(frozen=True)
class Forecast:
    """What the work will take: its steps in order, the bytes each artefact and the scratch beside it need, what is free."""

    steps: list[Step]
    disk_bytes: dict[str, int]  # artefact's folder name -> bytes; `.work` -> scratch at its largest
    free_ram_bytes: int
    free_disk_bytes: int
    standing: list[str]  # artefacts of these inputs that stand there already and will be kept
    offers: dict[str, int] = field(default_factory=dict)  # other formats -> peak bytes

    @property
    def need_disk_bytes(self) -> int:
        """Bytes of everything that does not stand there yet."""
        return sum(size for name, size in self.disk_bytes.items() if name not in self.standing)

    def to_dict(self) -> dict[str, Any]:
        """The forecast as plain JSON types."""
        return {**asdict(self), "need_disk_bytes": self.need_disk_bytes}


def forecast(
    planned: Plan,
    specs: Sequence[Spec],
    recipe: Recipe,
    made_from: dict[str, Any],
    gate_rows: Sequence[Row] = (),
    scored: bool = False,
) -> Forecast:
    """Predict what `compress` will take for a plan of the merge and the formats asked for.

    `gate_rows`: what the gate asks; `scored`: whether `--fit` scores the tensors.
    """
    shape = costs.shape_of(planned, bool(made_from.get("adapters")), recipe.calibration)
    box = costs.probe(recipe.out.absolute())
    standing = _standing(recipe, ["merged", *(spec.id for spec in specs)], made_from)
    steps = costs.merge_steps(shape, box)
    merged, scratch = shape.stored_bytes + costs.TOKENIZER_BYTES, 0
    auto = recipe.merge_base == "auto" and recipe.eval is not None and "merged" not in standing
    if auto and recipe.eval:
        steps = check_costs.merge_base_steps(shape, recipe.eval, box) + steps[1:]
    if scored:
        steps.append(check_costs.scores_step(shape, box))
    disk = {"merged": merged}
    for spec in specs:
        steps += costs.format_steps(spec, shape, box)
        disk[spec.id] = costs.artifact_bytes(spec, shape)
        scratch = max(scratch, costs.scratch_bytes(spec, shape))
    if not recipe.no_gate and any(
        formats.gated(s.format) and not (s.id in standing and _checked(recipe.out / s.id)) for s in specs
    ):
        steps += check_costs.gate_steps(shape, gate_rows, recipe.eval_limit, box)
        scratch += check_costs.gate_bytes(shape, gate_rows, recipe.eval_limit)
    if auto:  # two more merges lie there, before any of the formats does
        scratch = max(scratch, 2 * merged - sum(disk[s.id] for s in specs if s.id not in standing))
    return Forecast(
        steps=steps,
        disk_bytes={**disk, check_costs.WORK: scratch},
        free_ram_bytes=free_ram_bytes(),
        free_disk_bytes=free_disk_bytes(recipe.out),
        standing=standing,
        offers=_offers(shape, box),
    )


def _offers(shape: Shape, box: costs.Box) -> dict[str, int]:
    offered = {}
    for text in OFFERED:
        name, _, variant = text.partition(":")
        steps = costs.format_steps(Spec(name, variant), shape, box)
        offered[text] = max((s.need_bytes for s in steps), default=0)
    return offered


def _standing(recipe: Recipe, ids: Sequence[str], made_from: dict[str, Any]) -> list[str]:
    """The artefacts in OUT that were made of these inputs: they will be kept, unless another option or a version changed."""
    found = []
    for name in ids:
        if (recipe.out / name / "artifact.json").is_file():
            manifest = read_json(recipe.out / name / "artifact.json")
            there = {k: v for k, v in manifest.get("made_from", {}).items() if k != "merged_sha256"}
            merged_into = manifest.get("asked", {}).get("merge_base", recipe.merge_base)
            if there == made_from and merged_into == recipe.merge_base:
                found.append(name)
    return found


def _checked(folder: Path) -> bool:
    """Has the gate measured what stands there?"""
    return "checks" in read_json(folder / "artifact.json").get("checks", {}).get("gate", {})


def free_ram_bytes() -> int:
    """Memory that can be had: what the system has available, or what the control group leaves where that is less."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return max(free, 0)


def free_disk_bytes(folder: Path) -> int:
    """Room on the disk that a folder lies or will lie on."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def refuse(seen: Forecast, out: Path, checks: bool = True) -> None:
    """Raise EnvironmentFault where a step can't have the memory or OUT's disk the room, naming what would fit.

    The proof of the merge is no reason: where it does not fit it is marked as owed. Without `checks` the gate is none either.
    """
    if seen.need_disk_bytes > seen.free_disk_bytes:
        raise _no_room(seen, out)
    runs = [s for s in seen.steps if checks or s.name not in check_costs.CHECKS]
    counted = [s for s in runs if s.artifact not in seen.standing and not s.may_be_owed]
    over = [s for s in counted if s.need_bytes > seen.free_ram_bytes]
    if not over:
        return
    step = over[0]
    what = (
        f"{step.asked} needs about {step.need_bytes / 1e9:.1f} GB of memory ({step.name}), "
        f"and {seen.free_ram_bytes / 1e9:.1f} GB are free."
    )
    # --fit can't do without the gate: who leaves that out has no use for the scores.
    left_out = {s.without: s for s in counted if s.without and (s in over or s.name == check_costs.SCORES)}
    words = list(left_out)
    need_bytes = max((s.need_bytes for s in counted if s.without not in left_out), default=0)
    if not step.without:
        fitting = [(name, size) for name, size in seen.offers.items() if size <= seen.free_ram_bytes]
        if step.artifact == "merged" or not fitting:
            words, need_bytes = [], seen.free_ram_bytes + 1
        else:
            words, need_bytes = (
                [f"--to {fitting[0][0]}", *(w for w in words if "--to" not in w)],
                fitting[0][1],
            )
    if need_bytes > seen.free_ram_bytes:
        raise EnvironmentFault(what, "take a smaller base, or a box with more memory")
    raise EnvironmentFault(
        what, f"{' '.join(words)} needs about {need_bytes / 1e9:.1f} GB; or a box with more memory"
    )


def _no_room(seen: Forecast, out: Path) -> EnvironmentFault:
    sizes = {k: v for k, v in seen.disk_bytes.items() if k not in seen.standing}
    largest = max((k for k in sizes if k not in ("merged", ".work")), key=sizes.__getitem__, default="merged")
    without = seen.need_disk_bytes - sizes[largest]
    hint = f"df -h {out.absolute().parent}"
    bases = any(step.name.startswith(check_costs.MERGE_BASE) for step in seen.steps)
    if bases and seen.need_disk_bytes - sizes[check_costs.WORK] <= seen.free_disk_bytes:
        hint = f"--merge-base 16bit makes no copies ({sizes[check_costs.WORK] / 1e9:.1f} GB), or take an --out on a larger disk"
    elif largest != "merged" and without <= seen.free_disk_bytes:
        hint = f"leave out {largest} ({sizes[largest] / 1e9:.1f} GB), or take an --out on a larger disk"
    return EnvironmentFault(
        f"{out} needs about {seen.need_disk_bytes / 1e9:.1f} GB and its disk has {seen.free_disk_bytes / 1e9:.1f} GB free.",
        hint,
    )


def beside(artifact: Artifact, steps: list[dict[str, Any]], seen: Forecast | None) -> Artifact:
    """The artefact with its steps, each with what was predicted of it, and the sums in `cost.predicted`."""
    mine = [s for s in seen.steps if s.artifact in (artifact.id, check_costs.WORK)] if seen else []
    by_name = {s.name: s.figures() for s in mine}
    told = [
        {**step, **({"predicted": by_name[step["name"]]} if step["name"] in by_name else {})}
        for step in steps
    ]
    # A step that another artefact of this run has done already costs nothing here: it is not among the seen ones.
    ran = {s["name"] for s in told if s["name"] not in check_costs.CHECKS}
    done = [s.figures() for s in mine if s.name in ran]
    cost = dict(artifact.cost)
    if done and seen:
        cost["predicted"] = {
            "wall_s": sum(s["wall_s"] for s in done),
            "peak_rss_bytes": max(s["peak_rss_bytes"] for s in done),
            "size_bytes": seen.disk_bytes[artifact.id],
        }
    return replace(artifact, steps=told, cost=cost)


def rows_of(seen: Forecast) -> list[list[str]]:
    """The table of `--dry-run`."""
    return [
        [
            step.asked,
            step.name,
            f"{step.peak_rss_bytes / 1e6:.0f}",
            f"{step.wall_s:.0f}",
            f"{seen.disk_bytes[step.artifact] / 1e6:.0f}" if first else "",
            "stands there" if step.artifact in seen.standing else "",
        ]
        for step, first in _with_firsts(seen.steps)
    ]


def _with_firsts(steps: list[Step]) -> list[tuple[Step, bool]]:
    seen: set[str] = set()
    marked = []
    for step in steps:
        marked.append((step, step.artifact not in seen))
        seen.add(step.artifact)
    return marked
