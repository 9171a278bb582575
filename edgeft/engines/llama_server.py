"""GGUF by a `llama-server` binary that the user names; and next-token distributions from any llama.cpp server.

The binary is the option `binary`, else $EDGEFT_LLAMA_SERVER, else the one on the PATH. It is hardened as xllamacpp's server is.

`/completion` takes token ids as they are, and with `n_probs` answers with log-probabilities taken before any sampler
(temperature 0 does not collapse them) of as many tokens as are asked for, the whole vocabulary too: some 5 MB of JSON
a position for 49,152 tokens. A prompt's beginning that the slot has seen is not computed again.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx

from edgeft.device import gpu_layers
from edgeft.engines.gguf import (
    files_of,
    logits,
    logits_build,
    micro_batched,
    pooling_of,
    port_of,
    slots_of,
    told,
)
from edgeft.errors import EnvironmentFault, UsageError

__all__ = ["REQUIRES", "logits", "logits_build", "next_logprobs", "start"]
REQUIRES: dict[str, str] = {}
TIMEOUT_S = 600.0


def start(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Start the binary on the GGUF file in `folder`. Runs in a worker process, which ends when the binary does.

    Raises UsageError where there is no binary, RuntimeError where it ends before it listens.
    """
    binary = binary_of(options)
    model, beside = files_of(folder, options)
    if batch_s := options.get("batch_s"):
        options = micro_batched(
            model,
            "llama_server",
            options,
            batch_s,
            lambda trial: Running(command(binary, model, beside, trial), trial["key"]),
        )
    running = Running(command(binary, model, beside, options), options["key"])
    threading.Thread(target=running.end_with, daemon=True).start()
    port = port_of(running)
    return {
        "port": port,
        "build": f"llama-server {build_of(binary)}",
        "load_mode": "mmap",
        **told(port, options, list(options.get("adapters") or {})),
    }


def binary_of(options: dict[str, Any]) -> Path:
    """The binary's path. Raises UsageError where there is none."""
    named = options.get("binary") or os.environ.get("EDGEFT_LLAMA_SERVER") or shutil.which("llama-server")
    if not named or not os.access(named, os.X_OK):
        raise UsageError(
            f"there is no llama-server {named or 'on the PATH'}.",
            "EDGEFT_LLAMA_SERVER=/path/to/llama-server edgeft …",
        )
    return Path(named)


def build_of(binary: Path) -> str:
    """Its version as it says it, or 'unknown build': also where it can't be run here, which `start` says."""
    try:
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown build"
    found = re.search(r"version: (.+)", done.stdout + done.stderr)
    return found[1].strip() if found else "unknown build"


def command(
    binary: Path, model: Path, beside: list[tuple[Path, float]], options: dict[str, Any]
) -> list[str]:
    """The command line. The key is not in it: others see command lines. Raises UsageError for a path that it can't carry."""
    slots = slots_of(options)
    wanted: dict[str, Any] = {
        "--model": model, "--alias": options["name"], "--host": "127.0.0.1", "--port": 0, "--parallel": slots,
        "--ctx-size": options["context"] * (slots if "slots" in options else 1), "--threads": options["threads"],
        "--threads-batch": options.get("threads_batch", options["threads"]), "--n-gpu-layers": gpu_layers(options),
        "--batch-size": options.get("batch"), "--ubatch-size": options.get("ubatch"), "--poll": options.get("poll"),
        "--cache-type-k": options.get("kv_type"), "--cache-type-v": options.get("kv_type"),
        "--spec-type": options["speculative"].replace("_", "-") if "speculative" in options else None,
        "--spec-draft-model": options.get("draft"), "--spec-draft-n-max": options.get("draft_tokens"),
        "--spec-draft-threads": options["threads"] if "draft" in options else None,
        "--pooling": pooling_of(options), "--cache-ram": 0, "--load-mode": "mmap", "--fit": "off", "--cors-origins": "",
        "--log-verbosity": 3,
    }  # fmt: skip
    if "flash_attention" in options:
        wanted["--flash-attn"] = "on" if options["flash_attention"] else "off"
    flags = ["--no-kv-unified", "--no-cache-idle-slots", "--no-slots", "--no-ui", "--jinja", "--offline"]
    if pooling_of(options):
        flags.append("--embeddings")
    for path, scale in beside:
        if set(str(path)) & set(":,"):
            raise UsageError(f"llama-server can't take an adapter's path with ':' or ',': {path}", "move it")
        flags += ["--lora-scaled", f"{path}:{scale:g}"]
    given = [str(part) for name, value in wanted.items() if value is not None for part in (name, value)]
    return [str(binary), *given, *flags]


class Running:
    """A llama-server that listens on `listening_address`. Raises RuntimeError where it ends before."""

    def __init__(self, arguments: list[str], key: str) -> None:
        from edgeft.child import leashed

        self.process = subprocess.Popen(
            leashed(arguments), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "LLAMA_API_KEY": key},
        )  # fmt: skip
        assert self.process.stdout
        self.listening_address = ""
        for line in self.process.stdout:
            print(line.decode(errors="replace"), end="", file=sys.stderr)
            if found := re.search(rb"listening on (http://[0-9.]+:\d+)", line):
                self.listening_address = found[1].decode()
                break
        else:
            raise RuntimeError(f"llama-server ended with {self.process.wait()}")
        # What it says later may name what was asked: read, since a full pipe would stop it, and dropped.
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        assert self.process.stdout
        while self.process.stdout.read1(1 << 16):  # type: ignore[attr-defined]
            pass

    def end_with(self) -> None:
        """Wait for the binary to end, and end this process too."""
        code = self.process.wait()
        print(f"llama-server ended with {code}", file=sys.stderr, flush=True)
        os._exit(4)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


def next_logprobs(client: httpx.Client, url: str, ids: list[int], vocabulary: int) -> Any:
    """Log-probabilities after `ids` as the server gives them, float64 [vocabulary or more].

    Raises EnvironmentFault where the server refuses or leaves a token of the vocabulary out.
    """
    import numpy as np

    body = {
        "prompt": ids,
        "n_predict": 1,
        "n_probs": 1 << 30,
        "temperature": 0,
        "cache_prompt": True,
        "post_sampling_probs": False,
    }
    try:
        answer = client.post(f"{url}/completion", json=body, timeout=TIMEOUT_S)
    except httpx.HTTPError as error:
        raise EnvironmentFault(
            f"{url} broke off: {type(error).__name__} {error}", f"curl {url}/health"
        ) from error
    if answer.status_code != 200:
        raise EnvironmentFault(
            f"{url} answered {answer.status_code}: {answer.text[:300]}", f"curl {url}/health"
        )
    top = answer.json()["completion_probabilities"][0]["top_logprobs"]
    found = np.full(max(vocabulary, 1 + max(entry["id"] for entry in top)), np.nan)
    found[[entry["id"] for entry in top]] = [entry["logprob"] for entry in top]
    missing = int(np.isnan(found).sum())
    if missing:
        raise EnvironmentFault(
            f"the server gave log-probabilities of all but {missing} of {len(found)} tokens.",
            "pip install 'edgeft[compress]' brings the logits of llama-cpp-python",
        )
    return found
