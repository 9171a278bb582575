"""The Python packages of a box: edgeft's own wheel from what is installed here, and what it needs, at the versions that run here."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib
import io
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution, distributions
from pathlib import Path

from edgeft import console
from edgeft.errors import EnvironmentFault
from edgeft.files import sha256_file
from edgeft.home import cache_dir

EXTRAS = {"gguf": "gguf,serve", "onnx": "onnx,serve", "transformers": "compress,serve", "encoder": "encoder"}
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
GLIBC = 36  # 2.36: Debian 12, Raspberry Pi OS of 2023; wheels that want a newer one don't run there
LEAVE_OUT = ("__pycache__", ".pyc")


def own_wheel() -> tuple[str, bytes]:
    """(file name, content) of a wheel of the edgeft that runs now, the same bytes each time."""
    from edgeft import __version__

    info = f"edgeft-{__version__}.dist-info"
    files = {name: path.read_bytes() for name, path in sorted(_modules().items())}
    files[f"{info}/METADATA"] = _metadata(__version__).encode()
    files[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: edgeft\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    files[f"{info}/entry_points.txt"] = b"[console_scripts]\nedgeft = edgeft.cli:main\n"
    record = io.StringIO()
    rows = csv.writer(record, lineterminator="\n")
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.writerow([name, f"sha256={digest}", len(content)])
    rows.writerow([f"{info}/RECORD", "", ""])
    files[f"{info}/RECORD"] = record.getvalue().encode()
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            wheel.writestr(entry, content)
    return f"edgeft-{__version__}-py3-none-any.whl", made.getvalue()


def _modules() -> dict[str, Path]:
    """Name in the wheel -> file, of every package of edgeft, wherever its folder lies."""
    import edgeft

    root = Path(edgeft.__file__).parent
    found: dict[str, Path] = {}
    for folder in [root, *sorted(p for p in root.iterdir() if p.is_dir() and p.is_symlink())]:
        for path in folder.resolve().rglob("*"):
            inside = path.relative_to(folder.resolve())
            if path.is_file() and not any(
                part in LEAVE_OUT or part.endswith(LEAVE_OUT) for part in inside.parts
            ):
                where = Path("edgeft", inside) if folder == root else Path("edgeft", folder.name, inside)
                found[where.as_posix()] = path
    for name in ("compress", "bench", "router", "serve", "profiles", "tune", "tco", "deploy"):
        if f"edgeft/{name}/__init__.py" not in found:  # an editable install without links
            module = Path(str(importlib.import_module(f"edgeft.{name}").__file__)).parent
            found |= {
                f"edgeft/{name}/{p.relative_to(module).as_posix()}": p
                for p in module.rglob("*")
                if p.is_file() and p.suffix != ".pyc"
            }
    return found


def _metadata(version: str) -> str:
    """The installed distribution's metadata without its long text."""
    text = distribution("edgeft").read_text("METADATA") or distribution("edgeft").read_text("PKG-INFO") or ""
    head, needs = text.split("\n\n", 1)[0], _declared()
    left_out = ("Dynamic:", "License-File:", *(("Requires-Dist:", "Provides-Extra:") if needs else ()))
    lines = [line for line in head.splitlines() if not line.startswith(left_out)] + needs
    return "\n".join(re.sub(r"^Version: .*", f"Version: {version}", line) for line in lines) + "\n"


def _declared() -> list[str]:
    """What the pyproject.toml beside these sources needs, as lines of metadata: an editable install's own may be older. Empty
    where there is none."""
    import edgeft

    place = Path(edgeft.__file__).parent.parent / "pyproject.toml"
    project = tomllib.loads(place.read_text(encoding="utf-8"))["project"] if place.is_file() else {}
    if project.get("name") != "edgeft":
        return []
    lines = [f"Requires-Dist: {need}" for need in project["dependencies"]]
    for extra, needs in project["optional-dependencies"].items():
        lines.append(f"Provides-Extra: {extra}")
        for name, _, marker in (need.partition(";") for need in needs):
            only = f'({marker.strip()}) and extra == "{extra}"' if marker else f'extra == "{extra}"'
            lines.append(f"Requires-Dist: {name.strip()}; {only}")
    return lines


def installed() -> str:
    """name==version of every distribution that runs here: what was measured is what is installed."""
    found = {
        str(d.metadata["Name"]).lower().replace("_", "-"): d.version
        for d in distributions()
        if d.metadata["Name"]
    }
    return "".join(
        f"{name}=={version.split('+')[0]}\n" for name, version in sorted(found.items()) if name != "edgeft"
    )


def wheels(engines: set[str], arch: str, python: str) -> list[Path]:
    """Wheels of everything that serving needs on a platform, pip too, edgeft's own first; kept in the user's cache.

    Raises EnvironmentFault where one does not exist for the platform or can't be fetched.
    """
    name, content = own_wheel()
    pins, extras = installed(), sorted({EXTRAS[engine] for engine in engines})
    wanted = f"edgeft[{','.join(sorted({e for group in extras for e in group.split(',')}))}]"
    key = hashlib.sha256(f"{pins}|{wanted}|{arch}|{python}|{_metadata('0')}".encode()).hexdigest()[:16]
    folder = cache_dir("wheels", f"{arch}-{python}-{key}")
    done = folder / ".whole"
    folder.mkdir(parents=True, exist_ok=True)
    own = cache_dir("wheels") / name
    own.write_bytes(content)
    if not done.exists():
        (folder / "constraints.txt").write_text(pins)
        tags = [word for tag in platforms(arch) for word in ("--platform", tag)]
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary=:all:", "--dest", str(folder),
            "--python-version", python, "--implementation", "cp", *tags, "-c", str(folder / "constraints.txt"),
            f"{wanted} @ {own.as_uri()}", "pip",
        ]  # fmt: skip
        with console.step(f"fetching wheels for {arch}, Python {python}"):
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            said = (ran.stderr.strip().splitlines() or ["no word"])[-1]
            raise EnvironmentFault(
                f"the wheels for {arch} and Python {python} could not be fetched: {said}",
                "edgeft bundle … --lock-only, and the box fetches them itself",
            )
        done.touch()
    return [own, *sorted(p for p in folder.glob("*.whl") if not p.name.startswith("edgeft-"))]


def platforms(arch: str) -> list[str]:
    """Every tag of a wheel that runs on a Linux of GLIBC, the newest first."""
    machine = MACHINES[arch]
    old = {"amd64": 5, "arm64": 17}[arch]
    legacy = ("manylinux2014", *(("manylinux2010", "manylinux1") if arch == "amd64" else ()))
    return [
        *(f"manylinux_2_{n}_{machine}" for n in range(GLIBC, old - 1, -1)),
        *(f"{tag}_{machine}" for tag in legacy),
    ]


def lock(files: list[Path]) -> bytes:
    """A requirements file with a hash for each wheel."""
    lines = []
    for path in files:
        name, version = path.name.split("-")[:2]
        lines.append(f"{name.replace('_', '-').lower()}=={version} --hash=sha256:{sha256_file(path)}\n")
    return "".join(sorted(lines)).encode()
