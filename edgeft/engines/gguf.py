"""GGUF: served by xllamacpp (llama.cpp's server, prebuilt), logits by llama-cpp-python's decode.

A folder with `base.json` holds an adapter alone, which is loaded beside the base that the file names.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edgeft.device import gpu_layers
from edgeft.engines import micro_batch
from edgeft.engines.decoding import beginning
from edgeft.engines.memory import SMOOTHED, gguf_facts
from edgeft.errors import UsageError

REQUIRES = {"xllamacpp": "gguf"}
_alive: list[Any] = []  # the server lives as long as its object


def start(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Load the GGUF file in `folder` and listen. Runs in a worker process.

    With `batch_s` no batch of a prompt takes longer: the contract about clients that leave (docs/engines.md).
    """
    from xllamacpp import __version__

    model, beside = files_of(folder, options)
    if batch_s := options.get("batch_s"):
        options = micro_batched(
            model, "gguf", options, batch_s, lambda trial: listening(model, beside, trial)
        )
    server = listening(model, beside, options)
    _alive.append(server)
    port = port_of(server)
    return {
        "port": port,
        "build": f"xllamacpp {__version__}",
        "load_mode": "mmap",
        **told(port, options, list(options.get("adapters") or {})),
    }


def files_of(folder: Path, options: dict[str, Any]) -> tuple[Path, list[tuple[Path, float]]]:
    """The model's file, and adapters' files with the scale that they begin with: one of the folder's own 1, those by request 0.

    Raises UsageError where an adapter belongs to another base.
    """
    model, own = model_and_adapter(folder)
    named = {name: Path(path) for name, path in (options.get("adapters") or {}).items()}
    if own and named:
        raise UsageError(
            f"{folder} is an adapter itself.", "name its base as the model to switch adapters by request"
        )
    for name, path in named.items():
        if not path.exists():
            raise UsageError(
                f"the adapter '{name}' is missing: there is no {path}.",
                "edgeft compress … --to gguf-lora:f16",
            )
        if path.is_dir() and (path / "base.json").is_file():
            base = model_and_adapter(path)[0]
            if base.stat().st_size != model.stat().st_size or base.name != model.name:
                raise UsageError(
                    f"the adapter '{name}' is for {base.name}, not for {model.name}.",
                    "edgeft compress … --to gguf-lora:…",
                )
    if (own or named) and gguf_facts(model).get(SMOOTHED):
        raise UsageError(
            f"{model.name} has evened channels: an adapter made for the plain model does not fit it.",
            "edgeft compress BASE --adapter … --to gguf-lora:f16 (writes the base beside it)",
        )
    return model, [(own, 1.0)] if own else [(gguf_file(path), 0.0) for path in named.values()]


def micro_batched(
    model: Path, engine: str, options: dict[str, Any], batch_s: float, serve: Callable[[dict[str, Any]], Any]
) -> dict[str, Any]:
    """The options with a batch of at most `batch_s`. Where this box does not know the file's speed, a server by `serve` is asked first."""
    note = micro_batch.note_of(model, engine, options)
    speed = micro_batch.known_speed(note)
    if speed is None:
        trial = serve(
            {
                **options,
                "batch": micro_batch.TRIAL,
                "ubatch": micro_batch.TRIAL,
                "slots": 1,
                "context": 4 * micro_batch.TRIAL,
            }
        )
        try:
            speed = micro_batch.measured_speed(port_of(trial), options["key"])
        finally:
            close = getattr(trial, "close", None)  # xllamacpp's server ends with its object
            if close:
                close()
            del trial
        micro_batch.remember(note, speed)
    return micro_batch.within(speed, batch_s, options)


def port_of(server: Any) -> int:
    """The port that a server listens on."""
    return int(server.listening_address.rsplit(":", 1)[1])


def told(port: int, options: dict[str, Any], adapters: list[str]) -> dict[str, Any]:
    """`slots`, `batch` and `features` of llama.cpp's server, asked where the chat template decides."""
    try:
        caps = micro_batch.ask(port, options["key"], "/props").get("chat_template_caps") or {}
    except (OSError, RuntimeError, ValueError):  # a build that doesn't tell
        caps = {}
    return {
        "slots": slots_of(options),
        "batch": options.get("batch"),
        "features": {
            "completions": True, "embeddings": pooling_of(options) or False, "tools": bool(caps.get("supports_tools")), "json_schema": True,
            "logprobs": True, "top_logprobs": True, "adapters": adapters, "id_slot": True, "prompt_progress": True,
        },
    }  # fmt: skip


def slots_of(options: dict[str, Any]) -> int:
    """Requests at a time: `slots`, each with a context of its own, or `parallel`, which share one."""
    return int(options.get("slots") or options.get("parallel") or 1)


def pooling_of(options: dict[str, Any]) -> str | None:
    """How embeddings are pooled, `last` where nothing is said, None where none are wanted."""
    wanted = options.get("embeddings")
    return ("last" if wanted is True else str(wanted)) if wanted else None


def listening(model: Path, beside: list[tuple[Path, float]], options: dict[str, Any]) -> Any:
    """xllamacpp's server for a model with adapters beside it."""
    import xllamacpp as llama

    p = llama.CommonParams()
    p.model.path = str(model)
    adapters = []
    for path, scale in beside:
        loaded = llama.CommonAdapterLoraInfo()
        loaded.path, loaded.scale = str(path), scale
        adapters.append(loaded)
    p.lora_adapters = adapters
    p.model_alias = {options["name"]}
    p.n_parallel = slots_of(options)
    p.n_ctx = options["context"] * (p.n_parallel if "slots" in options else 1)
    p.kv_unified = False  # a slot's context is its own: one long request takes none of another's
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = options["threads"]
    p.n_gpu_layers = gpu_layers(options)
    set_run_options(llama, p, options)
    if pooling := pooling_of(options):
        p.embedding = True
        p.pooling_type = getattr(llama.llama_pooling_type, f"LLAMA_POOLING_TYPE_{pooling.upper()}")
    p.fit_params = False
    p.load_mode = llama.llama_load_mode.LLAMA_LOAD_MODE_MMAP
    p.api_keys = [options["key"]]
    p.hostnames = ["127.0.0.1"]
    p.port = 0
    p.cors_origins = ""
    p.ui = p.endpoint_slots = p.endpoint_props = False
    # The default prompt cache can restore another user's conversation (llama.cpp #27148).
    p.cache_ram_mib = 0
    p.cache_idle_slots = False
    p.verbosity = 1
    return llama.Server(p)


def set_run_options(llama: Any, p: Any, options: dict[str, Any]) -> None:
    """Give the server the options of a run profile (`edgeft.engines.run_profile`); one that is absent stays the server's default."""
    if "threads_batch" in options:
        p.cpuparams_batch.n_threads = options["threads_batch"]
    if "batch" in options:
        p.n_batch = options["batch"]
    if "ubatch" in options:
        p.n_ubatch = options["ubatch"]
    if "poll" in options:
        p.cpuparams.poll = p.cpuparams_batch.poll = options["poll"]
    if "flash_attention" in options:
        on = llama.llama_flash_attn_type
        p.flash_attn_type = (
            on.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if options["flash_attention"]
            else on.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
    if "kv_type" in options:
        p.cache_type_k = p.cache_type_v = getattr(llama.ggml_type, f"GGML_TYPE_{options['kv_type'].upper()}")
    if "speculative" in options:
        kind = options["speculative"].upper()
        p.speculative.types = [getattr(llama.common_speculative_type, f"COMMON_SPECULATIVE_TYPE_{kind}")]
    if "draft" in options:
        p.speculative.draft.mparams.path = str(options["draft"])
        p.speculative.draft.cpuparams.n_threads = p.speculative.draft.cpuparams_batch.n_threads = options[
            "threads"
        ]
    if "draft_tokens" in options:
        p.speculative.draft.n_max = options["draft_tokens"]


def gguf_file(folder: Path) -> Path:
    """The GGUF file of an artefact (or the file itself); of a split one the first part."""
    return folder if folder.is_file() else sorted(folder.glob("*.gguf"))[0]


def model_and_adapter(folder: Path) -> tuple[Path, Path | None]:
    """The model's GGUF file, and the adapter's where the folder holds one to be loaded beside a base.

    Raises UsageError where that base is gone.
    """
    beside = folder / "base.json"
    if not folder.is_dir() or not beside.is_file():
        return gguf_file(folder), None
    base = json.loads(beside.read_text(encoding="utf-8"))
    file = (folder / base["file"]).resolve()
    if not file.is_file() or file.stat().st_size != base["bytes"]:
        raise UsageError(
            f"{folder} is an adapter for {base['file']}, and no such file of {base['bytes']} bytes lies there.",
            "keep the two folders side by side; edgeft compress … --to gguf-lora:… makes them again",
        )
    return file, gguf_file(folder)


def logits(folder: Path, ids: list[list[int]], options: dict[str, Any]) -> Iterator[Any]:
    """Logits of every position, a float32 array [tokens, vocabulary] a row. Runs in a child process.

    xllamacpp's server gives no log-probabilities of the prompt, so this is another build of llama.cpp
    than the one that serves; reports name both. With the option `reuse` a row's beginning that the row before it had is not
    computed again.
    """
    import llama_cpp as llama
    import numpy as np

    longest = max(len(row) for row in ids)
    llama.llama_backend_init()
    file, adapter_file = model_and_adapter(folder)
    model = llama.llama_model_load_from_file(str(file).encode(), model_parameters(llama, 0))
    if not model:
        raise RuntimeError(f"llama.cpp can't load {file}")
    context_parameters = llama.llama_context_default_params()
    context_parameters.n_ctx = context_parameters.n_batch = context_parameters.n_ubatch = longest + 1
    context_parameters.n_threads = context_parameters.n_threads_batch = options["threads"]
    if options.get("exact"):
        # By default keys and values are kept as float16, which costs a float32 file some 5e-3 in its logits.
        context_parameters.type_k = context_parameters.type_v = llama.GGML_TYPE_F32
        context_parameters.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if "kv_type" in options:
        context_parameters.type_k = context_parameters.type_v = getattr(
            llama, f"GGML_TYPE_{options['kv_type'].upper()}"
        )
        context_parameters.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
    context = llama.llama_init_from_model(model, context_parameters)
    if adapter_file:
        adapter = llama.llama_adapter_lora_init(model, str(adapter_file).encode())
        scale = (ctypes.c_float * 1)(1.0)
        if not adapter or llama.llama_set_adapters_lora(
            context, (llama.llama_adapter_lora_p_ctypes * 1)(adapter), 1, scale
        ):
            raise RuntimeError(f"llama.cpp can't load the adapter {adapter_file}")
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    batch = llama.llama_batch_init(longest, 0, 1)
    try:
        last: list[int] = []
        found = None
        for row in ids:
            memory = llama.llama_get_memory(context)
            shared = beginning(row, last) if options.get("reuse") else 0
            if not shared or not llama.llama_memory_seq_rm(memory, 0, shared, -1):
                shared = 0  # some kinds of memory can't be cut
                llama.llama_memory_clear(memory, True)
            batch.n_tokens = len(row) - shared
            for index, token in enumerate(row[shared:]):
                batch.token[index], batch.pos[index] = token, shared + index
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
                batch.logits[index] = 1
            if llama.llama_decode(context, batch) != 0:
                raise RuntimeError(f"llama_decode failed on a row of {len(row)} tokens")
            flat = ctypes.cast(llama.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
            new = np.ctypeslib.as_array(flat, (len(row) - shared, vocabulary))
            found = np.concatenate([found[:shared], new]) if found is not None and shared else new.copy()
            last = row
            yield found
    finally:
        llama.llama_batch_free(batch)
        llama.llama_free(context)
        llama.llama_model_free(model)


def model_parameters(llama: Any, layers_on_gpu: int) -> Any:
    """llama-cpp-python's parameters for a model, without AMX. gcc's `_tile_loadconfig` tells the compiler of 8 of the 64 bytes that the
    instruction reads, so gcc 12 drops the stores of the others, and a library built by it dies at its first product (llama.cpp #20824).
    """
    parameters = llama.llama_model_default_params()
    parameters.n_gpu_layers = layers_on_gpu
    if b"AMX_INT8 = 1" in llama.llama_print_system_info():
        parameters.use_extra_bufts = False
    return parameters


def logits_build() -> str:
    """The package that computes the logits."""
    from importlib.metadata import version

    return f"llama-cpp-python {version('llama-cpp-python')}"
