"""The random adapter that the merge benchmarks share."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save_random_lora(model: Any, out: str | Path, std: float) -> None:
    """Save an adapter of rank 16 over all linear layers of `model`; B is normal with `std`, A is peft's own start."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(0.0, std)
    wrapped.save_pretrained(out)
