"""Tiny random models through merge, GGUF, ONNX and GPTQ: the numbers must be the source's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

from edgeft import child
from edgeft.compress import Recipe, compress
from edgeft.compress.formats import parse
from edgeft.tokenizer import load_tokenizer
from tests.conftest import DESK

torch = pytest.importorskip("torch", reason="needs the extra: compress")
pytest.importorskip("llama_cpp", reason="needs the extra: compress")
pytest.importorskip("onnxruntime_genai", reason="needs the extra: onnx")

KINDS = ("llama", "qwen2", "qwen3")
INT8 = "onnx:int8,accuracy_level=4"  # measuring levels is test_format_options' matter
FORMATS = ("gguf:f32", "gguf:f16", "gguf:q4_k_m", INT8)
IDS = [[1, 5, 99, 1234, 4321, 7, 42, 17], [2, 2000, 13, 40000, 12]]


def formats_of(kind: str) -> tuple[str, ...]:
    """What is made of a kind: one has them all, the others what could differ by architecture."""
    return (*FORMATS, "gguf:q8_0", "onnx:fp32", "onnx:int4") if kind == "llama" else FORMATS


def id_of(spec: str) -> str:
    """The folder of a format."""
    return parse(spec).id


def logits_of(engine: str, folder: Path, log: Path) -> list[np.ndarray]:
    """Logits of IDS through an engine, in a process of its own."""
    out = log.with_suffix(".npz")
    child.call("tests_support:dump_logits", log=log, title="logits", engine=engine, folder=str(folder), ids=IDS, out=str(out),
               env={"PYTHONPATH": str(Path(__file__).parent)})  # fmt: skip
    with np.load(out) as found:
        return [found[str(i)] for i in range(len(IDS))]


def torch_logits(folder: Path) -> list[np.ndarray]:
    """Logits of a safetensors folder in float32, in this process."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [model(torch.tensor([ids])).logits[0].numpy() for ids in IDS]


def dequantized_twin(gguf: Path, source: Path, out: Path) -> Path:
    """The source folder with the GGUF file's own dequantized weights, named through transformers' loader."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source)  # the reader itself misses Qwen3's head_dim
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, config=config, dtype=torch.float32
    )
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(out)
    return out


def worst(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """The largest absolute difference of logits over the common vocabulary."""
    assert len(found) == len(wanted)
    return max(
        float(np.abs(a[:, : b.shape[1]] - b[:, : a.shape[1]]).max())
        for a, b in zip(found, wanted, strict=True)
    )


def rms(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """The root of the mean squared difference of logits."""
    return float(np.sqrt(np.mean([np.mean((a - b) ** 2) for a, b in zip(found, wanted, strict=True)])))


def recipe_of(kind: str, out: Path) -> Recipe:
    """What is made of a kind; one kind goes through the gate as well."""
    return Recipe(out=out, formats=formats_of(kind), name="tiny", threads=2, no_gate=kind != "llama")


@pytest.fixture(scope="module", params=KINDS)
def made(request, tiny_models, tiny_adapters, tmp_path_factory):
    """(kind, dist folder) with every quick format of one tiny model."""
    out = tmp_path_factory.mktemp(f"dist-{request.param}")
    compress(
        tiny_models[request.param],
        tiny_adapters[request.param],
        recipe_of(request.param, out),
    )
    return request.param, out


def test_merge_equals_peft(made, tiny_models, tiny_adapters):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    kind, out = made
    base = AutoModelForCausalLM.from_pretrained(tiny_models[kind], dtype=torch.float32)
    before = [base(torch.tensor([ids])).logits[0].detach().numpy() for ids in IDS]
    live = PeftModel.from_pretrained(base, tiny_adapters[kind]).eval()
    with torch.inference_mode():
        wanted = [live(torch.tensor([ids])).logits[0].numpy() for ids in IDS]
    assert worst(torch_logits(out / "merged"), wanted) < 1e-4
    assert worst(before, wanted) > 0.1, "the adapter must change the model, or this test shows nothing"


def test_unquantized_files_have_the_sources_logits(made, tmp_path):
    kind, out = made
    wanted = torch_logits(out / "merged")
    assert worst(logits_of("gguf", out / "gguf-f32", tmp_path / "f32.log"), wanted) < 3e-5
    assert worst(logits_of("gguf", out / "gguf-f16", tmp_path / "f16.log"), wanted) < 5e-3
    if kind == "llama":
        assert worst(logits_of("onnx", out / "onnx-fp32", tmp_path / "onnx.log"), wanted) < 3e-4


# Weights that llama.cpp multiplies with 8-bit activations: in blocks of 32 with Q8_0, of 256 with K-quants (ggml's vec_dot types).
ACTIVATION_BLOCK = {"q8_0": 32, "q4_k_m": 256}


def with_8bit_activations(folder: Path, block: int) -> list[np.ndarray]:
    """Logits of IDS in float32, the input of each linear layer rounded as ggml's CPU kernels round it.

    Symmetric, `block` values a scale; Q8_0 keeps its scale in float16 (ggml's quantize_row_q8_0), Q8_K in float32.
    """
    from transformers import AutoModelForCausalLM

    def rounded(_module, inputs):
        blocks = inputs[0].unflatten(-1, (-1, block))
        scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        kept = scale.half().float() if block == 32 else scale
        return ((blocks / scale).round() * kept).flatten(-2)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(rounded)
    with torch.inference_mode():
        return [model(torch.tensor([ids])).logits[0].numpy() for ids in IDS]


@pytest.mark.parametrize("variant", ["q8_0", "q4_k_m"])
def test_quantized_logits_are_those_of_the_files_own_weights(made, variant, tmp_path):
    """Within 5e-2 of float32 arithmetic, and what is left is llama.cpp's rounding of activations."""
    kind, out = made
    if variant == "q8_0" and kind != "llama":
        pytest.skip("its blocks are the same for every kind; K-quants differ by tensor")
    gguf = next((out / f"gguf-{variant}").glob("*.gguf"))
    twin = dequantized_twin(gguf, out / "merged", tmp_path / "twin")
    found, wanted = logits_of("gguf", gguf.parent, tmp_path / "q.log"), torch_logits(twin)
    assert worst(found, wanted) < 5e-2
    rounded = with_8bit_activations(twin, ACTIVATION_BLOCK[variant])
    # Not to the last bit everywhere: a value at the edge of two steps may go either way, and the tokens after it follow.
    medians = [np.median(np.abs(a - b)) for a, b in zip(found, rounded, strict=True)]
    assert max(medians) < 1e-4
    assert rms(found, rounded) < 0.5 * rms(found, wanted)
    assert worst(torch_logits(out / "merged"), wanted) > 1e-3, "quantizing must have changed something"


def test_one_corrupted_tensor_is_noticed(made, tmp_path):
    """The comparison above fails when a single tensor of the file is damaged."""
    from edgeft.gguf_file import Tensors

    _, out = made
    folder = tmp_path / "damaged"
    shutil.copytree(out / "gguf-f32", folder)
    file = next(folder.glob("*.gguf"))
    reader = Tensors(file, "r+")
    tensor = next(t for t in reader.tensors if t.name == "blk.1.ffn_down.weight")
    tensor.data[...] = tensor.data[..., ::-1].copy()
    reader.data.flush()
    del reader
    wanted = torch_logits(out / "merged")
    assert worst(logits_of("gguf", folder, tmp_path / "damaged.log"), wanted) > 1e-2


def test_onnx_weights_are_close_and_the_embedding_is_quantized(made, tmp_path):
    kind, out = made
    import onnx
    import onnxruntime_genai as genai

    model = onnx.load(out / id_of(INT8) / "model.onnx", load_external_data=False)
    own = f"{genai.__version__}+{genai.__commit__[:7]}"
    assert model.producer_version == own, "not the commit of a repository that the package lies in"
    wanted = torch_logits(out / "merged")
    spread = float(np.std(wanted[0]))
    assert worst(logits_of("onnx", out / id_of(INT8), tmp_path / "8.log"), wanted) < 0.15 * spread + 0.1
    vocabulary_bytes = 4 * 256 * 49152
    for spec in (INT8, "onnx:int4") if kind == "llama" else (INT8,):
        artifact_bytes = sum(f.stat().st_size for f in (out / id_of(spec)).glob("model.onnx*"))
        assert artifact_bytes < vocabulary_bytes, (
            f"{spec}: the table of {vocabulary_bytes} bytes is still in float32"
        )


def test_manifests_count_every_parameter(made):
    from edgeft.compress import load_artifact

    kind, out = made
    merged = load_artifact(out / "merged", verify=True)
    for spec in formats_of(kind):
        artifact = load_artifact(out / id_of(spec), verify=True)
        if artifact.format == "gguf":
            counted = sum(t["parameters"] for t in artifact.tensor_types.values())
            # A tied head is stored once; rope factors may be added.
            assert abs(counted - merged.parameters) <= 0.01 * merged.parameters
        assert artifact.made_from["merged_sha256"] == merged.sha256
    assert load_artifact(out / "gguf-q4_k_m").fallback_share == 0.0
    assert 4.5 < load_artifact(out / "gguf-q4_k_m").bits_per_weight < 7
    if kind == "llama":
        assert 8.4 < load_artifact(out / "gguf-q8_0").bits_per_weight < 8.6


def test_merging_is_proven(made):
    from edgeft.compress import load_artifact

    _, out = made
    proof = load_artifact(out / "merged").checks["proof"]
    assert proof["status"] == "held" and proof["share_of_effect"] < 1e-3 < proof["kld_base"]


def test_a_merge_that_is_not_base_plus_adapter_is_rejected(tiny_models, tiny_adapters, tmp_path, monkeypatch):
    from edgeft.compress import proof
    from edgeft.errors import GateError

    log = tmp_path / "proof.log"
    base, adapter = str(tiny_models["llama"]), str(tiny_adapters["llama"])
    found = child.call("edgeft.compress.proof:prove", log=log, title="proof", base=base, adapter=adapter, merged=base,
                       rows_file=None, threads=2)  # fmt: skip
    assert found["kld_merged"] == pytest.approx(found["kld_base"], rel=1e-3)
    with pytest.raises(GateError, match="not base \\+ adapter"):
        proof.judge(found, "dist/.rejected/merged")
    real = child.call
    monkeypatch.setattr(
        child,
        "call",
        lambda function, **words: dict(found) if "proof" in function else real(function, **words),
    )
    with pytest.raises(GateError):
        compress(tiny_models["llama"], tiny_adapters["llama"], Recipe(out=tmp_path / "dist", formats=()))
    assert not (tmp_path / "dist" / "merged").exists()
    reasons = json.loads((tmp_path / "dist" / ".rejected" / "merged" / "reasons.json").read_text())
    assert "not base + adapter" in reasons["seen"]


def test_an_importance_matrix_serves_the_rows_it_was_made_of(made, tiny_models, tiny_adapters, tmp_path):
    """Weighed by it, the quantized weights are nearer the source's than without."""
    from gguf import dequantize

    from edgeft.compress.imatrix import read
    from edgeft.errors import UsageError
    from edgeft.gguf_file import Tensors

    kind, out = made
    if kind != "llama":
        pytest.skip("one kind is enough")
    model, adapter = tiny_models[kind], tiny_adapters[kind]
    with pytest.raises(UsageError, match="needs an importance matrix"):
        compress(model, adapter, Recipe(out=out, formats=("gguf:iq2_s",), name="tiny"))
    for name in ("merged", "gguf-f32"):
        shutil.copytree(out / name, tmp_path / name)
    formats, calibration = (
        ("gguf:f32", "gguf:q4_k_m,rounding=nearest", "gguf:iq2_s"),
        DESK / "calibrate.jsonl",
    )
    again = compress(
        model,
        adapter,
        Recipe(out=tmp_path, formats=formats, calibration=calibration, name="tiny", no_gate=True),
    )
    assert again[2].seen_rows["calibrate"] and "calibrate" not in again[1].seen_rows

    def weights(folder: Path) -> dict[str, np.ndarray]:
        tensors = Tensors(next(folder.glob("*.gguf"))).tensors
        return {
            t.name: dequantize(t.data, t.tensor_type)
            for t in tensors
            if t.name.startswith("blk.") and t.data.ndim == 2
        }

    matrix, source = read(tmp_path / "imatrix.gguf"), weights(out / "gguf-f32")
    assert set(source) <= set(matrix) and matrix["blk.1.ffn_down.weight"].shape == (512,)
    with_it, without = (
        sum(float((matrix[k] * (w - source[k]) ** 2).sum()) for k, w in weights(f).items())
        for f in (tmp_path / "gguf-q4_k_m+rounding=nearest", out / "gguf-q4_k_m")
    )
    assert with_it < 0.97 * without


def test_f16_is_upstreams_file_byte_for_byte(made, tmp_path):
    """The converter run by hand, as its documentation says, on the merged folder with the same name."""
    from edgeft.compress.converter import converter

    kind, out = made
    if kind != "llama":
        pytest.skip("one kind is enough (and qwen2 upstream can't: transformers swaps its pre-tokenizer)")
    ours = next((out / "gguf-f16").glob("*.gguf"))
    theirs = tmp_path / "theirs.gguf"
    folder = converter()
    subprocess.run(
        [sys.executable, folder / "convert_hf_to_gguf.py", out / "merged", "--outfile", theirs, "--outtype", "f16",
         "--model-name", "tiny"],
        check=True, capture_output=True, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder / "gguf-py")},
    )  # fmt: skip
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_second_run_keeps_what_stands_there(made, tiny_models, tiny_adapters):
    kind, out = made
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and ".work" not in p.parts}
    compress(tiny_models[kind], tiny_adapters[kind], recipe_of(kind, out))
    assert before == {
        p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and ".work" not in p.parts
    }


def test_the_tokenizers_file_is_right(tiny_models):
    """transformers gives qwen2 the pre-tokenizer of its class, whatever tokenizer.json says."""
    from transformers import AutoTokenizer

    text, digits = "order 20261", ["order", "Ġ", "2", "0", "2", "6", "1"]
    folder = tiny_models["qwen2"]
    wanted = AutoTokenizer.from_pretrained(tiny_models["llama"]).backend_tokenizer.pre_tokenizer
    loaded = load_tokenizer(folder)
    assert str(loaded.backend_tokenizer.pre_tokenizer) == str(wanted)
    assert str(AutoTokenizer.from_pretrained(folder).backend_tokenizer.pre_tokenizer) != str(wanted)
    assert loaded.tokenize(text) == digits and loaded.chat_template


@pytest.mark.slow
def test_gptq_loads_with_from_pretrained(made, tiny_models, tiny_adapters, tmp_path):
    """A width for each kind; 2 bits are in test_format_options.py."""
    pytest.importorskip("optimum", reason="needs the extra: gptq")
    if not __import__("importlib.util").util.find_spec("gptqmodel"):
        pytest.skip("needs the extra: gptq")
    kind, out = made
    words, least = {
        "llama": ("gptq:4,rows=8", 0.95),
        "qwen2": ("gptq:8,rows=8", 0.999),
        "qwen3": ("gptq:3,rows=8", 0.8),
    }[kind]
    recipe = Recipe(
        out=out, formats=(words,), calibration=DESK / "calibrate.jsonl", name="tiny", threads=2,
        no_gate=kind != "llama",
    )  # fmt: skip
    artifact = compress(tiny_models[kind], tiny_adapters[kind], recipe)[1]
    assert artifact.recipe["group_size"] == 128
    assert artifact.seen_rows["calibrate"]
    found = logits_of("transformers", out / id_of(words), tmp_path / "gptq.log")
    wanted = torch_logits(out / "merged")
    spread = float(np.std(wanted[0]))
    assert 1e-4 < worst(found, wanted) < 3 * spread
    correlation = np.corrcoef(found[0].ravel()[: 8 * 49152], wanted[0].ravel()[: 8 * 49152])[0, 1]
    assert correlation > least
    if kind != "llama":
        return
    from edgeft.engines.client import chat
    from edgeft.engines.local import LocalModel

    with (
        LocalModel(out / id_of(words), "transformers", log=tmp_path / "serve.log", context=256) as model,
        httpx.Client() as client,
    ):
        reply = chat(
            client,
            model.url,
            {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0},
            model.key,
        )
    assert reply.prompt_tokens > 5 and reply.output_tokens <= 3


def test_gguf_and_onnx_answer_through_their_own_template(made, tmp_path):
    """The prompt that each engine counts is the one that the merged folder's template renders."""
    from edgeft.engines.client import chat
    from edgeft.engines.local import LocalModel

    kind, out = made
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where is my parcel?"},
    ]
    tokenizer = load_tokenizer(out / "merged")
    wanted = len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    texts = {}
    onnx = "onnx-fp32" if kind == "llama" else id_of(INT8)
    for folder, engine in (("gguf-f32", "gguf"), (onnx, "onnx"), ("merged", "transformers")):
        with (
            LocalModel(out / folder, engine, log=tmp_path / f"{folder}.log", context=256) as model,
            httpx.Client() as client,
        ):
            body = {"messages": messages, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
            reply = chat(client, model.url, body, model.key)
            assert reply.prompt_tokens == wanted and reply.output_tokens == 12
            texts[engine] = reply.text
    assert texts["gguf"] == texts["transformers"]
    assert onnx != "onnx-fp32" or texts["onnx"] == texts["gguf"]
