"""llama.cpp's own converter, out of the source distribution of the installed llama-cpp-python.

Fetched once by pip, kept in the user's cache. Its `gguf-py` is newer than the gguf of the same
number on PyPI, so it goes first on the child's PYTHONPATH. `EDGEFT_CONVERTER` names another copy.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from edgeft import child, console
from edgeft.errors import EnvironmentFault, UsageError, missing_extra
from edgeft.files import disk_errors, replace_folder
from edgeft.home import cache_dir

SCRIPT = "convert_hf_to_gguf.py"
LORA_SCRIPT = "convert_lora_to_gguf.py"
SCRIPTS = (SCRIPT, LORA_SCRIPT)
WANTED = (*SCRIPTS, "conversion/", "gguf-py/gguf/", "LICENSE")


def installed_version() -> str:
    """The version of llama-cpp-python. Raises EnvironmentFault where it is not installed."""
    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        raise missing_extra("llama-cpp-python", "compress") from None


def location() -> Path:
    """Where the converter is or would be."""
    if own := os.environ.get("EDGEFT_CONVERTER"):
        return Path(own)
    return cache_dir("converters", f"llama-cpp-python-{installed_version()}")


def converter() -> Path:
    """The converter's folder, fetched if need be.

    Raises EnvironmentFault where pip can't fetch it, UsageError where EDGEFT_CONVERTER holds none.
    """
    folder = location()
    # A folder that an older edgeft kept may lack a script that is wanted now: it is fetched anew.
    missing = [script for script in SCRIPTS if not (folder / script).is_file()]
    if not missing:
        return folder
    if "EDGEFT_CONVERTER" in os.environ:
        raise UsageError(
            f"EDGEFT_CONVERTER is {folder}, which has no {missing[0]}.", "unset EDGEFT_CONVERTER"
        )
    release = installed_version()
    requirement = f"llama-cpp-python=={release}"
    log = cache_dir("logs", "converter.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with console.step(f"fetching llama.cpp's converter ({requirement}, source)"), disk_errors(folder):
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as scratch:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--no-binary",
                "llama-cpp-python",
                "-d",
                scratch,
            ]
            with log.open("w") as out:
                code = subprocess.run(
                    [*command, requirement], stdout=out, stderr=subprocess.STDOUT, check=False
                ).returncode
            archives = list(Path(scratch).glob("*.tar.gz"))
            if code != 0 or not archives:
                raise EnvironmentFault(
                    f"pip could not fetch {requirement} as source: {child.last_line(log)}", f"less {log}"
                )
            unpacked = Path(scratch, "converter")
            _unpack(archives[0], unpacked)
            replace_folder(unpacked, folder)
    return folder


def _unpack(archive: Path, target: Path) -> None:
    """Take the converter alone out of the archive, with its paths made relative to llama.cpp's root."""
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, inside = member.name.partition("/vendor/llama.cpp/")
            if inside and member.isfile() and inside.startswith(WANTED):
                member.name = inside
                tar.extract(member, target, filter="data")


def convert(model: Path, out: Path, kind: str, name: str, log: Path) -> dict[str, float]:
    """Run upstream's converter on a model folder as its documentation says; returns what it cost.

    `kind` is its --outtype: f32, f16, bf16, q8_0.
    """
    folder = converter()
    return child.run(
        [
            sys.executable,
            "-m",
            "edgeft.tokenizer",
            str(folder / SCRIPT),
            str(model),
            "--outtype",
            kind,
            "--outfile",
            str(out),
            "--model-name",
            name,
        ],
        log=log,
        title="llama.cpp's converter",
        env={"PYTHONPATH": str(folder / "gguf-py")},
    )
