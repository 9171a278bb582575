"""Block layouts, rounding with error feedback, types of single tensors, sizes, the knapsack."""

from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pytest

from edgeft import child
from edgeft.compress import Recipe, blocks, compress, knapsack
from edgeft.errors import GateError, UsageError
from tests.conftest import DESK

torch = pytest.importorskip("torch", reason="needs the extra: compress")
gguf = pytest.importorskip("gguf", reason="needs the extra: compress")
pytest.importorskip("llama_cpp", reason="needs the extra: compress")
Tensors = pytest.importorskip("edgeft.gguf_file").Tensors


def test_a_file_opened_for_its_tensors_is_what_gguf_py_reads(smollm2, rounded):
    out, artefacts = rounded
    file = next((out / artefacts[1].id).glob("*.gguf"))
    whole, quick = gguf.GGUFReader(file), Tensors(file)
    assert list(quick.fields) == list(whole.fields) and quick.data_offset == whole.data_offset
    for ours, theirs in zip(quick.tensors, whole.tensors, strict=True):
        assert (ours.name, ours.tensor_type, ours.data_offset) == (
            theirs.name,
            theirs.tensor_type,
            theirs.data_offset,
        )
        np.testing.assert_array_equal(ours.data, theirs.data)
    empty = {
        name for name, field in whole.fields.items() if field.contents() != quick.fields[name].contents()
    }
    assert empty == {f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges")}


@pytest.mark.parametrize("kind", blocks.LAYOUTS)
def test_a_block_is_its_grid_and_codes(kind):
    """ggml's own quantizer and gguf-py's own dequantizer are the reference."""
    from edgeft.compress.sensitivity import quantized_rows

    chance = np.random.default_rng(0)
    data = quantized_rows(kind, chance.standard_normal((8, 512)), None)
    scale, offset = blocks.grid(kind, data)
    levels = np.array(blocks.LAYOUTS[kind].levels, dtype=np.float32)
    wanted = gguf.dequantize(data, gguf.GGMLQuantizationType[kind.upper()])
    codes = np.abs(scale[..., None] * levels - offset[..., None] - wanted[..., None]).argmin(-1)
    np.testing.assert_array_equal(scale * levels[codes] - offset, wanted)
    np.testing.assert_array_equal(blocks.pack(kind, data, codes), data)
    codes = chance.integers(0, len(levels), (8, 512))
    made = gguf.dequantize(blocks.pack(kind, data, codes), gguf.GGMLQuantizationType[kind.upper()])
    np.testing.assert_array_equal(made, scale * levels[codes] - offset)


def by_the_book(weight, scale, offset, levels, moments, order, damping):
    """GPTQ as its paper has it, one row and column at a time, the inverse taken anew after each column (float64)."""
    h = moments.astype(np.float64) + damping * np.eye(len(moments))
    made = np.zeros_like(weight, dtype=np.float64)
    left = weight.astype(np.float64).copy()
    open_columns = list(order)
    while open_columns:
        column = open_columns[0]
        inverse = np.linalg.inv(h[np.ix_(open_columns, open_columns)])
        for row in range(len(weight)):
            values = scale[row, column] * levels - offset[row, column]
            made[row, column] = values[np.abs(values - left[row, column]).argmin()]
            error = (left[row, column] - made[row, column]) / inverse[0, 0]
            left[row, open_columns] -= error * inverse[0]
        open_columns = open_columns[1:]
    return made


@pytest.mark.parametrize("kind", ["q4_k", "iq4_nl"])
def test_feedback_is_gptq_by_the_book(kind):
    from edgeft.compress import rounding
    from edgeft.compress.sensitivity import quantized_rows

    chance = np.random.default_rng(1)
    mixing = chance.standard_normal((256, 256)) * 0.15 + np.eye(256)
    inputs = chance.standard_normal((2000, 256)) @ mixing
    moments = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    weight = chance.standard_normal((4, 256)).astype(np.float32)
    data = quantized_rows(kind, weight, None)
    feedback = rounding.Feedback(torch.from_numpy(moments))
    packed, before, after = rounding.chosen(kind, data, torch.from_numpy(weight), feedback)
    made = gguf.dequantize(packed, gguf.GGMLQuantizationType[kind.upper()])
    scale, offset = blocks.grid(kind, data)
    levels = np.array(blocks.LAYOUTS[kind].levels, dtype=np.float64)
    damping = rounding.DAMPING * float(np.diag(moments).mean())
    wanted = by_the_book(weight, scale, offset, levels, moments, feedback.order.tolist(), damping)
    # A value at the edge of two levels may go either way in float32, and the columns after it follow.
    assert (np.abs(made - wanted) < 1e-5).mean() > 0.97
    assert after < 0.8 * before
    real = ((inputs @ (made - weight).T) ** 2).sum(1).mean()
    assert after == pytest.approx(real, rel=1e-3), "the expected error is the real one on these inputs"


@pytest.fixture(scope="module")
def rounded(tiny_models, tiny_adapters, tmp_path_factory):
    """A dist of one tiny model: nearest and feedback, and one with types of its own."""
    out = tmp_path_factory.mktemp("rounded")
    asked = (
        "gguf:q4_k_m,rounding=nearest",
        "gguf:q4_k_m",
        "gguf:q4_k_m,ffn_down=q8_0,attn_v=iq4_xs",
    )
    recipe = Recipe(
        out=out, formats=asked, calibration=DESK / "calibrate.jsonl", name="tiny", threads=2, no_gate=True
    )
    return out, compress(tiny_models["llama"], tiny_adapters["llama"], recipe, keep_work=True)


def weights(folder):
    file = next(folder.glob("*.gguf"))
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in Tensors(file).tensors}


def test_feedback_keeps_types_and_size_and_loses_less(rounded):
    from edgeft.compress.moments import Moments

    out, (_, nearest, feedback, _) = rounded
    assert (nearest.size_bytes, nearest.tensor_types) == (feedback.size_bytes, feedback.tensor_types)
    assert (nearest.recipe["rounding"], feedback.recipe["rounding"]) == ("nearest", "feedback")
    second = Moments(out / ".work" / "moments")
    reader = Tensors(next((out / ".work").glob("source-*.gguf")))
    source = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    one, other = weights(out / nearest.id), weights(out / feedback.id)
    better = 0
    for name in source:
        if name in second and name != "token_embd.weight":
            h = second.of(name)
            errors = [
                float((((w - source[name]) @ h) * (w - source[name])).sum()) for w in (one[name], other[name])
            ]
            assert errors[1] <= errors[0] * 1.0001
            better += errors[1] < 0.9 * errors[0]
    assert better >= 10
    np.testing.assert_array_equal(one["token_embd.weight"], other["token_embd.weight"])


def test_moments_are_those_of_the_layers_inputs(rounded, tiny_models):
    """Against plain sums over every row by itself; the common beginning counts once; q, k and v share a file."""
    from transformers import AutoModelForCausalLM

    from edgeft.compress import moments
    from edgeft.compress.imatrix import read
    from edgeft.rows import load_rows, spread
    from edgeft.tokenizer import load_tokenizer

    out, _ = rounded
    tokenizer = load_tokenizer(out / "merged")
    rows = spread(load_rows(DESK / "calibrate.jsonl"), moments.MAX_ROWS)
    own = [tokenizer.apply_chat_template(r["messages"], return_dict=False) for r in rows]
    shared = moments.common_start(own)
    assert 5 < shared < min(map(len, own))
    model = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _m, x: seen.append(x[0][0]))
    with torch.inference_mode():
        for ids in own:
            model(torch.tensor([ids]))
        own_inputs = torch.cat([x[0 if i == 0 else shared :] for i, x in enumerate(seen)])
        seen.clear()
        for text in moments.general_texts():
            model(torch.tensor([tokenizer.encode(text)]))
        general = torch.cat(seen)
    share = moments.GENERAL_SHARE
    wanted = (1 - share) * own_inputs.T @ own_inputs / len(own_inputs) + share * general.T @ general / len(
        general
    )
    found = moments.Moments(out / ".work" / "moments")
    np.testing.assert_allclose(
        found.of("blk.1.ffn_down.weight"), wanted.numpy(), rtol=1e-2, atol=1e-5 * float(wanted.max())
    )
    matrix = read(out / "imatrix.gguf")["blk.1.ffn_down.weight"]
    np.testing.assert_allclose(matrix, (own_inputs**2).mean(0).numpy(), rtol=1e-3)
    assert len({found.leaders[f"blk.0.attn_{x}.weight"] for x in "qkv"}) == 1
    assert found.leaders["blk.0.ffn_up.weight"] != found.leaders["blk.0.ffn_down.weight"]


def test_passes_of_few_layers_give_the_same(rounded, monkeypatch, tmp_path):
    from edgeft.compress import moments

    out, _ = rounded
    source = next((out / ".work").glob("source-*.gguf"))
    few = tmp_path / "rows.jsonl"
    few.write_text("\n".join((DESK / "calibrate.jsonl").read_text().splitlines()[:4]))
    folders = []
    for name, size in (("one", 1 << 30), ("many", 4 * 256 * 256)):
        monkeypatch.setattr(moments, "PASS_BYTES", size)
        folders.append(tmp_path / name)
        moments.collect(str(out / "merged"), str(few), str(source), None, str(folders[-1]), "key", 1)
    one, many = map(moments.Moments, folders)
    for tensor in one.leaders:
        np.testing.assert_allclose(one.of(tensor), many.of(tensor), rtol=1e-5)


def test_single_tensors_get_their_types(rounded):
    out, (*_, mixed) = rounded
    file = next((out / mixed.id).glob("*.gguf"))
    kinds = {t.name: t.tensor_type.name.lower() for t in Tensors(file).tensors}
    assert {k for n, k in kinds.items() if "ffn_down" in n} == {"q8_0"}
    assert {k for n, k in kinds.items() if "attn_v" in n} == {"iq4_xs"}
    assert {k for n, k in kinds.items() if "ffn_up" in n} == {"q4_k"}
    assert mixed.id == "gguf-q4_k_m+attn_v=iq4_xs+ffn_down=q8_0"


def test_sizes_are_exact_before_anything_is_made(rounded, tmp_path):
    from edgeft.compress import sizes

    out, (_, nearest, _, mixed) = rounded
    source = next((out / ".work").glob("source-*.gguf"))
    dry = child.call("edgeft.compress.sizes:dry_run", log=tmp_path / "log", title="dry", source=str(source),
                     variants=["q4_k_m"])  # fmt: skip
    assert sizes.file_bytes(dry["source"], dry["types"]["q4_k_m"]) == nearest.size_bytes
    types = {
        t.name: t.tensor_type.name.lower() for t in Tensors(next((out / mixed.id).glob("*.gguf"))).tensors
    }
    assert sizes.file_bytes(dry["source"], types) == mixed.size_bytes


def test_types_by_name_are_read_and_written_back(tmp_path):
    from edgeft.compress import formats

    file = tmp_path / "types.json"
    file.write_text(json.dumps({"blk.0.ffn_down.weight": "q6_k", "output.weight": "q8_0"}))
    spec = formats.parse(f"gguf:q4_k_m,types={file}")
    assert formats.parse(spec.words) == spec and str(tmp_path) not in spec.words
    assert len(spec.id) < 40 and spec.id.startswith("gguf-q4_k_m+types=")
    file.write_text(json.dumps({"output.weight": "q9_k"}))
    with pytest.raises(UsageError, match="q9_k"):
        formats.parse(f"gguf:q4_k_m,types={file}")
    for wrong, said in (
        ("types=nowhere.json", "types takes"),
        ("fnn_down=q6_k", "ffn_down"),
        ("ffn_down=q7_k", "takes"),
    ):
        with pytest.raises(UsageError, match=said):
            formats.parse(f"gguf:q4_k_m,{wrong}")


def test_feedback_without_rows_is_refused(tiny_models, tmp_path):
    recipe = Recipe(out=tmp_path / "dist", formats=("gguf:q4_k_m,rounding=feedback",), no_gate=True)
    with pytest.raises(UsageError, match="needs rows"):
        compress(tiny_models["llama"], None, recipe)
    assert not (tmp_path / "dist").exists()


def test_knapsack_is_the_best_there_is_where_a_step_ends():
    """Against all combinations, on small random problems; it never exceeds the bytes."""
    chance = random.Random(0)
    ends = 0
    for _ in range(60):
        choices = {
            f"t{i}": {
                k: (size, 10 / size * chance.uniform(0.5, 2))
                for k, size in (("a", 3), ("b", 5), ("c", 8), ("d", 13))
            }
            for i in range(4)
        }
        budget = chance.randint(10, 60)
        found = knapsack.fill(choices, budget)
        best = min(
            (sum(choices[t][k][1] for t, k in zip(choices, kinds, strict=True)) for kinds in itertools.product("abcd", repeat=4)
             if sum(choices[t][k][0] for t, k in zip(choices, kinds, strict=True)) <= budget),
            default=None,
        )  # fmt: skip
        if best is None:
            assert found is None
            continue
        assert found is not None
        spent = sum(choices[t][k][0] for t, k in found.items())
        assert spent <= budget
        lost = knapsack.loss_of(choices, found)
        assert best <= lost + 1e-12
        # With exactly the bytes that it took, nothing loses less unless bytes were left over at the last step.
        ends += lost <= best + 1e-12
    assert ends >= 25


def test_nothing_fits_says_what_would():
    from edgeft.compress.fit import Scored, candidates

    scored = Scored({"a": {"q4_k": (4000, 1.0)}}, {"q4_k_m": 1000}, {"q4_k_m": 5000})
    with pytest.raises(GateError, match="smallest types") as error:
        candidates(scored, 4000, DESK)
    assert "--fit 0.1MB" in error.value.hint
