"""The semantic cache as serving uses it: who is answered by somebody else's answer, and when it switches itself off."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette", reason="edgeft[serve] is not installed")
pytest.importorskip("uvicorn", reason="edgeft[serve] is not installed")
pytest.importorskip("aiohttp", reason="edgeft[serve] is not installed")

from edgeft.cli import run as cli
from edgeft.errors import UsageError
from edgeft.router.cache import calibration
from edgeft.router.cache.semantic import Audit, SemanticCache
from edgeft.serve.app import create_app
from edgeft.serve.semantic import Semantic
from tests.serve_stage import Engine, Stage, cache_in, config_of, policy_of, running, until, upstream_of


def encoder(text: str) -> np.ndarray:
    """A stand-in: texts with the same letters are the same."""
    found = np.zeros(26, np.float32)
    for letter in text.lower():
        if letter.isascii() and letter.isalpha():
            found[ord(letter) - 97] += 1
    return found / np.linalg.norm(found)


def stage_of(tmp_path: Any, audited: float, budget: float = 0.01, **policy: Any) -> Any:
    engine = Engine("weak")
    semantic = Semantic(SemanticCache(encoder, 0.98, Audit(budget)), audited)
    app = create_app(
        policy_of("weak", **policy),
        {"weak": upstream_of(engine)},
        cache_in(tmp_path),
        config=config_of(models={}),
        semantic=semantic,
    )
    return engine, app


def test_what_means_the_same_is_answered_and_what_differs_is_not(tmp_path):
    engine, app = stage_of(tmp_path, audited=0.0, privacy={"patterns": ["email"]})
    with running(app) as client:
        stage = Stage(client, {}, None)
        first = stage.chat("how do i get a card", temperature=0)
        assert first.headers["x-edgeft-cache"] == "miss"
        until(lambda: app.proxy.semantic.cache.partitions)
        same = stage.chat("how do i get a card?", temperature=0)
        assert (
            same.headers["x-edgeft-cache"] == "semantic" and same.json()["choices"] == first.json()["choices"]
        )
        streamed = stage.chat("How do I get a card?!", temperature=0, stream=True)
        assert streamed.headers["x-edgeft-cache"] == "semantic" and "how do i get a card" in streamed.text
        assert engine.calls == 1
        for text, fields in (
            ("how do i get 2 cards", {"temperature": 0}),  # a number
            ("how do i not get a card", {"temperature": 0}),  # a negation
            ("how do i get a card?", {"temperature": 0, "max_tokens": 9}),  # another request
        ):
            assert stage.chat(text, **fields).headers["x-edgeft-cache"] == "miss", text
        assert stage.chat("how do i get a card?").headers["x-edgeft-cache"] == "off", "sampled"
        assert (
            stage.chat("how do i get a card, me@example.org", temperature=0).headers["x-edgeft-cache"]
            == "off"
        ), "private"


def test_hits_that_turn_out_wrong_switch_it_off(tmp_path):
    engine, app = stage_of(tmp_path, audited=1.0)
    with running(app) as client:
        stage = Stage(client, {}, None)
        stage.chat("abcd efgh", temperature=0)
        until(lambda: app.proxy.semantic.cache.partitions)
        for turn in range(4):  # an engine that echoes answers each wording otherwise
            assert (
                stage.chat(f"abcd efgh{'.' * (turn + 1)}", temperature=0).headers["x-edgeft-cache"] == "miss"
            )
            if app.proxy.semantic.cache.audit.off:
                break
        assert app.proxy.semantic.cache.audit.off and app.proxy.semantic.cache.audit.wrong >= 1
        assert (
            stage.chat("abcd efgh !", temperature=0).headers["x-edgeft-cache"] == "miss" and engine.calls >= 3
        )


def test_calibration_reads_pairs_and_refuses_others(tmp_path, capsys, monkeypatch):
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"one": f"how do i get card number {n}", "two": f"how do i get card number {n}?", "same": True}
        for n in range(400)
    ]
    rows += [{"one": "a b c", "two": "x y z", "same": False}]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(
        "edgeft.router.embedding.read_spec", lambda folder: {"path": str(folder), "kind": "test"}
    )
    monkeypatch.setattr("edgeft.router.embedding.load_encoder", lambda spec: encoder)
    words = [
        "route",
        "cache-calibrate",
        str(pairs),
        "--encoder",
        str(tmp_path),
        "--out",
        str(tmp_path / "s.json"),
    ]
    assert cli(words) == 0 and "hits wrong" in capsys.readouterr().out
    assert calibration.read(tmp_path / "s.json")["wrong"] == 0
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows[-50:]))
    assert cli([*words[:-1], str(tmp_path / "t.json")]) == 4 and not (tmp_path / "t.json").exists()
    for text in ('{"one": 1}', "nonsense", '{"one": "a", "two": "b", "same": true}'):
        pairs.write_text(text)
        with pytest.raises(UsageError):
            calibration.read_pairs(pairs)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UsageError, match="no calibration"):
        calibration.read(tmp_path / "other.json")
