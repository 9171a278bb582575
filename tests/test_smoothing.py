"""Channels evened out before quantizing: the same function, and less lost where some channels are loud."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from edgeft.compress import Recipe, compress
from edgeft.engines.gguf import files_of
from edgeft.errors import EnvironmentFault, UsageError
from tests.conftest import DESK
from tests.test_formats_tiny import logits_of, rms, torch_logits, worst

torch = pytest.importorskip("torch", reason="needs the extra: compress")
gguf = pytest.importorskip("gguf", reason="needs the extra: compress")
Tensors = pytest.importorskip("edgeft.gguf_file").Tensors
smoothing = pytest.importorskip("edgeft.compress.smoothing")

LOUD = slice(3, 256, 32)  # a channel of each of llama.cpp's blocks of 32


def fake_moments(folder, source):
    """Mean squared inputs from 1e-4 to 1e4, without a pass over any text."""
    folder.mkdir()
    chance, leaders = np.random.default_rng(0), {}
    for tensor in Tensors(source).tensors:
        if tensor.data.ndim == 2:
            leaders[tensor.name] = tensor.name
            np.save(folder / f"{tensor.name}.npy", np.diag(10 ** chance.uniform(-4, 4, int(tensor.shape[0]))))
    (folder / "index.json").write_text(json.dumps({"key": "fake", "tensors": leaders}))
    return folder


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_the_function_stays(kind, tiny_models, tmp_path):
    """Heads that several queries share, biases (qwen2), norms of queries and a head of its own (qwen3)."""
    from edgeft.compress.converter import convert

    (tmp_path / "plain").mkdir()
    source = tmp_path / "plain" / "m.gguf"
    convert(tiny_models[kind], source, "f32", "m", tmp_path / "log")
    (tmp_path / "even").mkdir()
    target, factors = tmp_path / "even" / "m.gguf", tmp_path / "f.npz"
    assert smoothing.applies(source)
    told = smoothing.smooth(str(source), str(fake_moments(tmp_path / "H", source)), str(target), str(factors))
    assert told["channels"] > 2000
    before, after = ({t.name: t for t in Tensors(file).tensors} for file in (source, target))
    known = smoothing.Factors(factors).known
    assert {"blk.1.attn_k.weight", "blk.0.ffn_down.weight", "blk.1.attn_output.weight"} < set(known)
    assert not {"output.weight", "token_embd.weight"} & set(known), (
        "what leaves the last norm is read as it is"
    )
    assert (
        not Tensors(source).fields.get(smoothing.KEY)
        and Tensors(target).fields[smoothing.KEY].contents() is True
    )
    for name, s in known.items():
        assert 1 / smoothing.MOST <= s.min() < 0.5 < 2 < s.max() <= smoothing.MOST
        if not name.endswith(("attn_v.weight", "ffn_up.weight")):  # whose rows are scaled too
            np.testing.assert_allclose(after[name].data, before[name].data * s, rtol=1e-6)
    found, wanted = (logits_of("gguf", f.parent, tmp_path / f"{f.parent.name}.log") for f in (target, source))
    assert worst(found, wanted) < 1e-4
    assert worst(wanted, torch_logits(tiny_models[kind])) < 3e-5


def test_a_weight_that_leaves_its_floats_range_ends_it():
    class Tensor:
        name, tensor_type = "t", gguf.GGMLQuantizationType.F16
        data = np.array([[1e-3, 1.0], [2.0, 3.0]], dtype=np.float16)

    smoothing._scale(Tensor, np.array([0.5, 4.0], dtype=np.float32))
    np.testing.assert_array_equal(Tensor.data[1], [1.0, 12.0])
    Tensor.data[0, 1] = 60000
    with np.errstate(over="ignore"), pytest.raises(EnvironmentFault, match="leaves the range of F16"):
        smoothing._scale(Tensor, np.array([1.0, 4.0], dtype=np.float32))


def test_loud_channels_cost_less(tiny_models, tmp_path):
    """Some channels 64 times as loud, undone in what reads them: the same function, hard to round."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "loud"
    shutil.copytree(tiny_models["llama"], folder)
    held = load_file(folder / "model.safetensors")
    for name, weight in held.items():
        if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            weight[LOUD] *= 64
        elif any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            weight[:, LOUD] /= 64
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    wanted = torch_logits(folder)
    assert worst(wanted, torch_logits(tiny_models["llama"])) < 1e-4
    recipe = Recipe(
        out=tmp_path / "dist", formats=("gguf:q4_k_m,smooth=true", "gguf:q4_k_m"), calibration=DESK / "calibrate.jsonl",
        name="tiny", threads=2, no_gate=True,
    )  # fmt: skip
    _, smooth, plain = compress(folder, None, recipe)
    names = [step["name"] for step in smooth.steps]
    assert "evening out channels" in names and all("predicted" in step for step in smooth.steps)
    assert (smooth.size_bytes, smooth.tensor_types) == (plain.size_bytes, plain.tensor_types)
    assert smooth.checks["smooth"]["channels"] > 2000 and "smooth" not in plain.checks
    assert not list((tmp_path / "dist" / ".work").glob("smooth-*"))
    file = next((tmp_path / "dist" / smooth.id).glob("*.gguf"))
    with pytest.raises(UsageError, match="an adapter made for the plain model does not fit"):
        files_of(file.parent, {"adapters": {"a": str(file)}})
    lost = [
        rms(logits_of("gguf", tmp_path / "dist" / a.id, tmp_path / f"{a.id}.log"), wanted)
        for a in (smooth, plain)
    ]
    assert lost[0] < 0.5 * lost[1]


def test_smoothing_without_feedback_is_refused(tiny_models, tmp_path):
    recipe = Recipe(
        out=tmp_path / "dist", formats=("gguf:q4_k_m,rounding=nearest,smooth=true",), calibration=DESK / "calibrate.jsonl",
    )  # fmt: skip
    with pytest.raises(UsageError, match="with edgeft's error feedback alone"):
        compress(tiny_models["llama"], None, recipe)
    assert not (tmp_path / "dist").exists()
