"""What stands after the variant: splits, ONNX's accuracy level, block size, embedding and device, GPTQ's groups and order."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgeft import child
from edgeft.compress import Recipe, compress, load_artifact
from edgeft.compress.formats import parse
from edgeft.errors import EnvironmentFault, UsageError
from tests.conftest import DESK

torch = pytest.importorskip("torch", reason="needs the extra: compress")
IDS = [[1, 5, 99, 1234, 4321, 7, 42, 17], [2, 2000, 13, 40000, 12]]


def logits_of(engine: str, folder: Path, log: Path) -> list[np.ndarray]:
    out = log.with_suffix(".npz")
    child.call("tests_support:dump_logits", log=log, title="logits", engine=engine, folder=str(folder), ids=IDS, out=str(out),
               env={"PYTHONPATH": str(Path(__file__).parent)})  # fmt: skip
    with np.load(out) as found:
        return [found[str(i)] for i in range(len(IDS))]


@pytest.fixture(scope="module")
def merged(tiny_models, tiny_adapters, tmp_path_factory):
    """dist folder with the tiny llama merged, and what each test adds to it."""
    out = tmp_path_factory.mktemp("dist")
    compress(
        tiny_models["llama"], tiny_adapters["llama"], Recipe(out=out, formats=(), name="tiny", threads=1)
    )
    return out


@pytest.fixture
def make(merged, tiny_models, tiny_adapters):
    """make("gguf:f16", …) -> [(artefact, folder), …], beside the merged model."""

    def some(*specs: str, **recipe):
        recipe = Recipe(out=merged, formats=specs, name="tiny", threads=1, **recipe)
        artifacts = compress(tiny_models["llama"], tiny_adapters["llama"], recipe)[1:]
        return [(artifact, merged / artifact.id) for artifact in artifacts]

    return some


# --- GGUF splits


def test_a_split_file_has_the_logits_and_bytes_of_the_whole(make, tmp_path):
    from gguf import GGUFReader

    # Both are quantized from the F32 file that stands beside them: one conversion.
    _, (whole, whole_folder), (parts, folder) = make("gguf:f32", "gguf:q4_0", "gguf:q4_0,split_max_size=1M")
    names = sorted(parts.files)
    assert (
        names == [f"tiny-q4_0-{i + 1:05}-of-{len(names):05}.gguf" for i in range(len(names))]
        and len(names) > 1
    )
    readers = [GGUFReader(folder / name) for name in names]
    tensors = GGUFReader(next(whole_folder.glob("*.gguf"))).tensors
    for number, reader in enumerate(readers):
        keys = {k: reader.fields[f"split.{k}"].contents() for k in ("no", "count", "tensors.count")}
        assert keys == {"no": number, "count": len(names), "tensors.count": len(tensors)}
    assert (
        "tokenizer.chat_template" in readers[0].fields and "tokenizer.chat_template" not in readers[1].fields
    )
    found = {t.name: t.data.tobytes() for reader in readers for t in reader.tensors}
    assert found == {t.name: t.data.tobytes() for t in tensors}
    # The embedding of 10 MB is larger than a part and stands alone; all others keep to the size.
    assert [len(r.tensors) for r in readers if sum(t.n_bytes for t in r.tensors) > 1e6] == [1]
    assert parts.tensor_types == whole.tensor_types and parts.bits_per_weight == whole.bits_per_weight
    for a, b in zip(
        logits_of("gguf", folder, tmp_path / "a.log"),
        logits_of("gguf", whole_folder, tmp_path / "b.log"),
        strict=True,
    ):
        assert np.array_equal(a, b)
    load_artifact(folder, verify=True)


@pytest.mark.parametrize("size", ["5X", "M", "0M", "100K", "-3G", "1.5G"])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(UsageError, match="split_max_size takes a size"):
        parse(f"gguf:q8_0,split_max_size={size}")


# --- ONNX


def levels_in(folder: Path) -> set[int | None]:
    import onnx

    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    nodes = [n for n in model.graph.node if n.op_type == "MatMulNBits"]
    return {next((a.i for a in n.attribute if a.name == "accuracy_level"), None) for n in nodes}


def hashes(folder: Path) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.iterdir()
        if p.name not in ("artifact.json", "README.md", "sbom.cdx.json")
    }


def test_accuracy_level_is_measured_told_and_can_be_pinned(make, merged, tmp_path):
    ((auto, folder),) = make("onnx:int4")
    told = auto.checks["choices"]["accuracy_level"]
    assert set(told["measured"]) == {"4", "1"} and told["tokens"] == 4 * 24
    for facts in told["measured"].values():
        assert facts["decode_tok_per_s"] > 0
    assert 0.3 < told["measured"]["4"]["agreement"] <= 1
    assert levels_in(folder) == {told["chosen"]} and f"level {told['chosen']}" in told["why"]
    ((pinned, pinned_folder),) = make(told["pin"])
    assert pinned.id == f"onnx-int4+accuracy_level={told['chosen']}" and "choices" not in pinned.checks
    assert hashes(pinned_folder) == hashes(folder), "what was chosen can be had again without measuring"
    # The measurement is kept by content: asked again, nothing is measured and the answer is the same.
    from edgeft.compress.formats import Job
    from edgeft.compress.formats.onnx_accuracy import choose

    work = merged / ".work"
    job = Job(
        parse("onnx:int4"), merged / "merged", folder, work, work / "again.log", "tiny", None, threads=1
    )
    assert choose(job) == (auto.checks["choices"], [])


def test_a_level_that_can_not_win_is_not_asked():
    from edgeft.compress.formats.onnx_accuracy import can_win, judge

    known = {"agreement": 0.995, "decode_tok_per_s": 100.0}
    assert not can_win(50.0, known) and not can_win(109.0, known) and can_win(120.0, known)
    flips = {**known, "agreement": 0.98}
    assert can_win(50.0, flips) and not can_win(20.0, flips)
    found = judge({4: known, 1: {"agreement": None, "decode_tok_per_s": 50.0}})
    assert found["chosen"] == 4 and "not asked" in found["why"]


def test_levels_compute_what_their_names_say(make, merged, tmp_path):
    """The agreement that is measured is a real one: 1 and 0 compute alike on a CPU, 4 does not."""
    from edgeft.compress.formats.onnx_accuracy import write_level

    ((_, folder),) = make("onnx:int4")
    found = {}
    for level in (0, 1, 4):
        copy = tmp_path / str(level)
        shutil.copytree(folder, copy)
        write_level(str(copy), level)
        assert levels_in(copy) == {level or None}
        found[level] = logits_of("onnx", copy, tmp_path / f"{level}.log")
    assert all(np.array_equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(found[4], found[1], strict=True))


@pytest.mark.parametrize(
    ("four", "one", "p_value", "chosen"),
    [
        ((0.98, 100), (0.985, 100), 1.0, 4),  # all alike: the builder's default
        ((0.98, 100), (0.985, 109), 1.0, 4),  # a little faster is a tie
        ((0.98, 100), (0.985, 120), 1.0, 1),  # as good and faster
        ((0.95, 200), (0.985, 100), 0.01, 1),  # flips tokens, and the other is not too slow
        ((0.95, 200), (0.985, 100), 0.2, 4),  # that could be chance
        ((0.976, 109), (0.993, 4), 0.01, 4),  # better, and unbearably slow
        ((0.985, 100), (0.95, 200), 0.01, 4),
    ],
)
def test_agreement_beyond_chance_goes_first_then_speed(four, one, p_value, chosen):
    from edgeft.compress.formats.onnx_accuracy import judge

    levels = {
        level: dict(zip(("agreement", "decode_tok_per_s"), facts, strict=True))
        for level, facts in ((4, four), (1, one))
    }
    levels[1]["p_value"] = p_value
    assert judge(levels)["chosen"] == chosen == judge(dict(reversed(levels.items())))["chosen"]


def test_block_size_and_embedding_of_its_own(make, merged, tmp_path):
    import onnx

    ((own, folder),) = make("onnx:int4,accuracy_level=4,block_size=64,embedding=own")
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    nodes = [n for n in graph.node if n.op_type in ("MatMulNBits", "GatherBlockQuantized")]
    assert {a.i for n in nodes for a in n.attribute if a.name == "block_size"} == {64}
    assert {
        a.i for n in nodes if n.op_type == "GatherBlockQuantized" for a in n.attribute if a.name == "bits"
    } == {8}
    # Two tables of 49,152 x 256: the embedding's in 8 bits, the head's in 4.
    assert own.size_bytes > 1.5 * 49152 * 256
    found = logits_of("onnx", folder, tmp_path / "own.log")
    wanted = logits_of("transformers", merged / "merged", tmp_path / "merged.log")
    assert np.corrcoef(found[0].ravel(), wanted[0].ravel())[0, 1] > 0.9


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("onnx:fp32,accuracy_level=1", "accuracy_level is for int4 and int8"),
        ("onnx:fp32,block_size=64", "block_size is for int4 and int8"),
        ("onnx:fp16,device=cpu", "fp16 runs on CUDA"),
    ],
)
def test_onnx_options_that_do_not_go_together(tiny_models, tmp_path, spec, complaint):
    with pytest.raises(UsageError, match=complaint):
        compress(tiny_models["llama"], None, Recipe(out=tmp_path / "dist", formats=(spec,)))
    assert not (tmp_path / "dist").exists()


def test_sharing_needs_a_tied_head_and_blocks_a_width(tiny_models, tmp_path):
    with pytest.raises(UsageError, match="not tied"):
        compress(tiny_models["qwen3"], None, Recipe(out=tmp_path, formats=("onnx:int8,embedding=shared",)))
    base = tmp_path / "narrow"
    shutil.copytree(tiny_models["llama"], base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "hidden_size": 576}))
    with pytest.raises(UsageError, match="blocks of 128 don't divide the width 576") as error:
        compress(base, None, Recipe(out=tmp_path / "dist", formats=("onnx:int8,block_size=128",)))
    assert error.value.hint == "block_size=16 or 32 or 64"


def test_cuda_is_refused_where_there_is_none(tiny_models, tmp_path):
    from edgeft.compress.formats.onnx import cuda_missing

    if cuda_missing() is None:
        pytest.skip("this box has CUDA")
    for spec in ("onnx:fp16", "onnx:int4,device=cuda"):
        with pytest.raises(EnvironmentFault, match="onnxruntime-gpu") as error:
            compress(tiny_models["llama"], None, Recipe(out=tmp_path / "dist", formats=(spec,)))
        assert error.value.exit_code == 3 and "edgeft[gpu]" in error.value.hint
    assert not (tmp_path / "dist").exists()


# --- GPTQ


@pytest.mark.slow
@pytest.mark.parametrize("options", ["2,group_size=32,act_order=true,sym=false,rows=4"])
def test_gptq_loads_and_what_vllm_refuses_is_told(make, merged, tmp_path, options):
    pytest.importorskip("optimum", reason="needs the extra: gptq")
    if not __import__("importlib.util").util.find_spec("gptqmodel"):
        pytest.skip("needs the extra: gptq")
    ((artifact, folder),) = make(f"gptq:{options}", calibration=DESK / "calibrate.jsonl")
    asked = parse(f"gptq:{options}")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"]) == (int(asked.variant), asked.options["group_size"])
    assert config["desc_act"] is asked.options.get("act_order", False)
    assert config["sym"] is asked.options.get("sym", True)
    told = artifact.checks["vllm"]
    assert told["kernel"] is None and told["loaded"] is False
    assert [p.split(";")[0] for p in told["problems"]] == ["bits is 2", "sym is false"]
    assert artifact.recipe["calibration_rows"] == 4
    found = logits_of("transformers", folder, tmp_path / "gptq.log")
    wanted = logits_of("transformers", merged / "merged", tmp_path / "merged.log")
    least = {"2": 0.5, "3": 0.8}[asked.variant]
    assert np.corrcoef(found[0].ravel(), wanted[0].ravel())[0, 1] > least


# --- One more format


def test_the_page_on_new_formats_makes_one(make, merged, monkeypatch, tmp_path):
    """docs/new-format.md: its file and its line, as they stand there."""
    from edgeft.compress import formats

    page = (Path(__file__).parent.parent / "docs" / "new-format.md").read_text()
    module, line = __import__("re").findall(r"```python\n(.*?)```", page, __import__("re").DOTALL)
    monkeypatch.setattr(formats, "FORMATS", dict(formats.FORMATS))
    (tmp_path / "npz.py").write_text(module)
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path)])
    real = child.run

    def with_page(command, **words):
        """The child finds the page's file too, as it would in compress/formats/."""
        start = f"import edgeft.compress.formats as f; f.__path__.append({str(tmp_path)!r}); import edgeft.child as c; c.main({command[-1]!r})"
        return real([command[0], "-c", start] if "edgeft.child" in command else command, **words)

    monkeypatch.setattr(child, "run", with_page)
    exec(line, {"FORMATS": formats.FORMATS})
    ((artifact, folder),) = make("npz:f16")
    assert (
        artifact.tensor_types["f16"]["parameters"] == artifact.parameters and artifact.bits_per_weight == 16
    )
    with np.load(folder / "tiny.npz") as found:
        assert found["model.norm.weight"].dtype == np.float16
    ((packed, _),) = make("npz:f16,packed=true")
    assert packed.id == "npz-f16+packed=True" and packed.size_bytes < artifact.size_bytes
    with pytest.raises(UsageError, match="Did you mean 'npz:f16'"):
        parse("npz:f61")
    with pytest.raises(UsageError, match="packed takes true, false"):
        parse("npz:f16,packed=2")


# --- auto-round


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["gguf:q4_k_m,method=auto-round", "gptq:4,method=auto-round,group_size=64"])
def test_auto_round_makes_the_same_kind_of_file(make, merged, tmp_path, spec):
    pytest.importorskip("auto_round", reason="needs the extra: auto-round")
    ((artifact, folder),) = make(spec, calibration=DESK / "calibrate.jsonl")
    assert artifact.recipe["method"].startswith("auto-round 0.") and artifact.recipe["iters"] == 0
    assert artifact.seen_rows["calibrate"]
    found = logits_of(artifact.engine, folder, tmp_path / "found.log")
    wanted = logits_of("transformers", merged / "merged", tmp_path / "merged.log")
    assert np.corrcoef(found[0].ravel(), wanted[0].ravel())[0, 1] > 0.95
    if artifact.format == "gptq":
        assert artifact.checks["vllm"]["kernel"] == "marlin"
        return
    from gguf import GGUFReader

    assert list(artifact.files) == ["tiny-q4_k_m.gguf"] and artifact.tensor_types["q4_k"]["tensors"] >= 8
    fields = GGUFReader(folder / "tiny-q4_k_m.gguf").fields
    template = json.loads((merged / "merged" / "tokenizer_config.json").read_text()).get("chat_template")
    file = merged / "merged" / "chat_template.jinja"
    assert fields["tokenizer.chat_template"].contents() == (file.read_text() if file.is_file() else template)
    assert fields["general.name"].contents().lower() == "tiny"


def test_what_auto_round_cannot_do(tiny_models, tmp_path):
    pytest.importorskip("auto_round", reason="needs the extra: auto-round")
    rows = DESK / "calibrate.jsonl"
    for spec, calibration, complaint in (
        ("gguf:q4_k_m,method=auto-round", None, "needs rows, which auto-round"),
        ("gguf:iq4_xs,method=auto-round", rows, "makes no iq4_xs"),
        ("gguf:q4_k_m,iters=200", rows, "iters is auto-round's"),
        ("gptq:4,method=auto-round,act_order=true", rows, "keeps the order"),
    ):
        with pytest.raises(UsageError, match=complaint):
            compress(
                tiny_models["llama"],
                None,
                Recipe(out=tmp_path / "dist", formats=(spec,), calibration=calibration),
            )
    assert not (tmp_path / "dist").exists()
