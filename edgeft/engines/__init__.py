"""How an artefact is run, for `bench` and `serve` alike, so that what was measured is what is served.

An engine is a child process that speaks OpenAI's chat API on a loopback port with a key of its own.
An engine module has
    REQUIRES                    import name -> extra that brings it
    start(folder, options)      -> {"port", "build"}; runs in the child, loads the model and listens
    logits(folder, ids, options) -> iterator of float32 arrays [len(ids[i]), vocabulary], one a row; in a child
`options` has threads, context (tokens) and key. Third parties register under the entry-point group
`edgeft.engines`.
"""

from __future__ import annotations

import importlib
import importlib.util
from importlib.metadata import entry_points
from types import ModuleType

from edgeft.errors import missing_extra, unknown

ENGINES = {
    "gguf": "edgeft.engines.gguf",
    "llama_cpp": "edgeft.engines.llama_cpp",  # the same files by llama-cpp-python
    "llama_server": "edgeft.engines.llama_server",  # the same files by a llama-server binary
    "onnx": "edgeft.engines.onnx",
    "transformers": "edgeft.engines.transformers",
}
GGUF = ("gguf", "llama_cpp", "llama_server")  # those that run GGUF files


def engine(name: str) -> ModuleType:
    """The module of an engine. Raises where the name is unknown or its packages are missing."""
    known = {**ENGINES, **{e.name: e.value for e in entry_points(group="edgeft.engines")}}
    if name not in known:
        raise unknown("the engine", name, known, "see docs/engines.md")
    module = importlib.import_module(known[name])
    for package, extra in module.REQUIRES.items():
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, extra)
    return module
