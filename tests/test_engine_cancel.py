"""A client that leaves frees the engine: before the first token, mid-stream, not streamed; by FIN and by RST.

The model of 1.06 billion random weights with a prompt of 4,000 tokens is in benchmarks/serve_cancellation.py: it takes minutes.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edgeft.engines.chat_server import Reader, Token, listen
from edgeft.engines.local import LocalModel
from tests.conftest import ROOT, tiny_config

found = importlib.util.spec_from_file_location(
    "serve_cancellation", ROOT / "benchmarks" / "serve_cancellation.py"
)
probe = importlib.util.module_from_spec(found)
found.loader.exec_module(probe)

# What a box that does other work adds. Each request that is left would otherwise hold the slot for many times the limit.
MARGIN_S = 1.0


class Counting:
    """A server whose prompt takes 100 steps of 10 ms and whose answer never ends by itself."""

    def __init__(self):
        self.steps, self.running, self.ended = 0, 0, threading.Event()
        reader = Reader(lambda text: [1], lambda m: "", self.complete, embed=self.embed)
        turn = ThreadPoolExecutor(1)
        self.port = listen(lambda m, s: (1, self.complete([1], s)), "k", "counting", reader, turn)
        self.key, self.features = "k", {}

    def complete(self, ids, sampling):
        self.running += 1
        self.ended.clear()
        try:
            for _ in range(100):
                self.steps += 1
                time.sleep(0.01)
                yield None
            while True:
                self.steps += 1
                time.sleep(0.01)
                yield Token("x", None)
        finally:
            self.running -= 1
            self.ended.set()

    def embed(self, ids):
        for step in self.complete(ids, None):
            yield None if step is None else [1.0]


def send(server, path: str, body: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port))
    head = f"POST {path} HTTP/1.1\r\nAuthorization: Bearer k\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall((head + body).encode())
    return connection


CHAT = '{"messages": [{"role": "user", "content": "x"}], "max_tokens": 100000, "stream": %s}'


@pytest.mark.parametrize("how", ["FIN", "RST"])
@pytest.mark.parametrize(
    "path, body, after",
    [
        ("/v1/chat/completions", CHAT % "true", 20),
        ("/v1/chat/completions", CHAT % "true", 120),
        ("/v1/chat/completions", CHAT % "false", 20),
        ("/v1/chat/completions", CHAT % "false", 120),
        ("/v1/completions", '{"prompt": [1], "max_tokens": 100000}', 120),
        ("/completion", '{"prompt": [1], "n_predict": 100000}', 120),
        ("/v1/embeddings", '{"input": [1]}', 20),
    ],
)
def test_the_server_stops_within_two_steps(how, path, body, after):
    server = Counting()
    connection = send(server, path, body)
    while server.steps < after:
        time.sleep(0.005)
    probe.leave(connection, how)
    at = server.steps
    assert server.ended.wait(10) and server.running == 0
    assert server.steps - at <= 3, "one that runs, one that looks, one between reading the count and closing"


def test_who_leaves_the_queue_is_not_computed():
    server = Counting()
    first = send(server, "/v1/chat/completions", CHAT % "true")
    while server.steps < 5:
        time.sleep(0.005)
    queued = send(server, "/v1/chat/completions", CHAT % "false")
    time.sleep(0.1)
    queued.close()
    first.close()
    assert server.ended.wait(10)
    at = server.steps
    time.sleep(0.3)
    assert server.steps - at <= 2 and server.running == 0


# --- real engines


def binary() -> str | None:
    return os.environ.get("EDGEFT_LLAMA_SERVER") or shutil.which("llama-server")


@pytest.fixture(scope="module")
def random_gguf(tmp_path_factory) -> Path:
    pytest.importorskip("gguf", reason="needs the extra: compress")
    return probe.random_gguf(tmp_path_factory.mktemp("random") / "random.gguf", *probe.SIZES["small"])


@pytest.fixture(scope="module")
def long_models(tmp_path_factory) -> dict[str, Path]:
    """A tiny Llama with room for 8,192 tokens, as transformers has it and as INT8 ONNX."""
    torch = pytest.importorskip("torch", reason="needs the extra: compress")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from edgeft.compress import Recipe, compress
    from edgeft.pull import pull

    home = tmp_path_factory.mktemp("long")
    tokenizer = AutoTokenizer.from_pretrained(pull("smollm2-135m-instruct"))
    torch.manual_seed(0)
    config = tiny_config("llama", len(tokenizer))
    config.max_position_embeddings = 8192
    AutoModelForCausalLM.from_config(config).save_pretrained(home / "base")
    tokenizer.save_pretrained(home / "base")
    compress(
        home / "base",
        None,
        Recipe(out=home / "dist", formats=("onnx:int8",), name="t", threads=1, no_gate=True),
    )
    return {"transformers": home / "base", "onnx": home / "dist" / "onnx-int8"}


def must_be_free(local: LocalModel, prompt: int, output: int) -> None:
    """The three moments, both ways of leaving, on an engine of one slot."""
    batch = probe.longest_batch_s(local, prompt, 1)
    turn = 0
    for moment in probe.MOMENTS:
        for how in ("FIN", "RST"):
            turn += 20
            # serve asks llama.cpp's server for a stream, also for clients that want none
            streams = local.features.get("prompt_progress") and moment == "non-stream"
            waited = probe.wait_s(local, "prompt" if streams else moment, how, prompt, output, turn)
            assert waited <= 0.25 + 2 * batch + MARGIN_S, (moment, how, batch)


@pytest.mark.parametrize("engine", ["gguf", "llama_server", "llama_cpp"])
def test_llama_cpp_s_engines_are_free(random_gguf, tmp_path, engine):
    if engine == "llama_server":
        if not binary():
            pytest.skip("no llama-server: EDGEFT_LLAMA_SERVER names one")
    else:
        pytest.importorskip({"gguf": "xllamacpp"}.get(engine, engine), reason="an extra is missing")
    options = {"slots": 1, "batch_s": 0.25}
    with LocalModel(
        random_gguf, engine, log=tmp_path / "log", threads=1, context=8192, options=options
    ) as local:
        must_be_free(local, 300, 6000)


def test_a_draft_changes_nothing(random_gguf, tmp_path):
    pytest.importorskip("xllamacpp", reason="needs the extra: gguf")
    options = {
        "slots": 1, "batch_s": 0.25, "speculative": "draft_simple", "draft": str(random_gguf), "draft_tokens": 4,
    }  # fmt: skip
    with LocalModel(
        random_gguf, "gguf", log=tmp_path / "log", threads=1, context=8192, options=options
    ) as local:
        must_be_free(local, 300, 6000)


@pytest.mark.slow
@pytest.mark.parametrize("engine, package", [("transformers", "torch"), ("onnx", "onnxruntime_genai")])
def test_python_engines_are_free(long_models, tmp_path, engine, package):
    pytest.importorskip(package, reason="an extra is missing")
    options = {"slots": 1, "batch_s": 0.25}
    with LocalModel(
        long_models[engine], engine, log=tmp_path / "log", threads=1, context=8192, options=options
    ) as local:
        must_be_free(local, 1500, 6000)
