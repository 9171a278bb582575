"""What `--fit`, the gate and `--merge-base auto` will take is known before they work; so is what is wrong with the inputs.

The models here are headers over empty files: nothing of them is ever loaded.
"""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from edgeft.compress import Recipe, check_costs, costs, fit_advice, gate_limits, preflight, prepare
from edgeft.compress.fit_choice import Wanted, choose
from edgeft.compress.formats import Spec
from edgeft.compress.merge import plan
from edgeft.errors import EnvironmentFault, UsageError
from tests.conftest import DESK, write_rows

WIDTH, LAYERS, VOCABULARY = 2048, 6, 4000
SIZE = 40_000_000


def sparse(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A bfloat16 safetensors file whose weights are a hole."""
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + at)


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """(base of 58M parameters, [its adapter], rows to calibrate on, rows to choose on)."""
    home = tmp_path_factory.mktemp("paper")
    base, adapter = home / "base", home / "adapter"
    base.mkdir()
    adapter.mkdir()
    shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (WIDTH, WIDTH)
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = (WIDTH, WIDTH)
    sparse(base / "model.safetensors", shapes)
    (base / "config.json").write_text(
        json.dumps({"model_type": "llama", "vocab_size": VOCABULARY, "tie_word_embeddings": True})
    )
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    low_rank = {f"{layer}.lora_A.weight": (4, WIDTH), f"{layer}.lora_B.weight": (WIDTH, 4)}
    sparse(adapter / "adapter_model.safetensors", low_rank)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    rows = [
        write_rows(
            home / f"{name}.jsonl",
            [json.loads(s) for s in (DESK / f"{name}.jsonl").read_text().splitlines()[:24]],
        )
        for name in ("calibrate", "select")
    ]
    return base, [(adapter, 1.0)], *rows


@pytest.fixture
def recipe(paper, tmp_path):
    return Recipe(out=tmp_path / "dist", formats=(), calibration=paper[2], eval=paper[3], name="paper")


needs_gguf = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf", "torch", "xllamacpp")),
    reason="needs the extras: compress, gguf",
)


def needed(seen: preflight.Forecast, *names: str) -> int:
    return max(step.need_bytes for step in seen.steps if step.name in names)


GATE = (check_costs.REFERENCE, check_costs.COMPARE, check_costs.ANSWERS)


@needs_gguf
def test_a_gate_that_does_not_fit_is_refused_before_the_work(paper, recipe, monkeypatch):
    """Merging and quantizing fit, the merged model in float32 does not."""
    from edgeft.compress import compress

    base, adapters, _, _ = paper
    recipe = replace(recipe, formats=("gguf:q8_0",))
    seen = prepare(base, adapters, recipe).forecast
    assert [s.name for s in seen.steps] == [costs.MERGE, costs.PROOF, costs.CONVERT, *GATE]
    gate = needed(seen, *GATE)
    assert gate > 4 * 58_000_000
    without = prepare(base, adapters, replace(recipe, no_gate=True)).forecast
    assert not {s.name for s in without.steps} & set(GATE)
    assert without.need_disk_bytes < seen.need_disk_bytes, "log-probabilities take room as well"
    free = needed(seen, costs.MERGE, costs.CONVERT) + 1
    assert free < needed(seen, check_costs.REFERENCE), "or this test shows nothing"
    monkeypatch.setattr(preflight, "free_ram_bytes", lambda: free)
    with pytest.raises(EnvironmentFault, match=r"the gate needs about 0\.6 GB of memory") as error:
        compress(base, adapters, recipe)
    assert "--no-gate needs about 0.4 GB" in error.value.hint
    assert not recipe.out.exists()
    preflight.refuse(replace(without, free_ram_bytes=free), recipe.out)
    preflight.refuse(replace(seen, free_ram_bytes=free), recipe.out, checks=False)  # as `edgeft rebuild` runs


def test_what_the_gate_has_measured_is_not_measured_again(paper, recipe):
    """A standing artefact that was checked costs nothing; one made with --no-gate is still to be checked."""
    base, adapters, _, _ = paper
    planned, spec = plan(base, adapters), Spec("gguf", "q8_0")
    made_from = {"adapters": [1]}

    def gated(checks: dict) -> bool:
        folder = recipe.out / spec.id
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "artifact.json").write_text(json.dumps({"made_from": made_from, "checks": checks}))
        seen = preflight.forecast(planned, [spec], recipe, made_from)
        assert seen.standing == [spec.id]
        return any(s.name in GATE for s in seen.steps)

    assert gated({"gate": {"status": "skipped"}})
    assert not gated({"gate": {"status": "passed", "checks": []}})


def test_merge_base_auto_is_three_merges_and_three_scorings(paper, recipe):
    base, adapters, _, _ = paper
    planned, made_from = plan(base, adapters), {"adapters": [1]}
    plain = preflight.forecast(planned, [], recipe, made_from)
    auto = preflight.forecast(planned, [], replace(recipe, merge_base="auto"), made_from)
    assert [s.name for s in auto.steps] == [
        costs.MERGE, "scoring the merge base 16bit",
        costs.MERGE, "scoring the merge base dequantized",
        costs.MERGE, "scoring the merge base dequantized-double", costs.PROOF,
    ]  # fmt: skip
    assert auto.need_disk_bytes == 3 * plain.disk_bytes["merged"] == 3 * plain.need_disk_bytes
    # One merge stands there when formats are made, so they may use the room of the other two.
    specs = [Spec("gguf", "q8_0")]
    both = preflight.forecast(planned, specs, replace(recipe, merge_base="auto", no_gate=True), made_from)
    assert both.need_disk_bytes == auto.need_disk_bytes
    free = needed(plain, costs.MERGE) + 1
    with pytest.raises(
        EnvironmentFault, match=r"--merge-base 16bit needs about 0\.\d GB of memory \(scor"
    ) as error:
        preflight.refuse(replace(auto, free_ram_bytes=free), recipe.out)
    assert error.value.hint.startswith("--merge-base 16bit needs about")
    with pytest.raises(EnvironmentFault) as error:
        preflight.refuse(replace(auto, free_disk_bytes=auto.need_disk_bytes - 1), recipe.out)
    assert "--merge-base 16bit makes no copies" in error.value.hint


def test_a_merge_into_another_base_does_not_stand(paper, recipe):
    (recipe.out / "merged").mkdir(parents=True)
    made_from = {"adapters": [1]}
    manifest = {"made_from": made_from, "asked": {"merge_base": "16bit"}}
    (recipe.out / "merged" / "artifact.json").write_text(json.dumps(manifest))
    planned = plan(*paper[:2])
    assert preflight.forecast(planned, [], recipe, made_from).standing == ["merged"]
    assert preflight.forecast(planned, [], replace(recipe, merge_base="auto"), made_from).standing == []


@needs_gguf
def test_fit_is_refused_for_memory_before_it_merges(paper, recipe, monkeypatch):
    from edgeft.compress import fit, fit_before

    base, adapters, _, _ = paper
    monkeypatch.setattr(fit_before, "OTHER_FORMATS", ())
    seen, _ = fit_before.foresee(base, adapters, recipe, Wanted(SIZE))
    names = [s.name for s in seen.steps]
    assert names.index(costs.MERGE) < names.index(check_costs.SCORES) < names.index(costs.QUANTIZE)
    assert names.count(costs.QUANTIZE) == 2 and set(GATE) < set(names), "two candidates, then the gate"
    assert seen.disk_bytes[next(k for k in seen.disk_bytes if "types" in k)] == SIZE
    scores = needed(seen, check_costs.SCORES)
    assert scores == max(s.need_bytes for s in seen.steps)
    monkeypatch.setattr(preflight, "free_ram_bytes", lambda: scores - 1)
    with pytest.raises(EnvironmentFault, match=rf"--fit needs about {scores / 1e9:.1f} GB") as error:
        fit.fit(base, adapters, recipe, Wanted(SIZE))
    assert error.value.hint.startswith("--to gguf:q4_k_m needs about")
    assert not recipe.out.exists()


@needs_gguf
def test_fit_dry_run_prints_the_table_and_writes_nothing(paper, recipe, capsys):
    from edgeft.cli.compress import command

    base, ((adapter, _),), calibration, select = paper
    words = [base, "--adapter", adapter, "--calibration", calibration, "--eval", select, "--out", recipe.out]
    command.main([*map(str, words), "--fit", "40MB", "--dry-run"], standalone_mode=False)
    printed = capsys.readouterr().out
    for said in ("merging", check_costs.SCORES, "gguf:", "types=", check_costs.REFERENCE):
        assert said in printed
    assert not recipe.out.exists()


@pytest.mark.parametrize("size", ["", "0", "0MB"])
def test_no_size_is_no_plain_compress(size, paper, tmp_path):
    from edgeft.cli.compress import command

    words = [str(paper[0]), "--fit", size, "--out", str(tmp_path / "dist")]
    with pytest.raises(UsageError, match=f"takes a size, and '{size}' is none") as error:
        command.main(words, standalone_mode=False)
    assert error.value.hint and not (tmp_path / "dist").exists()


@needs_gguf
def test_wrong_inputs_are_found_before_the_work(paper, recipe, tmp_path, monkeypatch):
    """Each of these came up after a merge, or after an hour of scoring."""
    from edgeft import profiles
    from edgeft.compress import fit, gate

    base, adapters, calibration, select = paper
    monkeypatch.setattr(fit, "compress", lambda *_, **__: pytest.fail("it began to work"))
    rows = [{**json.loads(line), "task": "json_schema"} for line in select.read_text().splitlines()]
    unscored = write_rows(tmp_path / "unscored.jsonl", rows)  # there is no schema
    few = write_rows(tmp_path / "few.jsonl", rows[:1])

    def said(wanted: Wanted, adapters=adapters, **changes) -> str:
        with pytest.raises((UsageError, EnvironmentFault)) as error:
            fit.fit(base, adapters, replace(recipe, **changes), wanted)
        assert error.value.hint and not recipe.out.exists()
        return error.value.message

    assert "Did you mean 'gguf:q8_0'" in said(Wanted(SIZE), formats=("gguf:q8_o",))
    assert "calibrat" in said(Wanted(SIZE), eval=calibration)
    assert "too small" in said(Wanted(SIZE), eval=few)
    assert "the half of" in said(Wanted(SIZE, min_retention=0.9), eval=unscored)
    assert "adapter" in said(Wanted(SIZE, min_retention=0.9), adapters=[])
    assert "profile" in said(Wanted(SIZE, profile="raspberry-pi-51"))
    bare = replace(
        profiles.get_profile("raspberry-pi-5-8gb"), bandwidth_gb_per_s=None, bandwidth_measured_gb_per_s=None
    )
    monkeypatch.setattr(profiles, "get_profile", lambda _: bare)
    assert "no bandwidth" in said(Wanted(SIZE, profile="bare"))

    def missing(name: str):
        raise EnvironmentFault(f"the engine {name} is not installed.", "pip install it")

    monkeypatch.setattr(gate, "engine_module", missing)
    assert "the gate runs what is made: the engine gguf is not installed" in said(Wanted(SIZE))


FRONTIER = [
    {"size_bytes": 10_000_000 * n, "bits_per_weight": n, "estimated_kl_nats": 1.6 / 4**n} for n in range(2, 9)
]


def row(name: str, size: int, retention: float | None, speed: float, kld: float | None = 0.1) -> dict:
    return {"id": name, "size_bytes": size, "retention": retention, "tok_per_s": speed, "kld_nats": kld}


def advice(rows: list[dict], wanted: Wanted) -> str:
    assert choose(rows, wanted) is None
    return fit_advice.nothing_holds(rows, wanted, FRONTIER, gate_limits.load())[1]


def test_where_retention_is_too_low_a_size_is_named():
    """0.8 at 40 MB: 0.95 takes a quarter of the change, so a sixteenth of the KL, which is two points on."""
    rows = [row("gguf-q4", 40_000_000, 0.8, 10), row("onnx-int4", 39_000_000, 0.7, 10)]
    wanted = Wanted(40_000_000, min_retention=0.95)
    assert advice(rows, wanted) == "--fit 60.0MB (by the estimate) or --min-retention 0.800"
    assert "--fit" not in advice(rows, Wanted(40_000_000, min_retention=1.0)), "no size promises that"


def test_where_it_is_too_slow_a_smaller_size_is_named():
    rows = [row("gguf-q4", 40_000_000, None, 12.37)]
    told = advice(rows, Wanted(40_000_000, min_tok_per_s=20))
    assert told == "--fit 20.0MB (by the estimate) or --min-tps 12.3, or a faster box"
    assert choose(rows, Wanted(40_000_000, min_tok_per_s=12.3)), "what is named holds"


def test_neither_advice_takes_the_others_place():
    rows = [row("gguf-a", 40_000_000, 0.8, 30), row("gguf-b", 38_000_000, 0.97, 10)]
    told = advice(rows, Wanted(40_000_000, min_retention=0.95, min_tok_per_s=20))
    assert "--min-retention 0.800" in told and "--min-tps 10.0" in told
    rows = [row("gguf-a", 40_000_000, 0.8, 10)]  # neither alone would do
    told = advice(rows, Wanted(40_000_000, min_retention=0.95, min_tok_per_s=20))
    assert told == "--min-retention 0.800 with --min-tps 10.0", "larger is slower: no size is named"


def test_where_nothing_was_measured_no_size_is_promised():
    rows = [row("gguf-a", 40_000_000, None, 10)]
    told = advice(rows, Wanted(40_000_000, min_retention=0.95))
    assert (
        told.startswith("--eval rows on which")
        and "leave out --min-retention" in told
        and "--fit" not in told
    )
    rows = [row("gguf-a", 40_000_000, None, 10, kld=None)]
    assert "--eval with shorter rows" in advice(rows, Wanted(40_000_000))


def test_where_all_are_rejected_a_size_within_the_gates_limit_is_named():
    told = advice([], Wanted(25_000_000))
    assert "reasons.json" in told and "--fit 30.0MB" in told
    tight = {bits: {**limits, "kld": 1e-9} for bits, limits in gate_limits.load().items()}
    assert "--fit" not in fit_advice.nothing_holds([], Wanted(25_000_000), FRONTIER, tight)[1]


def test_the_frontier_is_thinned_to_ten_lines():
    from edgeft.cli.fit import thinned

    assert thinned(list(range(46))) == [0, 5, 10, 15, 20, 25, 30, 35, 40, 45] and thinned([1, 2]) == [1, 2]
