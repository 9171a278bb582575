"""The adapter alone as a GGUF adapter, to be loaded beside one base: not merging, for comparison.

    dist/gguf-base-f16/NAME-f16.gguf            the shared base
    dist/gguf-lora-f16/NAME-lora-f16.gguf       the adapter, by upstream's convert_lora_to_gguf.py
    dist/gguf-lora-f16/base.json                which base it goes with, as a path from here

The engine `gguf` loads the two together. llama.cpp computes W x + (alpha / rank) B A x for each linear weight with the
rank of that very tensor and one alpha for all; what a factor of its own needs (rsLoRA, `alpha_pattern`, a share) is
multiplied into B.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.compress.adapter import Adapter, Change, ends_of, header_of
from edgeft.compress.converter import LORA_SCRIPT, converter, installed_version
from edgeft.compress.formats import Spec, gguf, gguf_base, one_of
from edgeft.errors import UsageError
from edgeft.files import read_json, sha256_file, write_json

VARIANTS = ("f32", "f16", "bf16", "q8_0")
DEFAULT_BASE = "f16"
OPTIONS: dict[str, Any] = {"base": one_of(*gguf_base.VARIANTS)}
NEEDS_ROWS: dict[str, str] = {}
ENGINE = "gguf"
PACKAGES = gguf.PACKAGES
REQUIRES = gguf.REQUIRES
BASE_FILE = "base.json"
SCHEMA = "edgeft/lora-base@1"
# What a change is called where a GGUF adapter has no place for it.
NO_PLACE = {
    "whole": "whole weights (modules_to_save, bias)",
    "rows": "trained token rows (trainable_token_indices)",
    "add": "a bias of the LoRA (lora_bias)",
}


def refuse(spec: Spec, base: Path, plan: Any) -> None:
    """Raise UsageError for what a GGUF adapter can't hold, with what it is."""
    merge = "--to gguf:… merges it, and that holds everything"
    if len(plan.adapters) != 1:
        raise UsageError(f"{spec} takes one adapter, and {len(plan.adapters)} were given.", merge)
    adapter = plan.adapters[0]
    weights = {name for file in base.glob("*.safetensors") for name in header_of(file)}
    _, head = ends_of(dict.fromkeys(weights))
    changes = [change for listed in adapter.changes.values() for change in listed]
    # What was trained comes first: with a LoRA of the embedding peft saves the base's whole weights as well.
    for change in sorted(changes, key=lambda c: c.kind != "low_rank"):
        if why := _no_place(change, head if head not in weights else None):
            raise UsageError(
                f"a GGUF adapter can't hold {why}, as {adapter.folder} has for {change.weight}.", merge
            )


def _no_place(change: Change, tied_head: str | None) -> str | None:
    """What a change is that llama.cpp's adapters can't hold; None where they can."""
    if change.kind != "low_rank":
        return NO_PLACE[change.kind]
    if change.magnitude:
        return "DoRA"
    if change.embedding:
        return "a LoRA of the embedding"
    if change.transposed:
        return "a LoRA of weights stored [in, out] (fan_in_fan_out)"
    if change.weight == tied_head:
        return "a LoRA of a head that is tied to the embedding"
    return None


def needs(job: Any) -> list[Any]:
    """The job of the base's own artefact."""
    spec = Spec("gguf-base", job.options.get("base", DEFAULT_BASE))
    log = job.work / f"{spec.id}.log"
    return [replace(job, spec=spec, out=job.merged.parent / spec.id, log=log, calibration=None)]


def settings(job: Any) -> dict[str, Any]:
    """What decides the result besides the adapter."""
    return {"converter": f"llama-cpp-python {installed_version()}", "base": _base(job)}


def _base(job: Any) -> dict[str, Any]:
    """The base's file, from this artefact's folder, with its hash as the base's own artifact.json has it."""
    folder = needs(job)[0].out
    name, entry = next(iter(read_json(folder / "artifact.json")["files"].items()))
    return {"file": f"../{folder.name}/{name}", **entry}


def build(job: Any) -> dict[str, Any]:
    """Write the adapter's GGUF file and base.json; returns wall_s and peak_rss_bytes."""
    folder, share = job.adapters[0]
    steps = []
    if any(factor != 1.0 for factor in factors(_read(job.base, folder, share)).values()):
        scaled = (
            job.work
            / f"scaled-{sha256_file(folder / 'adapter_model.safetensors')[:16]}"
            / folder.resolve().name
        )
        steps.append(
            child.call(
                "edgeft.compress.formats.gguf_lora:scale",
                log=job.log,
                title="scaling the adapter",
                base=str(job.base),
                adapter=str(folder),
                share=share,
                out=str(scaled),
            )
        )
        folder = scaled
    tool = converter()
    command = [sys.executable, "-m", "edgeft.tokenizer", str(tool / LORA_SCRIPT), "--base", str(job.base)]
    command += [
        "--outtype",
        job.variant,
        "--outfile",
        str(job.out / f"{job.model_name}-lora-{job.variant}.gguf"),
    ]
    steps.append(
        child.run(
            [*command, str(folder)],
            log=job.log,
            title="llama.cpp's converter of adapters",
            env={"PYTHONPATH": str(tool / "gguf-py")},
        )
    )
    write_json(job.out / BASE_FILE, {"schema": SCHEMA, **_base(job)})
    return {
        "wall_s": sum(step["wall_s"] for step in steps),
        "peak_rss_bytes": max(step["peak_rss_bytes"] for step in steps),
    }


def _read(base: Path, folder: Path, share: float) -> Adapter:
    from edgeft.compress.adapter import read_adapter

    weights = {k: v for file in base.glob("*.safetensors") for k, v in header_of(file).items()}
    return read_adapter(folder, base, weights, share)


def factors(adapter: Adapter) -> dict[str, float]:
    """Name of each B -> what it must be multiplied with, beside llama.cpp's own alpha / rank, to give share * scale."""
    header, alpha = header_of(adapter.file), float(adapter.config["lora_alpha"])
    found = {}
    for changes in adapter.changes.values():
        for change in changes:
            _, name_b = change.tensors
            rank = header[name_b]["shape"][1]
            found[name_b] = adapter.share * change.scale / (alpha / rank)
    return found


def scale(base: str, adapter: str, share: float, out: str) -> dict[str, Any]:
    """Write the adapter with each B multiplied by its factor, in float32. Runs in a child process."""
    import json

    from safetensors.torch import load_file, save_file

    source, target = Path(adapter), Path(out)
    target.mkdir(parents=True, exist_ok=True)
    by_name = factors(_read(Path(base), source, share))
    tensors = load_file(source / "adapter_model.safetensors")
    scaled = {name: tensor.float() * by_name.get(name, 1.0) for name, tensor in tensors.items()}
    save_file(scaled, target / "adapter_model.safetensors", metadata={"format": "pt"})
    (target / "adapter_config.json").write_text(json.dumps(read_json(source / "adapter_config.json")))
    return {}


def inspect(job: Any) -> dict[str, Any]:
    """Tensors and parameters by type of all that is loaded: the base's, and the adapter's as `lora TYPE`."""
    beside = read_json(needs(job)[0].out / "artifact.json")
    own = gguf.inspect(replace(job, spec=Spec("gguf", job.variant)))
    base_bytes = round(beside["bits_per_weight"] * beside["parameters"] / 8)
    return {
        "tensor_types": {
            **beside["tensor_types"],
            **{f"lora {kind}": counted for kind, counted in own["tensor_types"].items()},
        },
        "tensor_bytes": base_bytes + own["tensor_bytes"],
        "fallback_share": beside["fallback_share"],
    }
