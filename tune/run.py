"""Rows -> LoRA adapter, with the manifest that says which rows it saw."""

from __future__ import annotations

import importlib.util
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgeft import child, console
from edgeft.compress.artifacts import TUNE_MANIFEST
from edgeft.compress.provenance import installed, origin_without_files
from edgeft.errors import missing_extra
from edgeft.files import list_files, read_json, sha256_file, sha256_json, staged_folder, write_json
from edgeft.pull import check_model_folder, weights_sha256
from edgeft.rows import load_rows, row_hash

DEFAULTS: dict[str, Any] = {
    "rank": 16,
    "alpha": 32,
    # Dropout costs half of the forward pass on a CPU and short runs stop early instead.
    "dropout": 0.0,
    "learning_rate": 2e-3,
    "batch_size": 16,
    "epochs": 3,
    "seed": 7,
    "max_length": 512,
    "held_out": 0.1,
    "max_seconds": None,
    "last_layers": None,
}


def tune(base: Path, data: Path, out: Path, **changed: Any) -> dict[str, Any]:
    """Train a LoRA adapter on `data` into the folder `out`; returns its manifest.

    `changed` overrides DEFAULTS. An adapter that stands there already and was made from the same
    inputs is kept; an interrupted run goes on from its last evaluation.
    Raises UsageError for wrong rows or a folder that is no model, EnvironmentFault where a package is missing.
    """
    for package in ("torch", "transformers", "peft"):
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, "tune")
    check_model_folder(base)
    rows = load_rows(data)
    recipe = {**DEFAULTS, **changed}
    versions = installed(("torch", "transformers", "peft"))
    made_from = {
        "base": {**origin_without_files(base), "weights_sha256": weights_sha256(base)},
        "data_sha256": sha256_file(data),
    }
    key = sha256_json([made_from, recipe, versions])
    if _standing(out, key):
        console.note(f"  {out}: kept, made from the same inputs before")
        return read_json(out / TUNE_MANIFEST)

    work = out.parent / f".{out.name}.work"
    if (work / "key").is_file() and (work / "key").read_text() != key:
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    (work / "key").write_text(key)
    log = work / "tune.log"
    with console.step(f"training on {len(rows)} rows", log), staged_folder(out) as staging:
        made = child.call(
            "edgeft.tune.lora:train",
            log=log,
            title="training",
            base=str(base),
            data=str(data),
            out=str(staging),
            work=str(work),
            recipe=recipe,
        )
        manifest = {
            "schema": "edgeft/adapter@1",
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "made_from": made_from,
            "recipe": recipe,
            "recipe_sha256": key,
            "versions": versions,
            "files": list_files(staging),
            "result": {k: made[k] for k in made if k not in (*child.COST, "history")},
            "seen_rows": {"train": [row_hash(row) for row in rows]},
            "cost": {"wall_s": made["wall_s"], "peak_rss_bytes": made["peak_rss_bytes"]},
        }
        write_json(staging / TUNE_MANIFEST, manifest)
    shutil.rmtree(work, ignore_errors=True)
    return manifest


def _standing(out: Path, key: str) -> bool:
    """True where `out` holds an adapter made from the same inputs, whole."""
    if not (out / TUNE_MANIFEST).is_file():
        return False
    manifest = read_json(out / TUNE_MANIFEST)
    files = manifest["files"]
    return manifest["recipe_sha256"] == key and all(
        (out / n).is_file() and sha256_file(out / n) == f["sha256"] for n, f in files.items()
    )
