"""Tuning: the shared prefix changes nothing, and an interrupted run goes on to the same adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeft.tune import lora
from tests.conftest import DESK

torch = pytest.importorskip("torch", reason="needs the extra: tune")
pytest.importorskip("peft", reason="needs the extra: tune")

RECIPE = {
    "rank": 4, "alpha": 8, "dropout": 0.0, "learning_rate": 1e-2, "batch_size": 4, "epochs": 3, "seed": 7, "max_length": 128,
    "held_out": 0.2, "max_seconds": None, "last_layers": None,
}  # fmt: skip


@pytest.fixture
def few_rows(tmp_path) -> Path:
    file = tmp_path / "few.jsonl"
    file.write_text("\n".join((DESK / "train.jsonl").read_text().splitlines()[:20]))
    return file


def batch(model: Path):
    from transformers import AutoTokenizer

    from edgeft.rows import load_rows

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [lora.encode(tokenizer, row, 512) for row in load_rows(DESK / "select.jsonl")[:5]], tokenizer


def test_only_the_answer_and_its_end_are_learned(tiny_models):
    encoded, tokenizer = batch(tiny_models["llama"])
    for ids, start in encoded:
        answer = tokenizer.decode(ids[start:])
        assert answer.endswith("<|im_end|>") and "\n" not in answer and " " not in answer


def test_the_shared_prefix_changes_neither_loss_nor_gradient(tiny_models, monkeypatch):
    from transformers import AutoModelForCausalLM

    encoded, _ = batch(tiny_models["llama"])
    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.float32)

    def loss_and_gradient():
        model.zero_grad()
        loss, right = lora.answer_loss(model, encoded, 0)
        loss.backward()
        return loss.item(), right, model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    assert lora.common_prefix(encoded) > 10
    shared = loss_and_gradient()
    monkeypatch.setattr(lora, "common_prefix", lambda _: 0)
    plain = loss_and_gradient()
    assert shared[0] == pytest.approx(plain[0], rel=1e-5) and shared[1] == plain[1]
    assert torch.allclose(shared[2], plain[2], atol=1e-6)
    # One row at a time, without any padding: the slow reference.
    slow = []
    for ids, start in encoded:
        logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
        slow.append(
            torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:]), reduction="sum").item()
        )
    tokens = sum(len(ids) - start for ids, start in encoded)
    assert shared[0] == pytest.approx(sum(slow) / tokens, rel=1e-4)


def test_training_learns_and_an_interrupted_run_ends_the_same(tiny_models, few_rows, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    def run(name: str) -> dict:
        return lora.train(
            str(tiny_models["llama"]),
            str(few_rows),
            str(tmp_path / name),
            str(tmp_path / f"{name}.work"),
            RECIPE,
        )

    whole = run("whole")
    assert whole["history"][-1]["train_loss"] < whole["history"][0]["train_loss"] - 1
    assert (tmp_path / "whole" / "curve.png").stat().st_size > 5000 and (
        tmp_path / "whole" / "curve.csv"
    ).is_file()

    class Stop(Exception):
        pass

    real, calls = lora.answer_loss, []

    def breaks(*arguments):
        calls.append(1)
        if len(calls) == 8:
            raise Stop
        return real(*arguments)

    monkeypatch.setattr(lora, "answer_loss", breaks)
    with pytest.raises(Stop):
        run("broken")
    monkeypatch.setattr(lora, "answer_loss", real)
    again = run("broken")
    assert [h["step"] for h in again["history"]] == [h["step"] for h in whole["history"]]
    left, right = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "broken"))
    assert max((left[k] - right[k]).abs().max().item() for k in left) < 1e-5


def test_last_layers_only(tiny_models, few_rows, tmp_path):
    from safetensors.torch import load_file

    lora.train(str(tiny_models["llama"]), str(few_rows), str(tmp_path / "a"), str(tmp_path / "w"),
               {**RECIPE, "epochs": 1, "last_layers": 1})  # fmt: skip
    assert all(".layers.1." in name for name in load_file(tmp_path / "a" / "adapter_model.safetensors"))


def test_the_manifest_lists_the_rows_and_a_second_run_keeps_the_adapter(tiny_models, few_rows, tmp_path):
    from edgeft.tune import tune

    out = tmp_path / "adapter"
    made = tune(tiny_models["llama"], few_rows, out, epochs=1, batch_size=8)
    assert len(made["seen_rows"]["train"]) == 20
    stamp = (out / "adapter_model.safetensors").stat().st_mtime_ns
    assert tune(tiny_models["llama"], few_rows, out, epochs=1, batch_size=8) == made
    assert (out / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    assert json.loads((out / "edgeft-tune.json").read_text())["recipe"]["epochs"] == 1
    assert not list(tmp_path.glob(".adapter*"))
