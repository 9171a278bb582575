"""Build the wheel and import it from an empty directory, with the checkout out of reach."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("cli", "compress", "bench", "router", "serve", "profiles", "tune", "tco", "deploy", "engines.gguf")


def main() -> None:
    """Fail where a module or a data file is missing from the wheel."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", scratch, str(ROOT)],
            check=True,
        )
        wheel = next(Path(scratch).glob("edgeft-*.whl"))
        names = zipfile.ZipFile(wheel).namelist()
        assert any(n.startswith("edgeft/profiles/boxes/") for n in names), "the profiles are not in the wheel"
        assert "edgeft/compress/recipes/edge-cpu.yaml" in names, "the recipes are not in the wheel"
        assert "edgeft/tco/scenarios/support-desk.yaml" in names, "the scenarios are not in the wheel"
        assert "edgeft/deploy/templates/box.sh" in names, "the scripts for a box are not in the wheel"
        assert "edgeft/bench/report.schema.json" in names, "the schema of report.json is not in the wheel"
        assert "edgeft/serve/page/index.html" in names, "the proxy's page is not in the wheel"
        assert not any(n.split("/")[0] in ("bench", "compress", "router", "serve") for n in names), (
            "a generic name leaks"
        )
        home = Path(scratch, "venv")
        venv.create(home, system_site_packages=False, with_pip=True)
        python = home / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
        site = next((home / "lib").glob("python*/site-packages"))
        here = next(p for p in map(Path, sys.path) if p.name == "site-packages")
        (site / "borrowed.pth").write_text(f"import sys; sys.path.append({str(here)!r})\n")
        empty = Path(scratch, "empty")
        empty.mkdir()
        code = f"import importlib, edgeft\nfor m in {MODULES!r}: importlib.import_module('edgeft.' + m)\nprint(edgeft.__file__)"
        done = subprocess.run([python, "-c", code], cwd=empty, check=True, capture_output=True, text=True)
        assert str(home) in done.stdout, f"imported {done.stdout.strip()}, which is not the wheel"
        subprocess.run(
            [home / "bin" / "edgeft", "profiles", "list", "--json"],
            cwd=empty,
            check=True,
            capture_output=True,
        )
    print(f"{wheel.name}: imports from an empty directory")


if __name__ == "__main__":
    main()
