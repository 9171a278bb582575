"""The gate: healthy artefacts pass, damaged ones don't, and an adapter that quantizing erased is caught."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from edgeft.compress import Recipe, compress, gate, gate_limits, gate_rows, grid, load_artifact
from edgeft.errors import GateError, UsageError
from edgeft.files import list_files
from edgeft.rows import load_rows, row_hash
from tests.conftest import DESK, SHARED, write_rows
from tests.test_cli import assert_two_lines, edgeft

torch = pytest.importorskip("torch", reason="needs the extra: compress")
pytest.importorskip("llama_cpp", reason="needs the extra: compress")
pytest.importorskip("xllamacpp", reason="needs the extra: gguf")

ROWS = 8


@pytest.fixture(scope="module")
def eval_rows(tmp_path_factory) -> Path:
    """A few rows of the desk's part for choosing."""
    return write_rows(tmp_path_factory.mktemp("eval") / "eval.jsonl", load_rows(DESK / "select.jsonl")[:ROWS])


@pytest.fixture(scope="module")
def dist(tiny_models, tiny_adapters, eval_rows, tmp_path_factory) -> Path:
    """A tiny Llama as Q8_0, through the gate with rows."""
    out = tmp_path_factory.mktemp("gated")
    recipe = Recipe(out=out, formats=("gguf:q8_0",), name="tiny", eval=eval_rows, threads=1)
    compress(tiny_models["llama"], tiny_adapters["llama"], recipe)
    return out


@pytest.fixture(scope="module")
def held(dist, tiny_models, eval_rows) -> gate.Gate:
    """The gate that `dist` went through."""
    return gate.Gate(
        merged=dist / "merged",
        merged_sha256=load_artifact(dist / "merged").sha256,
        base=tiny_models["llama"],
        base_sha256=gate.model_sha256(tiny_models["llama"]),
        rows=gate_rows.choose(eval_rows, None, {}, False),
        limits=gate_limits.load(),
        grid=None,
        work=dist / ".work" / "gate",
        threads=1,
    )


def lines_of(entry: dict) -> dict[str, dict]:
    """The lines of a gate's entry by their check."""
    return {line["check"]: line for line in entry["checks"]}


def damaged(dist: Path, place: Path, old: bytes, new: bytes) -> Path:
    """A copy of the GGUF artefact whose file has `new` for the first `old`."""
    folder = place / "damaged"
    shutil.copytree(dist / "gguf-q8_0", folder)
    file = next(folder.glob("*.gguf"))
    data = file.read_bytes()
    at = data.index(old)
    assert len(old) == len(new)
    file.write_bytes(data[:at] + new + data[at + len(old) :])
    return folder


def rejected_by(held: gate.Gate, folder: Path) -> dict[str, dict]:
    """The lines of a folder that the gate rejects."""
    with pytest.raises(GateError) as caught:
        gate.check(held, folder, "gguf-q8_0", "gguf", "q8_0")
    assert "rejected" in caught.value.message and "reasons.json" in caught.value.hint
    return lines_of(caught.value.details["gate"])


def test_a_healthy_artefact_passes_and_says_what_was_measured(dist, eval_rows):
    artifact = load_artifact(dist / "gguf-q8_0", verify=True)
    entry = artifact.checks["gate"]
    found = lines_of(entry)
    assert entry["status"] == "passed" and entry["bits"] == 8
    for check in (
        "tokens",
        "template",
        "smoke",
        "kld own",
        "kld general",
        "kld code",
        "kld languages",
        "effect",
    ):
        assert found[check]["verdict"] == "PASS", found[check]
    assert found["tokens"]["n"] >= 40 and found["template"]["n"] == 8
    assert 0 < found["kld own"]["seen"] < found["kld own"]["limit"]
    assert "not better than base" in found["retention"]["why"], "random models get nothing right"
    assert artifact.seen_rows["select"] == sorted(row_hash(row) for row in load_rows(eval_rows))


def test_a_wrong_pre_tokenizer_fails_on_token_ids(dist, held, tmp_path):
    found = rejected_by(held, damaged(dist, tmp_path, b"smollm", b"gpt-4o"))
    assert found["tokens"]["verdict"] == "FAIL" and found["tokens"]["seen"] >= 1
    assert found["kld own"]["verdict"] == "PASS", "the weights are whole"


def test_a_changed_chat_template_fails(dist, held, tmp_path):
    found = rejected_by(held, damaged(dist, tmp_path, b"<|im_start|>assistant", b"<|im_start|>assistent"))
    assert found["template"]["verdict"] == "FAIL" and "assistent" in found["template"]["first"]
    assert found["tokens"]["verdict"] == "PASS"


def test_a_corrupted_tensor_fails_on_kld(dist, held, tmp_path):
    from edgeft.gguf_file import Tensors

    folder = tmp_path / "damaged"
    shutil.copytree(dist / "gguf-q8_0", folder)
    reader = Tensors(next(folder.glob("*.gguf")), "r+")
    tensor = next(t for t in reader.tensors if t.name == "token_embd.weight")
    tensor.data[...] = tensor.data[::-1].copy()
    reader.data.flush()
    del reader
    found = rejected_by(held, folder)
    assert found["kld own"]["verdict"] == "FAIL" and found["tokens"]["verdict"] == "PASS"


def test_a_file_that_does_not_load_fails(dist, held, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(dist / "gguf-q8_0", folder)
    file = next(folder.glob("*.gguf"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert rejected_by(held, folder)["load"]["verdict"] == "FAIL"


def test_the_base_in_place_of_the_merged_model_is_caught(held, tiny_models, tmp_path):
    """What an erased adapter looks like: a file that is perfect but for the adapter."""
    recipe = Recipe(out=tmp_path, formats=("gguf:q8_0",), name="tiny", no_gate=True, threads=1)
    made = compress(tiny_models["llama"], None, recipe)
    assert made[1].checks["gate"] == {"status": "skipped"}
    found = rejected_by(held, tmp_path / "gguf-q8_0")
    assert found["effect"]["verdict"] == "FAIL" and found["effect"]["seen"] == pytest.approx(1, abs=0.05)
    assert found["tokens"]["verdict"] == found["template"]["verdict"] == "PASS"


def test_others_are_made_when_one_is_rejected_and_a_standing_one_is_checked_again(
    dist, tiny_models, tiny_adapters, eval_rows, tmp_path
):
    """First skipped, then held to a limit that only one of two can keep."""
    out, model, adapter = tmp_path / "dist", tiny_models["llama"], tiny_adapters["llama"]
    shutil.copytree(dist / "merged", out / "merged")
    shutil.copytree(dist / ".work" / "gate", out / ".work" / "gate")  # what was measured of merged and base
    strict = {8: {"kld_other": 0.0}}
    first = compress(
        model, adapter, Recipe(out=out, formats=("gguf:q8_0",), name="tiny", no_gate=True, threads=1)
    )
    assert first[1].checks["gate"]["status"] == "skipped"
    with pytest.raises(GateError, match="gguf-q8_0 is rejected: kld") as caught:
        compress(
            model,
            adapter,
            Recipe(
                out=out,
                formats=("gguf:q8_0", "gguf:f16"),
                name="tiny",
                gate=strict,
                eval=eval_rows,
                threads=1,
            ),
        )
    assert caught.value.details["made"] == ["merged", "gguf-f16"]
    assert (
        not (out / "gguf-q8_0").exists() and not (out / ".rejected" / "gguf-q8_0" / "artifact.json").exists()
    )
    reasons = json.loads((out / ".rejected" / "gguf-q8_0" / "reasons.json").read_text())
    assert reasons["gate"]["status"] == "failed" and "above 0" in reasons["seen"]
    entry = load_artifact(out / "gguf-f16").checks["gate"]
    assert entry["status"] == "passed" and lines_of(entry)["kld own"]["seen"] < 1e-4


def test_verify_holds_until_one_byte_is_changed(dist, tmp_path):
    """Alone, as on a board: what artifact.json keeps of the source decides; with the merged model beside also KLD."""
    board = tmp_path / "board" / "gguf-q8_0"
    shutil.copytree(dist / "gguf-q8_0", board)
    done = edgeft("verify", board, "--json")
    assert done.returncode == 0, done.stderr
    found = lines_of(json.loads(done.stdout)[0])
    for check in ("files", "tensors", "tokens", "template", "smoke"):
        assert found[check]["verdict"] == "PASS"
    assert found["kld"]["verdict"] == "NOT RUN" and "not beside" in found["kld"]["why"]
    file = next(board.glob("*.gguf"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert_two_lines(edgeft("verify", board, "--quiet", "--json"), 1, "files", file.name)
    assert_two_lines(edgeft("verify", tmp_path / "nothing"), 2, "nothing", "edgeft compress")


def test_verify_finds_another_template_whose_hash_was_written_anew(dist, tmp_path):
    folder = damaged(dist, tmp_path, b"<|im_start|>assistant", b"<|im_start|>assistent")
    manifest = json.loads((folder / "artifact.json").read_text())
    manifest["files"] = list_files(folder, frozenset({"artifact.json"}))
    (folder / "artifact.json").write_text(json.dumps(manifest))
    from edgeft.compress.verify import verify

    found = verify([folder], threads=1)[0]
    assert found.status == "failed" and lines_of(found.to_dict())["template"]["verdict"] == "FAIL"


def test_verify_with_merged_and_rows_asks_again(dist, eval_rows):
    from edgeft.compress.verify import verify

    merged, quantized = (
        lines_of(v.to_dict()) for v in verify([dist / "merged", dist / "gguf-q8_0"], eval_rows, threads=1)
    )
    assert merged["tensors"]["verdict"] == merged["smoke"]["verdict"] == "PASS"
    assert quantized["kld own"]["verdict"] == quantized["kld code"]["verdict"] == "PASS"
    assert quantized["task drop"]["n"] == ROWS


def test_verify_says_what_this_box_lacks(dist, tmp_path):
    """A sitecustomize that hides the engine stands for a box without it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\n_find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'xllamacpp' else _find(name, *a)\n"
    )
    done = edgeft("verify", dist / "gguf-q8_0", "--quiet", "--json", PYTHONPATH=str(tmp_path))
    assert_two_lines(done, 3, "xllamacpp", "can't be run here")
    assert lines_of(json.loads(done.stdout)[0])["files"]["verdict"] == "PASS"


def test_rows_kept_aside_are_not_calibrated_on(tmp_path):
    rows = load_rows(DESK / "calibrate.jsonl")
    found = gate_rows.choose(None, DESK / "calibrate.jsonl", {}, False)
    assert 0.1 < len(found.rows) / len(rows) < 0.4
    file = gate_rows.calibration_file(found, DESK / "calibrate.jsonl", tmp_path)
    left = {row_hash(row) for row in load_rows(file)}
    assert not left & set(found.hashes) and left | set(found.hashes) == {row_hash(row) for row in rows}
    random.Random(0).shuffle(rows)
    again = gate_rows.choose(None, write_rows(tmp_path / "shuffled.jsonl", rows), {}, False)
    assert set(again.hashes) == set(found.hashes), "the split must not depend on the file's order"
    trained = gate_rows.choose(None, DESK / "calibrate.jsonl", {"train": found.hashes}, False)
    assert not trained.rows and trained.calibrating is None and "seen all" in trained.why_none
    with pytest.raises(UsageError, match="used to train"):
        gate_rows.choose(
            DESK / "select.jsonl", None, {"train": [row_hash(load_rows(DESK / "select.jsonl")[3])]}, False
        )
    with pytest.raises(UsageError, match="used to calibrate"):
        gate_rows.choose(DESK / "calibrate.jsonl", DESK / "calibrate.jsonl", {}, False)


@pytest.mark.parametrize("bits, levels", [(2, 4), (3, 8), (4, 16), (5, 32), (None, 0)])
def test_a_grid_is_seen_in_the_weights(tmp_path, bits, levels):
    """Each block of 32 rounded to so many levels between its extremes (as Q4_1 does), stored in bfloat16."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weights = {}
    for layer in range(4):
        blocks = torch.randn(64, 8, 32)
        if levels:
            low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
            step = (high - low) / (levels - 1)
            blocks = low + ((blocks - low) / step).round() * step
        weights[f"model.layers.{layer}.mlp.up_proj.weight"] = blocks.flatten(1).bfloat16()
    save_file(weights, tmp_path / "model.safetensors")
    found = grid.grid_of(tmp_path)
    assert (found["bits"] if found else None) == bits


def test_a_coarse_base_is_warned_of_beforehand(smollm2):
    from edgeft.compress import formats

    found = grid.grid_of(smollm2)
    assert found["bits"] == 4
    specs = [formats.parse(text) for text in ("gguf:q8_0", "gguf:q4_k_m", "gguf:q4_1")]
    assert grid.risky(found, specs) == ["gguf:q4_1", "gguf:q4_k_m"]
    assert "4-bit grid" in grid.warning(found, specs) and grid.warning(found, specs[:1]) is None


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data" / "adapters").is_dir(), reason="needs ../shared/data/adapters")
def test_the_adapter_that_q4_1_erases_is_rejected(tmp_path):
    """banking77 on the base that was dequantized from Q4_1: 68.3 % to 0.0 % with a file that looks perfect."""
    rows = edgeft("tune", "rows", SHARED / "data" / "banking77" / "dev.csv", "--label", "category", "--system",
                  "Classify the banking query. Answer with the intent label only.", "--out", tmp_path / "rows")  # fmt: skip
    assert rows.returncode == 0, rows.stderr
    out = tmp_path / "dist"
    done = edgeft("compress", "smollm2-135m-instruct", "--adapter", SHARED / "data" / "adapters" / "smollm2-135m-banking77",
                  "--to", "gguf:q4_1", "--eval", tmp_path / "rows" / "select.jsonl", "--eval-limit", "10",
                  "--out", out)  # fmt: skip
    assert done.returncode == 1
    assert "gguf-q4_1 is rejected: retention" in done.stderr and "4-bit grid" in done.stderr
    reasons = json.loads((out / ".rejected" / "gguf-q4_1" / "reasons.json").read_text())
    found = lines_of(reasons["gate"])
    assert found["retention"]["artefact"] == 0.0 < 0.4 < found["retention"]["merged"]
    assert found["effect"]["verdict"] == "FAIL" and found["tokens"]["verdict"] == "PASS"
    assert not (out / "gguf-q4_1").exists()
