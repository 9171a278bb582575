"""A bundle as a folder to build an image from: the same files, with a Dockerfile and a compose file or Kubernetes manifests."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from edgeft.deploy import archive, templates
from edgeft.deploy.bundle import Wanted, contents
from edgeft.errors import UsageError
from edgeft.files import staged_folder


def write_folder(wanted: Wanted, out: Path, image: str, k8s: bool) -> dict[str, Any]:
    """Write the folder whole or not at all; returns its manifest."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / archive.MANIFEST).is_file())):
        raise UsageError(f"{out} exists and is no bundle's folder; it is left alone.", "--out box/")
    files, manifest = contents(wanted)
    encoded = archive.encode(manifest)
    files |= {archive.MANIFEST: encoded, archive.SUMS: archive.sums(manifest["files"], encoded)}
    config, mib = manifest["config"], -(-manifest["needs"]["memory_bytes"] // (1 << 20))
    arch = {"x86_64": "amd64", "aarch64": "arm64"}[manifest["needs"]["machine"]]
    values = {
        "image": image, "port": str(config["port"]), "python": wanted.python, "id": manifest["id"], "memory_mib": str(mib), "arch": arch,
        "context": str(config["context"]),
        "slots": str(config.get("slots", 1)), "pip": "" if wanted.lock_only else "--no-index --find-links wheels --require-hashes --no-deps",
        "constraints": "-c constraints.txt" if wanted.lock_only else "",
    }  # fmt: skip
    names = ["Dockerfile", *(["k8s.yaml"] if k8s else ["compose.yaml"])]
    files |= {name: templates.text(name, **values) for name in names}
    with staged_folder(out) as staging:
        for name, source in files.items():
            path = staging / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, bytes):
                path.write_bytes(source)
            else:
                shutil.copyfile(source, path)
    return manifest
