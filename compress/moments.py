"""What the linear layers of a merged model see: second moments of their inputs, and the importance matrix.

For every linear layer H = mean of x xᵀ over calibration tokens; its diagonal is what llama.cpp's importance matrix
holds. `imatrix.py` writes that in llama.cpp's own format; H itself is what rounding with error feedback needs
(`rounding.py`). Computed in float32 on the merged model: quantization does not see its own errors.

The importance matrix is of the user's rows alone. H mixes in general text, so that what is rounded for one domain
keeps the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_ROWS = 256
MAX_TOKENS = 1024  # of a row
GENERAL_SHARE = 0.3  # of the weight in H
BATCH_TOKENS = 1024
PASS_BYTES = 2 << 30  # of H held at once; more layers take more passes over the tokens
INDEX = "index.json"

Batch = tuple[Any, Any]  # token ids and which of them count, [rows, tokens] each


def collect(
    merged: str, rows_file: str, gguf: str, imatrix: str | None, moments: str | None, key: str, threads: int
) -> dict[str, Any]:
    """Write the importance matrix to the file `imatrix` and H to the folder `moments`. Runs in a child process.

    `gguf`: the model's GGUF file, which says the architecture and so what the tensors are called there;
    `key`: what it was made of, kept in both.
    Returns rows, tokens, tensors, and the linear layers that have no name in GGUF (`unnamed`).
    """
    import torch
    from transformers import AutoModelForCausalLM

    from edgeft.compress import imatrix as importance
    from edgeft.rows import load_rows, spread
    from edgeft.tokenizer import load_tokenizer

    torch.set_num_threads(threads)
    tokenizer = load_tokenizer(Path(merged))
    model: Any = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    names, unnamed = linear_layers(model, gguf)
    rows = spread(load_rows(Path(rows_file)), MAX_ROWS)
    own = [tokenizer.apply_chat_template(r["messages"], return_dict=False)[:MAX_TOKENS] for r in rows]
    tokens = sum(map(len, own))
    sums, counts = _accumulate(model, names, own, tokenizer, Path(moments) if moments else None, key)
    if imatrix:
        facts = {"datasets": [Path(rows_file).name], "chunks": len(rows), "key": key}
        importance.write(Path(imatrix), sums, counts, facts)
    return {"rows": len(rows), "tokens": tokens, "tensors": len(names), "unnamed": unnamed}


def general_texts() -> list[str]:
    """The passages that stand for what the user's rows are not: prose, dialogue, code, mathematics, languages."""
    texts = json.loads(Path(__file__).with_name("general_texts.json").read_text(encoding="utf-8"))
    return [text for part in texts.values() for text in part]


def linear_layers(model: Any, gguf: str) -> tuple[dict[str, Any], list[str]]:
    """(GGUF tensor -> module of every linear layer, the modules that have no name there).

    A tied head is the tensor `token_embd`.
    """
    import torch
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    from edgeft.gguf_file import Tensors

    architecture = Tensors(gguf).fields["general.architecture"].contents()
    arch = {name: key for key, name in MODEL_ARCH_NAMES.items()}[architecture]
    known = get_tensor_name_map(arch, model.config.num_hidden_layers)
    head, tied = model.get_output_embeddings(), bool(getattr(model.config, "tie_word_embeddings", False))
    named, unnamed = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            called = "token_embd" if module is head and tied else known.get_name(name)
            if called is None:
                unnamed.append(name)
            else:
                named[f"{called}.weight"] = module
    return named, unnamed


def batches(rows: list[list[int]]) -> Iterator[Batch]:
    """Rows of similar length together, padded on the right; what all rows begin with counts once."""
    import torch

    shared = common_start(rows) if len(rows) > 1 else 0
    ordered = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
    first = ordered[0] if ordered else 0
    while ordered:
        width = len(rows[ordered[0]])
        part = [ordered.pop(0)]
        while ordered and (len(part) + 1) * len(rows[ordered[0]]) <= max(BATCH_TOKENS, width):
            part.append(ordered.pop(0))
        width = max(len(rows[i]) for i in part)
        ids, counts = (
            torch.zeros(len(part), width, dtype=torch.long),
            torch.zeros(len(part), width, dtype=torch.bool),
        )
        for place, i in enumerate(part):
            ids[place, : len(rows[i])] = torch.tensor(rows[i])
            counts[place, 0 if i == first else shared : len(rows[i])] = True
        yield ids, counts


def common_start(rows: list[list[int]]) -> int:
    """How many token ids all rows begin with."""
    shortest, longest = min(rows), max(rows)  # in the order of lists: they differ earliest
    return next(
        (i for i, (a, b) in enumerate(zip(shortest, longest, strict=False)) if a != b), min(map(len, rows))
    )


def _accumulate(
    model: Any, modules: dict[str, Any], own: list[list[int]], tokenizer: Any, folder: Path | None, key: str
) -> tuple[dict[str, Any], dict[str, int]]:
    """(sums of squared inputs a column, how many tokens) of every layer over `own`; H into `folder` where one is named.

    Layers with the same input share a file of H; no more than PASS_BYTES of H are held at once.
    """
    import numpy as np

    from edgeft.files import staged_folder, write_json

    leaders = shared_inputs(model, modules, own[0])
    firsts = sorted(set(leaders.values()))
    squares: dict[str, Any] = {}
    counts: dict[str, int] = {}
    own_parts = list(batches(own))

    def square(name: str, x: Any) -> None:
        squares[name] = squares.get(name, 0) + (x**2).sum(0).double()
        counts[name] = counts.get(name, 0) + len(x)

    if folder is None:
        _run(model, own_parts, {n: modules[n] for n in firsts}, [square], "importance matrix")
    else:
        general_parts = [
            part for text in general_texts() for part in batches([tokenizer.encode(text)[:MAX_TOKENS]])
        ]
        sets = [(own_parts, 1 - GENERAL_SHARE), (general_parts, GENERAL_SHARE)]
        with staged_folder(folder) as staging:
            for names in _passes(firsts, modules):
                moments: dict[str, Any] = {}
                for parts, share in sets:
                    weight = share / sum(int(counted.sum()) for _, counted in parts)

                    def multiply(
                        name: str, x: Any, weight: float = weight, into: dict[str, Any] = moments
                    ) -> None:
                        if name not in into:
                            into[name] = x.new_zeros(x.shape[1], x.shape[1])
                        into[name].addmm_(x.T, x, alpha=weight)

                    take = [multiply, square] if parts is own_parts else [multiply]
                    _run(model, parts, {n: modules[n] for n in names}, take, "second moments")
                for name, value in moments.items():
                    np.save(staging / f"{name}.npy", value.numpy())
            write_json(staging / INDEX, {"key": key, "tensors": leaders})
    return (
        {name: squares[leader].float().numpy() for name, leader in leaders.items()},
        {name: counts[leader] for name, leader in leaders.items()},
    )


class _EnoughError(Exception):
    """The head's input is known; its logits are not wanted."""


def _run(model: Any, parts: list[Batch], modules: dict[str, Any], take: list[Any], title: str) -> None:
    """Forward every batch; each of `take` is called with a layer's name and its inputs that count, [tokens, columns]."""
    import torch

    now: dict[str, Any] = {}

    def watch(name: str) -> Any:
        def hook(_module: Any, inputs: tuple[Any, ...]) -> None:
            counted = now["counted"]
            x = inputs[0][counted] if inputs[0].shape[:2] == counted.shape else inputs[0].flatten(0, -2)
            for function in take:
                function(name, x)

        return hook

    def enough(_module: Any, _inputs: Any) -> None:
        raise _EnoughError

    handles = [m.register_forward_pre_hook(watch(n)) for n, m in modules.items()]
    handles.append(model.get_output_embeddings().register_forward_pre_hook(enough))
    try:
        for index, (ids, now["counted"]) in enumerate(parts, 1):
            with torch.inference_mode():
                try:
                    model(input_ids=ids)
                except _EnoughError:
                    pass
            print(f"progress: {title} {index}/{len(parts)}")
    finally:
        for handle in handles:
            handle.remove()


def shared_inputs(model: Any, modules: dict[str, Any], ids: list[int]) -> dict[str, str]:
    """Layer -> the first layer that is given the very same tensor (q, k and v; gate and up)."""
    import torch

    seen: dict[str, Any] = {}
    handles = [
        m.register_forward_pre_hook(lambda _m, inputs, name=n: seen.__setitem__(name, inputs[0]))
        for n, m in modules.items()
    ]
    with torch.inference_mode():
        model(input_ids=torch.tensor([ids[:8]]))
    for handle in handles:
        handle.remove()
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in seen.items()}


def _passes(names: list[str], modules: dict[str, Any]) -> Iterator[list[str]]:
    """Layers in groups whose H together stay within PASS_BYTES."""
    group: list[str] = []
    held = 0
    for name in names:
        size = 4 * modules[name].in_features ** 2
        if group and held + size > PASS_BYTES:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    yield group


class Moments:
    """H of a model's layers, read when asked for."""

    def __init__(self, folder: Path) -> None:
        from edgeft.files import read_json

        self.folder = folder
        self.leaders: dict[str, str] = read_json(folder / INDEX)["tensors"]

    def __contains__(self, tensor: str) -> bool:
        return tensor in self.leaders

    def diagonal(self, tensor: str) -> Any:
        """The mean squared inputs of a GGUF tensor, float32 [columns], without reading the rest."""
        import numpy as np

        return np.load(self.folder / f"{self.leaders[tensor]}.npy", mmap_mode="r").diagonal()

    def of(self, tensor: str) -> Any:
        """H of a GGUF tensor's inputs, float32 [columns, columns]."""
        import numpy as np

        return np.load(self.folder / f"{self.leaders[tensor]}.npy")


def made_of(folder: Path) -> str | None:
    """The key of what a folder of moments was made of; None where there is none."""
    from edgeft.files import read_json

    return read_json(folder / INDEX)["key"] if (folder / INDEX).is_file() else None
