"""An adapter as a GGUF adapter beside one base: it must compute what the merged model computes, and refuse what it can't hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import httpx
import numpy as np
import pytest

from edgeft import child
from edgeft.compress import Recipe, compress, load_artifact
from edgeft.compress.formats import parse
from edgeft.compress.formats.gguf_lora import factors, refuse
from edgeft.compress.merge import plan
from edgeft.errors import UsageError

torch = pytest.importorskip("torch", reason="needs the extra: compress")
pytest.importorskip("llama_cpp", reason="needs the extra: compress")
pytest.importorskip("peft", reason="needs the extra: tune")

IDS = [[1, 5, 99, 1234, 4321, 7, 42, 17], [2, 2000, 13, 40000, 12]]
SPEC = "gguf-lora:f32,base=f32"


def logits_of(folder: Path, log: Path, engine: str = "gguf") -> list[np.ndarray]:
    out = log.with_suffix(".npz")
    child.call("tests_support:dump_logits", log=log, title="logits", engine=engine, folder=str(folder), ids=IDS, out=str(out),
               env={"PYTHONPATH": str(Path(__file__).parent)})  # fmt: skip
    with np.load(out) as found:
        return [found[str(i)] for i in range(len(IDS))]


def worst(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(found, wanted, strict=True))


def adapter(base: Path, folder: Path, **options) -> Path:
    """A random adapter of a kind for a model, saved by peft."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(model, LoraConfig(**config))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                weight.normal_(0.0, 0.05)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tiny_models, tmp_path_factory):
    """dist folder of an adapter whose every factor differs from llama.cpp's own alpha / rank."""
    folder, base = tmp_path_factory.mktemp("lora"), tiny_models["llama"]
    patterns = {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"k_proj": 2}}
    lora = adapter(base, folder / "adapter", use_rslora=True, **patterns)
    compress(base, lora, Recipe(out=folder / "dist", formats=(SPEC,), name="tiny", threads=1))
    return folder / "dist"


def test_base_and_adapter_loaded_together_equal_the_merged_model(made, tmp_path):
    found = logits_of(made / "gguf-lora-f32+base=f32", tmp_path / "lora.log")
    wanted = logits_of(made / "merged", tmp_path / "merged.log", "transformers")
    assert worst(found, wanted) < 1e-4
    alone = logits_of(made / "gguf-base-f32", tmp_path / "base.log")
    assert worst(alone, wanted) > 0.1, "the adapter must change the model, or this test shows nothing"


def test_artifacts_say_what_is_loaded(made):
    lora, base = (
        load_artifact(made / name, verify=True) for name in ("gguf-lora-f32+base=f32", "gguf-base-f32")
    )
    assert lora.size_bytes < base.size_bytes / 100
    assert lora.bits_per_weight > base.bits_per_weight, "both are in memory"
    assert (
        lora.tensor_types["lora f32"]["tensors"] == 2 * 14
        and lora.tensor_types["f32"] == base.tensor_types["f32"]
    )
    assert "adapters" not in base.made_from and base.seen_rows == {}
    named = json.loads((made / lora.id / "base.json").read_text())
    assert (made / lora.id / named["file"]).is_file()
    assert named["sha256"] == next(iter(base.files.values()))["sha256"]


def test_it_is_served_like_any_other(made, tmp_path):
    from edgeft.engines.client import chat
    from edgeft.engines.local import LocalModel

    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
    }
    texts = {}
    for name, engine in (
        ("gguf-lora-f32+base=f32", "gguf"),
        ("merged", "transformers"),
        ("gguf-base-f32", "gguf"),
    ):
        log = tmp_path / f"{name}.log"
        with (
            LocalModel(made / name, engine, log=log, context=128, threads=1) as model,
            httpx.Client() as client,
        ):
            texts[name] = chat(client, model.url, body, model.key).text
    assert texts["gguf-lora-f32+base=f32"] == texts["merged"] != texts["gguf-base-f32"]


def test_a_base_that_is_gone_is_named(made, tmp_path):
    from edgeft.engines.gguf import model_and_adapter

    shutil.copytree(made / "gguf-lora-f32+base=f32", tmp_path / "alone")
    with pytest.raises(UsageError, match=r"adapter for \.\./gguf-base-f32/"):
        model_and_adapter(tmp_path / "alone")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"use_dora": True}, "can't hold DoRA"),
        ({"modules_to_save": ["embed_tokens"]}, "can't hold whole weights"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "can't hold a LoRA of the embedding"),
        ({"target_modules": ["q_proj", "lm_head"]}, "can't hold a LoRA of a head that is tied"),
        ({"trainable_token_indices": {"embed_tokens": [1, 2]}}, "can't hold trained token rows"),
    ],
)
def test_what_a_gguf_adapter_cannot_hold_is_refused_by_name(tiny_models, tmp_path, options, complaint):
    base = tiny_models["llama"]
    lora = adapter(base, tmp_path / "a", **options)
    with pytest.raises(UsageError, match=complaint):
        compress(base, lora, Recipe(out=tmp_path / "dist", formats=(SPEC,)))
    assert not (tmp_path / "dist").exists(), "refused before anything is written"


def test_several_adapters_are_refused_and_a_share_is_a_factor(tiny_models, tiny_adapters):
    base, lora = tiny_models["llama"], tiny_adapters["llama"]
    with pytest.raises(UsageError, match="takes one adapter, and 2"):
        refuse(parse(SPEC), base, plan(base, [(lora, 1.0), (lora, 0.5)]))
    assert set(factors(plan(base, [(lora, 1.0)]).adapters[0]).values()) == {1.0}
    assert set(factors(plan(base, [(lora, 0.5)]).adapters[0]).values()) == {0.5}
