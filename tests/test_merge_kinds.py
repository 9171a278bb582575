"""Every kind of LoRA adapter that peft saves: the merged model computes what base + live adapter computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgeft.compress.merge import merge, plan
from edgeft.errors import UsageError

torch = pytest.importorskip("torch", reason="needs the extra: compress")
peft = pytest.importorskip("peft", reason="needs the extra: tune")
transformers = pytest.importorskip("transformers", reason="needs the extra: compress")

IDS = torch.tensor([[1, 5, 60, 93, 2, 7], [9, 8, 64, 3, 90, 11]])
SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
LINEAR = ["q_proj", "v_proj", "down_proj"]


def base_model(folder: Path, kind: str, dtype: Any = None) -> Path:
    """A random model: llama (tied), qwen2 (biases, untied) or gpt2 (weights stored [in, out])."""
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    elif kind == "llama":
        config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    else:
        config = transformers.Qwen2Config(**SIZES, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name or "ln_" in name else 0.0, 0.1)
    model.to(dtype or torch.float32).save_pretrained(folder)
    return folder


def trained(base: Path, folder: Path, grown: int = 0, **options: Any) -> tuple[Path, Any]:
    """(adapter folder, logits of base + live adapter) with every trained tensor set to random values."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if grown:
        model.resize_token_embeddings(96 + grown)
    model = peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **options})
    ).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * (0.3 if "lora_" in name else 0.05))
        live = model(IDS).logits
    model.save_pretrained(folder)
    return folder, live


def merged(base: Path, sources: list[tuple[Path, float]], out: Path) -> tuple[dict[str, Any], Any]:
    """(facts, the merged model)."""
    out.mkdir()
    facts = merge(str(base), [[str(folder), share] for folder, share in sources], str(out))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return facts, model.eval()


KINDS = {
    "plain": ("llama", {"target_modules": LINEAR}),
    "rank-stabilized": ("llama", {"target_modules": LINEAR, "use_rslora": True}),
    "patterns": ("llama", {"target_modules": LINEAR, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 9}}),
    "dora": ("llama", {"target_modules": LINEAR, "use_dora": True}),
    "all biases trained": ("qwen2", {"target_modules": LINEAR, "bias": "all"}),
    "biases of the layers trained": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "a bias in B": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "stored [in, out]": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "dora, stored [in, out]": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "a whole head": ("qwen2", {"target_modules": LINEAR, "modules_to_save": ["lm_head"]}),
    "whole embedding and head": ("qwen2", {"target_modules": LINEAR, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "low rank at both ends": ("qwen2", {"target_modules": [*LINEAR, "embed_tokens", "lm_head"]}),
    "dora at the embedding": ("qwen2", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "single tokens": ("qwen2", {"target_modules": LINEAR, "trainable_token_indices": {"embed_tokens": [5, 93]}}),
    "single tokens, tied": ("llama", {"target_modules": LINEAR, "trainable_token_indices": [5, 93]}),
    "tied: low rank at the embedding": ("llama", {"target_modules": ["embed_tokens"]}),
    "tied: low rank at the head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "tied: a whole embedding": ("llama", {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"]}),
    "tied: a whole embedding, tying ensured": (
        "llama", {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied: low rank, tying ensured": ("llama", {"target_modules": [*LINEAR, "embed_tokens"], "ensure_weight_tying": True}),
}  # fmt: skip
KEPT = {"single tokens, tied", "tied: a whole embedding, tying ensured", "tied: low rank, tying ensured"}


@pytest.mark.parametrize("name", KINDS)
def test_equals_the_live_adapter(name, tmp_path):
    kind, options = KINDS[name]
    base = base_model(tmp_path / "base", kind)
    adapter, live = trained(base, tmp_path / "adapter", **options)
    facts, model = merged(base, [(adapter, 1.0)], tmp_path / "out")
    with torch.inference_mode():
        found = model(IDS).logits
        before = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(IDS).logits
    assert (found - live).abs().max() < 1e-4 * live.abs().max()
    assert (before - live).abs().max() > 1e-2 * live.abs().max(), "the adapter must change something"
    if name.startswith("tied") or name in KEPT:
        untied = (
            json.loads((tmp_path / "out" / "config.json").read_text()).get("tie_word_embeddings") is False
        )
        assert untied == (name not in KEPT) == facts["tied_head"].startswith("untied")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_grown_vocabulary(kind, tmp_path):
    base = base_model(tmp_path / "base", kind)
    adapter, live = trained(base, tmp_path / "adapter", grown=3, target_modules=LINEAR)
    facts, model = merged(base, [(adapter, 1.0)], tmp_path / "out")
    with torch.inference_mode():
        assert (model(IDS).logits - live).abs().max() < 1e-4 * live.abs().max()
    assert model.config.vocab_size == 99 and facts["tied_head"] == ("kept" if kind == "llama" else None)


def test_several_adapters_with_shares(tmp_path):
    """W + sum of share * (what each makes of W - W); for plain LoRA that is peft's linear combination of the changes."""
    base = base_model(tmp_path / "base", "llama")
    one, _ = trained(base, tmp_path / "one", target_modules=["q_proj"])
    two, _ = trained(base, tmp_path / "two", target_modules=["q_proj", "down_proj"], r=2)
    _, model = merged(base, [(one, 0.5), (two, 2.0)], tmp_path / "out")
    live = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), one, "one"
    )
    live.load_adapter(two, "two")
    live.add_weighted_adapter(["one", "two"], [0.5, 2.0], "both", combination_type="cat")
    live.set_adapter("both")
    with torch.inference_mode():
        wanted = live.eval()(IDS).logits
        assert (model(IDS).logits - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("name", ["plain", "dora"])
def test_in_bf16_at_least_as_close_to_fp64_as_peft(name, tmp_path):
    from safetensors.torch import load_file

    base = base_model(tmp_path / "base", "llama", torch.bfloat16)
    adapter, _ = trained(base, tmp_path / "adapter", **KINDS[name][1])
    merged(base, [(adapter, 1.0)], tmp_path / "out")

    def peft_merged(dtype: Any) -> dict[str, Any]:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).to(dtype)
        live = peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
        return live.to(dtype).merge_and_unload().state_dict()

    exact, theirs, ours = (
        peft_merged(torch.float64),
        peft_merged(torch.bfloat16),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    for weight in ours:
        error = {
            who: float((w[weight].double() - exact[weight]).abs().sum())
            for who, w in (("ours", ours), ("theirs", theirs))
        }
        assert error["ours"] <= error["theirs"] * (1 + 1e-9), weight


def test_what_cant_be_merged_is_named(tmp_path):
    base = base_model(tmp_path / "base", "llama")
    adapter, _ = trained(base, tmp_path / "adapter", target_modules=LINEAR)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for change, complaint in (
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4, which changes the base"),
        ({"alora_invocation_tokens": [1, 2]}, "activated LoRA"),
        ({"target_parameters": ["mlp.experts"]}, "single parameters"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UsageError, match=complaint):
            plan(base, [(adapter, 1.0)])
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    stored = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps({**stored, "quantization_config": {"quant_method": "bitsandbytes"}})
    )
    with pytest.raises(UsageError, match="is quantized \\(bitsandbytes\\)"):
        plan(base, [(adapter, 1.0)])
