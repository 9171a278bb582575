"""`--fit` on a tiny model: what is chosen fits, holds what is wanted, and is reported on rows it was not chosen by."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edgeft.compress import Recipe
from edgeft.errors import GateError, UsageError
from tests.conftest import DESK

torch = pytest.importorskip("torch", reason="needs the extra: compress")
pytest.importorskip("llama_cpp", reason="needs the extra: compress")
pytest.importorskip("xllamacpp", reason="needs the extra: gguf")

SIZE = 13_500_000


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A few rows to calibrate on and to choose on: the tiny model says nothing of use anyway."""
    folder = tmp_path_factory.mktemp("fit-rows")
    for name, source in (("calibrate", "calibrate"), ("select", "select")):
        lines = (DESK / f"{source}.jsonl").read_text().splitlines()[:24]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def fitted(tiny_models, tiny_adapters, rows, tmp_path_factory):
    """(OUT, fit.json, recipe) of a fit in GGUF alone."""
    from edgeft.compress import fit, fit_before

    patch = pytest.MonkeyPatch()
    patch.setattr(fit_before, "OTHER_FORMATS", ())
    out = tmp_path_factory.mktemp("fit")
    recipe = Recipe(out=out, formats=(), calibration=rows / "calibrate.jsonl", eval=rows / "select.jsonl", name="tiny",
                    threads=2, eval_limit=4)  # fmt: skip
    source = [(tiny_adapters["llama"], 1.0)]
    found = fit.fit(tiny_models["llama"], source, recipe, fit.Wanted(SIZE))
    yield out, found, recipe, (tiny_models["llama"], source)
    patch.undo()


def test_what_is_chosen_fits_and_loses_least(fitted):
    out, found, _, _ = fitted
    held = [row for row in found["candidates"] if row["size_bytes"] <= SIZE]
    assert len(found["candidates"]) == 2 and found["chosen"] in {row["id"] for row in held}
    best = min(held, key=lambda row: row["kld_nats"])
    assert found["chosen"] == best["id"] and best["kld_nats"] > 0
    layout = next(row for row in found["candidates"] if "+types=" in row["id"])
    assert 0.97 * SIZE < layout["size_bytes"] <= SIZE, "a layout uses the room there is"
    assert json.loads((out / "fit.json").read_text()) == json.loads(json.dumps(found))
    assert (out / "fit.svg").read_text().startswith("<?xml")
    bits = [point["bits_per_weight"] for point in found["frontier"]]
    assert 2 < bits[0] < bits[-1] < 10
    losses = [point["estimated_kl_nats"] for point in found["frontier"]]
    assert losses == sorted(losses, reverse=True) and losses[0] > 10 * losses[-1]


def test_it_reports_on_rows_that_it_did_not_choose_by(fitted):
    from edgeft.compress import load_artifact
    from edgeft.rows import load_rows, row_hash

    out, found, recipe, _ = fitted
    chosen_by = set(load_artifact(out / found["chosen"]).seen_rows["select"])
    reported = set(found["report"]["rows"])
    assert reported and chosen_by and not reported & chosen_by
    assert reported | chosen_by == {row_hash(row) for row in load_rows(recipe.eval)}
    assert {line["check"] for line in found["report"]["checks"]} >= {"kld own", "tokens", "template"}


def test_sensitivities_are_kept_and_predict_the_loss(fitted):
    """The estimate for one tensor in q2_k is within a factor of two of the KLD that the tensor causes; wider types lose less."""
    from gguf import GGMLQuantizationType, dequantize
    from transformers import AutoModelForCausalLM

    from edgeft.compress import sensitivity
    from edgeft.compress.imatrix import read
    from edgeft.rows import load_rows
    from edgeft.tokenizer import load_tokenizer

    out, _, recipe, _ = fitted
    (kept,) = (out / ".work").glob("sensitivity-*.json")
    scores = json.loads(kept.read_text())
    model = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32).eval()
    tokenizer = load_tokenizer(out / "merged")
    ids = [
        tokenizer.apply_chat_template(r["messages"], return_dict=False) for r in load_rows(recipe.calibration)
    ][:12]

    def logprobs():
        with torch.inference_mode():
            return torch.cat([model(torch.tensor([row])).logits[0].log_softmax(-1) for row in ids])

    before, weighed = logprobs(), read(out / "imatrix.gguf")
    name = "blk.1.ffn_down.weight"
    weight = model.model.layers[1].mlp.down_proj.weight
    data = sensitivity.quantized_rows("q2_k", weight.detach().numpy(), weighed[name])
    weight.data = torch.from_numpy(np.array(dequantize(data, GGMLQuantizationType.Q2_K)))
    after = logprobs()
    measured = float((before.exp() * (before - after)).sum(-1).mean())
    assert 0.5 < scores[name]["q2_k"] / measured < 2
    for kinds in scores.values():
        assert kinds["q8_0"] < kinds["q4_k"] < kinds["q2_k"]


def test_rows_of_weights_in_another_order_are_found():
    from edgeft.compress.sensitivity import row_order

    weight = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    weight[4] = weight[1]  # rows that are alike
    shuffled = weight[[3, 1, 0, 5, 4, 2]]
    np.testing.assert_array_equal(weight[row_order(weight, shuffled)], shuffled)
    assert row_order(weight, shuffled + 1) is None and row_order(weight, shuffled[:5]) is None


def test_what_does_not_hold_is_said(fitted):
    from edgeft.compress import fit

    _, _, recipe, (base, source) = fitted
    with pytest.raises(GateError, match="smallest types") as error:
        fit.fit(base, source, recipe, fit.Wanted(1_000_000))
    assert "--fit" in error.value.hint


def test_missing_rows_and_wrong_sizes_are_refused(tiny_models, rows, tmp_path):
    from edgeft.cli.fit import bytes_of
    from edgeft.compress import fit

    for words, said in (({}, "calibration"), ({"calibration": rows / "calibrate.jsonl"}, "--eval")):
        with pytest.raises(UsageError) as error:
            fit.fit(
                tiny_models["llama"], [], Recipe(out=tmp_path / "no", formats=(), **words), fit.Wanted(SIZE)
            )
        assert said in error.value.message + error.value.hint
    assert not (tmp_path / "no").exists()
    assert [bytes_of(t) for t in ("100MB", "1.5GiB", "12 k", "7")] == [100_000_000, 3 << 29, 12_000, 7]
    for wrong in ("", "0", "0.0MB", "MB", "-3MB", "3 parsecs"):
        with pytest.raises(UsageError, match="size"):
            bytes_of(wrong)
