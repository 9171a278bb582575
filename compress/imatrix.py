"""Importance matrix: which input channels of each weight matter on the user's own rows.

For every linear layer the mean of the squared inputs, column by column, over the calibration rows as chats; that is
what llama.cpp's llama-imatrix collects, and the file is llama.cpp's own (a GGUF of type "imatrix"), so its tools can
use it. Computed in float32 on the merged model: quantization does not see its own errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

MAX_ROWS = 512
MAX_TOKENS = 1024  # of a row
KEY = "edgeft.made_of"


def collect(merged: str, rows_file: str, gguf: str, out: str, key: str, threads: int) -> dict[str, Any]:
    """Write the importance matrix of a merged model to the file `out`. Runs in a child process.

    `gguf`: the model's GGUF file, which says the architecture and so what the tensors are called there;
    `key`: what it was made of, kept in the file.
    Returns rows, tokens, tensors, and the linear layers that have no name in GGUF (`unnamed`).
    """
    import torch
    from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map
    from transformers import AutoModelForCausalLM

    from edgeft.rows import load_rows, spread
    from edgeft.tokenizer import load_tokenizer

    torch.set_num_threads(threads)
    tokenizer = load_tokenizer(Path(merged))
    model: Any = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    architecture = GGUFReader(gguf).fields["general.architecture"].contents()
    arch = {name: key for key, name in MODEL_ARCH_NAMES.items()}[architecture]
    names = get_tensor_name_map(arch, model.config.num_hidden_layers)
    sums: dict[str, Any] = {}
    counts: dict[str, int] = {}
    unnamed = []

    def watch(name: str) -> Any:
        def add(_module: Any, inputs: tuple[Any, ...]) -> None:
            values = inputs[0].detach().flatten(0, -2)
            sums[name] = sums.get(name, 0) + (values.double() ** 2).sum(0)
            counts[name] = counts.get(name, 0) + len(values)

        return add

    head = model.get_output_embeddings()
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        called = "token_embd" if module is head and tied else names.get_name(name)
        if called is None:
            unnamed.append(name)
        else:
            module.register_forward_pre_hook(watch(f"{called}.weight"))
    tokens = 0
    rows = spread(load_rows(Path(rows_file)), MAX_ROWS)
    for index, row in enumerate(rows):
        ids = tokenizer.apply_chat_template(row["messages"], return_dict=False)[:MAX_TOKENS]
        tokens += len(ids)
        with torch.inference_mode():
            model(input_ids=torch.tensor([ids]))
        print(f"progress: importance matrix {index + 1}/{len(rows)} rows")
    facts = {"datasets": [Path(rows_file).name], "chunks": len(rows), "key": key}
    write(Path(out), {k: v.float().numpy() for k, v in sums.items()}, counts, facts)
    return {"rows": len(rows), "tokens": tokens, "tensors": len(sums), "unnamed": unnamed}


def write(out: Path, sums: dict[str, Any], counts: dict[str, int], facts: dict[str, Any]) -> None:
    """llama.cpp's file: `NAME.in_sum2` [columns, 1] and `NAME.counts` [1, 1], both float32, and edgeft's own key."""
    import numpy as np
    from gguf import GGUFWriter

    from edgeft.files import publish

    partial = out.with_suffix(".part")
    writer = GGUFWriter(partial, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", facts["datasets"])
    writer.add_uint32("imatrix.chunk_count", facts["chunks"])
    writer.add_uint32("imatrix.chunk_size", MAX_TOKENS)
    writer.add_string(KEY, facts["key"])
    for name in sorted(sums):
        writer.add_tensor(f"{name}.in_sum2", sums[name].reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.array([[counts[name]]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    publish(partial, out)


def made_of(path: Path) -> str | None:
    """The key of a matrix that edgeft made; None for others."""
    from gguf import GGUFReader

    field = GGUFReader(path).fields.get(KEY)
    return str(field.contents()) if field else None


def read(path: Path) -> dict[str, Any]:
    """Tensor name -> mean of the squared inputs, float32 [columns]."""
    import numpy as np
    from gguf import GGUFReader

    found = {t.name: np.asarray(t.data, dtype=np.float32).reshape(-1) for t in GGUFReader(path).tensors}
    return {
        name.removesuffix(".in_sum2"): values
        / max(float(found[name.removesuffix(".in_sum2") + ".counts"][0]), 1.0)
        for name, values in found.items()
        if name.endswith(".in_sum2")
    }
