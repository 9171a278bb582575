"""How much of what the box can do an artefact uses, and so what another box would give.

A token read from memory-bound weights: decode tok/s <= BW / (W + KV * L), with W the bytes of the weights that each token
reads (the input embedding left out unless it is the head), KV the bytes a token adds to the context's cache, L the mean
length of the context (Williams 2009; metrics.md). Prefill: 2 N S + 2 layers d S^2 floating-point operations.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeft.bench.targets import Target
from edgeft.engines import GGUF

KV_BYTES = 2  # of one number in the cache: float16 by default in llama.cpp


@dataclass(frozen=True)
class Shape:
    """What a token costs: bytes read, bytes kept, operations."""

    weight_bytes: int  # read for each token
    kv_bytes_per_token: int
    layers: int
    attention_width: int  # heads x their width
    parameters: int  # in the layers: embedding and head left out
    basis: str


def shape_of(target: Target, on_gpu: bool = False) -> Shape | None:
    """A target's shape from its own files; None where they don't say. A GPU keeps weights and keys in 16 bits where a CPU takes 32."""
    if target.path is None:
        return None
    try:
        if target.engine in GGUF:
            return _of_gguf(target.path)
        return _of_config(target, on_gpu)
    except (OSError, KeyError, ValueError, ImportError, IndexError):
        return None


def _of_gguf(folder: Path) -> Shape:
    from edgeft.engines.gguf import gguf_file, model_and_adapter
    from edgeft.gguf_file import Tensors

    file, _ = model_and_adapter(folder)
    parts = sorted(folder.glob("*.gguf")) if folder.is_dir() and "-of-" in gguf_file(folder).name else [file]
    readers = [Tensors(part) for part in parts]
    known = {name: field.contents() for name, field in readers[0].fields.items() if "tokenizer" not in name}
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    if any("_exps" in tensor.name for tensor in tensors):
        raise ValueError("which experts a token reads is not in the file")
    arch = known["general.architecture"]
    tied = not any(t.name == "output.weight" for t in tensors)
    read = sum(int(t.n_bytes) for t in tensors if tied or t.name != "token_embd.weight")
    inner = sum(int(t.n_elements) for t in tensors if t.name not in ("token_embd.weight", "output.weight"))
    heads, layers = int(known[f"{arch}.attention.head_count"]), int(known[f"{arch}.block_count"])
    width = int(known.get(f"{arch}.attention.key_length") or known[f"{arch}.embedding_length"] // heads)
    kv_heads = int(known.get(f"{arch}.attention.head_count_kv", heads))
    kv = 2 * layers * kv_heads * width * KV_BYTES
    return Shape(read, kv, layers, heads * width, inner, "bytes of the file's tensors")


def _of_config(target: Target, on_gpu: bool) -> Shape:
    """Of a folder for transformers or onnxruntime-genai; the share of embedding and head comes from the shapes."""
    assert target.path is not None
    number_bytes = 2 if on_gpu else 4
    numbers = f"float{8 * number_bytes}"
    parameters = int(target.facts.get("parameters") or _parameters(target.path))
    if target.engine == "onnx":
        decoder = json.loads((target.path / "genai_config.json").read_text())["model"]
        vocabulary, part = int(decoder["vocab_size"]), decoder["decoder"]
        hidden, heads, kv_heads = (
            int(part["hidden_size"]),
            int(part["num_attention_heads"]),
            int(part["num_key_value_heads"]),
        )
        layers, width = int(part["num_hidden_layers"]), int(part["head_size"])
        read = sum(f.stat().st_size for f in target.path.iterdir() if f.name.startswith("model.onnx"))
        return Shape(
            read, 2 * layers * kv_heads * width * number_bytes, layers, heads * width, parameters - vocabulary * hidden,
            f"bytes of the ONNX files, an embedding of its own included; keys and values in {numbers}",
        )  # fmt: skip
    config = json.loads((target.path / "config.json").read_text())
    if any("expert" in key for key in config):
        raise ValueError("which experts a token reads is not in the configuration")
    hidden, heads, layers = (
        int(config["hidden_size"]),
        int(config["num_attention_heads"]),
        int(config["num_hidden_layers"]),
    )
    width, kv_heads = (
        int(config.get("head_dim") or hidden // heads),
        int(config.get("num_key_value_heads") or heads),
    )
    table = int(config["vocab_size"]) * hidden
    tied = bool(config.get("tie_word_embeddings"))
    inner = parameters - (table if tied else 2 * table)
    quantized = "quantization_config" in config
    bits = float(target.facts.get("bits_per_weight") or 16) if quantized else 8.0 * number_bytes
    read = int((parameters - (0 if tied else table)) * bits / 8)
    return Shape(read, 2 * layers * kv_heads * width * number_bytes, layers, heads * width, inner,
                 f"parameters at {bits:.1f} bits; keys and values in {numbers}")  # fmt: skip


def _parameters(folder: Path) -> int:
    """Parameters of a plain model folder, from the headers of its files."""
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def decode_bound(shape: Shape, gb_per_s: float, context_tokens: float) -> float:
    """Tokens a second that reading memory allows one stream."""
    return gb_per_s * 1e9 / (shape.weight_bytes + shape.kv_bytes_per_token * context_tokens)


def prefill_flop(shape: Shape, tokens: float) -> float:
    """Floating-point operations of reading a prompt (the head, asked for the last token alone, left out)."""
    return 2.0 * shape.parameters * tokens + 2.0 * shape.layers * shape.attention_width * tokens**2


def share(result: dict[str, Any], target: Target, box: dict[str, Any]) -> dict[str, Any] | None:
    """Share of the box's bandwidth in decode and of its GEMM rate in prefill; `over_100` says what that would mean."""
    gpu = gpu_used(result, box)
    shape, speed = shape_of(target, gpu is not None), result.get("speed")
    if shape is None or not speed or not speed.get("decode_tok_per_s"):
        return None
    roof = box if gpu is None else gpu
    bandwidth = roof.get("bandwidth_measured_gb_per_s") or roof.get("bandwidth_gb_per_s")
    length = sum(
        p + o / 2 for p, o in zip(speed["prompt_tokens"], speed["output_tokens"], strict=True)
    ) / len(speed["prompt_tokens"])
    bound = decode_bound(shape, bandwidth, length) if bandwidth else None
    used = speed["decode_tok_per_s"]["p50"] / bound if bound else None
    cpu = box.get("cpu") if gpu is None else None
    cache = cpu.get("last_level_cache_bytes") if isinstance(cpu, dict) else None
    longest = max(speed["points"], key=lambda p: p["asked"]["prompt_tokens"])
    rated = "gemm_f32_gflop_per_s" if gpu is None else "gemm_f16_gflop_per_s"
    gemm, prefill = roof.get(rated), longest["ttft_s"]["p50"]
    rate = prefill_flop(shape, _mean(longest["prompt_tokens"])) / prefill / 1e9
    return {
        **asdict(shape),
        "bandwidth_gb_per_s": bandwidth,
        "decode_bound_tok_per_s": bound,
        "bandwidth_share": used,
        "over_100": None if used is None or used <= 1 else (
            "the weights fit in the last-level cache" if cache and shape.weight_bytes < cache
            else "a fault of the measurement: the bandwidth was measured too low"
        ),
        "prefill_gflop_per_s": rate,
        rated: gemm,
        "gemm_share": rate / gemm if gemm else None,
        "context_tokens": length,
    }  # fmt: skip


def gpu_used(result: dict[str, Any], box: dict[str, Any]) -> dict[str, Any] | None:
    """The box's GPU that the artefact ran on, with what was measured of it; None where it ran on the CPU."""
    device = (result.get("load") or {}).get("device") or "cpu"
    return None if device == "cpu" else next((g for g in box.get("gpu") or () if g["name"] == device), {})


def held_bytes(result: dict[str, Any], kind: str | None) -> int | None:
    """The memory that is held against a box of a profile's kind: the processes' resident peak where the model ran on a CPU.

    Where it ran on a GPU: what its processes held there for a `gpu`, the larger of both for a `soc`, whose memory is one; None, since
    it says nothing, for a box without a GPU. None too where it was not measured.
    """
    memory = result.get("memory") or {}
    peak, vram = memory.get("peak_rss_bytes"), memory.get("vram_bytes")
    if on_cpu(result):
        return peak
    return vram if kind == "gpu" else max(peak or 0, vram or 0) or None if kind == "soc" else None


def on_cpu(result: dict[str, Any]) -> bool:
    """Did the model run on the CPU alone?"""
    return ((result.get("load") or {}).get("device") or "cpu") == "cpu"


def predict(result: dict[str, Any], profile: dict[str, Any]) -> dict[str, Any] | None:
    """What another box would give: the share of bandwidth seen here times its bandwidth, and whether memory holds it.

    Always a prediction; None where the share was not measured or the profile has no bandwidth.
    """
    here, there = (
        result.get("roofline") or {},
        profile.get("bandwidth_measured_gb_per_s") or profile.get("bandwidth_gb_per_s"),
    )
    if not there or here.get("bandwidth_share") is None:
        return None
    room = (
        (profile.get("limits") or {}).get("memory_budget_gb")
        or profile.get("vram_gb")
        or profile.get("ram_gb")
    )
    peak = held_bytes(result, profile.get("kind"))
    read = here["weight_bytes"] + here["kv_bytes_per_token"] * here["context_tokens"]
    assumes = f"the {100 * min(1.0, here['bandwidth_share']):.0f} % of the bandwidth that were used here"
    if profile.get("kind") == "gpu" and on_cpu(result):
        assumes += (
            ", on a CPU: a small model on a GPU is held up by other things, so this is no more than a bound"
        )
    return {
        "label": "predicted",
        "profile": profile["id"],
        "decode_tok_per_s": min(1.0, here["bandwidth_share"]) * there * 1e9 / read,
        "decode_bound_tok_per_s": there * 1e9 / read,
        "memory_gb": peak / 1e9 if peak else None,
        "fits": None if not (peak and room) else peak / 1e9 <= room,
        "assumes": assumes,
    }  # fmt: skip


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
