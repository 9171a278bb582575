"""What is written down of decisions, and that replay reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="edgeft[serve] is not installed")
pytest.importorskip("uvicorn", reason="edgeft[serve] is not installed")
pytest.importorskip("aiohttp", reason="edgeft[serve] is not installed")

from edgeft.router.replay import replay
from edgeft.serve.app import create_app
from edgeft.serve.decisions import DecisionLog
from tests.serve_stage import SECRET, Engine, Stage, config_of, policy_of, running, until, upstream_of


@pytest.mark.parametrize("texts", [False, True])
def test_decisions_are_logged_as_replay_reads_them(texts, tmp_path):
    policy = policy_of(privacy={"patterns": ["email"]})
    engines = {name: Engine(name) for name in ("weak", "strong")}
    log = tmp_path / "decisions.jsonl"
    app = create_app(
        policy,
        {n: upstream_of(e) for n, e in engines.items()},
        config=config_of(),
        decisions=DecisionLog(log, texts),
    )
    with running(app) as client:
        stage = Stage(client, {}, None)
        stage.chat(f"hello {SECRET}")
        stage.chat("a refund")
        stage.chat("me@example.org")
        stage.chat("hello", model="weak")
        until(lambda: len(log.read_text().splitlines()) == 3)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["choice"] for line in lines] == ["weak", "strong", "weak"], "a pinned model is no decision"
    assert [line["private"] for line in lines] == [False, False, True] and lines[0]["output_tokens"] == 3
    assert (SECRET in log.read_text()) is texts and "example.org" not in log.read_text()
    assert replay(policy, log)["n"] == 3 and oct(log.stat().st_mode & 0o777) == "0o600"


def test_a_full_disk_costs_lines_and_no_answers():
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    engine = Engine("weak")
    app = create_app(
        policy_of("weak"),
        {"weak": upstream_of(engine)},
        config=config_of(models={}),
        decisions=DecisionLog(Path("/dev/full"), False),
    )
    with running(app) as client:
        assert Stage(client, {}, None).chat("hello").status_code == 200
        until(lambda: app.proxy.decisions.lines.lost >= 1)
