"""What the work will take is said before it begins, refused where it can't be had, and recorded beside what was seen."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from edgeft.compress import Recipe, check_costs, compress, costs, preflight, prepare
from edgeft.compress.formats import FORMATS, Spec, module_of
from edgeft.compress.merge import plan
from edgeft.errors import EnvironmentFault
from edgeft.types import Artifact
from tests.test_cli import edgeft

pytest.importorskip("llama_cpp", reason="needs the extra: compress")
BOX = costs.Box(gflops=139.0, python_s=0.0056, write_gb_per_s=0.4)
TINY_PARAMETERS = 13_763_840


@pytest.fixture
def shape(tiny_models, tiny_adapters, rows_file):
    """The tiny Llama's sizes with its adapter and twenty rows."""
    return costs.shape_of(plan(tiny_models["llama"], [(tiny_adapters["llama"], 1.0)]), True, rows_file)


def prepared(model: Path, out: Path, *formats: str, calibration: Path | None = None) -> preflight.Forecast:
    return prepare(model, None, Recipe(out=out, formats=formats, calibration=calibration)).forecast


def test_sizes_are_read_from_headers(shape):
    assert shape.parameters == TINY_PARAMETERS and shape.stored_bytes == 4 * TINY_PARAMETERS
    assert shape.tied and shape.table == shape.largest == 49152 * 256 and shape.type == "F32"
    assert shape.largest_changed == 512 * 256 and not shape.narrow and not shape.narrow_ends
    assert shape.tokens > 20 * shape.longest_tokens / 4 > 0


def test_wide_and_narrow_rows_are_told_apart(smollm2):
    """SmolLM2's width of 576 is no multiple of 256: its K-quants are larger, and so is what is predicted."""
    narrow = costs.shape_of(plan(smollm2), False, None)
    assert narrow.narrow_ends and 0.5 < narrow.narrow / narrow.parameters < 0.7
    wide = replace(narrow, narrow=0, narrow_ends=False)
    spec = Spec("gguf", "q4_k_m")
    assert costs.artifact_bytes(spec, narrow) > 1.1 * costs.artifact_bytes(spec, wide)
    assert costs.artifact_bytes(spec, narrow) == pytest.approx(
        105.5e6, rel=0.05
    )  # as it was seen to come out


@pytest.mark.parametrize("name", FORMATS)
def test_every_variant_has_a_prediction(shape, name):
    """Grows with the model; a format that is not known yet has none and stops nothing."""
    shape = replace(shape, adapter_parameters=shape.parameters // 100)
    larger = replace(shape, adapter_parameters=shape.parameters // 10, parameters=10 * shape.parameters, stored_bytes=10 * shape.stored_bytes,
                     table=10 * shape.table, largest=10 * shape.largest, widest=4 * shape.widest)  # fmt: skip
    for variant in module_of(name).VARIANTS:
        spec = Spec(name, variant)
        small, large = (costs.format_steps(spec, s, BOX) for s in (shape, larger))
        assert small and all(a.need_bytes < b.need_bytes for a, b in zip(small, large, strict=True))
        assert 0 < costs.artifact_bytes(spec, shape) < costs.artifact_bytes(spec, larger)
    assert costs.format_steps(Spec("tomorrow", "w2"), shape, BOX) == []


def test_a_slower_box_is_said_to_take_longer(shape):
    """What grows with the model grows with the box's slowness; starting Python goes by how fast it runs a loop."""
    large = replace(shape, parameters=1_000_000_000)
    spec = Spec("gguf", "q4_k_m")
    fast, slow = (
        costs.format_steps(spec, large, costs.Box(g, 0.0056, 1.0))[-1].wall_s for g in (100.0, 10.0)
    )
    assert slow > 5 * fast


def test_probe_measures_and_leaves_nothing(tmp_path):
    box = costs.probe(tmp_path / "not" / "there")
    assert box.gflops > 0.1 and box.write_gb_per_s > 0
    assert not list(tmp_path.iterdir())


def test_too_little_memory_names_the_number_and_what_would_fit(tiny_models, tmp_path, rows_file, monkeypatch):
    pytest.importorskip("gptqmodel", reason="needs the extra: gptq")
    wanted = prepared(tiny_models["llama"], tmp_path / "dist", "gptq:4", calibration=rows_file)
    need = max(s.need_bytes for s in wanted.steps)
    free = max(s.need_bytes for s in wanted.steps if s.artifact == "merged")
    free = max(free, wanted.offers["gguf:q8_0"]) + 1
    assert free < need, "or this test shows nothing"
    monkeypatch.setattr(preflight, "free_ram_bytes", lambda: free)
    with pytest.raises(EnvironmentFault) as caught:
        compress(
            tiny_models["llama"],
            None,
            Recipe(out=tmp_path / "dist", formats=("gptq:4",), calibration=rows_file),
        )
    assert f"gptq:4 needs about {need / 1e9:.1f} GB" in caught.value.message
    assert f"{free / 1e9:.1f} GB are free" in caught.value.message and "--to gguf:q8_0" in caught.value.hint
    assert not (tmp_path / "dist").exists()


def test_memory_for_the_merge_itself_has_no_smaller_format(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "free_ram_bytes", lambda: 1_000_000)
    with pytest.raises(EnvironmentFault, match=r"merging needs about 0\.2 GB"):
        compress(tiny_models["llama"], None, Recipe(out=tmp_path / "dist", formats=("gguf:f16",)))


def test_too_little_disk_names_what_to_leave_out(tiny_models, tmp_path, monkeypatch):
    wanted = prepared(tiny_models["llama"], tmp_path / "dist", "gguf:f32", "gguf:q8_0")
    usage = namedtuple("usage", "total used free")
    free = wanted.need_disk_bytes - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free, 0, free))
    with pytest.raises(EnvironmentFault, match="needs about") as caught:
        compress(tiny_models["llama"], None, Recipe(out=tmp_path / "dist", formats=("gguf:f32", "gguf:q8_0")))
    assert "leave out gguf-f32" in caught.value.hint


def test_a_control_groups_limit_counts(monkeypatch):
    """The smaller of what the system has and what the group leaves."""
    texts = {"/sys/fs/cgroup/memory.max": "3000000", "/sys/fs/cgroup/memory.current": "1000000"}

    def read(self: Path, *_a, **_k) -> str:
        if str(self) in texts:
            return texts[str(self)]
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", read)
    assert preflight.free_ram_bytes() == 2_000_000
    texts["/sys/fs/cgroup/memory.max"] = "max"
    assert preflight.free_ram_bytes() > 2_000_000


def test_what_stands_there_needs_no_room(tiny_dist, monkeypatch):
    """A finished folder on a full disk: the same command has nothing to do and is not refused."""
    recipe = Recipe(out=tiny_dist / "dist", formats=("gguf:f16",), calibration=tiny_dist / "rows.jsonl",
                    name="tiny", threads=1, no_gate=True)  # fmt: skip
    seen = prepare(tiny_dist / "base", tiny_dist / "adapter", recipe).forecast
    assert seen.standing == ["merged", "gguf-f16"] and seen.need_disk_bytes == 0
    monkeypatch.setattr(preflight, "free_ram_bytes", lambda: 1)
    monkeypatch.setattr(preflight, "free_disk_bytes", lambda _: 1)
    assert [a.id for a in compress(tiny_dist / "base", tiny_dist / "adapter", recipe)] == [
        "merged",
        "gguf-f16",
    ]


def test_dry_run_prints_the_table_and_writes_nothing(tiny_models, tmp_path):
    out = tmp_path / "dist"
    done = edgeft("compress", tiny_models["llama"], "--to", "gguf:q8_0", "--out", out, "--dry-run")
    assert done.returncode == 0 and not out.exists()
    assert "llama.cpp's converter" in done.stdout and "are free" in done.stderr
    seen = json.loads(
        edgeft(
            "compress", tiny_models["llama"], "--to", "gguf:q8_0", "--out", out, "--dry-run", "--json"
        ).stdout
    )
    assert [s["name"] for s in seen["steps"]] == [
        costs.MERGE,
        costs.CONVERT,
        check_costs.REFERENCE,
        check_costs.COMPARE,
    ]
    assert seen["need_disk_bytes"] == sum(seen["disk_bytes"].values())


UNFORESEEN = ("reading the ONNX file", "setting accuracy_level")  # a fraction of a second each


def test_predictions_stand_beside_what_was_seen(tiny_dist):
    """Every step of a real run has its prediction; with the CPU build of torch, anonymous memory within 25 %.

    Pages that mirror files stand in the record beside it, but a kernel may map more of a library's file than was read.
    """
    torch = pytest.importorskip("torch")
    off = []
    for name in ("merged", "gguf-f16", "gguf-q4_k_m", "onnx-int8"):
        artifact = Artifact.load(tiny_dist / "dist" / name / "artifact.json")
        foreseen = artifact.cost["predicted"]
        assert foreseen["peak_rss_bytes"] > 0 and foreseen["wall_s"] > 0
        assert artifact.size_bytes == pytest.approx(foreseen["size_bytes"], rel=0.25)
        for step in artifact.steps:
            if step["name"] not in UNFORESEEN:
                assert step["predicted"]["peak_rss_bytes"] > step["predicted"]["peak_anon_bytes"]
                ratio = step["predicted"]["peak_anon_bytes"] / step["peak_anon_bytes"]
                off += [(name, step["name"], ratio)] if not 0.75 < ratio < 1.25 else []
    if "+cpu" in torch.__version__:
        assert not off
