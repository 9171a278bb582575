"""Two keys with planted strings before real engines, caches and prefix reuse on: nothing crosses."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="edgeft[serve] is not installed")
pytest.importorskip("uvicorn", reason="edgeft[serve] is not installed")
pytest.importorskip("aiohttp", reason="edgeft[serve] is not installed")

from edgeft.serve import keys
from edgeft.serve.app import create_app
from edgeft.serve.config import Keys
from edgeft.serve.live import Live
from edgeft.serve.local import LocalUpstream
from edgeft.serve.pool import LocalSpec, Pool
from tests.serve_stage import cache_in, config_of, policy_of, running

SYSTEM = "You answer for the desk. " + "Rules of the house, which are long and many. " * 6
PLANTED = {"a": "alpha-secret-5521", "b": "beta-secret-9310"}


@contextmanager
def proxied(engine: str, folder: Path, tmp_path: Path, slots: int) -> Any:
    """A proxy before one real engine with a key for each of two tenants; yields (client, tenant -> headers, app)."""
    pool = Pool([LocalSpec("tiny", folder, engine, 512, tmp_path / "engine.log", threads=1, slots=slots)])
    upstream = LocalUpstream(pool, pool.entries["tiny"].spec, 300.0)
    upstream.aclose = pool.aclose  # type: ignore[method-assign]  # the app ends what it holds
    headers = {}
    for tenant in PLANTED:
        _, key = keys.create(tmp_path / "keys.db", f"k-{tenant}", tenant)
        headers[tenant] = {"Authorization": f"Bearer {key}"}
    app = create_app(
        policy_of("tiny"),
        {"tiny": upstream},
        cache_in(tmp_path / "cache"),
        config=config_of(models={}, keys=Keys(required=True)),
        keys=keys.KeyStore(tmp_path / "keys.db"),
        live=Live(),
    )
    with running(app) as client:
        client.timeout = 300
        yield client, headers, app


def ask(client: Any, headers: dict[str, str], text: str, **fields: Any) -> Any:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    body = {"model": "auto", "messages": messages, "max_tokens": 4, **fields}
    reply = client.post("/v1/chat/completions", json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    return reply


def cached(reply: Any) -> int:
    return (reply.json()["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 2])
def test_prefixes_are_reused_within_a_tenant_and_never_across(slots, tiny_dist, tmp_path):
    with proxied("gguf", tiny_dist / "dist" / "gguf-f16", tmp_path, slots) as (client, headers, _app):
        first = ask(client, headers["a"], PLANTED["a"])
        second = ask(client, headers["a"], "and something else")
        assert cached(first) == 0 and cached(second) > 40, "the system prompt is read once"
        for turn in range(3):  # more tenants' turns than slots
            other = ask(client, headers["b"], PLANTED["b"] if turn == 0 else f"turn {turn}")
            assert (cached(other) > 40) is (turn > 0), "another tenant's prefix may not even be felt"
        back = ask(client, headers["a"], "back again")
        assert (cached(back) > 40) is (slots == 2), "with one slot the other tenant's lies there now"
        alone = ask(client, headers["a"], "the same", temperature=0)
        assert 'edgeft_cached_tokens_total{route="tiny"}' in client.get("/metrics", headers=headers["a"]).text
        told = (
            client.get("/edgeft/state", headers=headers["b"]).text
            + client.get("/metrics", headers=headers["b"]).text
        )
        assert (
            not any(secret in told for secret in PLANTED.values())
            and alone.json()["usage"]["completion_tokens"] > 0
        )


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["gguf", "onnx"])
def test_answers_of_one_key_are_never_given_to_another(engine, tiny_dist, tmp_path):
    folder = next(
        (f for f in sorted((tiny_dist / "dist").iterdir()) if f.name.startswith(f"{engine}-")), None
    )
    if folder is None:
        pytest.skip(f"no {engine} artefact of the tiny model here")
    with proxied(engine, folder, tmp_path, 1) as (client, headers, app):
        for tenant in ("a", "b"):
            told = [
                ask(client, headers[tenant], "the same question", temperature=0, max_tokens=3)
                for _ in range(2)
            ]
            if told[0].json()["choices"][0]["finish_reason"] == "stop":  # only whole answers are kept
                assert [r.headers["x-edgeft-cache"] for r in told] == ["miss", "hit"]
            assert told[0].headers["x-edgeft-cache"] == "miss", "b's first is not answered from a's"
        kept = tmp_path / "cache"
        assert not any(
            s.encode() in p.read_bytes() for s in PLANTED.values() for p in kept.rglob("*") if p.is_file()
        )
        assert json.dumps(list(app.proxy.conversations.values())).count("tiny") >= 2
