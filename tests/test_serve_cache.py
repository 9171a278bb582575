"""What the proxy keeps and gives again."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("starlette", reason="edgeft[serve] is not installed")
pytest.importorskip("uvicorn", reason="edgeft[serve] is not installed")


from edgeft.router import LoadedPolicy, Request
from edgeft.serve.choose import Plan
from edgeft.serve.protocol import CHAT, COMPLETION, Asked, Kind
from tests.serve_stage import cache_in, events, policy_of, text_of
from tests.serve_stage import stage as stage


def test_a_repeat_comes_from_the_cache_in_both_forms(stage):
    first = stage.chat("tell me", temperature=0)
    assert first.headers["x-edgeft-cache"] == "miss"
    again = stage.chat("tell me", temperature=0)
    assert again.headers["x-edgeft-cache"] == "hit" and again.headers["x-edgeft-route"] == "weak"
    assert (
        again.json()["choices"] == first.json()["choices"] and again.json()["usage"] == first.json()["usage"]
    )
    assert again.json()["id"] != first.json()["id"]
    streamed = stage.chat("tell me", temperature=0, stream=True, stream_options={"include_usage": True})
    chunks = events(streamed)
    assert streamed.headers["x-edgeft-cache"] == "hit" and text_of(chunks) == "weak: tell me"
    assert (
        chunks[-1]["usage"] == first.json()["usage"] and chunks[-2]["choices"][0]["finish_reason"] == "stop"
    )
    assert stage.chat("tell me", model="weak", temperature=0).headers["x-edgeft-cache"] == "hit", (
        "the same model, pinned"
    )
    assert stage.engines["weak"].calls == 1
    assert stage.chat("streamed first", seed=3, stream=True).headers["x-edgeft-cache"] == "miss"
    assert (
        stage.chat("streamed first", seed=3).json()["choices"][0]["message"]["content"]
        == "weak: streamed first"
    )
    assert stage.engines["weak"].calls == 2


def test_what_differs_or_is_sampled_is_not_a_hit(stage):
    stage.chat("tell me", temperature=0)
    for fields in (
        {"max_tokens": 2},
        {"stop": ["x"]},
        {"seed": 1},
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function"}]},
        {"model": "strong"},
    ):
        assert stage.chat("tell me", **{"temperature": 0, **fields}).headers["x-edgeft-cache"] == "miss", (
            fields
        )
    for _ in range(2):
        assert stage.chat("tell me").headers["x-edgeft-cache"] == "off", (
            "sampled: the client wants another each time"
        )
    assert stage.chat("tell me", temperature=1).headers["x-edgeft-cache"] == "off"


def test_the_key_holds_artefact_tenant_and_api(tmp_path):
    cache = cache_in(tmp_path)
    policy = policy_of()

    def key(
        policy: LoadedPolicy = policy, tenant: str | None = None, kind: Kind = CHAT, **fields: Any
    ) -> str | None:
        given = {"messages": [{"role": "user", "content": "x"}], "temperature": 0, **fields}
        plan = Plan(policy, ("weak",), tenant, 1, False, "", Request([]))
        return cache.key(Asked(kind, "auto", given, False, False), plan)

    other = policy_of()
    other.policy.candidates[0]["artifact_sha256"] = "requantized"
    keys = {key(), key(other), key(tenant="a"), key(tenant="b"), key(kind=COMPLETION), key(seed=1)}
    assert len(keys) == 6 and None not in keys
    assert key(temperature=1.0) is None and key(temperature=1.0, seed=3) is not None
    assert cache_in(tmp_path / "2", sampled={"*/weak": True}).settings.allows({}, "t", "weak")


def test_cut_answers_are_not_kept(stage):
    for _ in range(2):
        cut = stage.chat("one two three", temperature=0, max_tokens=2)
        assert (
            cut.headers["x-edgeft-cache"] == "miss" and cut.json()["choices"][0]["finish_reason"] == "length"
        )
