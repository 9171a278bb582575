"""GGUF: f32, f16, bf16 and q8_0 by upstream's converter, K and IQ types by `llama_model_quantize`.

With calibration rows the quantizer weighs columns by an importance matrix computed on them, which is kept as
`dist/imatrix.gguf`.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from edgeft import child, console
from edgeft.compress.converter import convert, installed_version
from edgeft.errors import EnvironmentFault

CONVERTED = ("f32", "f16", "bf16", "q8_0")
# llama.cpp refuses these without an importance matrix.
NEED_IMATRIX = ("q2_k_s", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs")
QUANTIZED = (
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m", "q5_0", "q5_1", "q5_k_s", "q5_k_m",
    "q6_k", "iq3_s", "iq4_nl", "iq4_xs",
)  # fmt: skip
VARIANTS = (*CONVERTED, *QUANTIZED, *NEED_IMATRIX)
OPTIONS: dict[str, Any] = {}
NEEDS_ROWS = dict.fromkeys(NEED_IMATRIX, "an importance matrix, which needs rows")
ENGINE = "gguf"
PACKAGES = ("llama-cpp-python", "torch", "transformers", "numpy")
REQUIRES = {"llama_cpp": "compress", "gguf": "compress", "torch": "compress", "transformers": "compress"}
BLOCK_OF_256 = ("_k", "iq1_", "iq2_", "iq3_", "iq4_xs")
FALLBACK_WARNING_SHARE = 0.05


def settings(job: Any) -> dict[str, Any]:
    """What decides the result besides the merged model."""
    from edgeft.compress.card import front_matter_sha256
    from edgeft.files import sha256_file

    found = {
        "converter": f"llama-cpp-python {installed_version()}",
        "model_name": job.model_name,
        "card_sha256": front_matter_sha256(
            job.merged
        ),  # upstream's converter reads it into the file's metadata
    }
    if job.variant in CONVERTED:
        return found
    if job.calibration is None:
        return {**found, "imatrix": None}
    return {**found, "imatrix": "mean squared inputs", "calibration_sha256": sha256_file(job.calibration)}


def build(job: Any) -> dict[str, float]:
    """Write the GGUF file; returns wall_s and peak_rss_bytes."""
    target = job.out / f"{job.model_name}-{job.variant}.gguf"
    if job.variant in CONVERTED:
        return convert(job.merged, target, job.variant, job.model_name, job.log)
    source, spent = _unquantized(job)
    steps = [spent] if spent else []
    imatrix = None
    if job.calibration:
        imatrix, spent = _imatrix(job, source)
        steps += [spent] if spent else []
    steps.append(
        child.call(
            "edgeft.compress.formats.gguf:quantize",
            log=job.log,
            title="llama_model_quantize",
            source=str(source),
            target=str(target),
            variant=job.variant,
            threads=job.threads,
            imatrix=str(imatrix) if imatrix else None,
        )
    )
    return {
        "wall_s": sum(step["wall_s"] for step in steps),
        "peak_rss_bytes": max(step["peak_rss_bytes"] for step in steps),
    }


def _imatrix(job: Any, source: Path) -> tuple[Path, dict[str, Any]]:
    """The importance matrix of this merged model on these rows; the one that stands there where it is that."""
    from edgeft.compress.imatrix import made_of
    from edgeft.files import sha256_file
    from edgeft.types import Artifact

    wanted = f"{Artifact.load(job.merged / 'artifact.json').sha256} {sha256_file(job.calibration)}"
    target = job.merged.parent / "imatrix.gguf"
    if target.exists() and made_of(target) == wanted:
        return target, {}
    spent = child.call(
        "edgeft.compress.imatrix:collect",
        log=job.log,
        title="the importance matrix",
        merged=str(job.merged),
        rows_file=str(job.calibration),
        gguf=str(source),
        out=str(target),
        key=wanted,
        threads=job.threads,
    )
    if spent["unnamed"]:
        console.note(
            f"  no importance for {len(spent['unnamed'])} layers that GGUF has no name for ({spent['unnamed'][0]}, …)"
        )
    return target, spent


def _unquantized(job: Any) -> tuple[Path, dict[str, float]]:
    """The GGUF that quantizing starts from, in the merged model's own precision.

    The artefact of that precision where it stands already; else made in `work` and kept for the next job.
    """
    from edgeft.compress.adapter import header_of
    from edgeft.compress.card import front_matter_sha256
    from edgeft.files import publish, sha256_json
    from edgeft.types import Artifact

    merged_sha256 = Artifact.load(job.merged / "artifact.json").sha256
    card_sha256 = front_matter_sha256(job.merged)

    kinds = {
        entry["dtype"] for file in job.merged.glob("*.safetensors") for entry in header_of(file).values()
    }
    kind = "f32" if "F32" in kinds else "bf16" if "BF16" in kinds else "f16"
    made_of = (merged_sha256, card_sha256, job.model_name)
    if standing := _standing(job.merged.parent / f"gguf-{kind}", made_of):
        return standing, {}
    source = job.work / f"source-{kind}-{sha256_json(made_of)[:16]}.gguf"
    if source.exists():
        return source, {}
    partial = source.with_suffix(".part")
    spent = convert(job.merged, partial, kind, job.model_name, job.log)
    publish(partial, source)
    return source, spent


def _standing(folder: Path, made_of: tuple[str, str | None, str]) -> Path | None:
    """The file of a GGUF artefact that was made of this (merged model, card, name) and is whole."""
    from edgeft.files import sha256_file
    from edgeft.types import Artifact

    if not (folder / "artifact.json").is_file():
        return None
    artifact = Artifact.load(folder / "artifact.json")
    merged_sha256, card_sha256 = artifact.made_from.get("merged_sha256"), artifact.recipe.get("card_sha256")
    if (merged_sha256, card_sha256, artifact.model_name) != made_of:
        return None
    name, entry = next(iter(artifact.files.items()))
    file = folder / name
    return file if file.is_file() and sha256_file(file) == entry["sha256"] else None


def quantize(
    source: str, target: str, variant: str, threads: int, imatrix: str | None = None
) -> dict[str, Any]:
    """Quantize a GGUF file, columns weighed by an importance matrix where there is one. Runs in a child process."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, ftype_name(variant))
    parameters.nthread = threads
    kept = []  # the numbers live as long as this function
    if imatrix:
        from edgeft.compress.imatrix import read

        weighed = sorted(read(Path(imatrix)).items())
        entries = (llama_cpp.llama_model_imatrix_data * (len(weighed) + 1))()
        for entry, (name, values) in zip(entries, weighed, strict=False):
            numbers = (ctypes.c_float * len(values))(*values.tolist())
            kept.append(numbers)
            entry.name, entry.size = name.encode(), len(values)
            entry.data = ctypes.cast(numbers, ctypes.POINTER(ctypes.c_float))
        parameters.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    code = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters))
    if code != 0:
        raise EnvironmentFault(
            f"llama_model_quantize gave {code} for {variant}.", f"df -h {Path(target).parent}"
        )
    return {}


def ftype_name(variant: str) -> str:
    """llama.cpp's name of a file type: q4_k_m -> LLAMA_FTYPE_MOSTLY_Q4_K_M."""
    return f"LLAMA_FTYPE_MOSTLY_{variant.upper()}"


def inspect(job: Any) -> dict[str, Any]:
    """Tensors and parameters by type, read from the file; the share of parameters too narrow for the asked type."""
    from gguf import GGUFReader

    file = next(job.out.glob("*.gguf"))
    wide = any(mark in job.variant for mark in BLOCK_OF_256)
    types: dict[str, dict[str, int]] = {}
    total_bytes = parameters = narrow = 0
    for tensor in GGUFReader(file).tensors:
        count = int(tensor.n_elements)
        kind = types.setdefault(tensor.tensor_type.name.lower(), {"tensors": 0, "parameters": 0})
        kind["tensors"] += 1
        kind["parameters"] += count
        total_bytes += int(tensor.n_bytes)
        parameters += count
        if len(tensor.shape) > 1 and int(tensor.shape[0]) % 256:
            narrow += count
    return {
        "tensor_types": types,
        "tensor_bytes": total_bytes,
        "fallback_share": narrow / parameters if wide else 0.0,
    }
