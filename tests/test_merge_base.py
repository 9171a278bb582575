"""A QLoRA adapter is merged into the base it was trained beside: what 4-bit loading computes is what is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgeft.compress import Recipe, compress, merge_base, proof
from edgeft.compress.merge import merge
from edgeft.compress.merge_base import CANDIDATES, is_rounded, judge, refuse, rounded, trained_on_4bit
from edgeft.errors import EnvironmentFault, UsageError
from edgeft.files import sha256_file
from tests.conftest import DESK, write_rows

torch = pytest.importorskip("torch", reason="needs the extra: compress")
pytest.importorskip("peft", reason="needs the extra: tune")
pytest.importorskip("bitsandbytes", reason="needs the extra: qlora")

IDS = [1, 5, 99, 1234, 4321, 7, 42, 17]
# The sixteen values of NF4 (QLoRA, arXiv 2305.14314, appendix E), to four digits.
NF4 = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
       0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0)  # fmt: skip


def test_rounding_is_nf4_in_blocks_of_64():
    torch.manual_seed(0)
    weight = torch.randn(32, 128) * 0.02
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = torch.tensor(NF4)[(blocks[..., None] / scale[..., None] - torch.tensor(NF4)).abs().argmin(-1)]
    slow = (nearest * scale).reshape(weight.shape)
    found = rounded(weight, "dequantized")
    # Table to four digits, and a value between two steps may go either way.
    assert (found - slow).abs().max() < 1e-4 * scale.max() or (
        (found - slow).abs() > 1e-5
    ).float().mean() < 1e-3
    twice = rounded(weight, "dequantized-double")
    assert 0 < (twice - found).abs().max() < 0.1 * scale.max(), "the scales are rounded as well"
    assert torch.equal(rounded(weight.T.contiguous(), "dequantized", transposed=True), found.T)
    assert torch.equal(
        rounded(weight.bfloat16(), "dequantized"), rounded(weight.bfloat16().float(), "dequantized")
    )


def test_what_4bit_loading_rounds(tiny_models):
    """Exactly the layers that transformers replaces by 4-bit ones."""
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM

    for kind in ("llama", "qwen3"):
        loaded = four_bit(tiny_models[kind])
        wanted = {
            f"{name}.weight" for name, module in loaded.named_modules() if isinstance(module, Linear4bit)
        }
        plain = AutoModelForCausalLM.from_pretrained(tiny_models[kind], dtype=torch.float32)
        assert {name for name, weight in plain.named_parameters() if is_rounded(name, weight.shape)} == wanted


def four_bit(folder: Path, double: bool = False):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=torch.float32
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    for module in model.modules():
        # bitsandbytes multiplies in bfloat16 where the CPU can, some 4e-3 off; a GPU computes in what was asked for.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize("kind", ["dequantized", "dequantized-double"])
def test_the_merged_model_computes_what_was_trained(tiny_models, tiny_adapters, tmp_path, kind):
    """bitsandbytes' own 4-bit model with the live adapter is what QLoRA training sees."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, adapter = tiny_models["llama"], tiny_adapters["llama"]
    (tmp_path / "merged").mkdir()
    merge(str(base), [[str(adapter), 1.0]], str(tmp_path / "merged"), kind)
    live = PeftModel.from_pretrained(four_bit(base, kind == "dequantized-double"), adapter).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    sixteen = PeftModel.from_pretrained(plain, adapter).eval()
    with torch.inference_mode():
        wanted, found, other = (model(torch.tensor([IDS])).logits for model in (live, merged, sixteen))
    assert (found - wanted).abs().max() < 1e-4
    assert (found - other).abs().max() > 1e-2, "the rounding must show, or this test shows nothing"


def test_auto_measures_each_and_keeps_what_it_says(tiny_models, tiny_adapters, tmp_path):
    rows = write_rows(
        tmp_path / "rows.jsonl", [json.loads(s) for s in (DESK / "report.jsonl").read_text().splitlines()[:6]]
    )
    base, adapter = tiny_models["llama"], tiny_adapters["llama"]
    recipe = Recipe(out=tmp_path / "auto", formats=(), name="tiny", threads=1, merge_base="auto", eval=rows)
    (artifact,) = compress(base, adapter, recipe)
    told = artifact.checks["choices"]["merge_base"]
    assert set(told["measured"]) == set(CANDIDATES) and told["rows"] == 6 and told["chosen"] in told["why"]
    assert len({facts["answer_nll"] for facts in told["measured"].values()}) == 3, (
        "three models, three figures"
    )
    assert len(artifact.seen_rows["select"]) == 6
    assert artifact.checks["proof"]["status"] == "held" and artifact.checks["proof"]["share_of_effect"] < 1e-3
    # What is written is what the choice says, and the figure is that model's own.
    (tmp_path / "same").mkdir()
    merge(str(base), [[str(adapter), 1.0]], str(tmp_path / "same"), told["chosen"])
    written = [
        sha256_file(f / "model.safetensors") for f in (tmp_path / "same", tmp_path / "auto" / "merged")
    ]
    assert written[0] == written[1] == artifact.files["model.safetensors"]["sha256"]
    again = merge_base.score(str(tmp_path / "same"), str(rows), 1)
    assert np.mean(again["nll"]) == pytest.approx(told["measured"][told["chosen"]]["answer_nll"], abs=1e-6)
    assert not (tmp_path / "auto" / ".work" / "merge-base").exists()


def test_the_proof_stands_on_the_base_that_was_merged_into(tiny_models, tiny_adapters, tmp_path):
    recipe = Recipe(out=tmp_path, formats=(), name="tiny", threads=1, merge_base="dequantized")
    (artifact,) = compress(tiny_models["llama"], tiny_adapters["llama"], recipe)
    assert artifact.recipe["merge_base"] == "dequantized" and "select" not in artifact.seen_rows
    told = artifact.checks["proof"]
    assert told["status"] == "held" and told["share_of_effect"] < 1e-3


def test_chance_keeps_the_16bit_base():
    chance = np.random.default_rng(0)
    nll = chance.uniform(1, 2, 40)
    noise = chance.normal(0, 0.1, 40)
    noise -= noise.mean()

    def scores(shift: float) -> dict:
        found = {"16bit": nll, "dequantized": nll + noise + shift, "dequantized-double": nll + noise + 0.2}
        return {kind: {"nll": list(values), "right": [True] * 40} for kind, values in found.items()}

    assert judge(scores(-0.005))["chosen"] == "16bit" and "chance" in judge(scores(-0.005))["why"]
    assert judge(scores(-0.1))["chosen"] == "dequantized" and "no chance" in judge(scores(-0.1))["why"]
    assert judge(scores(+0.1))["chosen"] == "16bit"


def test_what_cannot_be_is_refused_before_anything_is_written(
    tiny_models, tiny_adapters, tmp_path, monkeypatch
):
    base, adapters = tiny_models["llama"], [(tiny_adapters["llama"], 1.0)]
    with pytest.raises(UsageError, match="Did you mean 'dequantized'"):
        refuse("dequantised", base, adapters, None)
    with pytest.raises(UsageError, match="needs rows") as error:
        compress(base, adapters, Recipe(out=tmp_path / "dist", formats=(), merge_base="auto"))
    assert error.value.hint == "--eval rows.jsonl" and not (tmp_path / "dist").exists()
    with pytest.raises(UsageError, match="for an adapter"):
        refuse("dequantized", base, [], None)
    with pytest.raises(UsageError, match="beside the 16-bit base"):
        compress(
            base,
            adapters,
            Recipe(out=tmp_path / "dist", formats=("gguf-lora:f16",), merge_base="dequantized"),
        )
    monkeypatch.setattr(merge_base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="bitsandbytes"):
        refuse("dequantized", base, adapters, None)


def test_signs_of_4bit_training(tiny_models, tiny_adapters, tmp_path, capsys, monkeypatch):
    adapter = tmp_path / "a"
    shutil.copytree(tiny_adapters["llama"], adapter)
    assert trained_on_4bit(adapter) is None
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "someone/tiny-bnb-4bit"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert "someone/tiny-bnb-4bit" in str(trained_on_4bit(adapter))
    monkeypatch.setattr(proof, "owed", lambda *_, **__: "it is of no concern here")
    compress(tiny_models["llama"], adapter, Recipe(out=tmp_path / "dist", formats=(), threads=1))
    assert "--merge-base auto measures" in capsys.readouterr().err
