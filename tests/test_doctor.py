"""The doctor: what it sees here, and what it says where packages are missing."""

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from edgeft import doctor
from edgeft.cli import run
from edgeft.console import output

HEAVY = {"torch", "transformers", "onnxruntime", "llama_cpp", "litellm", "numpy", "matplotlib", "xllamacpp"}


@pytest.fixture(autouse=True)
def plain(monkeypatch, tmp_path):
    monkeypatch.setattr(output, "json", False)
    monkeypatch.setenv("EDGEFT_HOME", str(tmp_path))


def by_check(rows):
    return {row["check"]: row for row in rows}


def test_rows_are_whole_and_core_is_ok_here():
    rows = doctor.examine()
    assert len(by_check(rows)) == len(rows)
    for row in rows:
        assert set(row) == {"check", "state", "seen", "hint"}
        assert row["state"] in ("ok", "missing", "warning") and row["seen"]
        assert row["hint"] or row["state"] == "ok", row
    assert doctor.broken_core(rows) == []
    assert {
        "python",
        "CPU",
        "instruction sets",
        "RAM",
        "disk",
        "GPU",
        "C++ compiler",
        "GGUF converter",
    } <= set(by_check(rows))


def test_missing_extras_name_the_line_that_installs_them(monkeypatch):
    real = doctor.version

    def without_extras(name):
        if name in ("xllamacpp", "litellm", "llama-cpp-python"):
            raise PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor, "version", without_extras)
    monkeypatch.setattr("edgeft.compress.converter.version", without_extras)
    rows = by_check(doctor.examine())
    assert rows["gguf: xllamacpp"]["state"] == "missing"
    assert rows["gguf: xllamacpp"]["hint"] == "pip install 'edgeft[gguf]'"
    assert rows["api: litellm"]["hint"] == "pip install 'edgeft[api]'"
    assert rows["GGUF converter"]["state"] == "missing"
    assert doctor.broken_core(list(rows.values())) == []


def test_a_broken_core_package_ends_with_3(monkeypatch, capfd):
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "1.26.4" if name == "numpy" else real(name))
    assert run(["doctor", "--json"]) == 3
    captured = capfd.readouterr()
    row = by_check(json.loads(captured.out))["core: numpy"]
    assert row["state"] == "missing" and row["seen"] == "1.26.4, and >=2 is wanted"
    assert captured.err.splitlines()[0] == "Error: core packages are broken or missing: numpy."


def test_without_rich_the_table_is_plain_text(monkeypatch, capfd):
    real = doctor.version

    def without_rich(name):
        if name == "rich":
            raise PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor, "version", without_rich)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert run(["doctor"]) == 3
    assert "core: rich  missing  not installed" in capfd.readouterr().out


def test_a_converter_that_is_not_fetched_is_a_warning():
    row = by_check(doctor.examine())["GGUF converter"]
    assert row["state"] == "warning" and row["hint"].startswith("fetched on first use")


@pytest.mark.parametrize(
    ("seen", "wanted", "good"),
    [
        ("2.13.0+cpu", ">=2.13", True), ("7.5.0", "<7.7,>=7.5", True), ("7.7", "<7.7,>=7.5", False), ("0.3.36", "==0.3.36", True),
        ("0.3.4", "==0.3.36", False), ("2026.10.11549", ">=2026.10", True), ("1", ">=1.0.1", False), ("5", "", True),
    ],
)  # fmt: skip
def test_versions(seen, wanted, good):
    assert doctor._satisfies(seen, wanted) is good


def test_nothing_heavy_is_imported():
    code = "import sys; from edgeft.doctor import examine; examine(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())
