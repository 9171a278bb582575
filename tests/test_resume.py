"""Work is not lost: a kill -9 anywhere loses at most the step under way, and what comes out has the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgeft import child
from edgeft.compress import Recipe, artifacts, compress, resume
from edgeft.files import publish, replace_folder, staged_folder, sweep
from tests.conftest import DIST_FORMATS
from tests.test_cli import assert_two_lines, edgeft

KILLS = 20


def folder_with(path: Path, text: str) -> Path:
    """A folder with one file."""
    path.mkdir(parents=True)
    (path / "file").write_text(text)
    return path


def killed_in_a_child(code: str) -> None:
    """Run Python code that kills itself with SIGKILL."""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_while_a_folder_is_replaced_loses_neither_old_nor_new(tmp_path, renames):
    """Killed before the first, between the two, and after the second rename."""
    target = folder_with(tmp_path / "target", "old")
    killed_in_a_child(
        "import os, pathlib\nfrom edgeft.files import staged_folder\n"
        "rename, left = pathlib.Path.rename, [1 + "
        + str(renames)
        + "]\n"  # the first renames the fresh folder
        "def counted(self, to):\n"
        "    if left[0] == 0:\n        os.kill(os.getpid(), 9)\n"
        "    left[0] -= 1\n    return rename(self, to)\n"
        "pathlib.Path.rename = counted\nimport shutil\nshutil.rmtree = lambda *a, **k: os.kill(os.getpid(), 9)\n"
        f"with staged_folder(pathlib.Path({str(target)!r})) as staging:\n    (staging / 'file').write_text('new')\n"
    )
    assert target.exists() is (renames != 1), "between the two renames nothing has the name"
    sweep(target)
    assert (target / "file").read_text() == ("new" if renames == 2 else "old")
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_sweep_leaves_work_under_way_alone(tmp_path):
    target = tmp_path / "target"
    with staged_folder(target) as staging:
        (staging / "file").write_text("new")
        code = f"import pathlib\nfrom edgeft.files import sweep\nsweep(pathlib.Path({str(target)!r}))"
        subprocess.run([sys.executable, "-c", code], check=True)
        assert (staging / "file").exists()
    assert (target / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_a_failed_rename_puts_the_old_folder_back(tmp_path):
    target = folder_with(tmp_path / "target", "old")
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "never-made", target)
    assert (target / "file").read_text() == "old"


def test_publish_renames_a_whole_file(tmp_path):
    (tmp_path / "a.part").write_text("whole")
    publish(tmp_path / "a.part", tmp_path / "a")
    assert (tmp_path / "a").read_text() == "whole" and not (tmp_path / "a.part").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_tools_end_with_the_run_that_started_them(tmp_path):
    """A kill -9 of the parent alone: the child, though in a session of its own, does not write on."""
    mark = tmp_path / "alive"
    endless = "import pathlib, sys, time\np = pathlib.Path(sys.argv[1])\nwhile True:\n p.write_text(str(time.time())); time.sleep(.02)"
    code = (
        "import pathlib, sys\nfrom edgeft import child\n"
        f"child.run([sys.executable, '-c', {endless!r}, {str(mark)!r}], log=pathlib.Path({str(tmp_path / 'log')!r}))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    wait_for(mark.exists)
    parent.kill()
    parent.wait()
    time.sleep(0.3)
    last = mark.read_text()
    time.sleep(0.3)
    assert mark.read_text() == last


def wait_for(condition, seconds: float = 60.0) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_two_runs_in_one_folder_are_refused_and_a_killed_one_leaves_no_lock(tiny_models, tmp_path):
    out = tmp_path / "dist"
    code = (
        "import pathlib, time\nfrom edgeft.compress.resume import only_run\n"
        f"with only_run(pathlib.Path({str(out)!r})):\n    print('held', flush=True)\n    time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "held\n"
    try:
        done = edgeft("compress", tiny_models["llama"], "--to", "merged", "--out", out)
        assert_two_lines(done, 2, f"another run (process {holder.pid})", str(out))
        assert not (out / "merged").exists()
    finally:
        holder.kill()
        holder.wait()
    with resume.only_run(out):
        pass


def test_leftovers_of_killed_runs_are_swept(tmp_path):
    out = tmp_path / "dist"
    folder_with(out / ".gguf-f16.part-abc", "half")
    folder_with(out / ".merged.old-17", "old")
    folder_with(out / ".work" / ".made-merged-0123.part-x", "half")
    folder_with(out / ".rejected" / ".merged.old-17", "reasons")
    folder_with(out / "gguf-q8_0", "whole")
    (out / "imatrix.part").write_text("half")
    (out / ".work" / "source-f16-0123.part").write_text("half")
    (out / ".work" / "source-f16-4567.gguf").write_text("whole")
    with resume.only_run(out):
        pass
    left = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert left == [
        ".rejected/merged/file",
        ".work/lock",
        ".work/source-f16-4567.gguf",
        "gguf-q8_0/file",
        "merged/file",
    ]


def test_an_interrupt_during_the_proof_keeps_the_merge(tiny_models, tiny_adapters, tmp_path, monkeypatch):
    out = tmp_path / "dist"
    recipe = Recipe(out=out, formats=(), name="tiny", threads=1)

    def interrupted(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(artifacts, "_prove", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compress(tiny_models["llama"], tiny_adapters["llama"], recipe)
    assert not (out / "merged").exists() and len(list((out / ".work").glob("made-merged-*/"))) == 1
    (made,) = compress(tiny_models["llama"], tiny_adapters["llama"], recipe, checks=False)
    assert [(s["name"], s["kept"]) for s in made.steps] == [("merging", True)]
    assert not list((out / ".work").glob("made-*"))


def test_steps_of_killed_runs_are_in_the_record(tmp_path):
    """One tool ends, then the run is killed; the next run's record has the tool's cost, marked as kept."""
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-c", "pass"]
    killed_in_a_child(
        "import os, pathlib, sys\nfrom edgeft import child\nfrom edgeft.compress import resume\n"
        "def make(folder):\n"
        f"    child.run({command!r}, log=pathlib.Path({str(tmp_path / 'log')!r}), title='first')\n"
        "    os.kill(os.getpid(), 9)\n"
        f"resume.kept(pathlib.Path({str(tmp_path / 'made')!r}), pathlib.Path({str(out)!r}), make)\n"
    )

    def make(_folder: Path) -> dict:
        return child.run(command, log=tmp_path / "log", title="second")

    _, steps = resume.kept(tmp_path / "made", out, make)
    assert [(s["name"], s["kept"]) for s in steps] == [("first", True), ("second", False)]
    assert all(s["wall_s"] > 0 for s in steps)


def test_a_kept_step_is_bound_to_its_inputs(tmp_path):
    """Another key is another folder; the same key does no work again."""
    calls = []

    def make(folder: Path) -> dict:
        calls.append(folder)
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text(str(len(calls)))
        return {"wall_s": 1.0}

    results = []
    for index, key in enumerate(("a", "a", "b")):
        out = tmp_path / f"out-{index}"
        out.mkdir()
        resume.kept(tmp_path / f"made-{key}", out, make)
        results.append((out / "sub" / "file").read_text())
        assert not (out / resume.RECORD).exists()
    assert results == ["1", "1", "2"]


def stage(out: Path) -> set[str]:
    """The names in OUT and its work folder, without what is random in them: what has been begun and done."""
    found = set()
    for folder in (out, out / ".work"):
        for path in folder.glob("*") if folder.exists() else ():
            name = path.name
            if path.suffix not in (".log", ".jsonl") and name not in ("lock", "inputs.json"):
                found.add(name.rpartition(".part-")[0] + ".part" if ".part-" in name else name)
    return found


def all_files(out: Path) -> dict[str, bytes]:
    """Relative path -> contents of everything but logs, the lock, the notes of places and what another test's gate kept."""
    found = {p.relative_to(out).as_posix(): p for p in out.rglob("*") if p.is_file()}
    return {
        name: path.read_bytes()
        for name, path in found.items()
        if path.suffix != ".log"
        and path.name not in ("lock", "inputs.json")
        and not name.startswith(".work/gate/")
    }


def timeless(manifest: bytes) -> dict:
    """A manifest without dates, durations and what was seen of memory."""
    value = json.loads(manifest)
    for key in ("created_at", "cost", "steps"):
        value.pop(key)
    value["checks"].get("proof", {}).pop("cost", None)
    if level := value["checks"].get("choices", {}).get("accuracy_level"):
        level.pop("why")  # in words, what follows in figures
        for measured in level["measured"].values():
            measured.pop("decode_tok_per_s")
    return value


def untimed_levels(measured: bytes) -> dict:
    """What was measured of the accuracy levels, without their speed."""
    value = json.loads(measured)
    for level in value["levels"].values():
        level.pop("decode_tok_per_s")
    return value


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_killed_at_20_random_moments_it_ends_with_the_same_bytes(tiny_dist, tmp_path):
    """kill -9 of the run alone (its tools must end with it) or of all: a random while after a random next stage."""
    import psutil

    out, chance = tmp_path / "dist", random.Random(int(os.environ.get("EDGEFT_KILL_SEED", "0")))
    words = [str(tiny_dist / "base"), "--no-gate", "--adapter", str(tiny_dist / "adapter"), "--calibration", str(tiny_dist / "rows.jsonl"),
             "--name", "tiny", "--threads", "1", "--out", str(out), *(w for f in DIST_FORMATS for w in ("--to", f))]  # fmt: skip
    command = [sys.executable, "-m", "edgeft", "compress", *words, "--json"]
    kills = 0
    while kills < KILLS:
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        before, stages = stage(out), chance.choice((0, 1, 1, 2, 3))
        while run.poll() is None and len(stage(out) - before) < stages:
            time.sleep(0.01)
        time.sleep(chance.random() * (0.7 if stages else 1.5))
        if run.poll() is not None:  # it was done before its time came: give it work again
            assert run.returncode == 0, run.stderr.read().decode()
            shutil.rmtree(out / chance.choice(("gguf-f16", "onnx-int8")))
            continue
        family = psutil.Process(run.pid).children(recursive=True)
        if chance.random() < 0.5:
            for process in family:
                process.kill()
        run.kill()
        run.communicate()
        kills += 1
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive, "a tool outlived the run that started it"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, wanted = all_files(out), all_files(tiny_dist / "dist")
    assert sorted(found) == sorted(wanted), "nothing half-made stays, nothing is missing"
    for name, contents in wanted.items():
        if name.endswith("artifact.json"):
            assert timeless(found[name]) == timeless(contents), name
        elif name.startswith(".work/accuracy-level-"):
            assert untimed_levels(found[name]) == untimed_levels(contents), name
        else:
            assert found[name] == contents, name


def test_what_stood_under_the_name_of_a_rejected_artefact_goes_with_it(tmp_path):
    """It was made of other inputs: whoever takes OUT for what was asked for must not find it there."""
    from edgeft.compress.make import reject
    from edgeft.errors import GateError

    target = folder_with(tmp_path / "gguf-q4_0", "earlier")
    with pytest.raises(FileNotFoundError), staged_folder(target) as staging:
        (staging / "artifact.json").write_text("{}")
        reject(staging, target, GateError("it lost the adapter.", "a wider --to"))
        (staging / "gone").read_text()  # the caller's error, which removes what is staged
    assert not target.exists()
    kept = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert kept == {".rejected/gguf-q4_0/reasons.json", ".rejected/gguf-q4_0.before/file"}
    assert "before" in json.loads((tmp_path / ".rejected" / "gguf-q4_0" / "reasons.json").read_text())
