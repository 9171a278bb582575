"""What quantizing each tensor costs: an estimate of KL(merged || artefact) for every tensor in every type.

With small changes δ of one tensor, KL(p || p_δ) summed over a text's positions is ½ E⟨∇ log p(y), δ⟩², where the y are
drawn from the model's own p at each position (the Fisher information; the terms between positions vanish in
expectation). One backward pass a text serves every tensor and type. δ is what llama.cpp's own rounding does, weighed
by the importance matrix. It is an estimate to choose by, never a figure to report.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeft.compress.moments import GENERAL_SHARE, MAX_TOKENS, general_texts

TEXTS = 48  # of rows; as many draws of y
WIDE = ("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0")
NARROW = ("iq4_nl", "q5_0", "q5_1", "q8_0")  # where rows are no multiple of 256
HELD_BYTES = 3 << 30  # of δ at once; larger models take more passes


def score(merged: str, rows_file: str, source: str, imatrix: str, threads: int) -> dict[str, Any]:
    """Tensor name -> type -> estimated KL in nats a position, under `kl_nats`. Runs in a child process.

    Positions are those of the rows as chats after what all share, and of general text, weighed as in `moments.py`.
    Tensors that transformers stores otherwise than GGUF (not even with rows in another order) are left out.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from edgeft.compress import imatrix as importance
    from edgeft.compress.moments import common_start
    from edgeft.rows import load_rows, spread
    from edgeft.tokenizer import load_tokenizer

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    tokenizer = load_tokenizer(Path(merged))
    rows = spread(load_rows(Path(rows_file)), TEXTS)
    own = [tokenizer.apply_chat_template(r["messages"], return_dict=False)[:MAX_TOKENS] for r in rows]
    general = [tokenizer.encode(text)[:MAX_TOKENS] for text in general_texts()]
    shared = max(1, common_start(own)) if len(own) > 1 else 1
    texts = [(ids, shared) for ids in own] + [(ids, 1) for ids in general]
    model: Any = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    model.requires_grad_(False)
    found: dict[str, dict[str, float]] = {}
    weighed = importance.read(Path(imatrix))
    pairs = parameters_of(model, source)
    groups = list(_groups(pairs))
    for number, group in enumerate(groups, 1):
        changes = {n: _changes(pairs[n], weighed.get(n)) for n in group}
        for name in group:
            pairs[name][0].requires_grad_(True)
        sums = {name: dict.fromkeys(changes[name], 0.0) for name in group}
        for index, (ids, start) in enumerate(texts, 1):
            count, share = (
                (len(own), 1 - GENERAL_SHARE) if index <= len(own) else (len(general), GENERAL_SHARE)
            )
            positions = max(1, len(ids) - start)
            _draw_and_differentiate(model, ids, start)
            for name in group:
                gradient = pairs[name][0].grad
                for kind, change in changes[name].items():
                    along = float(torch.dot(gradient.flatten(), change.flatten().float()))
                    sums[name][kind] += share / count * 0.5 * along**2 / positions
            model.zero_grad(set_to_none=True)
            print(f"progress: sensitivity {number}/{len(groups)}, text {index}/{len(texts)}")
        for name in group:
            pairs[name][0].requires_grad_(False)
        found.update(sums)
    return {"kl_nats": found, "left_out": sorted(set(weighed) - set(found))}


def _draw_and_differentiate(model: Any, ids: list[int], start: int) -> None:
    """Gradients of the summed log-probability of tokens drawn from the model's own distribution, from `start` on."""
    import torch

    logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1 if len(ids) > start else None]
    logprobs = logits.log_softmax(-1)
    with torch.no_grad():
        drawn = torch.multinomial(logprobs.exp(), 1)
    logprobs.gather(1, drawn).sum().backward()


def parameters_of(model: Any, source: str) -> dict[str, tuple[Any, Any, Any]]:
    """GGUF tensor -> (the model's parameter, the row of GGUF that stands in each of its rows, the weight [rows, columns])."""
    import numpy as np
    import torch
    from gguf import MODEL_ARCH_NAMES, dequantize, get_tensor_name_map

    from edgeft.gguf_file import Tensors

    reader = Tensors(source)
    architecture = reader.fields["general.architecture"].contents()
    arch = {name: key for key, name in MODEL_ARCH_NAMES.items()}[architecture]
    names = get_tensor_name_map(arch, model.config.num_hidden_layers)
    tensors = {t.name: t for t in reader.tensors}
    pairs = {}
    for name, parameter in model.named_parameters():
        called = names.get_name(name, try_suffixes=(".weight",))
        if called not in tensors or parameter.ndim != 2:
            continue
        weight = np.array(dequantize(tensors[called].data, tensors[called].tensor_type), dtype=np.float32)
        order = row_order(weight, parameter.detach().numpy())
        if order is not None:
            pairs[called] = (parameter, torch.from_numpy(order), weight)
    return pairs


def row_order(rows: Any, wanted: Any) -> Any | None:
    """Indices so that rows[indices] == wanted, or None where `wanted` has other rows.

    llama.cpp's converter puts the rows of some attention weights in another order.
    """
    import numpy as np

    if rows.shape != wanted.shape:
        return None
    if np.array_equal(rows, wanted):
        return np.arange(len(rows))
    whole = np.dtype((np.void, rows.shape[1] * 4))
    keys = [np.ascontiguousarray(x, dtype=np.float32).view(whole).ravel() for x in (rows, wanted)]
    from_rows, from_wanted = (np.argsort(k, kind="stable") for k in keys)
    order = np.empty(len(rows), dtype=np.int64)
    order[from_wanted] = from_rows
    return order if np.array_equal(rows[order], wanted) else None


def bytes_of_changes(parameters: int) -> int:
    """Of a tensor's changes in every type (float16), and the weight that they are of (float32)."""
    return (2 * len(WIDE) + 4) * parameters


def _groups(pairs: dict[str, tuple[Any, Any, Any]]) -> Iterator[list[str]]:
    """Tensors in groups whose changes (float16, a type each) together stay within HELD_BYTES."""
    group: list[str] = []
    held = 0
    for name, (parameter, _, _) in pairs.items():
        size = bytes_of_changes(parameter.numel())
        if group and held + size > HELD_BYTES:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group


def types_for(columns: int) -> list[str]:
    """The types that rows of so many columns may have."""
    from edgeft.compress import blocks

    listed = WIDE if columns % 256 == 0 else NARROW
    return [kind for kind in listed if columns % blocks.LAYOUTS[kind].values == 0]


def _changes(pair: tuple[Any, Any, Any], weighed: Any) -> dict[str, Any]:
    """Type -> what rounding to it adds to the parameter, float16 [rows, columns]."""
    import torch
    from gguf import GGMLQuantizationType, dequantize

    _, order, weight = pair
    found = {}
    for kind in types_for(weight.shape[1]):
        made = dequantize(quantized_rows(kind, weight, weighed), GGMLQuantizationType[kind.upper()])
        found[kind] = torch.from_numpy(made - weight)[order].half()
    return found


def quantized_rows(kind: str, weight: Any, weighed: Any) -> Any:
    """A weight, float32 [rows, columns], as llama.cpp quantizes it, uint8 [rows, row bytes]; `weighed`: importance by column."""
    import numpy as np
    from gguf import GGMLQuantizationType

    from edgeft.compress import blocks

    layout = blocks.LAYOUTS[kind]
    rows, columns = weight.shape
    out = np.empty((rows, columns // layout.values * layout.size_bytes), dtype=np.uint8)
    source = np.ascontiguousarray(weight, dtype=np.float32)
    importance = None if weighed is None else np.ascontiguousarray(weighed, dtype=np.float32)
    _ggml().ggml_quantize_chunk(
        GGMLQuantizationType[kind.upper()].value, source.ctypes.data, out.ctypes.data, 0, rows, columns,
        None if importance is None else importance.ctypes.data,
    )  # fmt: skip
    return out


def _ggml() -> ctypes.CDLL:
    """ggml's own library, as llama-cpp-python brings it."""
    import llama_cpp

    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    function = library.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return library
