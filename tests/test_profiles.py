"""Profiles: what the loader takes and refuses, and what detecting finds on this box."""

import json
import os
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from edgeft import child
from edgeft.cli import run
from edgeft.console import output
from edgeft.errors import EnvironmentFault, UsageError
from edgeft.profiles import detect, from_detected, gemm, get_profile, load_profiles
from edgeft.profiles.detection import as_profile, gpu_facts
from edgeft.profiles.loader import BASES, FIGURES, GEMM, check
from edgeft.profiles.probes import read_bandwidth

GOOD = {
    "id": "mine", "name": "Mine", "kind": "cpu", "ram_gb": 16, "bandwidth_gb_per_s": 40.5,
    "price_usd": [100, 150],
    "basis": {"ram_gb": "published"}, "as_of": "2026-11", "source": "the invoice",
}  # fmt: skip
IN_THE_RESEARCH_TABLE = [
    "raspberry-pi-5-8gb",
    "raspberry-pi-5-16gb",
    "intel-n100",
    "jetson-orin-nano-super",
    "jetson-agx-orin",
    "ryzen-8845hs-mini",
    "ryzen-ai-max-395",
    "dgx-spark",
    "mac-mini-m4",
    "mac-mini-m4-pro",
    "mac-studio-m4-max",
    "rtx-4060",
    "rtx-4090",
    "rtx-5090",
    "l4",
    "l40s",
    "a100-80",
    "h100-sxm",
    "h200-sxm",
]


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFT_HOME", str(tmp_path))
    monkeypatch.setattr(output, "json", False)
    return tmp_path


def write_own(home: Path, name: str, value: object) -> Path:
    folder = home / "profiles"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(value))
    return path


def test_every_packaged_profile_loads_and_marks_each_figure():
    profiles = load_profiles()
    assert set(IN_THE_RESEARCH_TABLE) <= set(profiles)
    for path in (Path(__file__).parent.parent / "profiles" / "boxes").glob("*.yaml"):
        written = yaml.safe_load(path.read_text())
        assert written["id"] == path.stem
        assert written["as_of"] and written["source"]
        figures = {key for key in (*FIGURES, "price_usd") if key in written}
        assert set(written["basis"]) == figures, path  # nothing unmarked, even by default
        assert set(written["basis"].values()) <= set(BASES)
    for p in profiles.values():
        memory = p.vram_gb if p.kind == "gpu" else p.ram_gb
        assert memory and p.limits["memory_budget_gb"] < memory
        assert p.power_idle_w < p.power_load_w <= p.limits["watts"]
        assert p.limits["tpot_s"] * p.limits["decode_tok_per_s"] == pytest.approx(1)


def test_figures_of_the_research_table():
    assert get_profile("h100-sxm").bandwidth_gb_per_s == 3360
    assert get_profile("rtx-5090").price_usd == (1999, 5000)
    assert get_profile("raspberry-pi-5-8gb").basis["bandwidth_gb_per_s"] == "estimate"
    assert get_profile("l40s").gemm_int8_gop_per_s == 733_000
    assert get_profile("intel-n100").gemm_int8_gop_per_s is None


def test_usable_bandwidth_is_the_measured_one_where_there_is_one():
    ryzen = get_profile("ryzen-8845hs-mini")
    assert (ryzen.bandwidth_gb_per_s, ryzen.usable_bandwidth_gb_per_s) == (89.6, 83)
    assert get_profile("l4").usable_bandwidth_gb_per_s == 300
    without = {key: value for key, value in GOOD.items() if key != "bandwidth_gb_per_s"}
    assert check(without, "here.yaml").usable_bandwidth_gb_per_s is None


@pytest.mark.parametrize(
    ("change", "seen", "hint"),
    [
        (
            {"bandwith_gb_per_s": 3},
            "'bandwith_gb_per_s' is not known. Did you mean 'bandwidth_gb_per_s'?",
            "edit here",
        ),
        ({"limits": {"ttft": 3}}, "Did you mean 'ttft_s'?", "edit here"),
        ({"limits": {"watt": 3}}, "Did you mean 'watts'?", "edit here"),
        ({"limits": {"tpot_ms": 3}}, "Did you mean 'tpot_s'?", "edit here"),
        ({"gemm_int8_gflop_per_s": 3}, "Did you mean 'gemm_int8_gop_per_s'?", "edit here"),
        ({"basis": {"ram": "estimate"}}, "Did you mean 'ram_gb'?", "edit here"),
        ({"basis": {"ram_gb": "publishd"}}, "Did you mean 'published'?", "edit 'basis'"),
        ({"basis": {"vram_gb": "estimate"}}, "has a basis for 'vram_gb' and no 'vram_gb'", "add 'vram_gb"),
        ({"kind": "gpus"}, "Did you mean 'gpu'?", "edit 'kind'"),
        ({"ram_gb": "16 GB"}, "the str '16 GB', and a number", "'ram_gb: 16'"),
        ({"ram_gb": True}, "the bool True, and a number", "edit 'ram_gb'"),
        ({"ram_gb": -1}, "the int -1", "edit 'ram_gb'"),
        ({"ram_gb": float("nan")}, "the float nan", "edit 'ram_gb'"),
        ({"price_usd": 100}, "a range [low, high] is needed", "[200, 250]"),
        ({"price_usd": [150, 100]}, "[150, 100], whose low end is above", "[100, 150]"),
        ({"price_usd": [1, 2, 3]}, "a range [low, high] is needed", "edit 'price_usd'"),
        ({"source": None}, "has no 'source'", "add 'source"),
        ({"name": ["a"]}, "the list ['a'], and a text is needed", "edit 'name'"),
    ],
)
def test_the_loader_refuses(change, seen, hint):
    with pytest.raises(UsageError) as caught:
        check({**GOOD, **change}, "here.yaml")
    assert seen in caught.value.message
    assert hint in caught.value.hint


def test_what_is_not_given_is_none_and_unmarked_figures_are_estimates():
    p = check(GOOD, "here.yaml")
    assert p.power_idle_w is None and p.vram_gb is None
    assert p.basis == {"ram_gb": "published", "bandwidth_gb_per_s": "estimate", "price_usd": "estimate"}
    measured = check({**GOOD, "bandwidth_measured_gb_per_s": 30}, "here.yaml")
    assert measured.basis["bandwidth_measured_gb_per_s"] == "measured"


def test_own_profile_is_found_and_takes_the_place_of_a_packaged_one(own_home):
    write_own(own_home, "a", GOOD)
    path = write_own(own_home, "b", {**GOOD, "id": "l4", "ram_gb": 99})
    assert get_profile("mine").bandwidth_gb_per_s == 40.5
    assert get_profile("l4").ram_gb == 99 and get_profile("l4").origin == str(path)


def test_two_own_files_with_one_id(own_home):
    write_own(own_home, "a", GOOD)
    write_own(own_home, "b", GOOD)
    with pytest.raises(UsageError, match=r"'mine' stands in .*a\.yaml and in .*b\.yaml"):
        load_profiles()


def test_broken_yaml_is_named(own_home):
    write_own(own_home, "a", GOOD).write_text("id: [")
    with pytest.raises(UsageError, match=r"a\.yaml is not valid YAML"):
        load_profiles()


def test_unknown_profile_on_the_command_line(capfd):
    assert run(["profiles", "show", "rpi-5-8gb"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "Error: the profile 'rpi-5-8gb' is not known. Did you mean 'raspberry-pi-5-8gb'?",
        "  edgeft profiles list",
    ]


def test_list_and_show_as_json(capfd):
    assert run(["profiles", "list", "--json"]) == 0
    assert {p["id"] for p in json.loads(capfd.readouterr().out)} >= set(IN_THE_RESEARCH_TABLE)
    assert run(["profiles", "show", "l4", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["bandwidth_gb_per_s"] == 300


def test_show_has_the_measured_figure_beside_the_published_one(capfd):
    assert run(["profiles", "show", "ryzen-ai-max-395"]) == 0
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert ["bandwidth_gb_per_s", "256", "published"] in lines
    assert ["bandwidth_measured_gb_per_s", "212", "measured"] in lines


def test_detect_without_measuring_is_quick_and_says_what_is_missing():
    box = detect(measure=False)
    for key in ("bandwidth_gb_per_s", *GEMM):
        assert box[key] is None and "not asked for" in box["reasons"][key]
    assert 1 <= box["cpu"]["usable_cores"] <= box["cpu"]["logical_cores"]
    assert box["memory"]["available_bytes"] <= box["memory"]["total_bytes"]
    assert box["disk"]["free_bytes"] > 0
    for path in ("cpu.governor", "cpu.isa", "cpu.model", "gpu", "virtualized", "throttling", "thermal_c"):
        value = box
        for key in path.split("."):
            value = value[key]
        assert (value is None) == (path in box["reasons"]), path
    assert detect(measure=False)["id"] == box["id"]


def test_measured_figures_are_possible_ones():
    cache = detect(measure=False)["cpu"]["last_level_cache_bytes"]
    bandwidth = read_bandwidth(len(os.sched_getaffinity(0)), cache, None, budget_s=0.3)
    assert 0.5 < bandwidth["gb_per_s"] < 5000
    assert bandwidth["gb_per_s"] == max(bandwidth["kernels_gb_per_s"].values())
    assert 0.5 < gemm.numpy_rates(budget_s=0.2)["gemm_f32_gflop_per_s"]["rate"] < 100_000


def test_every_precision_has_a_rate_or_a_reason_and_the_caller_imports_no_runtime():
    loaded = {name for name in gemm.RUNTIMES if name in sys.modules}
    found = gemm.gemm_rates(len(os.sched_getaffinity(0)), budget_s=0.05)
    assert list(found) == list(GEMM)
    for key, one in found.items():
        assert (one["rate"] is None) == (one["method"] is None) == (one["reason"] is not None), key
        assert one["rate"] is None or 0 < one["rate"] < 1e7
        assert one["method"] is None or GEMM[key] in one["method"]
    assert {name for name in gemm.RUNTIMES if name in sys.modules} == loaded


def test_without_a_runtime_the_reason_names_it(monkeypatch):
    monkeypatch.setattr(gemm, "find_spec", lambda package: None)
    found = gemm.gemm_rates(1, budget_s=0.01)
    assert found["gemm_f32_gflop_per_s"]["rate"] > 0
    assert found["gemm_int8_gop_per_s"]["rate"] is None
    assert found["gemm_int8_gop_per_s"]["reason"] == "torch is not installed; onnxruntime is not installed"


def test_a_runtime_that_breaks_leaves_the_others_and_a_reason(monkeypatch):
    monkeypatch.setattr(gemm, "RUNTIMES", {"nothing": 20.0})
    monkeypatch.setattr(gemm, "find_spec", lambda package: package)
    found = gemm.gemm_rates(1, budget_s=0.01)
    assert found["gemm_f32_gflop_per_s"]["rate"] > 0
    assert "multiplying matrices with nothing failed" in found["gemm_bf16_gflop_per_s"]["reason"]


def test_the_fastest_runtime_stands():
    slow, fast = ({"rate": r, "method": str(r), "reason": None} for r in (1.0, 2.0))
    none = {"rate": None, "method": None, "reason": "no kernel"}
    assert gemm.best_of([slow, none, fast], ["broken"]) == fast
    assert gemm.best_of([none], ["broken"])["reason"] == "no kernel; broken"


@pytest.mark.parametrize(
    ("gop_per_s", "budget_s", "expected"),
    [
        (lambda n: n, 0.8, (2048, 2048)),  # 17 GOP at 2 TOP/s: all sizes fit
        (lambda n: 0.1, 0.3, (0.1, 256)),  # one pass is over the budget, and it counts
        (
            lambda n: 100 - n / 256 if n < 1024 else 1e6,
            0.04,
            (99, 256),
        ),  # by what it did so far 1024 does not fit
    ],
)
def test_matrices_grow_while_they_fit_the_budget(monkeypatch, gop_per_s, budget_s, expected):
    clock = {"s": 0.0}
    monkeypatch.setattr(gemm, "time", SimpleNamespace(perf_counter=lambda: clock["s"]))

    def multiplier(n):
        def multiply():
            clock["s"] += 2 * n**3 / 1e9 / gop_per_s(n)

        return multiply

    rate, n = gemm.best_rate(multiplier, budget_s)
    assert rate == pytest.approx(expected[0])
    assert n == expected[1]


def test_one_pass_that_nothing_confirms_does_not_count(monkeypatch):
    clock, spans = {"s": 0.0}, iter([1.0, 0.001, 0.5, *[1.0] * 100])
    monkeypatch.setattr(gemm, "time", SimpleNamespace(perf_counter=lambda: clock["s"]))
    monkeypatch.setattr(gemm, "SIZES", (1000,))

    def multiply():
        clock["s"] += next(spans)

    assert gemm.best_rate(lambda n: multiply, 10)[0] == pytest.approx(4)  # 2 GOP in 0.5 s


def test_the_model_written_by_hand_multiplies():
    onnxruntime = pytest.importorskip("onnxruntime")
    import numpy as np

    n = 200  # a length that takes two bytes
    session = onnxruntime.InferenceSession(gemm.integer_product(n), providers=["CPUExecutionProvider"])
    a = np.random.default_rng(0).integers(0, 256, (n, n), dtype=np.uint8)
    (product,) = session.run(None, {"a": a})
    assert product.dtype == np.int32
    assert (product == a.astype(np.int32) @ np.ones((n, n), dtype=np.int32)).all()


def test_a_child_that_takes_too_long_is_ended(tmp_path):
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    with pytest.raises(EnvironmentFault, match=r"sleeping was not done after 2 s"):
        child.run([sys.executable, "-c", code], log=tmp_path / "log", title="sleeping", timeout_s=2)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_no_bandwidth_where_memory_is_too_small_for_the_array():
    found = read_bandwidth(1, 2**30, 2**30)
    assert found["gb_per_s"] is None and "4x the last-level cache" in found["reason"]


def test_a_detected_box_can_be_read_back(own_home):
    box = {**detect(measure=False), "bandwidth_gb_per_s": 20.0, "gemm_int8_gop_per_s": 700.5}
    box["gemm"] = {"gemm_int8_gop_per_s": {"rate": 700.5, "method": "by hand", "reason": None}}
    write_own(own_home, "this", as_profile(box))
    again = get_profile(box["id"])
    assert again.gemm_int8_gop_per_s == from_detected(box).gemm_int8_gop_per_s == 700.5
    assert again.gemm_f32_gflop_per_s is None and "gemm_int8_gop_per_s: by hand" in again.notes
    assert again.ram_gb == from_detected(box).ram_gb == box["ram_gb"]
    assert again.basis["ram_gb"] == "measured" and again.price_usd is None


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            "echo 'NVIDIA H200, 143771, 570.86.15, 700.00, 9.0'",
            {"name": "NVIDIA H200", "vram_gb": 150.8, "power_limit_w": 700.0, "compute_capability": "9.0"},
        ),
        (
            "echo 'NVIDIA Orin, [N/A], 540.3, [N/A], [N/A]'",
            {"name": "NVIDIA Orin", "vram_gb": None, "power_limit_w": None, "compute_capability": None},
        ),
        (
            'case "$1" in *compute_cap*) echo "Field \\"compute_cap\\" is not a valid field to query."; exit 2;; esac; '
            "echo 'Tesla T4, 15109, 440.33, 70.00'",
            {"name": "Tesla T4", "driver": "440.33", "power_limit_w": 70.0, "compute_capability": None},
        ),
        ("echo 'driver mismatch'; exit 9", None),
    ],
)
def test_gpu_by_a_stand_in_for_nvidia_smi(tmp_path, monkeypatch, script, expected):
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    reasons: dict[str, str] = {}
    found = gpu_facts(reasons)
    if expected is None:
        assert found is None and "driver mismatch" in reasons["gpu"]
    else:
        assert found is not None and len(found) == 1 and expected.items() <= found[0].items()
