"""GGUF: f32, f16, bf16 and q8_0 by upstream's converter, K and IQ types by `llama_model_quantize`.

With calibration rows the quantizer weighs columns by an importance matrix computed on them, which is kept as
`dist/imatrix.gguf`, and the codes are then chosen again with error feedback (`edgeft.compress.rounding`): types, scales and size stay
llama.cpp's. With `smooth=true` channels are evened out beforehand (`edgeft.compress.smoothing`).
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from edgeft import child, console
from edgeft.compress import autoround
from edgeft.compress.converter import convert, installed_version
from edgeft.compress.formats import gguf_split, one_of
from edgeft.compress.formats.gguf_types import (
    TENSOR_CLASSES,
    TENSOR_TYPES,
    patterns,
    read_types,
    refuse_unmatched,
)
from edgeft.errors import EnvironmentFault, UsageError

CONVERTED = ("f32", "f16", "bf16", "q8_0")
# llama.cpp refuses these without an importance matrix.
NEED_IMATRIX = ("q2_k_s", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs")
QUANTIZED = (
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m", "q5_0", "q5_1", "q5_k_s", "q5_k_m",
    "q6_k", "iq3_s", "iq3_m", "iq4_nl", "iq4_xs",
)  # fmt: skip
VARIANTS = (*CONVERTED, *QUANTIZED, *NEED_IMATRIX)
OPTIONS: dict[str, Any] = {
    "rounding": one_of("nearest", "feedback"),
    "smooth": one_of(True, False),
    "types": (read_types, "a JSON file of tensor name -> type, or name:type;name:type…"),
    **dict.fromkeys(TENSOR_CLASSES, one_of(*TENSOR_TYPES)),
    "split_max_size": gguf_split.OPTION,
    **autoround.OPTIONS,
}
NEEDS_ROWS = dict.fromkeys(NEED_IMATRIX, "an importance matrix, which needs rows")
ENGINE = "gguf"
PACKAGES = ("llama-cpp-python", "torch", "transformers", "numpy")
REQUIRES = {"llama_cpp": "compress", "gguf": "compress", "torch": "compress", "transformers": "compress"}
BLOCK_OF_256 = ("_k", "iq1_", "iq2_", "iq3_", "iq4_xs")
FALLBACK_WARNING_SHARE = 0.05


def refuse(spec: Any, base: Path, plan: Any) -> None:
    """Raise what is wrong with the options."""
    autoround.refuse(spec)
    refused = set(spec.options) & {"rounding", "smooth", "types", *TENSOR_CLASSES}
    if spec.variant in CONVERTED and refused:
        raise UsageError(
            f"gguf:{spec.variant} is written by the converter, which has no {sorted(refused)[0]}.",
            "--to gguf:q4_k_m,… (any quantized type)",
        )
    if spec.options.get("smooth") and (spec.options.get("rounding") == "nearest" or "method" in spec.options):
        raise UsageError(
            f"{spec}: channels are evened out with edgeft's error feedback alone.",
            f"--to gguf:{spec.variant},smooth=true",
        )


def settings(job: Any) -> dict[str, Any]:
    """What decides the result besides the merged model."""
    from edgeft.compress.card import front_matter_sha256
    from edgeft.files import sha256_file

    found: dict[str, Any] = {
        "converter": f"llama-cpp-python {installed_version()}",
        "model_name": job.model_name,
        "card_sha256": front_matter_sha256(
            job.merged
        ),  # upstream's converter reads it into the file's metadata
        **job.options,
    }
    if how := autoround.settings(job.options):
        return {**found, **how, "calibration_sha256": sha256_file(job.calibration)}
    if job.variant in CONVERTED:
        return found
    rounding = rounding_of(job)
    if types := patterns(job.options):
        found["tensor_types"] = types
    if job.calibration is None:
        return {**found, "imatrix": None, "rounding": rounding}
    return {
        **found,
        "imatrix": "mean squared inputs",
        "rounding": rounding,
        "calibration_sha256": sha256_file(job.calibration),
    }


def rounding_of(job: Any) -> str:
    """nearest or feedback: as asked, else feedback where there are rows."""
    return job.options.get("rounding") or ("feedback" if job.calibration else "nearest")


def build(job: Any) -> dict[str, Any]:
    """Write the GGUF file, or its parts; returns wall_s, peak_rss_bytes and checks (channels evened out)."""
    spent = _build(job)
    if size := job.options.get("split_max_size"):
        cut = child.call(
            "edgeft.compress.formats.gguf_split:split",
            log=job.log,
            title="splitting",
            file=str(next(job.out.glob("*.gguf"))),
            max_bytes=gguf_split.size_bytes(size),
        )
        spent = {
            **spent,
            "wall_s": spent["wall_s"] + cut["wall_s"],
            "peak_rss_bytes": max(spent["peak_rss_bytes"], cut["peak_rss_bytes"]),
        }
    return spent


def _build(job: Any) -> dict[str, Any]:
    from edgeft.compress import smoothing

    target = job.out / f"{job.model_name}-{job.variant}.gguf"
    if job.options.get("method") == autoround.METHOD:
        name = f"gguf:{autoround.SCHEMES.get(job.variant, job.variant)}"
        spent = autoround.build(job, {"scheme": name.upper()}, name)
        next(job.out.glob("*.gguf")).rename(target)
        return spent
    if job.variant in CONVERTED:
        return convert(job.merged, target, job.variant, job.model_name, job.log)
    source, spent = unquantized(job)
    steps = [spent] if spent else []
    if patterns(job.options):
        from edgeft.gguf_file import Tensors

        refuse_unmatched(job.options, {tensor.name for tensor in Tensors(source).tensors})
    imatrix = moments = None
    if job.calibration:
        imatrix, moments, spent = seen_by_layers(job, source, with_moments=rounding_of(job) == "feedback")
        steps += [spent] if spent else []
    factors, checks = None, {}
    if moments and job.options.get("smooth"):
        source, factors, spent = smoothing.smoothed(job, source, moments)
        steps += [spent] if spent else []
        checks["smooth"] = smoothing.Factors(factors).counts()
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
            factors=str(factors) if factors else None,
            types=patterns(job.options),
        )
    )
    if moments:
        steps.append(
            child.call(
                "edgeft.compress.rounding:recode",
                log=job.log,
                title="rounding with error feedback",
                target=str(target),
                source=str(source),
                moments=str(moments),
                factors=str(factors) if factors else None,
                threads=job.threads,
            )
        )
    return {
        "wall_s": sum(step["wall_s"] for step in steps),
        "peak_rss_bytes": max(step["peak_rss_bytes"] for step in steps),
        "checks": checks,
    }


def seen_by_layers(job: Any, source: Path, with_moments: bool) -> tuple[Path, Path | None, dict[str, Any]]:
    """(importance matrix, folder of second moments, cost) of this merged model on these rows; kept where they stand already."""
    from edgeft.compress import imatrix, moments
    from edgeft.files import sha256_file
    from edgeft.types import Artifact

    wanted = f"{Artifact.load(job.merged / 'artifact.json').sha256} {sha256_file(job.calibration)}"
    matrix, folder = job.merged.parent / "imatrix.gguf", job.work / "moments"
    standing = matrix.exists() and imatrix.made_of(matrix) == wanted
    if standing and (not with_moments or moments.made_of(folder) == wanted):
        return matrix, folder if with_moments else None, {}
    spent = child.call(
        "edgeft.compress.moments:collect",
        log=job.log,
        title="what the layers see",
        merged=str(job.merged),
        rows_file=str(job.calibration),
        gguf=str(source),
        imatrix=None if standing else str(matrix),
        moments=str(folder) if with_moments else None,
        key=wanted,
        threads=job.threads,
    )
    if spent["unnamed"]:
        console.note(
            f"  no importance for {len(spent['unnamed'])} layers that GGUF has no name for ({spent['unnamed'][0]}, …)"
        )
    return matrix, folder if with_moments else None, spent


def unquantized(job: Any) -> tuple[Path, dict[str, float]]:
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
    source: str,
    target: str,
    variant: str,
    threads: int,
    imatrix: str | None = None,
    types: list[list[str]] | None = None,
    factors: str | None = None,
) -> dict[str, Any]:
    """Quantize a GGUF file, columns weighed by an importance matrix where there is one. Runs in a child process.

    `types`: [regular expression over tensor names, type] in the order of being tried; the variant decides the rest.
    `factors`: by which `source` was smoothed after the matrix was collected.
    """
    import llama_cpp
    from gguf import GGMLQuantizationType

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, ftype_name(variant))
    parameters.nthread = threads
    kept = []  # the numbers live as long as this function
    if imatrix:
        from edgeft.compress.imatrix import read
        from edgeft.compress.smoothing import Factors

        known = Factors(Path(factors) if factors else None)
        weighed = [
            (name, known.squares(name, values)) for name, values in sorted(read(Path(imatrix)).items())
        ]
        entries = (llama_cpp.llama_model_imatrix_data * (len(weighed) + 1))()
        for entry, (name, values) in zip(entries, weighed, strict=False):
            numbers = (ctypes.c_float * len(values))(*values.tolist())
            kept.append(numbers)
            entry.name, entry.size = name.encode(), len(values)
            entry.data = ctypes.cast(numbers, ctypes.POINTER(ctypes.c_float))
        parameters.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    if types:
        overrides = (llama_cpp.llama_model_tensor_override * (len(types) + 1))()
        for override, (pattern, kind) in zip(overrides, types, strict=False):
            override.pattern, override.type = pattern.encode(), GGMLQuantizationType[kind.upper()].value
        parameters.tt_overrides = overrides
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
    from edgeft.gguf_file import Tensors

    tensors = [tensor for file in sorted(job.out.glob("*.gguf")) for tensor in Tensors(file).tensors]
    wide = any(mark in job.variant for mark in BLOCK_OF_256)
    types: dict[str, dict[str, int]] = {}
    total_bytes = parameters = narrow = 0
    for tensor in tensors:
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
