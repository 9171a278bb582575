"""How an artefact is run on a box: the options that `edgeft bench --autotune` chose there, kept beside the artefact.

`run-profile.json` holds the options of each box that was tuned; `bench` and `serve` start the artefact with those of the box
they are on. Another box, another processor: the engine's defaults.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeft.engines import GGUF

FILE = "run-profile.json"
SCHEMA = "edgeft/run-profile@1"
# What an engine may be told, and what stands for it. `cores`: the CPUs that it is bound to; `engine`: another one that runs its files.
LLAMA = ("threads", "threads_batch", "cores", "batch", "ubatch", "flash_attention", "kv_type")
SERVER = (*LLAMA, "poll", "speculative", "draft", "draft_tokens")
KNOWN = {
    "gguf": (*SERVER, "engine"),
    "llama_server": SERVER,
    "llama_cpp": LLAMA,
    "onnx": ("threads", "cores", "spin"),
    "transformers": ("threads", "cores"),
}  # fmt: skip


def this_box() -> str:
    """The id of this box, as `edgeft profiles detect` makes it."""
    from edgeft.engines.local import usable_cores
    from edgeft.profiles.detection import box_id, cpu_facts, memory_facts

    reasons: dict[str, str] = {}
    total = memory_facts(reasons)["total_bytes"]
    return box_id(cpu_facts(reasons)["model"], usable_cores(), round(total / 1e9, 1) if total else None)


def options_for(folder: Path, engine: str) -> dict[str, Any]:
    """The options that were chosen for this artefact on this box with this engine; empty where there are none.

    A draft's path is kept relative to the artefact; where the draft is gone, so is the option. Where the engine that they were
    found with is gone, so are they all. The file names no binary: what is run is the user's own, never what came with an artefact.
    """
    kept = read(folder)["boxes"].get(_key(engine)) if (folder / FILE).is_file() else None
    if not kept:
        return {}
    options = {key: value for key, value in kept["options"].items() if key in KNOWN.get(engine, ())}
    if "engine" in options and not can_run(options["engine"]):
        return {}
    if "draft" in options:
        draft = (folder / options["draft"]).resolve()
        options["draft"] = str(draft)
        if not draft.is_file():
            return {k: v for k, v in options.items() if k not in ("draft", "draft_tokens", "speculative")}
    return options


def can_run(engine: str) -> bool:
    """Can GGUF files be run here by this engine: a `llama-server` that the user named or has on the PATH?"""
    from edgeft.engines.llama_server import binary_of
    from edgeft.errors import UsageError

    try:
        return engine == "llama_server" and bool(binary_of({}))
    except UsageError:
        return False


def _key(engine: str | None) -> str:
    """What a box's options stand under; engines beside an artefact's own have a name of their own."""
    return f"{this_box()} {engine}" if engine in GGUF and engine != "gguf" else this_box()


def read(folder: Path) -> dict[str, Any]:
    """The file, an empty one where there is none. Raises UsageError where it has another schema."""
    from edgeft.errors import UsageError
    from edgeft.files import read_json

    if not (folder / FILE).is_file():
        return {"schema": SCHEMA, "boxes": {}}
    value = read_json(folder / FILE)
    if (
        not isinstance(value, dict)
        or value.get("schema") != SCHEMA
        or not isinstance(value.get("boxes"), dict)
    ):
        raise UsageError(
            f"{folder / FILE} is not a run profile.", f"rm {folder / FILE}; edgeft bench … --autotune"
        )
    return value


def keep(folder: Path, found: dict[str, Any]) -> None:
    """Keep what was chosen for this box: `engine`, `options`, `gain` and how they were found."""
    from edgeft.files import write_json

    value = read(folder)
    options = dict(found["options"])
    if "draft" in options:
        import os

        options["draft"] = os.path.relpath(options["draft"], folder.resolve())
    value["boxes"][_key(found.get("engine"))] = {**found, "options": options}
    write_json(folder / FILE, value)
