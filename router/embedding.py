"""The heads that read a sentence embedding: Gaussian kernel ridge, and the mean of the nearest training rows.

They are blended with the other heads (`router/blend.py`). onnxruntime and tokenizers at run time, no torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeft.errors import UsageError, missing_extra
from edgeft.files import read_json, sha256_file
from edgeft.router import blend, kernel
from edgeft.router.minilm_export import CARD, GRAPH, TOKENIZER

WIDTHS = (0.3, 0.5, 0.8)  # of unit vectors, whose squared distances lie in 0..4
NEIGHBOURS = (30, 60, 100)
MAX_CHARACTERS = 2000  # as the hashed text
ENCODE = "edgeft route encoder FOLDER, with all-MiniLM-L6-v2's files"
Encoder = Callable[[str], np.ndarray]


class OnnxEncoder:
    """Text -> float32 [E] of length 1, on one thread. Safe to call from several."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        try:
            import onnxruntime
            from tokenizers import Tokenizer
        except ImportError as error:
            raise missing_extra(error.name or "onnxruntime", "onnx") from None
        self.tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_tokens)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        settings.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            str(folder / GRAPH), settings, providers=["CPUExecutionProvider"]
        )
        self.lock = threading.Lock()

    def __call__(self, text: str) -> np.ndarray:
        with self.lock:
            ids = self.tokenizer.encode(text[:MAX_CHARACTERS]).ids
        found = self.session.run(None, {"input_ids": np.array([ids], np.int64)})[0]
        return np.asarray(found, np.float32)


def load_encoder(spec: Mapping[str, Any]) -> Encoder:
    """The encoder of a policy: where it was when fitting, or the user's cache. Raises UsageError where it is missing or another."""
    from edgeft.home import cache_dir

    for folder in (Path(spec["path"]), cache_dir("encoders", "minilm")):
        if (folder / GRAPH).is_file() and (folder / TOKENIZER).is_file():
            for name in ("graph", "tokenizer"):
                file = folder / (GRAPH if name == "graph" else TOKENIZER)
                if sha256_file(file) != spec[f"{name}_sha256"]:
                    raise UsageError(
                        f"{file} is not the one that the policy was fitted with.", ENCODE + ", then fit again"
                    )
            return OnnxEncoder(folder, spec["max_tokens"])
    raise UsageError(f"the policy's sentence encoder is missing: there is no {spec['path']}.", ENCODE)


def read_spec(folder: Path) -> dict[str, Any]:
    """What a policy keeps of an encoder. Raises UsageError for a folder that holds none."""
    if not (folder / CARD).is_file():
        raise UsageError(f"{folder} holds no {CARD}.", ENCODE)
    return {**read_json(folder / CARD), "path": str(folder.resolve())}


def fit_embedding(
    folder: Path, items: Sequence[Any], targets: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any], dict[str, np.ndarray]]:
    """(tensors, what is said of the heads, features block, leave-one-out predictions by head) of the embedding heads on fitting rows."""
    spec = read_spec(folder)
    encoder = load_encoder(spec)
    tensors, said, more, left_out = vector_heads(np.array([encoder(item.request) for item in items]), targets)
    return tensors, said, {**spec, **more}, left_out


def vector_heads(
    vectors: np.ndarray, targets: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any], dict[str, np.ndarray]]:
    """The same from vectors [n, E] and targets [n, K]; each prediction is [n, K]."""
    head = kernel.fit(vectors, targets, WIDTHS)
    near = nearest(vectors, vectors, max(NEIGHBOURS), leave_out_self=True)
    by_k = {k: targets[near[:, :k]].mean(1) for k in NEIGHBOURS if k < len(vectors)} or {
        1: targets[near[:, :1]].mean(1)
    }
    k = min(by_k, key=lambda k: float(((by_k[k] - targets) ** 2).mean()))
    tensors: dict[str, np.ndarray] = {
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


def fit_vectors(
    vectors: np.ndarray, targets: np.ndarray, text_left_out: np.ndarray | None
) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    """Heads on vectors, blended with the hashed head's leave-one-out predictions [n, K] (None: no such head)."""
    tensors, said, spec, left_out = vector_heads(vectors, targets)
    parts = [*([] if text_left_out is None else [text_left_out]), *left_out.values()]
    tensors |= blend.fit(parts, targets)
    return tensors, {**said, "blend": tensors["blend"].tolist()}, spec


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
    kernel_part = (
        kernel.gram(vectors, tensors["landmark.vectors"], spec["width"]) @ tensors["landmark.weights"]
        + tensors["landmark.bias"]
    )
    memory = np.asarray(tensors["memory.vectors"], np.float32)
    near = nearest(vectors, memory, spec["neighbours"])
    return [kernel_part, tensors["memory.targets"][near].mean(1)]


def mix(
    tensors: Mapping[str, Any], spec: Mapping[str, Any], vectors: np.ndarray, text: np.ndarray | None
) -> np.ndarray:
    """Blended outputs [n, K] of embeddings [n, E] and of the hashed head's outputs [n, K]: what `fit_vectors` fitted."""
    parts = parts_of(tensors, spec, vectors)
    return blend.mix(tensors, parts if text is None else [text, *parts])
