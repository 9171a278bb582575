"""What each step costs in memory, time and bytes, from a model's shapes.

The coefficients were read off measured runs of three models: SmolLM2-135M (float16, tied), a random Llama of 0.38B
(bfloat16, untied) and a tiny one (float32, tied), on two AMD EPYC (Zen 3) cores. Memory follows shapes; time is scaled
by what `probe` measures of this box. docs/benchmarks.md has how close they came on a fourth model.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeft.compress import proof
from edgeft.compress.adapter import ends_of, header_of
from edgeft.compress.formats import Spec
from edgeft.compress.merge import BYTES, Plan
from edgeft.compress.moments import MAX_ROWS, MAX_TOKENS, PASS_BYTES
from edgeft.compress.rounding import BATCH_ROWS
from edgeft.device import driver_seen

MERGE, PROOF = "merging", "proving the merge"
CONVERT, IMATRIX, QUANTIZE = "llama.cpp's converter", "what the layers see", "llama_model_quantize"
SMOOTHING, ROUNDING = "evening out channels", "rounding with error feedback"
CONVERT_LORA = "llama.cpp's converter of adapters"
GREEDY = "the merged model's greedy tokens"
LEVELS = "measuring accuracy levels"
BUILDER, EMBEDDING, GPTQ = "onnxruntime-genai's builder", "quantizing the embedding", "gptqmodel"
LORA_HEADER_BYTES = 30_000  # names and shapes of an adapter's tensors in GGUF
GENERAL_TOKENS = 4_100  # of `moments.general_texts`
CONVERTED = ("f32", "f16", "bf16", "q8_0")
BYTES_A_TOKEN, TEMPLATE_TOKENS = 4.0, 12
TOKENIZER_BYTES, VOCABULARY_BYTES = (
    5_000_000,
    2_000_000,
)  # beside the tensors: in files of their own; inside a GGUF


@dataclass(frozen=True)
class Shape:
    """A merged model's sizes, from headers alone."""

    parameters: int
    stored_bytes: int  # of the tensors
    width: int  # bytes of a parameter in the largest weight's type
    type: str  # that type, as safetensors calls it
    table: int  # parameters of the input embedding
    tied: bool  # the head is the embedding
    largest: int  # parameters of the largest weight
    largest_changed: int  # of the largest one that the adapters change
    widest: int  # columns of the widest inner weight
    matrices: int  # inner weights of two dimensions
    moment_bytes: int  # second moments of all layers' inputs
    vocabulary: int
    narrow: int  # parameters outside the ends in rows that are no multiple of 256
    narrow_ends: bool  # whether embedding and head are such
    has_adapter: bool
    adapter_parameters: int
    tokens: int  # of the calibration rows, as the importance matrix reads them
    longest_tokens: int  # of the longest row
    proof_tokens: int  # that the proof reads

    @property
    def ends(self) -> int:
        """Parameters of embedding and head."""
        return self.table if self.tied else 2 * self.table


@dataclass(frozen=True)
class Box:
    """What was just measured of this box."""

    gflops: float  # float32 matrix product
    python_s: float  # seconds of a fixed loop in Python
    write_gb_per_s: float  # to OUT's disk, flushed


@dataclass(frozen=True)
class Step:
    """A predicted step: `name` is the title it runs under."""

    artifact: str  # the folder's name
    asked: str  # what it is called on the command line
    name: str
    wall_s: float
    peak_rss_bytes: int
    peak_anon_bytes: int
    may_be_owed: bool = False  # left out where it does not fit
    without: str = ""  # the option that does without this step

    @property
    def need_bytes(self) -> int:
        """What must be free: pages that mirror a file can be given back."""
        return self.peak_anon_bytes

    def figures(self) -> dict[str, Any]:
        """What stands beside the seen figures."""
        return {
            "wall_s": round(self.wall_s, 1),
            "peak_rss_bytes": self.peak_rss_bytes,
            "peak_anon_bytes": self.peak_anon_bytes,
        }


# `cuda` is what a torch that has a GPU takes of the host beside: seen on one H100 with one model, not fitted.
# Bytes: step -> (anonymous memory, pages that mirror files), each a sum of coefficient x quantity (see `quantities`).
MEMORY: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    MERGE: ({"one": 1.25e8, "merge": 1.0, "cuda": 0.9e8}, {"one": 0.86e8, "stored": 0.8, "cuda": 1.9e8}),
    PROOF: (
        {"one": 5.8e8, "parameters": 5.5, "proof_logits": 12.0, "cuda": 3.2e8},
        {"one": 1.6e8, "stored": 0.75, "cuda": 3.1e8},
    ),
    CONVERT: ({"one": 3.2e8, "convert": 1.0}, {"one": 1.25e8}),
    IMATRIX: ({"one": 2.8e8, "parameters": 5.0, "pass": 1.3}, {"one": 0.8e8, "stored": 0.6}),
    CONVERT_LORA: ({"one": 2.7e8, "parameters": 0.05}, {"one": 1.1e8}),
    QUANTIZE: ({"one": 0.05e8, "quantize": 1.0}, {"one": 0.75e8, "stored": 0.06}),
    SMOOTHING: ({"one": 0.3e8, "batch": 10.5}, {"one": 0.3e8, "stored": 0.8}),
    ROUNDING: ({"one": 1.15e8, "batch": 25.0, "square": 25.0}, {"one": 0.9e8, "stored": 0.95}),
    "onnx:int8": ({"one": 4.3e8, "parameters": 5.9, "tied_table": 5.9}, {"one": 1.35e8, "stored": 1.0}),
    "onnx:int4": ({"one": 4.3e8, "parameters": 5.32}, {"one": 1.35e8, "stored": 1.0}),
    "onnx:fp32": ({"one": 4.3e8, "parameters": 1.4}, {"one": 1.35e8, "stored": 1.0}),
    EMBEDDING: (
        {"one": 0.28e8, "parameters": 1.36, "table": 3.5, "untied_table": 14.0},
        {"one": 0.26e8},
    ),
    GREEDY: ({"one": 2.7e8, "parameters": 4.3}, {"one": 0.6e8, "stored": 0.7}),
    "levels:int8": ({"one": 1.55e8, "parameters": 1.25}, {"one": 0.6e8, "parameters": 0.2}),
    "levels:int4": ({"one": 1.45e8, "parameters": 0.8}, {"one": 0.5e8, "parameters": 0.1}),
    GPTQ: (
        {"one": 4.0e8, "parameters": 4.9, "logits": 32.0, "cuda": 1.05e9},
        {"one": 2.15e8, "stored": 0.4, "cuda": 3.5e8},
    ),
}
# Seconds on a box as fast as the reference: `one` is starting Python and its packages, which goes by how fast one core
# runs Python; the rest goes by how fast the box multiplies matrices.
SECONDS: dict[str, dict[str, float]] = {
    MERGE: {"one": 1.2, "stored": 2.5e-9},
    PROOF: {"one": 8.2, "parameters": 2.7e-8},
    CONVERT: {"one": 4.2, "parameters": 4e-9},
    IMATRIX: {"one": 6.9, "see": 1.27e-11},
    CONVERT_LORA: {"one": 3.6, "parameters": 1e-9},
    SMOOTHING: {"one": 0.5, "parameters": 1.1e-8},
    ROUNDING: {"one": 4.3, "parameters": 1.55e-7},
    QUANTIZE: {"one": 0.15, "parameters": 1.6e-8, "wide": 2.1e-8},
    "onnx:int8": {"one": 5.6, "parameters": 1.65e-8},
    "onnx:int4": {"one": 5.1, "parameters": 1.4e-8},
    "onnx:fp32": {"one": 5.1, "parameters": 1e-8},
    EMBEDDING: {"one": 0.2, "table": 9e-9, "untied_table": 4.5e-8},
    GREEDY: {"one": 6.5, "parameters": 9e-8},
    "levels:int8": {"one": 0.8, "parameters": 9e-8},
    "levels:int4": {"one": 0.5, "parameters": 2.4e-8},
    GPTQ: {
        "one": 5.0,
        "matrices": 0.22,
        "parameters": 2.2e-7,
    },  # a matrix is packed in Python, whatever its size
}
REFERENCE_GFLOPS, REFERENCE_PYTHON_S = 139.0, 0.0056
BY_PYTHON = ("one", "matrices")  # whose seconds follow the interpreter; others follow the matrix product

# Bits a parameter of a GGUF type as llama.cpp mixes them on a Llama, and what rows no multiple of 256 fall back to.
GGUF_BITS = {
    "f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q6_k": 6.56, "q5_k_m": 5.69, "q5_k_s": 5.54, "q5_1": 6.0, "q5_0": 5.5,
    "q4_k_m": 4.85, "q4_k_s": 4.58, "q4_1": 5.0, "q4_0": 4.5, "iq4_nl": 4.5, "iq4_xs": 4.3, "q3_k_l": 4.2, "q3_k_m": 3.9,
    "q3_k_s": 3.5, "q2_k": 2.9, "q2_k_s": 2.75, "iq3_s": 3.5, "iq3_xxs": 3.2, "iq2_m": 2.8, "iq2_s": 2.6, "iq2_xs": 2.4,
    "iq2_xxs": 2.2, "iq1_m": 1.9, "iq1_s": 1.7,
}  # fmt: skip
GGUF_NARROW_BITS = {"q6": 8.5, "q5": 6.2, "q4": 5.7, "q3": 4.8, "q2": 4.6, "iq": 4.5}


def shape_of(planned: Plan, has_adapter: bool, rows: Path | None) -> Shape:
    """The sizes of what a plan will write, and of the calibration rows."""
    outputs = {o.name: o for listed in planned.files.values() for o in listed}
    counts = {name: math.prod(o.shape) for name, o in outputs.items()}
    embedding, head = ends_of(dict.fromkeys(outputs))
    largest = max(counts, key=counts.__getitem__)
    changed = [counts[name] for name, o in outputs.items() if o.parts]
    inner = [o for name, o in outputs.items() if name not in (embedding, head) and len(o.shape) > 1]
    ends = [outputs[name] for name in (embedding, head) if name in outputs]
    lengths = row_tokens(rows)
    prompts = sorted(lengths)[len(lengths) // 2 :][: proof.PROMPTS] or [20] * len(proof.TEXTS)
    return Shape(
        parameters=sum(counts.values()),
        stored_bytes=sum(o.size_bytes for o in outputs.values()),
        width=BYTES[outputs[largest].dtype],
        type=outputs[largest].dtype,
        table=counts.get(str(embedding), 0),
        tied=head not in outputs,
        largest=counts[largest],
        largest_changed=max(changed, default=0),
        widest=max((o.shape[-1] for o in inner if len(o.shape) == 2), default=0),
        matrices=sum(len(o.shape) == 2 for o in inner),
        moment_bytes=_moment_bytes(inner),
        vocabulary=outputs[embedding].shape[0] if embedding in outputs else 0,
        narrow=sum(math.prod(o.shape) for o in inner if o.shape[-1] % 256),
        narrow_ends=any(o.shape[-1] % 256 for o in ends),
        has_adapter=has_adapter,
        adapter_parameters=sum(
            math.prod(e["shape"]) for a in planned.adapters for e in header_of(a.file).values()
        ),
        tokens=sum(lengths[:MAX_ROWS]),
        longest_tokens=max(lengths, default=0),
        proof_tokens=sum(min(n, proof.MAX_TOKENS) for n in prompts),
    )


def _moment_bytes(inner: list[Any]) -> int:
    """Of H of every layer's inputs: one a module's parent and width, and the attention's output has its own."""
    widths = {
        (o.name.rsplit(".", 2)[0], o.shape[-1], o.name.endswith(("o_proj.weight", "out_proj.weight")))
        for o in inner
        if len(o.shape) == 2
    }
    return sum(4 * width**2 for _, width, _ in widths)


def row_tokens(rows: Path | None) -> list[int]:
    """About how many tokens each calibration row has: four bytes of text each, and the template's own."""
    from edgeft.rows import load_rows

    return [min(tokens_of(row), MAX_TOKENS) for row in (load_rows(rows) if rows else [])]


def tokens_of(row: dict[str, Any]) -> int:
    """About how many tokens a row has."""
    text = sum(len(str(m.get("content") or "").encode()) for m in row["messages"])
    return int(text / BYTES_A_TOKEN) + TEMPLATE_TOKENS


def quantities(shape: Shape) -> dict[str, float]:
    """What the coefficients multiply: counts of parameters or logits, or bytes."""
    f32_copy = 0 if shape.type == "F32" else 4  # bytes a parameter of a float32 copy
    # The converter takes bfloat16 apart in float32 through torch; numpy knows float16.
    convert = {"F32": 4.0, "F16": 2.0}.get(shape.type, 5.2)
    return {
        "one": 1.0,
        "cuda": float(driver_seen()),
        "matrices": shape.matrices,
        "parameters": shape.parameters,
        "stored": shape.stored_bytes,
        "table": shape.table,
        "tied_table": shape.table if shape.tied else 0,
        "untied_table": 0 if shape.tied else shape.table,
        "merge": max(4.6 * shape.largest, 18.0 * shape.largest_changed),  # the sum in float32, and its copies
        "convert": convert * shape.largest,
        "batch": BATCH_ROWS * shape.widest,
        "square": shape.widest**2,
        "pass": min(shape.moment_bytes, PASS_BYTES),
        "quantize": (shape.width + f32_copy) * shape.largest,
        "logits": shape.longest_tokens * shape.vocabulary,
        "proof_logits": shape.proof_tokens * shape.vocabulary,
        # In K-quants, which take longer to search than the legacy types.
        "wide": shape.parameters - shape.narrow,
        "see": (shape.tokens + GENERAL_TOKENS) * (shape.parameters + shape.moment_bytes / 4),
    }


def step(spec_id: str, asked: str, name: str, shape: Shape, box: Box) -> Step:
    """The prediction of one step; `name` may carry the variant, as `onnx:int8`, where the title is the builder's."""
    written = shape.stored_bytes / 1e9 / box.write_gb_per_s if name in (MERGE, CONVERT) else 0.0
    title = {"onnx": BUILDER, "levels": LEVELS}.get(name.partition(":")[0], name)
    predicted = priced(spec_id, asked, title, quantities(shape), MEMORY[name], SECONDS[name], box, written)
    return replace(predicted, may_be_owed=name in (PROOF, GREEDY))


def priced(
    artifact: str,
    asked: str,
    title: str,
    known: dict[str, float],
    memory: tuple[dict[str, float], dict[str, float]],
    seconds: dict[str, float],
    box: Box,
    written_s: float = 0.0,
) -> Step:
    """A step whose memory (anonymous, mirrored) and seconds are coefficients times what is `known`."""
    anon, mirrored = (int(sum(c * known[q] for q, c in part.items())) for part in memory)
    fixed = (
        sum(seconds.get(q, 0.0) * known.get(q, 0.0) for q in BY_PYTHON) * box.python_s / REFERENCE_PYTHON_S
    )
    grows = sum(c * known[q] for q, c in seconds.items() if q not in BY_PYTHON)
    wall_s = fixed + grows * REFERENCE_GFLOPS / box.gflops + written_s
    return Step(artifact, asked, title, wall_s, anon + mirrored, anon)


def merge_steps(shape: Shape, box: Box) -> list[Step]:
    """Merging, and its proof where there is an adapter."""
    names = [MERGE, PROOF] if shape.has_adapter else [MERGE]
    return [step("merged", "merging", name, shape, box) for name in names]


def format_steps(spec: Spec, shape: Shape, box: Box) -> list[Step]:
    """A format's steps in order; none where nothing is known of the format."""
    return [step(spec.id, str(spec), name, shape, box) for name in _names(spec, shape)]


def _names(spec: Spec, shape: Shape) -> list[str]:
    if spec.format == "gguf-base":
        return [CONVERT] if spec.variant in CONVERTED else [CONVERT, QUANTIZE]
    if spec.format == "gguf-lora":
        return [CONVERT_LORA]
    if spec.format == "gguf":
        feedback = shape.tokens and spec.options.get("rounding") != "nearest"
        smooth = [SMOOTHING] if spec.options.get("smooth") else []
        quantize = [
            *([IMATRIX] if shape.tokens else []), *smooth, QUANTIZE, *([ROUNDING] if feedback else []),
        ]  # fmt: skip
        return [CONVERT] if spec.variant in CONVERTED else [CONVERT, *quantize]
    if spec.format == "onnx":
        known = f"onnx:{spec.variant}" if f"onnx:{spec.variant}" in MEMORY else "onnx:fp32"
        levels = f"levels:{spec.variant}"
        measured = levels in MEMORY and "accuracy_level" not in spec.options
        return [
            known,
            *([EMBEDDING] if spec.variant == "int8" else []),
            *([GREEDY, levels] if measured else []),
        ]
    return [GPTQ] if spec.format == "gptq" else []


def artifact_bytes(spec: Spec, shape: Shape) -> int:
    """About how large a format's files will be."""
    inner = shape.parameters - shape.ends
    if spec.format in ("gguf", "gguf-base"):
        bits = GGUF_BITS.get(spec.variant, 8.5)
        narrow_bits = bits if bits >= 8 else GGUF_NARROW_BITS.get(spec.variant[:2], bits)
        head_bits = bits if bits >= 6 else (8.5 if shape.narrow_ends else 6.56)
        total = (inner - shape.narrow) * bits + shape.narrow * max(bits, narrow_bits)
        total += shape.table * head_bits + (0 if shape.tied else shape.table * bits)
    elif spec.format == "onnx":
        bits = {"int8": 9.1, "int4": 5.1, "fp32": 32.1, "fp16": 16.1}.get(spec.variant, 32.1)
        embedding = 9.1 if spec.variant == "int4" and not shape.tied else bits
        total = (shape.parameters - shape.table) * bits + shape.table * embedding
    elif spec.format == "gptq":
        total = inner * (int(spec.variant) + 0.4) + shape.ends * 8 * shape.width
    else:
        return int(shape.adapter_parameters * GGUF_BITS.get(spec.variant, 16) / 8) + LORA_HEADER_BYTES
    return int(total / 8) + (VOCABULARY_BYTES if spec.format == "gguf" else TOKENIZER_BYTES)


def scratch_bytes(spec: Spec, shape: Shape) -> int:
    """What lies in OUT/.work while a format is made: the unquantized GGUF, the smoothed one, the second moments."""
    if spec.format != "gguf" or spec.variant in CONVERTED:
        return 0
    feedback = shape.tokens and spec.options.get("rounding") != "nearest"
    return shape.stored_bytes * (2 if spec.options.get("smooth") else 1) + (
        shape.moment_bytes if feedback else 0
    )


def probe(folder: Path) -> Box:
    """Time a small matrix product and a small flushed file on the disk of a folder: well under a second in all."""
    import numpy as np

    values = np.ones((768, 768), dtype=np.float32)
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        values @ values
        taken.append(time.perf_counter() - started)
    gflops = 2 * 768**3 / min(taken) / 1e9
    return Box(gflops, min(_python_s() for _ in range(3)), _write_gb_per_s(folder))


def _python_s() -> float:
    """Seconds that a fixed loop in Python takes."""
    started = time.perf_counter()
    total = 0
    for i in range(200_000):
        total += i & 3
    return time.perf_counter() - started


def _write_gb_per_s(folder: Path, size_bytes: int = 8 << 20) -> float:
    import os

    while not folder.is_dir():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            started = time.perf_counter()
            file.write(bytes(size_bytes))
            file.flush()
            os.fsync(file.fileno())
            return size_bytes / 1e9 / (time.perf_counter() - started)
    except OSError:  # not allowed here: the run itself will say so
        return 0.1
