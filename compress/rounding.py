"""Rounding with error feedback: the codes of a quantized GGUF file chosen again, its types, scales and size kept.

llama_model_quantize rounds every weight to the nearest level. Here the columns of a tensor are rounded one after the
other, the most used first, and what each loses is made up for in those that come after, as far as the layer's inputs
tell: GPTQ (arXiv 2210.17323) on a grid that is given, with the inputs' second moments H of `moments.py`. A tensor
keeps the codes it had where that does not lower its expected squared output error, trace(E H Eᵀ).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

DAMPING = 0.01  # of H's mean diagonal, added to it
BLOCK_COLUMNS = 128  # rounded before the rest of the tensor is corrected
BATCH_ROWS = 4096  # of a tensor at once: rows do not know of each other


def recode(
    target: str, source: str, moments: str, threads: int, factors: str | None = None
) -> dict[str, Any]:
    """Choose the codes of the quantized file `target` again, in place. Runs in a child process.

    `source`: the unquantized GGUF file that it was made of; `moments`: a folder of `edgeft.compress.moments`;
    `factors`: by which `source` was smoothed after they were collected.
    Returns tensors (how many were changed), share (of all parameters), and error_ratio (the sum of the changed tensors'
    expected squared output errors, after over before).
    """
    import torch

    from edgeft.compress import blocks
    from edgeft.compress.moments import Moments
    from edgeft.compress.smoothing import Factors
    from edgeft.gguf_file import Tensors

    torch.set_num_threads(threads)
    weights = {t.name: t for t in Tensors(source).tensors}
    reader = Tensors(target, "r+")
    second, smoothed = Moments(Path(moments)), Factors(Path(factors) if factors else None)
    tied = "output.weight" not in weights
    parameters = changed = tensors = 0
    before = after = 0.0
    prepared: tuple[str, Any] = ("", None)
    for index, tensor in enumerate(reader.tensors, 1):
        parameters += int(tensor.n_elements)
        kind = tensor.tensor_type.name.lower()
        # A tied table is looked up as well: errors that cancel in the head would not in a lookup.
        if (
            kind not in blocks.LAYOUTS
            or tensor.name not in second
            or (tied and tensor.name == "token_embd.weight")
        ):
            continue
        leader = second.leaders[tensor.name]
        if leader != prepared[0]:
            moved = smoothed.moments(tensor.name, second.of(tensor.name))
            prepared = (leader, Feedback(torch.from_numpy(moved)))
        data, old, new = _in_batches(kind, tensor.data, weights[tensor.name], prepared[1])
        if new < old:
            tensor.data[...] = data
            before, after = before + old, after + new
            tensors, changed = tensors + 1, changed + int(tensor.n_elements)
        print(f"progress: rounding tensor {index}/{len(reader.tensors)}")
    reader.data.flush()
    return {
        "tensors": tensors,
        "share": changed / parameters,
        "error_ratio": after / before if before else 1.0,
    }


def _in_batches(kind: str, data: Any, origin: Any, feedback: Feedback) -> tuple[Any, float, float]:
    """`chosen` over a whole tensor, some rows at a time; `origin` is the unquantized file's tensor."""
    import numpy as np
    import torch
    from gguf import dequantize

    parts, before, after = [], 0.0, 0.0
    for start in range(0, len(data), BATCH_ROWS):
        rows = slice(start, start + BATCH_ROWS)
        weight = torch.tensor(dequantize(origin.data[rows], origin.tensor_type))
        packed, old, new = chosen(kind, data[rows], weight, feedback)
        parts.append(packed)
        before, after = before + old, after + new
    return np.concatenate(parts), before, after


class Feedback:
    """What H says of a group of layers: the order of its columns and how an error in one is made up for in the later.

    Attributes: moments H [columns, columns]; order [columns], the most used column first; upper, the Cholesky factor of
    H's inverse in that order, upper triangular.
    """

    def __init__(self, moments: Any) -> None:
        import torch

        self.moments = moments
        self.order = torch.argsort(moments.diagonal(), descending=True, stable=True)
        ordered = moments[self.order][:, self.order].double()
        damping = DAMPING * float(ordered.diagonal().mean())
        ordered.diagonal().add_(max(damping, 1e-12))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
        self.upper = torch.linalg.cholesky(inverse, upper=True).float()

    def error(self, difference: Any) -> float:
        """trace(E H Eᵀ) of a difference of weights E [rows, columns]."""
        return float(((difference @ self.moments) * difference).sum())


def chosen(kind: str, data: Any, weight: Any, feedback: Feedback) -> tuple[Any, float, float]:
    """(a tensor's bytes with new codes, its expected squared output error with the old ones, with the new).

    `data`: uint8 [rows, row bytes] as quantized; `weight`: float32 [rows, columns] as it was before.
    """
    import torch
    from gguf import GGMLQuantizationType, dequantize

    from edgeft.compress import blocks

    scale, offset = (torch.from_numpy(part) for part in blocks.grid(kind, data))
    levels = torch.tensor(blocks.LAYOUTS[kind].levels, dtype=torch.float32)
    codes = rounded(weight, scale, offset, levels, feedback)
    packed = blocks.pack(kind, data, codes.numpy())
    made = scale * levels[codes.long()] - offset
    standing = torch.tensor(dequantize(data, GGMLQuantizationType[kind.upper()]))
    return packed, feedback.error(standing - weight), feedback.error(made - weight)


def rounded(weight: Any, scale: Any, offset: Any, levels: Any, feedback: Feedback) -> Any:
    """Codes, uint8 [rows, columns], that index `levels`: value = scale * level - offset, all float32 [rows, columns]."""
    import torch

    order, upper = feedback.order, feedback.upper
    # Columns first: each step then works on memory that lies together.
    left, scale, offset = (x.T[order].contiguous() for x in (weight, scale, offset))
    inverse = torch.where(scale != 0, 1 / scale, 0.0)
    codes = torch.empty(left.shape, dtype=torch.uint8)
    nearest = _nearest(levels)
    for start in range(0, len(left), BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, len(left))
        errors = torch.empty(end - start, left.shape[1])
        for column in range(start, end):
            code = nearest((left[column] + offset[column]) * inverse[column])
            codes[column] = code
            made = levels[code.long()] * scale[column] - offset[column]
            errors[column - start] = (left[column] - made) / upper[column, column]
            if column + 1 < end:
                left[column + 1 : end].addr_(
                    upper[column, column + 1 : end], errors[column - start], alpha=-1
                )
        left[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    back = torch.empty_like(codes)
    back[order] = codes
    return back.T.contiguous()


def _nearest(levels: Any) -> Any:
    """A function from values to the codes of their nearest levels."""
    import torch

    if bool((levels.diff() == 1).all()):
        low, last = float(levels[0]), len(levels) - 1
        return lambda x: (x.round() - low).clamp_(0, last).to(torch.uint8)
    middles = (levels[1:] + levels[:-1]) / 2
    return lambda x: torch.bucketize(x, middles).to(torch.uint8)
