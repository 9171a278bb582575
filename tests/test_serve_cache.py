"""What the proxy keeps and gives again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="edgeft[serve] is not installed")
pytest.importorskip("uvicorn", reason="edgeft[serve] is not installed")


from edgeft.serve import sse
from edgeft.serve.cache import AnswerCache, key_of
from tests.serve_stage import events, text_of, until
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


def test_the_key_holds_the_artefact():
    fields = {"messages": [{"role": "user", "content": "x"}], "temperature": 0}
    keys = {
        key_of("a", "1", fields),
        key_of("a", "2", fields),
        key_of("b", "1", fields),
        key_of("a", "1", {**fields, "seed": 1}),
    }
    assert len(keys) == 4 and key_of("a", "1", dict(reversed(fields.items()))) in keys


def test_the_cache_keeps_whole_answers_only_forgets_in_time_and_never_unpickles(tmp_path):
    import pickle
    import sqlite3

    kept = sse.Answer({"role": "assistant", "content": "é 日本"}, "stop", None, {"total_tokens": 3})
    cache = AnswerCache(tmp_path / "a", ttl_s=0.2)
    cache.put("k", kept)
    cache.put("tools", replace(kept, finish_reason="tool_calls"))
    cache.put("cut", replace(kept, finish_reason=None))
    assert cache.get("k") == kept and cache.get("tools") is None and cache.get("cut") is None
    until(lambda: cache.get("k") is None, 2)
    assert oct((tmp_path / "a").stat().st_mode & 0o777) == "0o700"

    mark = tmp_path / "unpickled"
    evil = AnswerCache(tmp_path / "b")
    evil.put("k", kept)
    evil.close()

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (mark,))

    with sqlite3.connect(tmp_path / "b" / "cache.db") as database:
        database.execute(
            "UPDATE Cache SET mode = 4, value = ?, filename = NULL", (sqlite3.Binary(pickle.dumps(Bomb())),)
        )
    assert AnswerCache(tmp_path / "b").get("k") is None
    assert not mark.exists()
