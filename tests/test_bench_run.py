"""A bench of tiny artefacts as a user runs it: killed in the middle, with a broken file, with too little memory, tuned, predicted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from edgeft.bench import Workload, autotune, bench, memory, roofline
from edgeft.bench.callers import caller, plain
from edgeft.bench.pool import need_bytes
from edgeft.bench.schema import faults
from edgeft.bench.speed import Point
from edgeft.bench.targets import Target, find, run_by
from edgeft.engines import run_profile
from edgeft.engines.local import LocalModel
from edgeft.errors import EnvironmentFault, UsageError
from edgeft.rows import load_rows, row_hash, spread
from tests.conftest import DESK

for package, extra in {"llama_cpp": "compress", "xllamacpp": "gguf", "onnxruntime_genai": "onnx"}.items():
    pytest.importorskip(package, reason=f"needs the extra: {extra}")

pytestmark = pytest.mark.slow
QUICK = {
    "points": (Point(32, 24),),
    "repetitions": 2,
    "speed_seconds": 0.0,
    "restarts": 1,
    "fidelity_rows": 3,
    "context": 1024,
}


@pytest.fixture(autouse=True)
def quick_look(monkeypatch):
    """Measuring this box takes seconds, and tests of its own hold it."""
    from edgeft import profiles

    seen = {**profiles.detect(measure=False), "bandwidth_gb_per_s": 20.0, "gemm_f32_gflop_per_s": 100.0}
    monkeypatch.setattr("edgeft.bench.run.detect", lambda measure: seen)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "tasks.jsonl"
    file.write_text("\n".join((DESK / "select.jsonl").read_text().splitlines()[:10]) + "\n")
    return file


def test_every_part_of_a_report_is_there_and_holds_together(tiny_dist, tasks, tmp_path):
    out = tmp_path / "report"
    places = [tiny_dist / "dist" / name for name in ("merged", "gguf-f16", "gguf-q4_k_m", "onnx-int8")]
    workload = Workload(tasks, base=tiny_dist / "base", **QUICK)
    report = bench(places, [], workload, "auto", out, ("raspberry-pi-5-8gb",))
    found = {r["id"]: r for r in report.results}
    assert list(found) == ["merged", "gguf-f16", "gguf-q4_k_m", "onnx-int8", "(base)"]
    for name, result in found.items():
        assert result["error"] is None, (name, result["error"])
        assert result["speed"]["rounds"] == 2 and result["speed"]["points"][0]["itl_s"]["n"] > 4
        assert result["memory"]["peak_rss_bytes"] > 5e7 and result["load"]["cold_start_s"] > 0
        assert result["roofline"], (name, result["speed"])
        assert result["roofline"]["weight_bytes"] > 0 and result["predictions"][0]["label"] == "predicted"
    assert (
        found["gguf-f16"]["fidelity"]["all"]["kld_mean"] < found["gguf-q4_k_m"]["fidelity"]["all"]["kld_mean"]
    )
    # A random model answers nothing right, so nothing was gained that could be kept.
    assert found["gguf-f16"]["retention"] is None and len(report.pairs) == 10
    assert (
        found["gguf-f16"]["roofline"]["weight_bytes"]
        > 3 * found["gguf-q4_k_m"]["roofline"]["weight_bytes"] * 0.8
    )
    for name in ("report.json", "report.md", "report.csv", "report.html", "items.jsonl"):
        assert (out / name).stat().st_size > 0
    assert not (out / ".work" / "journal.jsonl").exists()
    page = (out / "report.md").read_text()
    assert "predicted" in page and "Energy: not measured." in page


def test_rows_that_the_gate_chose_by_are_taken_for_choosing_alone(tiny_dist, tasks, tmp_path):
    rows = spread(load_rows(tasks), 2)
    artefact = tmp_path / "gguf-f16"
    shutil.copytree(tiny_dist / "dist" / "gguf-f16", artefact)
    manifest = json.loads((artefact / "artifact.json").read_text())
    place = {"select": [row_hash(rows[0])]}
    (artefact / "artifact.json").write_text(json.dumps({**manifest, "seen_rows": place}))
    plain = Workload(tasks, speed=False, fidelity=False, limit=2, context=1024, max_tokens=4)
    with pytest.raises(UsageError, match="used to select already"):
        bench([artefact], [], plain, "auto", tmp_path / "r")
    report = bench([artefact], [], replace(plain, choosing=True), "auto", tmp_path / "r")
    assert report.workload["rows_chosen_by"] == 1
    assert "none of quality" in (tmp_path / "r" / "report.md").read_text()
    (artefact / "artifact.json").write_text(json.dumps({**manifest, "seen_rows": {"train": place["select"]}}))
    with pytest.raises(UsageError, match="used to train already"):
        bench([artefact], [], replace(plain, choosing=True), "auto", tmp_path / "r2")


def test_a_box_under_load_and_one_that_never_rests(tiny_dist, tasks, tmp_path):
    workload = Workload(
        tasks,
        fidelity=False,
        speed=False,
        load_levels=(1, 2),
        load_seconds=0.5,
        sustained_seconds=0.5,
        context=1024,
        limit=2,
    )
    (result,) = bench([tiny_dist / "dist" / "gguf-f16"], [], workload, "auto", tmp_path / "r").results
    closed, arrivals = result["load_test"]["closed"], result["load_test"]["open"]
    assert [c["clients"] for c in closed] == [1, 2] and [a["share_of_best"] for a in arrivals] == [
        0.5,
        0.7,
        0.9,
    ]
    assert (
        closed[0]["failed"] == 0
        and closed[0]["output_tok_per_s"] > 0
        and result["load_test"]["knee_clients"] in (1, 2)
    )
    assert result["sustained"]["last_tok_per_s"] > 0


def test_a_killed_run_goes_on_where_it_was(tiny_dist, tasks, tmp_path):
    out = tmp_path / "report"
    command = [
        sys.executable, "-m", "edgeft", "bench", str(tiny_dist / "dist" / "gguf-f16"), str(tiny_dist / "dist" / "gguf-q4_k_m"), "--tasks",
        str(tasks), "--out", str(out), "--restarts", "2", "--repetitions", "2",
        "--speed-seconds", "0", "--speed-points", "32x24", "--no-fidelity", "--quiet",
    ]  # fmt: skip
    journal = out / ".work" / "journal.jsonl"

    def killed_at(kind: str, times: int) -> None:
        first = subprocess.Popen(command, start_new_session=True)
        for _ in range(2400):
            if journal.is_file() and journal.read_text().count(f'"{kind}"') >= times:
                break
            time.sleep(0.05)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()

    killed_at("block", 3)  # one model's second process has been timed, the other's not
    assert '"answered"' not in journal.read_text(), "the kill must come in the middle"
    killed_at("answer", 3)
    kept = [json.loads(line) for line in journal.read_text().splitlines()[1:] if line.endswith("}")]
    answers = [k["value"] for k in kept if k["kind"] == "answer"]
    assert 3 <= len(answers) < 20, "the kill must come in the middle"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    items = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    assert len(items) == 20 and len({(i["model_id"], i["item_id"]) for i in items}) == 20
    assert [i["e2e_s"] for i in items[: len(answers)]] == [a["e2e_s"] for a in answers], (
        "what was answered is not asked again"
    )
    blocks = [k["value"] for k in kept if k["kind"] == "block"]
    for result in json.loads((out / "report.json").read_text())["results"]:
        assert result["speed"]["processes"] == 2 == result["speed"]["rounds"], (
            "a process a restart, none timed twice"
        )
        assert result["speed"]["points"][0]["process"][0] == 0
    assert len(blocks) == 4 and len({b["begun_s"] for b in blocks}) == 4
    page = (out / "report.md").read_text()
    assert (
        "Each model was timed in 2 processes" in page
        and faults(json.loads((out / "report.json").read_text())) == []
    )


def test_a_broken_file_is_told_on_its_row_and_the_rest_is_kept(tiny_dist, tasks, tmp_path):
    broken = tmp_path / "gguf-broken"
    shutil.copytree(tiny_dist / "dist" / "gguf-q4_k_m", broken)
    file = next(broken.glob("*.gguf"))
    file.write_bytes(b"\0" * file.stat().st_size)
    value = json.loads((broken / "artifact.json").read_text())
    (broken / "artifact.json").write_text(json.dumps({**value, "id": "gguf-broken"}))
    report = bench(
        [tiny_dist / "dist" / "gguf-f16", broken],
        [],
        Workload(tasks, fidelity=False, **QUICK),
        "auto",
        tmp_path / "r",
    )
    found = {r["id"]: r for r in report.results}
    assert "did not load" in found["gguf-broken"]["error"] and found["gguf-broken"]["accuracy"] is None
    assert found["gguf-f16"]["error"] is None and found["gguf-f16"]["accuracy"]["n"] == 10
    assert "gguf-broken broke off" in (tmp_path / "r" / "report.md").read_text()


def test_what_does_not_fit_is_refused_before_it_loads_with_the_number(
    tiny_dist, tasks, tmp_path, monkeypatch
):
    monkeypatch.setattr("edgeft.bench.pool.free_bytes", lambda: 10_000_000)
    report = bench(
        [tiny_dist / "dist" / "gguf-f16"],
        [],
        Workload(tasks, fidelity=False, **QUICK),
        "auto",
        tmp_path / "r",
    )
    assert (
        "needs about 0.2 GB" in report.results[0]["error"] and "0.0 GB are free" in report.results[0]["error"]
    )
    assert not list((tmp_path / "r" / ".work").glob("gguf-f16.log")), "nothing was started"


def test_needs_grow_with_the_artefact():
    small, large = (Target("m", "artifact", "gguf", Path("/x"), None, size) for size in (10**8, 10**9))
    merged = Target(
        "m",
        "artifact",
        "transformers",
        Path("/x"),
        None,
        2 * 10**8,
        {"format": "safetensors", "parameters": 10**8},
    )
    assert need_bytes(large) - need_bytes(small) == 9 * 10**8
    assert need_bytes(merged) > 4 * 10**8, "transformers holds float16 files in float32"


# --- tuning


def test_a_run_profile_is_of_its_box_and_a_lost_draft_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "draft.gguf").write_bytes(b"x")
    folder = tmp_path / "artefact"
    folder.mkdir()
    found = {
        "options": {
            "threads": 1,
            "speculative": "draft_simple",
            "draft": str(tmp_path / "draft.gguf"),
            "nonsense": 1,
        },
        "gain": None,
    }
    run_profile.keep(folder, found)
    kept = json.loads((folder / run_profile.FILE).read_text())["boxes"][run_profile.this_box()]
    assert kept["options"]["draft"] == "../draft.gguf", "the pair of folders may move"
    assert run_profile.options_for(folder, "gguf")["draft"] == str((tmp_path / "draft.gguf").resolve())
    assert run_profile.options_for(folder, "onnx") == {"threads": 1}
    (tmp_path / "draft.gguf").unlink()
    assert run_profile.options_for(folder, "gguf") == {"threads": 1}
    monkeypatch.setattr(run_profile, "this_box", lambda: "another box")
    assert run_profile.options_for(folder, "gguf") == {}


def test_only_what_is_faster_and_nowhere_slower_is_kept(monkeypatch, tmp_path):
    import numpy as np

    def rounds(time_saved, prefill, decode, own=0.0):
        values = {"time": time_saved, "prefill": prefill, "decode": decode, "own": own}
        return lambda *_: [None, {k: np.log(1 - np.full(12, v)) for k, v in values.items()}]

    for turns, kept in (
        (rounds(0.1, 0.0, 0.2), True),
        (rounds(0.1, -0.05, 0.3), False),
        (rounds(0.1, 0.0, 0.4, -0.05), False),
        (rounds(0.0, 0.0, 0.0), False),
    ):
        monkeypatch.setattr(autotune, "in_turns", turns)
        options, gain = autotune.confirm(None, [], {"threads": 2}, 1024, 8, tmp_path / "log", print)
        assert gain["kept"] is kept and options == ({"threads": 2} if kept else {})
    assert autotune.confirm(None, [], {}, 1024, 8, tmp_path / "log", print) == ({}, None)
    assert autotune.interval(np.log(np.full(5, 0.5)))["ratio"] == pytest.approx(2.0), (
        "half the time is twice the rate"
    )


def test_a_report_says_what_tuning_gained():
    part = {"ratio": 1.2, "ci95": [1.1, 1.3], "rounds": 12}
    tried = [{"what": "4 threads", "time_saved": 0.1}, {"what": "polling 0", "why": "the time was up"}]
    gain = {**dict.fromkeys(autotune.PARTS, part), "kept": True}

    def said(options, gain):
        (line,) = autotune.notes({"id": "q", "autotune": {"options": options, "gain": gain, "tried": tried}})
        return line

    assert "time 1.20 (1.10 to 1.30), prefill" in said({"threads": 4}, gain) and "kept: threads 4." in said(
        {"threads": 4}, gain
    )
    assert "the defaults stay" in said({}, {**gain, "kept": False}) and "none of 1 settings" in said({}, None)
    assert autotune.notes({"id": "q", "autotune": None}) == []


def test_the_fast_cores_are_found_where_they_differ(tmp_path):
    for cpu, hz in enumerate((1800, 1800, 2400, 2400)):
        (tmp_path / f"cpu{cpu}" / "cpufreq").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "cpufreq" / "cpuinfo_max_freq").write_text(str(hz))
    assert autotune.core_groups(tmp_path) == {"fast": [2, 3]}
    assert autotune.core_groups(tmp_path / "none") == {}


def test_coarser_keys_are_told_by_their_distance(tiny_dist, tasks, tmp_path):
    (target,) = find([tiny_dist / "dist" / "gguf-f16"], [])
    fine, coarse = (autotune.kv_kld(target, tasks, kind, tmp_path / "log") for kind in ("q8_0", "q4_0"))
    assert 0 < fine < coarse


def test_a_search_ends_in_time_and_says_what_it_did_not_try(tiny_dist, tasks, tmp_path):
    folder = tmp_path / "gguf-f16"
    shutil.copytree(tiny_dist / "dist" / "gguf-f16", folder)
    workload = Workload(
        tasks,
        fidelity=False,
        speed=False,
        autotune_seconds=0.5,
        **{k: v for k, v in QUICK.items() if k != "fidelity_rows"},
    )
    report = bench([folder], [], workload, "auto", tmp_path / "r")
    found = report.results[0]["autotune"]
    assert (
        found["tried"][-1]["why"] == "the time was up" and found["tried"][0].get("why") != "the time was up"
    )
    assert run_profile.read(folder)["boxes"][run_profile.this_box()]["options"] == found["options"]


# --- the second GGUF engine, memory, roofline


def test_a_server_of_another_kind_is_asked_in_openais_words():
    body = {"messages": [], "max_tokens": 4, "cache_prompt": True}
    assert plain(body) == {"messages": [], "max_tokens": 4}
    assert plain({**body, "cache_prompt": False})["cache_prompt"] is False, "a cold prompt must be asked for"


def test_both_gguf_engines_answer_alike(tiny_dist, tmp_path):
    texts = {}
    for engine in ("gguf", "llama_cpp"):
        target = Target(engine, "folder", engine, tiny_dist / "dist" / "gguf-f16", None, None)
        with caller(target, tmp_path / f"{engine}.log", 1, 512) as (ask, _):
            body = {
                "messages": [{"role": "user", "content": "Où est ma carte ? 12"}],
                "max_tokens": 12,
                "temperature": 0,
                "ignore_eos": True,
            }
            reply = ask(body)
            texts[engine] = (reply.prompt_tokens, reply.output_tokens, reply.text)
            assert ask({**body, "max_tokens": 3}).output_tokens == 3
    assert texts["gguf"] == texts["llama_cpp"]


def test_a_gguf_engine_runs_files_of_that_kind_alone_or_is_refused_beforehand(
    tiny_dist, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("EDGEFT_LLAMA_SERVER", raising=False)
    both = find([tiny_dist / "dist" / "gguf-f16", tiny_dist / "dist" / "merged"], [])
    assert [t.engine for t in run_by(both, "llama_cpp")] == ["transformers", "llama_cpp"]
    assert run_by(both, "gguf") == both
    with pytest.raises(UsageError, match="no llama-server on the PATH"):
        run_by(both, "llama_server")


def test_options_chosen_with_one_engine_are_not_another_ones(tmp_path):
    run_profile.keep(tmp_path, {"engine": "llama_cpp", "options": {"threads": 3, "poll": 9}})
    assert run_profile.options_for(tmp_path, "llama_cpp") == {"threads": 3}
    assert run_profile.options_for(tmp_path, "gguf") == {}
    run_profile.keep(tmp_path, {"engine": "gguf", "options": {"threads": 2, "poll": 9}})
    assert run_profile.options_for(tmp_path, "gguf") == {"threads": 2, "poll": 9}
    assert run_profile.options_for(tmp_path, "llama_cpp") == {"threads": 3}


def test_an_engine_chosen_with_its_options_runs_the_file_only_where_the_user_has_it(tmp_path, monkeypatch):
    binary = tmp_path / "bin" / "llama-server"
    binary.parent.mkdir()
    binary.write_text("#!/bin/sh\nexit 3\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{binary.parent}:/usr/bin:/bin")
    monkeypatch.delenv("EDGEFT_LLAMA_SERVER", raising=False)
    options = {"engine": "llama_server", "ubatch": 128, "binary": "/tmp/came-with-the-artefact"}
    run_profile.keep(tmp_path, {"engine": "gguf", "options": options})
    assert run_profile.options_for(tmp_path, "gguf") == {"engine": "llama_server", "ubatch": 128}, "no binary"
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(EnvironmentFault, match="llama-server ended with 3"):
        LocalModel(tmp_path, "gguf", log=tmp_path / "log")
    (asked,) = find([tmp_path / "m.gguf"], [])
    engines = [change["engine"] for _, change in autotune.knobs(asked, [], False) if "engine" in change]
    assert engines == ["llama_server"]
    assert not any("engine" in c for _, c in autotune.knobs(replace(asked, engine="llama_cpp"), [], False))
    binary.write_bytes(b"\x7fELF of another processor")
    assert next(autotune.knobs(asked, [], False))[0] == "llama-server unknown build", "tried, and told"
    binary.unlink()
    assert run_profile.options_for(tmp_path, "gguf") == {}, "what was found with one engine is not another's"
    assert not any("engine" in change for _, change in autotune.knobs(asked, [], False))


def test_a_group_that_is_none_is_not_taken_for_one(tmp_path):
    (tmp_path / "memory").mkdir()
    assert memory.groups(tmp_path) is None and not list((tmp_path / "memory").iterdir())


def test_a_memory_limit_holds_and_a_generous_one_does_not(tiny_dist, tmp_path, monkeypatch):
    if (where := memory.groups()) is None:
        pytest.skip("no control group can be made here")
    (target,) = find([tiny_dist / "dist" / "gguf-q4_k_m"], [])
    body = {
        "messages": [{"role": "user", "content": "?"}],
        "max_tokens": 4,
        "temperature": 0,
        "ignore_eos": True,
    }

    def answered(limit_bytes):
        with (
            memory.made(*where, limit_bytes) as group,
            caller(target, tmp_path / "log", 1, 512, {"group": str(group)}) as (ask, _),
        ):
            return ask(body).output_tokens

    with pytest.raises(EnvironmentFault):
        answered(20_000_000)  # the interpreter alone needs more
    assert answered(2_000_000_000) == 4
    assert not (where[1] / f"edgeft-{os.getpid()}").exists(), "the group is gone"


def test_the_smallest_limit_is_halved_in_on(monkeypatch, tmp_path):
    """A stand-in that is slow below 100 MB and dead below 40."""
    limits = []

    @contextmanager
    def made(version, parent, limit_bytes=None):
        limits.append(limit_bytes)
        yield tmp_path

    @contextmanager
    def asked(target, log, threads, context, options):
        if limits[-1] is not None and limits[-1] < 40e6:
            raise EnvironmentFault("killed", "")
        yield limits[-1], None

    monkeypatch.setattr(memory, "groups", lambda: (memory.V2, tmp_path))
    monkeypatch.setattr(memory, "made", made)
    monkeypatch.setattr(memory, "caller", asked)
    monkeypatch.setattr(memory, "_rate", lambda limit, rows: 1.0 if limit is None or limit >= 100e6 else 0.5)
    found = memory.smallest_limit(
        Target("m", "artifact", "gguf", None, None, 1),
        [],
        200_000_000,
        1,
        512,
        tmp_path / "log",
        lambda t: None,
    )
    assert (
        100e6 <= found["bytes"] <= 104e6
        and found["share_of_speed"] == 1.0
        and found["method"].startswith(memory.V2)
    )
    assert all(t["share_of_speed"] == (1.0 if t["bytes"] >= 100e6 else 0.5) for t in found["tried"])


def test_the_roofline_of_a_file_is_its_tensors_and_its_cache(tiny_dist):
    (target,) = find([tiny_dist / "dist" / "gguf-f16"], [])
    shape = roofline.shape_of(target)
    # Tiny Llama: 2 layers, 2 heads of keys of width 64, keys and values as float16; a tied head is read for every token.
    assert shape.kv_bytes_per_token == 2 * 2 * 2 * 64 * 2
    assert shape.weight_bytes == pytest.approx(target.facts["parameters"] * 2, rel=0.01)
    assert roofline.decode_bound(shape, 10.0, 0) == pytest.approx(10e9 / shape.weight_bytes)
