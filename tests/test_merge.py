"""Planning a merge: what fits, with which factor, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgeft.compress.adapter import scale_of
from edgeft.compress.merge import merge, plan
from edgeft.errors import UsageError

torch = pytest.importorskip("torch", reason="needs the extra: compress")
MODULE = "model.layers.0.self_attn.q_proj"


def base_folder(folder: Path, dtype=torch.float32) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text("{}")
    torch.manual_seed(0)
    tensors = {f"{MODULE}.weight": torch.randn(6, 4), "model.norm.weight": torch.ones(4)}
    save_file({k: v.to(dtype) for k, v in tensors.items()}, folder / "model.safetensors")
    return folder


def adapter_folder(folder: Path, tensors: dict, **config) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3, **config})
    )
    save_file({f"base_model.model.{k}": v for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def lora(out: int = 6, width: int = 4, module: str = MODULE) -> dict:
    torch.manual_seed(1)
    return {f"{module}.lora_A.weight": torch.randn(2, width), f"{module}.lora_B.weight": torch.randn(out, 2)}


def test_factor_follows_alpha_rank_and_patterns():
    config = {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"q_proj": 16},
        "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 2},
    }
    assert scale_of(config, "model.layers.0.self_attn.q_proj") == 8 / 16
    assert scale_of(config, "model.layers.1.mlp.up_proj") == 2 / 4
    assert scale_of(config, "model.layers.11.mlp.up_proj") == 8 / 4
    assert scale_of({**config, "use_rslora": True}, "model.layers.0.self_attn.q_proj") == 8 / 16**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_added_in_float32_and_rounded_once(tmp_path, dtype):
    from safetensors.torch import load_file

    base, added = base_folder(tmp_path / "b", dtype), lora()
    adapter = adapter_folder(tmp_path / "a", added)
    (tmp_path / "out").mkdir()
    facts = merge(str(base), [[str(adapter), 1.0]], str(tmp_path / "out"))
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    a, b = (added[f"{MODULE}.lora_{x}.weight"].double() for x in "AB")
    exact = before[f"{MODULE}.weight"].double() + 1.5 * b @ a
    assert torch.equal(after[f"{MODULE}.weight"], exact.float().to(dtype)) or dtype == torch.float32
    assert np.allclose(after[f"{MODULE}.weight"].float(), exact, atol=torch.finfo(dtype).eps * 8)
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])
    assert facts["weights_changed"] == 1 and facts["parameters"] == 28


def test_fan_in_fan_out_is_transposed(tmp_path):
    from safetensors.torch import load_file

    base = base_folder(tmp_path / "b")
    added = lora(out=4, width=6)
    adapter = adapter_folder(tmp_path / "a", added, fan_in_fan_out=True)
    (tmp_path / "out").mkdir()
    merge(str(base), [[str(adapter), 1.0]], str(tmp_path / "out"))
    change = (
        load_file(tmp_path / "out" / "model.safetensors")[f"{MODULE}.weight"]
        - load_file(base / "model.safetensors")[f"{MODULE}.weight"]
    )
    a, b = (added[f"{MODULE}.lora_{x}.weight"] for x in "AB")
    assert torch.allclose(change, 1.5 * (b @ a).T, atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "config", "complaint"),
    [
        (
            lora(module="model.layers.9.self_attn.q_proj"),
            {},
            "model.layers.9.self_attn.q_proj.weight, which b does not have",
        ),
        (lora(out=8), {}, r"is \[6, 4\] in b and \[8, 4\] in the adapter"),
        (
            {**lora(), "lm_head.weight": torch.ones(3, 4)},
            {},
            "changes lm_head.weight, which b does not have",
        ),
        ({f"{MODULE}.lora_A.weight": torch.ones(2, 4)}, {}, "and no .*lora_B"),
        (lora(), {"use_dora": True}, "no magnitude"),
        ({**lora(), f"{MODULE}.odd": torch.ones(2)}, {}, "fit nothing in b .first: .*odd"),
        (lora(), {"peft_type": "IA3"}, "IA3"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, tensors, config, complaint):
    with pytest.raises(UsageError, match=complaint):
        plan(base_folder(tmp_path / "b"), [(adapter_folder(tmp_path / "a", tensors, **config), 1.0)])


def test_not_a_number_is_named(tmp_path):
    added = lora()
    added[f"{MODULE}.lora_B.weight"][0, 0] = torch.nan
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match=f"{MODULE}.weight has NaN"):
        merge(
            str(base_folder(tmp_path / "b")),
            [[str(adapter_folder(tmp_path / "a", added)), 1.0]],
            str(tmp_path / "out"),
        )
