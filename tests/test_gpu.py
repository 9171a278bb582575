"""What changes where an NVIDIA GPU is: told by stand-ins, since no machine of the tests has one (docs/hardware-runs has the real one)."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest

from edgeft import device
from edgeft.bench import energy, memory, report, roofline, verdict
from edgeft.compress import costs
from edgeft.engines import transformers as engine
from edgeft.errors import UsageError
from edgeft.profiles import detection, gpu

GPU = "NVIDIA H100 80GB HBM3"
QUERY = f"{GPU}, 81559, 580.159.04, 700.00, 9.0"


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """nvidia-smi by name: one H100; `driver(pid, MiB)` says who holds its memory."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def holds(pid: int, mib: object) -> None:
        tool.write_text(
            f"#!/bin/sh\ncase \"$1\" in *compute-apps*) echo '{pid}, {mib}'; echo '1, 99';; "
            f"*) echo '{QUERY}';; esac\n"
        )
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)

    holds(0, 0)
    return holds


def test_the_memory_of_a_gpu_is_that_of_a_processes_tree_alone(driver):
    driver(os.getpid(), 1040)
    assert device.vram_bytes([os.getpid()]) == 1040 << 20
    assert device.vram_bytes([os.getpid() + 1]) is None
    assert device.device_of(os.getpid()) == GPU
    local = SimpleNamespace(pid=os.getpid(), memory=SimpleNamespace(peak={"rss_bytes": 5}))
    assert memory.taken(local) == {"memory": {"rss_bytes": 5}, "vram_bytes": 1040 << 20}
    driver(os.getpid(), "[N/A]")
    assert device.vram_bytes([os.getpid()]) is None and device.device_of(os.getpid()) == device.CPU


def test_layers_go_to_the_gpu_where_a_driver_is_unless_told_otherwise(driver, monkeypatch):
    assert device.gpu_layers({}) == device.ALL_LAYERS
    assert device.gpu_layers({"gpu_layers": 7}) == 7
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device.gpu_layers({}) == 0 and device.device_of(os.getpid()) == device.CPU
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", "/nowhere")
    assert device.gpu_layers({}) == 0 and device.vram_bytes([1]) is None


def test_a_kernel_that_does_not_take_the_widths_gives_way_to_the_next(tmp_path, monkeypatch):
    import transformers

    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"bits": 4}}))
    asked = []

    def load(folder, *, quantization_config, **_):
        asked.append(quantization_config.backend)
        if quantization_config.backend == "auto":
            raise NotImplementedError("`out_features`: 192 must be divisible by [128].")
        return "model"

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    assert engine.by_kernel(tmp_path, "cuda") == "model" and asked == ["auto", "gptq_triton"]

    def refuse(*_, **__):
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(NotImplementedError, match="no kernel"):
        engine.by_kernel(tmp_path, "cuda")


def test_energy_of_gpus_by_their_counters(monkeypatch, tmp_path):
    spent = {"mj": 1_000_000}

    class NVMLError(Exception):
        pass

    def total(gpu):
        if spent["mj"] is None:
            raise NVMLError("not supported")
        return spent["mj"] * (gpu + 1)

    fake = SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda i: i, nvmlDeviceGetTotalEnergyConsumption=total,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    meter = energy.Meter(rapl_root=tmp_path)
    assert meter.method == "NVML counter"
    span = meter.start()
    spent["mj"] += 2_500
    assert meter.stop(span) == pytest.approx(2.5 * (1 + 2))
    spent["mj"] = None
    assert energy.gpu_counters() is None


def test_samples_of_power_stand_in_for_counters_and_count_every_gpu(driver, monkeypatch, tmp_path):
    monkeypatch.setattr(energy, "gpu_counters", lambda: None)
    monkeypatch.setattr(energy, "gpu_facts", lambda reasons: [{}, {}])
    meter = energy.Meter(rapl_root=tmp_path)
    assert meter.method == "NVML samples"
    process = subprocess.Popen(["printf", "100.0\n200.0\n"], stdout=subprocess.PIPE, text=True)
    process.wait()
    span = {"monotonic_s": energy.time.monotonic() - 2.0, "uj": [], "gpu": process}
    assert meter.stop(span) == pytest.approx(2 * 150.0 * 2.0, rel=0.05)


def test_the_roofline_of_a_gpu_is_the_gpus(tiny_dist):
    from edgeft.bench.targets import find

    (target,) = find([tiny_dist / "dist" / "merged"], [])
    speed = {
        "decode_tok_per_s": {"p50": 100.0}, "prompt_tokens": [100], "output_tokens": [50],
        "points": [{"asked": {"prompt_tokens": 100}, "ttft_s": {"p50": 0.1}, "prompt_tokens": [100]}],
    }  # fmt: skip
    box = {
        "bandwidth_gb_per_s": 20.0, "gemm_f32_gflop_per_s": 50.0,
        "gpu": [{"name": GPU, "bandwidth_gb_per_s": 3000.0, "gemm_f16_gflop_per_s": 700_000.0}],
    }  # fmt: skip
    on_cpu = roofline.share({"speed": speed, "load": {"device": "cpu"}}, target, box)
    on_gpu = roofline.share({"speed": speed, "load": {"device": GPU}}, target, box)
    assert on_cpu["bandwidth_gb_per_s"] == 20.0 and on_cpu["gemm_f32_gflop_per_s"] == 50.0
    assert on_gpu["bandwidth_gb_per_s"] == 3000.0 and on_gpu["gemm_f16_gflop_per_s"] == 700_000.0
    # 16 bits on a GPU, 32 on a CPU: half of the bytes a token.
    assert on_gpu["weight_bytes"] * 2 == on_cpu["weight_bytes"]
    assert on_gpu["kv_bytes_per_token"] * 2 == on_cpu["kv_bytes_per_token"]
    unknown = roofline.share({"speed": speed, "load": {"device": "another"}}, target, box)
    assert unknown["bandwidth_gb_per_s"] is None and unknown["bandwidth_share"] is None


def test_a_gpus_profile_holds_what_was_measured_of_it(driver, monkeypatch):
    found = {
        "bandwidth_gb_per_s": 3082.8,
        "gemm_f16_gflop_per_s": 736_136.8,
        "methods": {"bandwidth_gb_per_s": "sum"},
    }
    monkeypatch.setattr(detection, "gpu_measured", lambda reasons: found)
    monkeypatch.setattr(detection, "_measure", lambda *_: (None, None))
    profile = detection.gpu_profile(detection.detect())
    assert profile["id"] == "detected-nvidia-h100-80gb-hbm3" and profile["kind"] == "gpu"
    assert profile["bandwidth_gb_per_s"] == 3082.8 and profile["vram_gb"] == 85.5 and "ram_gb" not in profile
    from edgeft.profiles import loader

    assert loader.check(profile, "profile.yaml").basis["bandwidth_gb_per_s"] == "measured"


def test_what_a_gpu_may_have_made_says_so(driver, monkeypatch):
    from edgeft.compress import provenance

    assert provenance.made_on()["gpus"] == [GPU]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "gpus" not in provenance.made_on()


def test_no_gpu_has_no_profile_and_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="there is no GPU: nvidia-smi is not on the PATH"):
        detection.need_gpu()


def test_a_torch_without_cuda_says_so():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "sees no GPU" in gpu.rates(0.1)["reasons"]["gpu.bandwidth_gb_per_s"]


def test_the_report_says_what_ran_on_a_gpu():
    row = {"id": "gptq-4", "load": {"device": GPU}, "memory": {"vram_bytes": 926_941_184}}
    lines = report._memory_notes(SimpleNamespace(results=[row, {"id": "m", "load": {"device": "cpu"}}]))
    assert lines == [f"gptq-4: on {GPU}, 927 MB of its memory."]


def test_the_engine_tells_its_device_and_kernel(tiny_dist):
    from edgeft.engines.local import LocalModel

    with LocalModel(tiny_dist / "dist" / "merged", "transformers", log=tiny_dist / "log") as local:
        assert local.device and "transformers" in local.build and "Linear" not in local.build


def test_a_model_on_a_gpu_is_held_against_memory_by_what_it_holds_there():
    seen = {"bandwidth_share": 0.5, "weight_bytes": 1e8, "kv_bytes_per_token": 1e3, "context_tokens": 100.0}
    memory = {"peak_rss_bytes": 9_000_000_000, "vram_bytes": 2_000_000_000}
    on_gpu = {"roofline": seen, "memory": memory, "load": {"device": GPU}}
    on_cpu = {**on_gpu, "load": {"device": "cpu"}}
    card = {"id": "card", "kind": "gpu", "vram_gb": 4, "ram_gb": 64, "bandwidth_gb_per_s": 1000.0}
    board = {"id": "board", "kind": "soc", "ram_gb": 8, "bandwidth_gb_per_s": 10.0}
    pc = {**board, "id": "pc", "kind": "cpu"}
    assert [roofline.predict(on_gpu, box)["fits"] for box in (card, board, pc)] == [True, False, None]
    assert [roofline.predict(on_cpu, box)["fits"] for box in (card, board, pc)] == [False, False, False]

    def judged(result, kind):
        (found,) = verdict.verdicts(result, {"memory_budget_gb": 6.0}, kind)
        return found["verdict"], found["value"], found["why"]

    assert judged(on_gpu, "gpu") == ("PASS", 2.0, None) and judged(on_cpu, "cpu") == ("FAIL", 9.0, None)
    assert judged(on_gpu, "soc") == ("FAIL", 9.0, None)
    assert judged(on_gpu, "cpu") == ("INCONCLUSIVE", None, "it ran on a GPU, which the profile has not")


def test_the_host_memory_of_a_torch_with_a_gpu_is_counted_beforehand(driver, monkeypatch):
    known = {"parameters": 1e8, "stored": 2e8, "logits": 1e6, "matrices": 100.0, "one": 1.0}
    box = costs.Box(costs.REFERENCE_GFLOPS, costs.REFERENCE_PYTHON_S, 1.0)

    def anon(**more):
        return costs.priced(
            "a", "a", costs.GPTQ, known | more, costs.MEMORY[costs.GPTQ], costs.SECONDS[costs.GPTQ], box
        ).peak_anon_bytes

    assert anon(cuda=1.0) - anon(cuda=0.0) == pytest.approx(1.05e9)
    shape = SimpleNamespace(**dict.fromkeys(costs.Shape.__dataclass_fields__, 1), ends=1)
    assert costs.quantities(shape)["cuda"] == 1.0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert costs.quantities(shape)["cuda"] == 0.0
