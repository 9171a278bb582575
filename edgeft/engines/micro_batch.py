"""How many tokens of a prompt llama.cpp's server may read at once, so that a client that leaves is noticed in time.

The server looks for closed connections between batches only, and its batch can't be changed while it runs. Prefill speed is measured
when an artefact is first loaded on a box, and remembered in the user's cache.
"""

from __future__ import annotations

import http.client
import json
import time
from pathlib import Path
from typing import Any

from edgeft.engines.decoding import tokens_in

TRIAL = 64  # tokens a batch while speed is measured
SCHEMA = "edgeft/prefill@1"
# What prefill speed depends on beside the file and the box.
SPEED_OPTIONS = (
    "threads",
    "threads_batch",
    "cores",
    "gpu_layers",
    "kv_type",
    "flash_attention",
    "speculative",
    "draft",
)


def note_of(file: Path, engine: str, options: dict[str, Any]) -> Path:
    """Where the speed of a file on this box with these options is remembered."""
    from edgeft.engines.run_profile import this_box
    from edgeft.files import sha256_json
    from edgeft.home import cache_dir

    facts = file.stat()
    key = {
        "file": [str(file.resolve()), facts.st_size, facts.st_mtime_ns],
        "engine": engine,
        "box": this_box(),
        "options": {name: options[name] for name in SPEED_OPTIONS if name in options},
    }
    return cache_dir("prefill", f"{sha256_json(key)[:32]}.json")


def known_speed(note: Path) -> float | None:
    """Tokens a second as remembered; None where nothing is, or it can't be read."""
    try:
        value = json.loads(note.read_text(encoding="utf-8"))
        return float(value["tok_per_s"]) if value["schema"] == SCHEMA else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(note: Path, speed: float) -> None:
    """Keep a measured speed. A cache that can't be written is no reason not to serve."""
    from edgeft.errors import EdgeftError
    from edgeft.files import write_json

    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, {"schema": SCHEMA, "tok_per_s": speed})
    except (OSError, EdgeftError):
        pass


def measured_speed(port: int, key: str, repeats: int = 2) -> float:
    """Prefill in tokens a second of a server that answers nobody else: the best of some prompts of TRIAL tokens.

    The ids are common ones of any vocabulary; what they mean does not matter to the arithmetic.
    """
    best = 0.0
    for turn in range(repeats + 1):  # the first one warms up
        ids = [(7 * turn + 3 * i) % 90 + 3 for i in range(TRIAL)]
        begun = time.perf_counter()
        ask(
            port, key, "/completion", {"prompt": ids, "n_predict": 1, "cache_prompt": False, "temperature": 0}
        )
        if turn:
            best = max(best, TRIAL / (time.perf_counter() - begun))
    return best


def within(speed: float, batch_s: float, options: dict[str, Any]) -> dict[str, Any]:
    """The options with a batch that keeps `batch_s`; a run profile's own stands where it does."""
    batch = min(options.get("batch", 2048), tokens_in(speed, batch_s))
    return {**options, "batch": batch, "ubatch": min(options.get("ubatch", 512), batch)}


def ask(port: int, key: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """One question to a server on this box. Raises OSError or RuntimeError where it does not answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        head = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, head)
        answer = connection.getresponse()
        data = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path} answered {answer.status}: {data[:200]!r}")
        return dict(json.loads(data))
    finally:
        connection.close()
