"""The sentence encoder against a plain BERT in numpy, the heads on vectors, and a policy with both."""

from __future__ import annotations

import json
import shutil
import tarfile
from math import erf, sqrt

import numpy as np
import pytest

pytest.importorskip("onnx", reason="edgeft[compress] is not installed")
pytest.importorskip("onnxruntime", reason="edgeft[onnx] is not installed")
pytest.importorskip("tokenizers", reason="edgeft[onnx] is not installed")

from safetensors.numpy import save_file

from edgeft.errors import UsageError
from edgeft.router import Options, blend, decide, fit, load_policy
from edgeft.router.blend import nonnegative
from edgeft.router.embedding import load_encoder, nearest, parts_of, read_spec, vector_heads
from edgeft.router.minilm_export import GRAPH, ROUTING, export
from tests.test_router import PAIR, WORDS, by_word, write_report

SIZE, LAYERS, HEADS, WIDE = 32, 2, 4, 48


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    """A BERT with random weights over a vocabulary of the tests' words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.save(str(folder / "tokenizer.json"))
    chance = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return chance.normal(0, 0.3, shape).astype(np.float32)

    weights = {
        "embeddings.word_embeddings.weight": random(len(words), SIZE), "embeddings.position_embeddings.weight": random(64, SIZE),
        "embeddings.token_type_embeddings.weight": random(2, SIZE),
    }  # fmt: skip
    norms = ["embeddings.LayerNorm"]
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}."
        shapes = {"attention.self.query": (SIZE, SIZE), "attention.self.key": (SIZE, SIZE), "attention.self.value": (SIZE, SIZE),
                  "attention.output.dense": (SIZE, SIZE), "intermediate.dense": (WIDE, SIZE), "output.dense": (SIZE, WIDE)}  # fmt: skip
        for name, shape in shapes.items():
            weights |= {f"{layer}{name}.weight": random(*shape), f"{layer}{name}.bias": random(shape[0])}
        norms += [f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"]
    for name in norms:
        weights |= {f"{name}.weight": 1 + random(SIZE), f"{name}.bias": random(SIZE)}
    save_file(weights, folder / "model.safetensors")
    config = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "hidden_size": SIZE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "layer_norm_eps": 1e-12,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, weights


def slow_bert(w: dict[str, np.ndarray], ids: list[int], layers: int = LAYERS) -> np.ndarray:
    """Devlin et al. 2018, written out: the mean over tokens after so many layers, of length 1 after the last."""

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    h = (
        w["embeddings.word_embeddings.weight"][ids]
        + w["embeddings.position_embeddings.weight"][: len(ids)]
        + w["embeddings.token_type_embeddings.weight"][0]
    )
    h = norm("embeddings.LayerNorm", h)
    for i in range(layers):
        layer, mixed, width = f"encoder.layer.{i}.", np.zeros_like(h), SIZE // HEADS
        q, k, v = (linear(f"{layer}attention.self.{n}", h) for n in ("query", "key", "value"))
        for head in range(HEADS):
            at = slice(head * width, (head + 1) * width)
            scores = q[:, at] @ k[:, at].T / sqrt(width)
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[:, at] = shares / shares.sum(-1, keepdims=True) @ v[:, at]
        h = norm(f"{layer}attention.output.LayerNorm", h + linear(f"{layer}attention.output.dense", mixed))
        wide = linear(f"{layer}intermediate.dense", h)
        wide = wide * 0.5 * (1 + np.vectorize(erf)(wide / sqrt(2)))
        h = norm(f"{layer}output.LayerNorm", h + linear(f"{layer}output.dense", wide))
    mean = h.mean(0)
    return mean / np.linalg.norm(mean) if layers == LAYERS else mean


def test_the_graph_is_the_encoder_to_8_bits(tiny_bert, tmp_path):
    from edgeft.router import minilm_export

    folder, weights = tiny_bert
    out = export(folder, tmp_path / "encoder")
    encoder, routing = load_encoder(read_spec(out)), load_encoder(read_spec(out, ROUTING))
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("card payment", "refund limit address app login fee", "x"):
        found, right = encoder(text), slow_bert(weights, tokenizer.encode(text).ids)
        assert found.shape == (SIZE,) and np.linalg.norm(found) == pytest.approx(1, abs=1e-5)
        assert found @ right > 0.98
        halfway, half = routing(text), slow_bert(weights, tokenizer.encode(text).ids, 1)
        assert halfway @ half > 0.98 * np.linalg.norm(halfway) * np.linalg.norm(half)
        assert np.linalg.norm(halfway) == pytest.approx(np.linalg.norm(half), rel=0.1)
    import onnx
    import onnxruntime

    for name in (GRAPH, ROUTING):
        held = [
            onnx.numpy_helper.to_array(t)
            for t in onnx.load(out / name).graph.initializer
            if t.data_type == onnx.TensorProto.INT8
        ]
        assert max(np.abs(w.astype(int)).max() for w in held if w.ndim == 2) in range(32, 65), (
            "7 bits: no product saturates, on whatever processor"
        )
    config = json.loads((folder / "config.json").read_text())
    ids = tokenizer.encode("refund limit address").ids
    for layers in (1, LAYERS):
        made = minilm_export._Graph(dict(weights), config).model(layers, unit=layers == LAYERS)
        onnx.save(made, tmp_path / "float.onnx")
        session = onnxruntime.InferenceSession(
            str(tmp_path / "float.onnx"), providers=["CPUExecutionProvider"]
        )
        exact = session.run(None, {"input_ids": np.array([ids])})[0]
        np.testing.assert_allclose(exact, slow_bert(weights, ids, layers), atol=4e-6)


def test_a_policy_with_an_encoder_reads_back_and_misses_it_in_two_lines(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFT_HOME", str(tmp_path / "home"))
    out = export(tiny_bert[0], tmp_path / "encoder")
    report = write_report(tmp_path / "r", by_word(200, 1))
    made = fit([report], PAIR, tmp_path / "policy", Options(encoder=out))
    read = load_policy(tmp_path / "policy")
    assert decide(read, "refund my card") == decide(made, "refund my card")
    assert list(made.policy.fitted["heads"]["blend"]) == ["hashed", "kernel", "neighbours"]
    assert (
        decide(read, "refund my card").choice == "strong"
        and decide(read, "card limit address").choice == "weak"
    )
    # The folder is whole: it may be moved, and the encoder's own may go.
    shutil.rmtree(out)
    (tmp_path / "policy").rename(tmp_path / "moved")
    moved = load_policy(tmp_path / "moved")
    assert decide(moved, "refund my card") == decide(made, "refund my card") and moved.sha256 == made.sha256
    own = tmp_path / "moved" / "encoder" / "tokenizer.json"
    own.write_text("{}")
    with pytest.raises(UsageError, match="is not the one that the policy was fitted with"):
        load_policy(tmp_path / "moved")
    own.unlink()
    with pytest.raises(UsageError, match="sentence encoder is missing"):
        load_policy(tmp_path / "moved")
    with pytest.raises(UsageError, match=r"holds no encoder\.json"):
        fit([report], PAIR, tmp_path / "other", Options(encoder=tmp_path / "r"))
    with pytest.raises(UsageError, match=r"holds no config\.json|holds no model\.safetensors"):
        export(tmp_path, tmp_path / "other")


def test_heads_on_vectors_predict_what_the_vectors_tell():
    chance = np.random.default_rng(1)
    vectors = chance.normal(size=(400, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    targets = np.column_stack([vectors[:, 0], vectors[:, 1]]) + 0.1 * chance.normal(size=(400, 2))
    for shift in (0.0, 5.0):  # what all vectors share says nothing
        tensors, said, spec, left_out = vector_heads(vectors[:300] + shift, targets[:300])
        for found in parts_of(tensors, spec, vectors[300:] + shift):
            assert np.corrcoef(found[:, 0], targets[300:, 0])[0, 1] > 0.85
    assert max(said["kernel_loo_mse"]) < 0.05 and list(left_out) == ["kernel", "neighbours"]
    noise = chance.normal(size=(300, 2))
    tensors, _, spec, left_out = vector_heads(vectors[:300], noise)
    tensors |= blend.fit(list(left_out.values()), noise)
    found = blend.mix(tensors, parts_of(tensors, spec, vectors[300:]))
    assert np.abs(found - noise.mean(0)).max() < 0.5, "noise is shrunk to the mean"


def test_nearest_against_a_full_sort_and_weights_are_never_negative():
    chance = np.random.default_rng(2)
    memory, queries = chance.normal(size=(700, 5)), chance.normal(size=(600, 5))
    np.testing.assert_array_equal(nearest(queries, memory, 7), np.argsort(-(queries @ memory.T), 1)[:, :7])
    assert not (nearest(memory, memory, 3, leave_out_self=True) == np.arange(700)[:, None]).any()
    x = chance.normal(size=(50, 3))
    np.testing.assert_allclose(nonnegative(list(x.T), x @ [0.5, 0.0, 2.0], 1e6), [0.5, 0, 2], atol=1e-9)
    assert nonnegative([x[:, 0]], -x[:, 0], 1e6).tolist() == [0]


def test_few_rows_leave_the_weights_of_a_blend_equal_and_many_move_them():
    chance = np.random.default_rng(3)
    x = 0.1 * chance.normal(size=(50000, 2))  # two heads that say little, of which one is right
    target = x[:, 0] + chance.normal(size=50000)
    few, many = (nonnegative([x[:n, 0], x[:n, 1]], target[:n]) for n in (100, 50000))
    np.testing.assert_allclose(few, [0.5, 0.5], atol=0.2)
    assert many[0] > 0.9 and many[1] < 0.1
    # By hand, for one head: (x'y + p) / (x'x + p), p the penalty.
    one, p = x[:100, 0], target[:100].var() / 0.2**2
    assert nonnegative([one], target[:100])[0] == pytest.approx((one @ target[:100] + p) / (one @ one + p))


def test_a_bundle_takes_the_encoder_and_its_packages_along(tiny_bert, tmp_path, monkeypatch):
    from edgeft.deploy import Wanted, bundle
    from edgeft.router.features import DIMENSIONS, SPEC
    from edgeft.router.policy import save_policy
    from edgeft.router.rule import DEFAULTS
    from edgeft.types import Artifact, Policy
    from tests.test_bundle import PI, artifact

    weak = artifact(tmp_path / "dist" / "weak")
    side = {"id": "weak", "kind": "artifact", "engine": "gguf", "path": str(weak), "price": None,
            "artifact_sha256": Artifact.load(weak / "artifact.json").sha256}  # fmt: skip
    encoder = export(tiny_bert[0], tmp_path / "encoder")
    tensors = {"text.weights": np.zeros((1, DIMENSIONS), np.float32), "text.bias": np.zeros(1, np.float32)}
    features = {**SPEC, "embedding": read_spec(encoder, ROUTING)}
    save_policy(Policy("2026", [side], features, dict(DEFAULTS), {}), tensors, tmp_path / "policy", encoder)
    manifest = bundle(Wanted([weak], PI, tmp_path / "policy", lock_only=True), tmp_path / "a.tar")
    assert manifest["needs"]["memory"] and manifest["needs"]["memory_bytes"] > 150e6 + 90e6
    with tarfile.open(tmp_path / "a.tar") as tar:
        tar.extractall(tmp_path / "x", filter="data")
    assert load_policy(tmp_path / "x" / "policy").encoder("card payment").shape == (SIZE,)
    assert "edgeft[encoder,gguf,serve] @" in (tmp_path / "x" / "requirements.lock").read_text()
    (tmp_path / "policy" / "encoder" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    monkeypatch.setenv("EDGEFT_HOME", str(tmp_path / "home"))
    shutil.copytree(encoder, tmp_path / "home" / "encoders" / "minilm")
    load_policy(tmp_path / "policy")  # out of this user's cache, which the box has not
    with pytest.raises(UsageError, match="does not hold its sentence encoder"):
        bundle(Wanted([weak], PI, tmp_path / "policy", lock_only=True), tmp_path / "b.tar")
    assert not (tmp_path / "b.tar").exists()
