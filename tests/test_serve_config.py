"""edgeft.yaml: what is read, what is refused and how it is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeft.cli import run as cli
from edgeft.errors import UsageError
from edgeft.serve.config import Config, secret, shown
from edgeft.serve.config_file import load


def written(folder: Path, text: str) -> Path:
    path = folder / "edgeft.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_what_is_given_is_read_and_paths_are_the_files_own(tmp_path):
    config = load(
        written(
            tmp_path,
            "policy: policy\nlisten: {port: 0, drain_s: 5}\nkeys: {required: true}\nlimits: {ttft_s: 2}\n"
            "models:\n  'openai:http://h:1#m': {key_env: K, retries: 0}\n  base: {adapters: {desk: dist/desk}, slots: 4}\n",
        )
    )
    assert config.policy == tmp_path / "policy" and config.listen.port == 0 and config.listen.drain_s == 5.0
    assert config.keys.required and config.limits.ttft_s == 2.0 and config.limits.waiting == 32
    assert (
        config.model("base").adapters == {"desk": tmp_path / "dist/desk"} and config.model("base").slots == 4
    )
    assert config.model("openai:http://h:1#m").retries == 0 and config.model("other").retries == 1
    assert json.loads(json.dumps(shown(config)))["models"]["base"]["slots"] == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no policy"),
        ("policy: [", "is no YAML"),
        ("policy: p\nlisten: {prot: 1}", "'listen.prot' is not known. Did you mean 'listen.port'?"),
        ("policy: p\nlimit: {}", "Did you mean 'limits'?"),
        ("policy: p\nlisten: {port: http}", "listen.port must be a whole number, not 'http'"),
        ("policy: p\nlisten: {port: 70000}", "listen.port is out of range"),
        ("policy: p\nlisten: {port: true}", "listen.port must be a whole number"),
        ("policy: p\nlisten: 8080", "listen must be a table"),
        ("policy: p\nlisten: {tls_key: k}", "TLS needs a certificate and its key"),
        ("policy: p\nengines: {slots: 0}", "engines.slots is out of range"),
        ("policy: p\nmodels: {m: {stream: never}}", "models.m.stream is 'never'"),
        ("policy: p\nmodels: {m: {context: 3}}", "models.m.context is out of range"),
        ("policy: p\ncache: {sampled: {desk: true}}", "which is not tenant/route"),
        ("policy: p\npage: 'yes'", "page must be true or false"),
        ("policy:", "policy is empty"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, said):
    with pytest.raises(UsageError) as refused:
        load(written(tmp_path, text))
    assert said in refused.value.message and refused.value.hint


def test_secrets_come_from_variables_and_files_and_are_never_shown(tmp_path, monkeypatch):
    (tmp_path / "key").write_text("from-a-file\n")
    monkeypatch.setenv("MY_KEY", "from-the-environment")
    assert (
        secret("MY_KEY", None, "it") == "from-the-environment"
        and secret(None, tmp_path / "key", "it") == "from-a-file"
    )
    assert secret(None, None, "it") is None
    for env, file in (("NOT_SET_HERE", None), (None, tmp_path / "none")):
        with pytest.raises(UsageError):
            secret(env, file, "it")
    config = load(written(tmp_path, "policy: p\nmodels: {m: {key_env: MY_KEY}}\ncache: {redis_env: MY_KEY}"))
    assert "from-the-environment" not in json.dumps(shown(config)) and "MY_KEY" in json.dumps(shown(config))


def test_init_writes_a_file_that_is_read_and_says_what_is_default(tmp_path, capsys, monkeypatch):
    pytest.importorskip("safetensors", reason="edgeft[serve] is not installed")
    import numpy as np

    from edgeft.router.policy import save_policy
    from tests.serve_stage import policy_of

    policy = policy_of("gguf-q4_k_m", "openai:http://h:1#big")
    policy.policy.candidates[0]["kind"] = "artifact"
    save_policy(
        policy.policy,
        {"text.weights": np.float32(policy.weights), "text.bias": np.float32(policy.bias)},
        tmp_path / "policy",
    )
    monkeypatch.chdir(tmp_path)
    assert cli(["serve", "init", "--policy", "policy", "--artifacts", "dist"]) == 0
    made = load(tmp_path / "edgeft.yaml")
    assert made.artifacts == tmp_path / "dist" and set(made.models) == {
        "gguf-q4_k_m",
        "openai:http://h:1#big",
    }
    plain = Config(policy=tmp_path / "policy", artifacts=tmp_path / "dist", models=made.models)
    assert shown(made) == shown(plain), "what the file says is what is default"
    capsys.readouterr()
    assert cli(["serve", "init", "--policy", "policy"]) == 2 and "there already" in capsys.readouterr().err
    assert cli(["serve", "--config", "edgeft.yaml", "--port", "9", "--no-cache", "--show-config"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["listen"]["port"] == 9 and told["cache"]["enabled"] is False
    assert cli(["serve"]) == 2 and "neither --config nor --policy" in capsys.readouterr().err
