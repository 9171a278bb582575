"""What `edgeft compress` refuses before any work, and what an adapter brings besides weights."""

from __future__ import annotations

import json
import shutil

import pytest

from edgeft.compress import Recipe, converter, gate_limits, pre_tokenizer, prepare, proof, resume
from edgeft.compress.adapter import read_adapter
from edgeft.compress.formats import gguf_types
from edgeft.compress.merge import merge
from edgeft.compress.rebuild import rebuild
from edgeft.errors import EnvironmentFault, GateError, UsageError
from tests.test_cli import assert_two_lines, edgeft
from tests.test_merge import MODULE, adapter_folder, base_folder, lora

pytest.importorskip("torch", reason="needs the extra: compress")

TEMPLATE = "{{ messages[0].content }} by "


def tokenizer_files(folder, template_in: str, text: str) -> None:
    """A tokenizer_config.json, with the template in it or in a file beside it."""
    config = {"eos_token": "</s>", **({"chat_template": text} if template_in == "config" else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template_in == "file":
        (folder / "chat_template.jinja").write_text(text)


@pytest.mark.parametrize("base_has", ["config", "file"])
@pytest.mark.parametrize("adapter_has", ["config", "file"])
def test_the_adapters_template_is_the_only_one(tmp_path, base_has, adapter_has):
    base, adapter = base_folder(tmp_path / "base"), adapter_folder(tmp_path / "adapter", lora())
    tokenizer_files(base, base_has, TEMPLATE + "base")
    tokenizer_files(adapter, adapter_has, TEMPLATE + "adapter")
    if adapter_has == "file":
        (adapter / "tokenizer_config.json").unlink()
    out = tmp_path / "out"
    out.mkdir()
    merge(str(base), [[str(adapter), 1.0]], str(out))
    found = [json.loads((out / "tokenizer_config.json").read_text()).get("chat_template")]
    found += [file.read_text() for file in out.glob("chat_template.*")]
    assert [text for text in found if text] == [TEMPLATE + "adapter"]


def test_a_base_keeps_its_template_where_the_adapter_brings_none(tmp_path):
    base, adapter = base_folder(tmp_path / "base"), adapter_folder(tmp_path / "adapter", lora())
    tokenizer_files(base, "file", TEMPLATE + "base")
    (adapter / "tokenizer_config.json").write_text("{}")
    out = tmp_path / "out"
    out.mkdir()
    merge(str(base), [[str(adapter), 1.0]], str(out))
    assert (out / "chat_template.jinja").read_text() == TEMPLATE + "base"


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("{oops", "not valid JSON"),
        ("[1]", "no map"),
        ('{"peft_type": "LORA", "lora_alpha": 3}', "r is None"),
        ('{"peft_type": "LORA", "r": 0, "lora_alpha": 3}', "r is 0"),
        ('{"peft_type": "LORA", "r": 2, "lora_alpha": "x"}', "lora_alpha is 'x'"),
        ('{"peft_type": "LORA", "r": 2, "lora_alpha": 3, "rank_pattern": {"q": 0}}', "r is 0"),
        ('{"peft_type": "LORA", "r": 2, "lora_alpha": 3, "alpha_pattern": [1]}', r"lora_alpha is \[1\]"),
    ],
)
def test_a_broken_adapter_config_is_named(tmp_path, text, seen):
    adapter = adapter_folder(tmp_path / "adapter", lora())
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(UsageError, match=seen) as caught:
        read_adapter(adapter, base_folder(tmp_path / "base"), {f"{MODULE}.weight": {"shape": [6, 4]}})
    assert "adapter_config.json" in caught.value.message


def test_a_vocabulary_beyond_the_embedding_is_refused(tiny_models, tiny_adapters, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(tiny_adapters["llama"], adapter)
    held = json.loads((tiny_models["llama"] / "tokenizer.json").read_text())
    last = max(held["model"]["vocab"].values())
    held["added_tokens"].append({"id": last + 1, "content": "<new>", "special": True})
    (adapter / "tokenizer.json").write_text(json.dumps(held))
    with pytest.raises(UsageError, match=f"token id {last + 1}, and the embedding has {last + 1} rows"):
        prepare(tiny_models["llama"], adapter, Recipe(out=tmp_path / "dist", formats=()))


def test_a_way_of_cutting_text_that_llama_cpp_does_not_know_is_refused_before_the_merge(
    tiny_models, tiny_adapters, tmp_path
):
    base, out = tmp_path / "base", tmp_path / "dist"
    shutil.copytree(tiny_models["llama"], base)
    asked = {"out": out, "formats": ("gguf:f16",), "no_gate": True}
    prepare(base, tiny_adapters["llama"], Recipe(**asked))  # the converter is there now, and knows it
    held = json.loads((base / "tokenizer.json").read_text())
    held["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    (base / "tokenizer.json").write_text(json.dumps(held))
    if not (converter.location() / pre_tokenizer.SOURCE).is_file():
        pytest.skip("llama.cpp's converter is not in the cache yet")
    with pytest.raises(UsageError, match=r"does not know how .*tokenizer\.json cuts text"):
        prepare(base, tiny_adapters["llama"], Recipe(**asked))
    assert not out.exists()
    prepare(base, tiny_adapters["llama"], Recipe(**{**asked, "formats": ("onnx:int8",)}))


def test_what_the_converter_asks_is_read_from_its_source():
    source = """
class TextModel:
    def get_vocab_base_pre(self, tokenizer):
        chktxt = 'some text'
        chkhsh = sha256(tokenizer.encode(chktxt))
        if chkhsh == "%s":
            res = "one"
""" % ("ab" * 32)
    assert pre_tokenizer.asked_by(source) == ("some text", {"ab" * 32})
    assert pre_tokenizer.asked_by("def another(): pass") is None
    assert pre_tokenizer.asked_by("def get_vocab_base_pre(): return 1") is None


@pytest.mark.parametrize("name", ["a/b", "", ".hidden"])
def test_a_name_that_no_file_can_have(tiny_models, tmp_path, name):
    with pytest.raises(UsageError, match="file's name"):
        prepare(tiny_models["llama"], None, Recipe(out=tmp_path / "dist", formats=(), name=name))


def test_out_that_is_a_file(tiny_models, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        prepare(tiny_models["llama"], None, Recipe(out=tmp_path / "out", formats=()))
    with pytest.raises(EnvironmentFault, match="cannot write"), resume.only_run(tmp_path / "out"):
        pass
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("share", ["nan", "0", "inf"])
def test_a_share_that_merges_nothing(tiny_models, tiny_adapters, tmp_path, share):
    done = edgeft(
        "compress",
        tiny_models["llama"],
        "--adapter",
        f"{tiny_adapters['llama']}={share}",
        "--out",
        tmp_path / "d",
    )
    assert_two_lines(done, 2)
    assert share in done.stderr and not (tmp_path / "d").exists()


def test_types_of_tensors_that_are_not_there():
    names = {"blk.0.ffn_down.weight", "token_embd.weight"}
    gguf_types.refuse_unmatched({"types": {"blk.0.ffn_down.weight": "q6_k"}, "ffn_down": "q6_k"}, names)
    with pytest.raises(UsageError, match=r"Did you mean 'blk\.0\.ffn_down\.weight'"):
        gguf_types.refuse_unmatched({"types": {"blk.0.ffn_dwn.weight": "q6_k"}}, names)
    with pytest.raises(UsageError, match="ffn_gate_exps=q6_k: this model has no such tensor") as caught:
        gguf_types.refuse_unmatched({"ffn_gate_exps": "q6_k"}, names)
    assert caught.value.hint == "it has token_embd, ffn_down"


def test_an_adapter_that_changes_nothing_is_rejected():
    held = {"kld_merged": 0.0, "kld_base": 0.5}
    assert proof.judge(held, "x")["status"] == "held"
    with pytest.raises(GateError, match="changes nothing"):
        proof.judge({"kld_merged": 0.0, "kld_base": 0.0}, "x")


def test_a_rebuild_is_made_from_nothing(tiny_dist):
    with pytest.raises(UsageError, match="merged stands there already"):
        rebuild(tiny_dist / "dist" / "gguf-f16", out=tiny_dist / "dist")


def test_limits_are_numbers_out_of_a_file_or_a_map(tmp_path):
    with pytest.raises(UsageError, match="kld is inf"):
        gate_limits.load({4: {"kld": float("inf")}})
    with pytest.raises(UsageError, match="can't be read: Is a directory"):
        gate_limits.load(tmp_path)


def test_a_recipe_may_hold_the_limits_themselves(tiny_models, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"base: {tiny_models['llama']}\nto: gguf:f16\ngate:\n  4:\n    kld: 0.5\n  16: {{kdl: 1}}\n"
    )
    done = edgeft("compress", "--recipe", recipe, "--out", tmp_path / "dist")
    assert_two_lines(done, 2)
    assert "16: the limit 'kdl' is not known. Did you mean 'kld'" in done.stderr
    assert not (tmp_path / "dist").exists()
