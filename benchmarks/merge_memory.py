"""Merging a LoRA: edgeft's streamed merge against peft's merge_and_unload + save_pretrained.

    python benchmarks/merge_memory.py

A random bf16 Llama of 1.1B parameters (TinyLlama's shapes) in one safetensors file, a random adapter of rank 16 over all
linear layers. Each way in a process of its own, in turns; peak anonymous memory of the process tree and wall time,
interpreter and imports included on both sides, as ratios. Needs 8 GB of disk and 6 GB of memory (peft's side).
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.console import output

RUNS = 3
HERE = {"PYTHONPATH": str(Path(__file__).parent.parent)}
SHAPES = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip


def make(base: str, adapter: str) -> dict[str, Any]:
    """Write the model and the adapter."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.random_lora import save_random_lora

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model: Any = LlamaForCausalLM(LlamaConfig(**SHAPES, tie_word_embeddings=False, dtype="bfloat16"))
    parameters = model.num_parameters()
    model.save_pretrained(base, max_shard_size="100GB")
    save_random_lora(model, adapter, 0.01)
    return {"parameters": parameters}


def by_peft(base: str, adapter: str, out: str) -> dict[str, Any]:
    """peft's own way, in the model's own precision."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="100GB")
    return {}


def main() -> None:
    """Measure in turns and print one JSON line."""
    output.quiet = True
    with tempfile.TemporaryDirectory() as scratch:
        base, adapter, log = (str(Path(scratch, name)) for name in ("base", "adapter", "log"))
        made = child.call(
            "benchmarks.merge_memory:make", log=Path(log), title="model", env=HERE, base=base, adapter=adapter
        )
        taken: dict[str, list[dict[str, float]]] = {"edgeft": [], "peft": []}
        for _ in range(RUNS):
            for name in taken:
                out = Path(scratch, "out")
                out.mkdir()
                if name == "edgeft":
                    spent = child.call("edgeft.compress.merge:merge", log=Path(log), title=name, base=base,
                                       adapters=[[adapter, 1.0]], out=str(out))  # fmt: skip
                else:
                    spent = child.call("benchmarks.merge_memory:by_peft", log=Path(log), title=name, env=HERE, base=base,
                                       adapter=adapter, out=str(out))  # fmt: skip
                taken[name].append({key: spent[key] for key in child.COST})
                shutil.rmtree(out)
    middle = {
        name: {k: statistics.median(run[k] for run in runs) for k in child.COST}
        for name, runs in taken.items()
    }
    ratio = {k: round(middle["edgeft"][k] / middle["peft"][k], 3) for k in child.COST}
    claim = "peak_anon_bytes <= 0.30, wall_s <= 1"
    print(
        json.dumps(
            {"parameters": made["parameters"], "median": middle, "ratio": ratio, "claim": claim, "runs": RUNS}
        )
    )


if __name__ == "__main__":
    main()
