"""The command line as a user meets it: light, two-line errors, documented exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgeft.cli import COMMANDS, run
from tests.conftest import DESK, ROOT

HEAVY = (
    "torch",
    "transformers",
    "onnxruntime",
    "onnxruntime_genai",
    "llama_cpp",
    "xllamacpp",
    "litellm",
    "numpy",
    "peft",
)


def edgeft(*words: str | Path, **environment: str) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own."""
    import os

    return subprocess.run(
        [sys.executable, "-m", "edgeft", *map(str, words)],
        capture_output=True, text=True, env={**os.environ, **environment}, check=False,
    )  # fmt: skip


def assert_two_lines(done: subprocess.CompletedProcess, code: int, *seen: str) -> None:
    """An error of two lines with what was seen, the documented code, nothing on standard output."""
    lines = done.stderr.rstrip("\n").splitlines()
    lines = lines[next((i for i, line in enumerate(lines) if line.startswith("Error: ")), 0) :]
    assert done.returncode == code, done.stderr
    assert len(lines) == 2, done.stderr
    assert lines[0].startswith("Error: ") and lines[1].startswith("  ") and lines[1].strip()
    assert "Traceback" not in done.stderr
    for word in seen:
        assert word in done.stderr, f"{word!r} not in {done.stderr!r}"


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom edgeft.cli import run\nrun(['--help'])\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_the_shared_options(name):
    from click.testing import CliRunner

    from edgeft.cli import cli

    text = CliRunner().invoke(cli, [name, "--help"]).output
    assert COMMANDS[name].rstrip(".") in text
    if "Commands:" not in text:
        assert all(option in text for option in ("--json", "--quiet", "--debug"))


def test_cli_page_is_fresh():
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.path.insert(0, 'docs'); import make_cli; print(make_cli.text(), end='')"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == (ROOT / "docs" / "cli.md").read_text(), "run: make docs"


def test_unknown_command_names_the_nearest():
    assert_two_lines(edgeft("compres"), 2, "compres", "'compress'")


def test_usage_error_is_two_lines():
    assert_two_lines(edgeft("bench", "dist"), 2, "--tasks", "edgeft bench run --help")


def test_no_such_folder():
    assert_two_lines(edgeft("compress", "./nowhere", "--to", "gguf:f16"), 2, "nowhere", "edgeft pull")
    assert_two_lines(
        edgeft("bench", "nowhere", "--tasks", DESK / "report.jsonl"), 2, "nowhere", "edgeft compress"
    )


def test_unknown_format_names_the_nearest(tiny_models, tmp_path):
    done = edgeft("compress", tiny_models["llama"], "--to", "gguf:q4_k_mm", "--out", tmp_path / "dist")
    assert_two_lines(done, 2, "gguf:q4_k_mm", "gguf:q4_k_m")
    assert not (tmp_path / "dist").exists()


def test_adapter_for_another_base_names_both_shapes(tiny_models, tmp_path):
    """An adapter of the wrong width."""
    import torch
    from safetensors.torch import save_file

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({f"{name}.lora_A.weight": torch.zeros(4, 576), f"{name}.lora_B.weight": torch.zeros(576, 4)},
              adapter / "adapter_model.safetensors")  # fmt: skip
    done = edgeft(
        "compress", tiny_models["llama"], "--adapter", adapter, "--to", "gguf:f16", "--out", tmp_path / "dist"
    )
    assert_two_lines(done, 2, "[256, 256]", "[576, 576]", "another base")
    assert not (tmp_path / "dist").exists()


def test_corrupt_safetensors(tiny_models, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_models["llama"], broken)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert_two_lines(
        edgeft("compress", broken, "--to", "gguf:f16", "--out", tmp_path / "dist"), 2, "corrupt", "sha256sum"
    )
    file.write_bytes(b"\xff" * 4096)
    assert_two_lines(
        edgeft("compress", broken, "--to", "gguf:f16", "--out", tmp_path / "dist"), 2, "model.safetensors"
    )
    assert not (tmp_path / "dist").exists()


def test_pickles_are_refused(tiny_models, tmp_path):
    import shutil

    folder = tmp_path / "pickled"
    shutil.copytree(tiny_models["llama"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert_two_lines(edgeft("compress", folder, "--to", "gguf:f16", "--out", tmp_path / "dist"), 2, "pickle")


def test_row_without_an_answer_names_its_line(tmp_path):
    rows = (DESK / "report.jsonl").read_text().splitlines()[:3]
    row = json.loads(rows[1])
    row["messages"] = row["messages"][:-1]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([rows[0], json.dumps(row), rows[2]]))
    done = edgeft("tune", "smollm2-135m-instruct", "--data", file, "--out", tmp_path / "adapter")
    assert_two_lines(done, 2, "line 2", "no answer", "sed -n 2p")
    assert not (tmp_path / "adapter").exists()


def test_missing_extra_names_the_install_line(tiny_models, tmp_path):
    """A sitecustomize that hides a package stands for an environment without it."""
    hide = tmp_path / "hide"
    hide.mkdir()
    (hide / "sitecustomize.py").write_text(
        "import importlib.util as u\n_find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'onnxruntime_genai' else _find(name, *a)\n"
    )
    done = edgeft(
        "compress",
        tiny_models["llama"],
        "--to",
        "onnx:int8",
        "--out",
        tmp_path / "dist",
        PYTHONPATH=str(hide),
    )
    assert_two_lines(done, 3, "onnxruntime_genai", "pip install 'edgeft[onnx]'")


def test_disk_too_small_is_said_before_the_work(tiny_models, tmp_path, monkeypatch):
    import shutil
    from collections import namedtuple

    from edgeft.compress import Recipe, compress
    from edgeft.errors import EnvironmentFault

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 99, 1))
    with pytest.raises(EnvironmentFault, match="needs about"):
        compress(tiny_models["llama"], None, Recipe(out=tmp_path / "dist", formats=("gguf:f16",)))
    assert not (tmp_path / "dist").exists()


def test_disk_full_in_the_middle_leaves_nothing(tiny_models, tmp_path):
    """A real full disk: a file-size limit makes the write of the weights fail, as ENOSPC would."""
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 2000; trap '' XFSZ; {sys.executable} -m edgeft compress {tiny_models['llama']} "
         f"--to gguf:f16 --out {tmp_path / 'dist'}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "dist" / "merged").exists()
    assert not list((tmp_path / "dist").glob(".merged*"))


def test_json_is_one_value(tiny_models):
    done = edgeft("pull", tiny_models["llama"], "--json")
    assert json.loads(done.stdout) == {"path": str(tiny_models["llama"])}
    assert done.stderr == ""
    before = edgeft("--json", "pull", tiny_models["llama"])
    assert json.loads(before.stdout) == json.loads(done.stdout)


def test_interrupt_ends_with_130_and_leaves_nothing_half_written(smollm2, tmp_path):
    """Ctrl-C while the merged model is being quantized."""
    import os
    import signal
    import time

    out = tmp_path / "dist"
    process = subprocess.Popen(
        [sys.executable, "-m", "edgeft", "compress", str(smollm2), "--to", "gguf:q8_0", "--out", str(out)],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
        # A test run in a shell's background would hand down that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(out.glob(".gguf-q8_0.part-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, complaint = process.communicate(timeout=30)
    assert process.returncode == 130
    assert re.search(r"^Error: interrupted", complaint, re.M) and "Traceback" not in complaint
    assert (out / "merged" / "artifact.json").is_file(), "what was finished stays"
    assert not list(out.glob("*gguf*")) and not list(out.glob(".gguf*"))


def test_wrong_rows_of_tune_are_told_before_a_base_is_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("edgeft.pull.pull", lambda base: pytest.fail("a base was fetched"))
    rows = tmp_path / "none.jsonl"
    assert run(["tune", "smollm2-135m-instruct", "--data", str(rows), "--out", str(tmp_path / "a")]) == 2
    assert f"there is no file {rows}" in capsys.readouterr().err
