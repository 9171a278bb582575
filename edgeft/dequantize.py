"""A GGUF file as an ordinary transformers folder: safetensors, config, tokenizer, chat template.

Runs in a child process (`edgeft.child`). What is stored is float16: every type of GGUF holds its
scales in float16, so the loss against float32 is below half a unit in the last place of a scale.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

VERSION = 2  # what an earlier one wrote is made again
# llama.cpp's names of pre-tokenizers that split digits, which transformers' reader of GGUF leaves out.
DIGITS_APART = ("smollm",)


def dequantize(gguf: str, out: str) -> dict[str, Any]:
    """Write the model in the file `gguf` into the folder `out`; returns its tensor types and the dtype stored."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from edgeft.gguf_file import Tensors

    source = Path(gguf)
    reader = Tensors(source)
    kinds = Counter(t.tensor_type.name.lower() for t in reader.tensors)
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float16
    # A fresh model of the same class: the loaded one still counts as quantized and refuses to be saved.
    model: Any = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    pre = reader.get_field("tokenizer.ggml.pre")
    if pre is not None and pre.contents() in DIGITS_APART:
        _split_digits(tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.float16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {"tensor_types": dict(kinds), "dtype": "float16"}


def _split_digits(tokenizer: Any) -> None:
    """Every digit a piece of its own, also after white space."""
    from tokenizers.pre_tokenizers import Digits, Sequence

    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
