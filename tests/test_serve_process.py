"""The command `edgeft serve` as a process, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

pytest.importorskip("starlette", reason="edgeft[serve] is not installed")
pytest.importorskip("uvicorn", reason="edgeft[serve] is not installed")


from edgeft.cli import run as cli
from edgeft.errors import UsageError
from edgeft.router.policy import save_policy
from edgeft.serve.candidates import address_of, check
from edgeft.serve.config import Config, Keys, Listen
from edgeft.serve.run import refuse_public
from tests.serve_stage import KEY, Engine, policy_of, tensors_of, until


def test_only_loopback_is_listened_on_without_keys():
    def config(host: str, required: bool = False) -> Config:
        return Config(Path("policy"), listen=Listen(host=host), keys=Keys(required=required))

    for host in ("127.0.0.1", "localhost", "::1"):
        refuse_public(config(host))
    for host in ("0.0.0.0", "::", "192.168.1.4", "example.org", ""):
        with pytest.raises(UsageError, match="open the proxy to the network"):
            refuse_public(config(host))
        refuse_public(config(host, required=True))


def test_candidates_that_are_not_what_was_measured(tmp_path):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"weights")
    from edgeft.files import sha256_file, sha256_json

    right = sha256_json({"model.gguf": sha256_file(gguf)})
    candidate = {"id": "m", "kind": "folder", "engine": "gguf", "path": str(gguf), "artifact_sha256": right}
    assert check(candidate)["path"] == str(gguf)
    assert check({**candidate, "path": "/elsewhere/model.gguf"}, tmp_path)["path"] == str(gguf)
    with pytest.raises(UsageError, match="is missing: there is no /elsewhere"):
        check({**candidate, "path": "/elsewhere/model.gguf"})
    gguf.write_bytes(b"Weights")
    with pytest.raises(UsageError, match="is not the one that the policy was fitted on"):
        check(candidate)
    with pytest.raises(UsageError, match="was changed"):
        (tmp_path / "folder").mkdir()
        check({**candidate, "kind": "artifact", "path": str(tmp_path / "folder")})
    assert address_of("openai:http://h:1/v1#m/x") == ("openai", "http://h:1", "m/x")
    assert address_of("litellm:openai/gpt") == ("litellm", "", "openai/gpt")
    with pytest.raises(UsageError):
        address_of("openai:http://h:1")


@contextmanager
def served(tmp_path: Path, *more: str, file: str = "") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`edgeft serve --json` as a process, over two fake engines; yields it and its address. `file`: more of an edgeft.yaml."""
    engines = [Engine("one"), Engine("two")]
    names = [f"openai:{engine.url}#{engine.name}" for engine in engines]
    policy = policy_of(*names)
    save_policy(policy.policy, tensors_of(policy), tmp_path / "policy")
    given = ["--policy", str(tmp_path / "policy")]
    if file:
        (tmp_path / "edgeft.yaml").write_text(f"policy: policy\n{file}")
        given = ["--config", str(tmp_path / "edgeft.yaml")]
    process = subprocess.Popen(
        [sys.executable, "-m", "edgeft", "serve", *given, "--port", "0", "--json", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OPENAI_API_KEY": KEY, "EDGEFT_HOME": str(tmp_path / "home")},
    )
    try:
        assert process.stdout
        line = process.stdout.readline()
        assert line, process.stderr and process.stderr.read()
        ready = json.loads(line)
        assert ready["ready"] is True
        yield process, ready["url"]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_command_serves_and_ends_when_told(tmp_path, sign, code):
    with served(tmp_path) as (process, url):
        body = {"model": "auto", "messages": [{"role": "user", "content": "a refund"}], "temperature": 0}
        assert httpx.get(f"{url}/health/ready").status_code == 200
        replies = [httpx.post(f"{url}/v1/chat/completions", json=body) for _ in range(2)]
        assert [r.headers["x-edgeft-cache"] for r in replies] == ["miss", "hit"]
        assert replies[1].json()["choices"][0]["message"]["content"] == "two: a refund"
        assert (tmp_path / "home" / "answers").is_dir()
        slow = {"model": "auto", "messages": [{"role": "user", "content": "word " * 30}], "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=slow) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(sign)
            assert [line for line in lines if line][-1] == "data: [DONE]", "a running answer is finished"
        assert process.wait(15) == code
        assert process.stderr and process.stderr.read() == ""


def test_the_command_refuses_in_two_lines(tmp_path, capsys):
    policy = policy_of("openai:http://h:1#a", "openai:http://h:1#b")
    save_policy(policy.policy, tensors_of(policy), tmp_path / "policy")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, message in (
            (["--policy", str(tmp_path / "policy"), "--host", "0.0.0.0"], "open the proxy to the network"),
            (["--policy", str(tmp_path / "none")], "holds no policy.json"),
            (["--policy", str(tmp_path / "policy"), "--port", port, "--no-cache"], "can't be listened on"),
        ):
            assert cli(["serve", *arguments]) == 2
            problem = capsys.readouterr().err.splitlines()
            assert len(problem) == 2 and message in problem[0], problem


def test_a_model_that_does_not_load_ends_the_start_in_two_lines(tmp_path):
    pytest.importorskip("xllamacpp", reason="edgeft[gguf] is not installed")
    from edgeft.files import sha256_file, sha256_json

    broken = tmp_path / "model.gguf"
    broken.write_bytes(b"no weights")
    digest = sha256_json({broken.name: sha256_file(broken)})
    local = {
        "kind": "folder",
        "remote": False,
        "engine": "gguf",
        "path": str(broken),
        "artifact_sha256": digest,
    }
    policy = policy_of("one", "two")
    candidates = [{**c, **local} for c in policy.policy.candidates]
    save_policy(replace(policy.policy, candidates=candidates), tensors_of(policy), tmp_path / "policy")
    command = [sys.executable, "-m", "edgeft", "serve", "--policy", str(tmp_path / "policy"), "--port", "0"]
    home = {**os.environ, "EDGEFT_HOME": str(tmp_path / "home")}
    ran = subprocess.run(command, capture_output=True, text=True, env=home, timeout=120, check=False)
    *_, first, second = ran.stderr.splitlines()
    assert ran.returncode == 3, ran.stderr
    assert first.count("did not load") == 1 and "fault of edgeft" not in ran.stderr
    assert second.strip().startswith("less ") and Path(second.split()[1]).is_file(), ran.stderr


BODY = {"model": "auto", "messages": [{"role": "user", "content": "hello"}]}


def test_a_hangup_takes_a_new_policy_over_and_drops_nothing(tmp_path):
    with served(tmp_path, file="limits: {waiting: 8}\n") as (process, url):
        names = [m["id"] for m in httpx.get(f"{url}/v1/models").json()["data"]]
        slow = {"model": names[1], "messages": [{"role": "user", "content": "word " * 50}], "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=slow, timeout=20) as response:
            lines = response.iter_lines()
            next(lines)
            (tmp_path / "edgeft.yaml").write_text("policy: policy\nlimits: {waiting: 8}\npolcy: x\n")
            process.send_signal(signal.SIGHUP)
            time.sleep(0.5)
            assert httpx.post(f"{url}/v1/chat/completions", json=BODY).json()["model"] == names[1], (
                "a wrong file changes nothing"
            )
            one = policy_of(names[2], created_at="2026-02-02T00:00:00+00:00")
            save_policy(one.policy, tensors_of(one), tmp_path / "policy")
            (tmp_path / "edgeft.yaml").write_text("policy: policy\nlimits: {waiting: 9}\n")
            process.send_signal(signal.SIGHUP)
            until(lambda: len(httpx.get(f"{url}/v1/models").json()["data"]) == 2)
            assert httpx.post(f"{url}/v1/chat/completions", json=BODY).json()["model"] == names[2]
            assert [line for line in lines if line][-1] == "data: [DONE]", "what ran goes on to its end"
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0


def test_keys_open_the_proxy_and_are_revoked_while_it_runs(tmp_path):
    home = {
        "env": {**os.environ, "EDGEFT_HOME": str(tmp_path / "home")},
        "text": True,
        "capture_output": True,
    }
    made = subprocess.run(
        [sys.executable, "-m", "edgeft", "keys", "create", "desk", "--tenant", "t1", "--json"],
        check=True,
        **home,
    )
    told = json.loads(made.stdout)
    with served(tmp_path, "--host", "0.0.0.0", "--require-keys") as (_, url):
        url = url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.post(f"{url}/v1/chat/completions", json=BODY).status_code == 401
        assert httpx.get(f"{url}/v1/models").status_code == httpx.get(f"{url}/metrics").status_code == 401
        assert httpx.get(f"{url}/health/ready").status_code == 200
        wrong = httpx.post(
            f"{url}/v1/chat/completions", json=BODY, headers={"Authorization": "Bearer ek-wrong"}
        )
        assert wrong.status_code == 401 and wrong.json()["error"]["code"] == "invalid_api_key"
        right = {"Authorization": f"Bearer {told['key']}"}
        assert httpx.post(f"{url}/v1/chat/completions", json=BODY, headers=right).status_code == 200
        subprocess.run(
            [sys.executable, "-m", "edgeft", "keys", "revoke", str(told["id"])], check=True, **home
        )
        until(
            lambda: httpx.post(f"{url}/v1/chat/completions", json=BODY, headers=right).status_code == 401, 5
        )


def test_tls_by_certificate_files(tmp_path):
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=IP:127.0.0.1", "-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    import ssl

    with served(tmp_path, file="listen: {tls_certificate: cert.pem, tls_key: key.pem}\n") as (_, url):
        assert url.startswith("https://")
        trusted = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
        assert httpx.post(f"{url}/v1/chat/completions", json=BODY, verify=trusted).status_code == 200


def test_a_reload_can_not_take_the_keys_away_from_an_open_address_and_can_ask_for_them(tmp_path):
    with served(tmp_path, file="listen: {host: 0.0.0.0}\nkeys: {required: true}\n") as (process, url):
        url = url.replace("0.0.0.0", "127.0.0.1")
        (tmp_path / "edgeft.yaml").write_text("policy: policy\n")
        process.send_signal(signal.SIGHUP)
        until(lambda: "open the proxy" in (httpx.get(f"{url}/health/ready").json()["reloads"]["error"] or ""))
        assert httpx.post(f"{url}/v1/chat/completions", json=BODY).status_code == 401
    (tmp_path / "second").mkdir()
    with served(tmp_path / "second", file="limits: {waiting: 8}\n") as (process, url):
        assert httpx.post(f"{url}/v1/chat/completions", json=BODY).status_code == 200
        (tmp_path / "second" / "edgeft.yaml").write_text("policy: policy\nkeys: {required: true}\n")
        process.send_signal(signal.SIGHUP)
        until(lambda: httpx.post(f"{url}/v1/chat/completions", json=BODY).status_code == 401)
