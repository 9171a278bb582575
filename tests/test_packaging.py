"""The mapped packages stay one package, and what is declared is what is there."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPED = {k: v for k, v in PROJECT["tool"]["setuptools"]["package-dir"].items() if k != "edgeft"}


def test_packages_are_the_folders_on_disk():
    found = {"edgeft"}
    for name, folder in {"edgeft": "edgeft", **MAPPED}.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inside = init.parent.relative_to(ROOT / folder)
            if not any((ROOT / folder / p).is_symlink() for p in [inside, *inside.parents]):
                found.add(".".join([name, *inside.parts]))
    assert sorted(found) == sorted(PROJECT["tool"]["setuptools"]["packages"])


@pytest.mark.parametrize("folder", MAPPED.values())
def test_importing_from_the_checkout_is_refused(folder):
    done = subprocess.run(
        [sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and f"import edgeft.{folder}" in done.stderr


@pytest.mark.parametrize("folder", MAPPED.values())
def test_links_for_static_tools_point_home(folder):
    link = ROOT / "edgeft" / folder
    assert link.is_symlink() and link.resolve() == ROOT / folder


def test_an_edge_box_gets_no_compiler_and_no_torch():
    extras = PROJECT["project"]["optional-dependencies"]
    assert [r.split(">")[0] for r in extras["gguf"]] == ["xllamacpp"]
    core = " ".join(PROJECT["project"]["dependencies"])
    assert not any(word in core for word in ("torch", "llama-cpp", "onnx", "transformers"))
    assert "gpu" not in extras["all"][0]


def test_serving_and_measuring_import_without_torch():
    """What runs on an edge box must not need the packages that made the artefact."""
    code = (
        "import sys\n"
        "class No:\n"
        "    def find_spec(self, name, *a):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'gguf', 'llama_cpp', 'peft', 'onnx', 'safetensors_torch'):\n"
        "            raise ImportError('hidden: ' + name)\n"
        "sys.meta_path.insert(0, No())\n"
        "import edgeft.bench, edgeft.router, edgeft.serve.app, edgeft.compress, edgeft.engines.gguf, edgeft.engines.onnx\n"
        "print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr
