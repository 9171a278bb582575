"""The heads that read an encoder's middle layer: Gaussian kernel ridge, and the mean of the nearest training rows.

Its vectors share most of their length: the fitting rows' mean is taken off, and what is left is scaled to length 1. The heads are
blended with the others (`router/blend.py`). onnxruntime and tokenizers at run time, no torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeft.errors import UsageError, missing_extra
from edgeft.files import read_json, sha256_file
from edgeft.router import kernel
from edgeft.router.minilm_export import CARD, GRAPH, ROUTING, TOKENIZER

WIDTHS = (0.5, 1.0, 2.0)  # of unit vectors, whose squared distances lie in 0..4
LANDMARKS = 2000
NEIGHBOURS = (30, 60, 100)
MAX_CHARACTERS = 2000  # as the hashed text
ENCODE = "edgeft route encoder FOLDER, with all-MiniLM-L6-v2's files"
Encoder = Callable[[str], np.ndarray]


class OnnxEncoder:
    """Text -> float32 [E], on one thread. Safe to call from several."""

    def __init__(self, folder: Path, max_tokens: int, graph: str = GRAPH) -> None:
        try:
            import onnxruntime
            from tokenizers import Tokenizer
        except ImportError as error:
            raise missing_extra(error.name or "onnxruntime", "encoder") from None
        self.tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_tokens)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        settings.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            str(folder / graph), settings, providers=["CPUExecutionProvider"]
        )
        self.lock = threading.Lock()

    def __call__(self, text: str) -> np.ndarray:
        with self.lock:
            ids = self.tokenizer.encode(text[:MAX_CHARACTERS]).ids
        found = self.session.run(None, {"input_ids": np.array([ids], np.int64)})[0]
        return np.asarray(found, np.float32)


def load_encoder(spec: Mapping[str, Any], inside: Path | None = None) -> Encoder:
    """An encoder by what `read_spec` kept of it: a policy's own (`inside` its folder), else where it lay, or the user's cache.
    Raises UsageError where it is missing or another."""
    from edgeft.home import cache_dir

    graph = spec.get("graph", GRAPH)
    named = [Path(spec["path"])] if "path" in spec else []
    for folder in ([inside] if inside else []) + named + [cache_dir("encoders", "minilm")]:
        if (folder / graph).is_file() and (folder / TOKENIZER).is_file():
            for name, key in ((graph, "graph_sha256"), (TOKENIZER, "tokenizer_sha256")):
                if sha256_file(folder / name) != spec[key]:
                    raise UsageError(
                        f"{folder / name} is not the one that the policy was fitted with.",
                        ENCODE + ", then fit again",
                    )
            return OnnxEncoder(folder, spec["max_tokens"], graph)
    sought = [*named, *([inside] if inside else []), cache_dir("encoders", "minilm")][0]
    raise UsageError(f"the policy's sentence encoder is missing: there is no {sought / graph}.", ENCODE)


def read_spec(folder: Path, graph: str = GRAPH) -> dict[str, Any]:
    """What is kept of one graph of an encoder's folder. Raises UsageError for a folder that does not hold it."""
    card = read_json(folder / CARD) if (folder / CARD).is_file() else {}
    if not (folder / graph).is_file() or not card:
        raise UsageError(f"{folder} holds no {graph if card else CARD}.", ENCODE)
    sha256 = card["routing_sha256"] if graph == ROUTING else card["graph_sha256"]
    kept = {
        name: card[name]
        for name in ("kind", "dimensions", "max_tokens", "tokenizer_sha256", "made_from_sha256")
    }
    return {**kept, "graph": graph, "graph_sha256": sha256, "path": str(folder.resolve())}


def encoded(folder: Path, texts: Sequence[str]) -> tuple[dict[str, Any], np.ndarray]:
    """(what a policy keeps of the encoder, the texts' vectors [n, E]) of the middle layer."""
    spec = read_spec(folder, ROUTING)
    encoder = load_encoder(spec)
    return spec, np.array([encoder(text) for text in texts])


def vector_heads(
    vectors: np.ndarray, targets: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any], dict[str, np.ndarray]]:
    """(tensors, what is said of the heads, features block, leave-one-out predictions by head, each [n, K]) of the heads on vectors
    [n, E], for targets [n, K]."""
    mean = vectors.mean(0)
    vectors = directions(vectors, mean)
    head = kernel.fit(vectors, targets, WIDTHS, LANDMARKS)
    near = nearest(vectors, vectors, max(NEIGHBOURS), leave_out_self=True)
    by_k = {k: targets[near[:, :k]].mean(1) for k in NEIGHBOURS if k < len(vectors)} or {
        1: targets[near[:, :1]].mean(1)
    }
    k = min(by_k, key=lambda k: float(((by_k[k] - targets) ** 2).mean()))
    tensors: dict[str, np.ndarray] = {
        "embedding.mean": mean.astype(np.float32),
        "landmark.vectors": head.landmarks.astype(np.float32), "landmark.weights": head.weights.astype(np.float32),
        "landmark.bias": head.bias.astype(np.float32), "memory.vectors": vectors.astype(np.float16),
        "memory.targets": targets.astype(np.float32),
    }  # fmt: skip
    return (
        tensors,
        {"kernel_loo_mse": head.loo_mse},
        {"width": head.width, "neighbours": k},
        {"kernel": head.left_out, "neighbours": by_k[k]},
    )


def directions(vectors: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Where vectors [n, E] lie seen from a mean [E]: float32 [n, E], of length 1."""
    found = np.asarray(vectors, np.float32) - np.asarray(mean, np.float32)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)


def nearest(queries: np.ndarray, memory: np.ndarray, k: int, leave_out_self: bool = False) -> np.ndarray:
    """Places of the k most similar rows of memory, int [queries, min(k, n)]; by blocks, so that memory stays small."""
    found = []
    room = len(memory) - leave_out_self
    k = max(1, min(k, room))
    for start in range(0, len(queries), 512):
        likeness = queries[start : start + 512] @ memory.T
        if leave_out_self:
            likeness[np.arange(len(likeness)), start + np.arange(len(likeness))] = -np.inf
        part = np.argpartition(-likeness, k - 1, axis=1)[:, :k]
        order = np.take_along_axis(-likeness, part, 1).argsort(1, kind="stable")
        found.append(np.take_along_axis(part, order, 1))
    return np.concatenate(found)


def parts_of(tensors: Mapping[str, Any], spec: Mapping[str, Any], vectors: np.ndarray) -> list[np.ndarray]:
    """Outputs of the kernel and of the neighbours, each [n, K], of embeddings [n, E]."""
    if "embedding.mean" in tensors:  # policies on the last layer have none
        vectors = directions(vectors, tensors["embedding.mean"])
    kernel_part = (
        kernel.gram(
            vectors, tensors["landmark.vectors"], spec["width"], tensors.get("landmark.vectors.squared")
        )
        @ tensors["landmark.weights"]
        + tensors["landmark.bias"]
    )
    memory = np.asarray(tensors["memory.vectors"], np.float32)
    near = nearest(vectors, memory, spec["neighbours"])
    return [kernel_part, tensors["memory.targets"][near].mean(1)]
