"""What happens when a candidate fails: tried again, somebody else asked, left alone for a while; and never a private request let out."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pytest

pytest.importorskip("starlette", reason="edgeft[serve] is not installed")
pytest.importorskip("uvicorn", reason="edgeft[serve] is not installed")
pytest.importorskip("aiohttp", reason="edgeft[serve] is not installed")

from edgeft.serve import breaker
from edgeft.serve.app import create_app
from edgeft.serve.breaker import Breaker
from edgeft.serve.config import Limits, Model
from edgeft.serve.refusals import seconds
from edgeft.serve.upstream import HttpUpstream
from tests.serve_stage import (
    JSON,
    Engine,
    Stage,
    cache_in,
    config_of,
    policy_of,
    running,
    said,
    scripted,
    until,
    upstream_of,
)


def nobody() -> str:
    """An address that refuses connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def app_of(weak: str, strong: str, **given: Any) -> Any:
    upstreams = {"weak": HttpUpstream(weak, "weak", None), "strong": HttpUpstream(strong, "strong", None)}
    return create_app(given.pop("policy", policy_of()), upstreams, config=config_of(**given))


def test_a_failure_before_the_first_byte_is_answered_by_the_other():
    broken = (
        b'data: {"choices": [{"index": 0, "delta": {"role": "assistant"}}]}\n\n'  # a role is no output yet
    )
    for script in (
        lambda path, body: (500, JSON, b"{}"),
        lambda path, body: (200, {"Content-Type": "text/event-stream"}, broken),
        lambda path, body: (200, JSON, b"nonsense"),
    ):
        with scripted(script) as bad, scripted(lambda p, b: (200, JSON, said("good"))) as good:
            with running(app_of(bad, good)) as client:
                stage = Stage(client, {}, None)
                for stream in (False, True):
                    answer = stage.chat("hello", stream=stream)
                    assert answer.status_code == 200 and "good" in answer.text
                    assert (
                        answer.headers["x-edgeft-route"] == "strong"
                        and "weak failed" in answer.headers["x-edgeft-reason"]
                    )
    with scripted(lambda p, b: (200, JSON, said("good"))) as good, running(app_of(nobody(), good)) as client:
        assert Stage(client, {}, None).chat("hello").json()["model"] == "strong"


def test_a_pinned_model_and_a_clients_own_fault_are_not_answered_elsewhere():
    with (
        scripted(lambda p, b: (400, JSON, b'{"error": {"message": "bad"}}')) as bad,
        scripted(lambda p, b: (200, JSON, said("g"))) as good,
    ):
        with running(app_of(bad, good)) as client:
            assert Stage(client, {}, None).chat("hello").status_code == 400
    with scripted(lambda p, b: (200, JSON, said("g"))) as good, running(app_of(nobody(), good)) as client:
        assert Stage(client, {}, None).chat("hello", model="weak").status_code == 502


def test_it_is_tried_again_and_a_short_retry_after_is_waited_for():
    calls: list[float] = []

    def script(path: str, body: dict[str, Any]) -> Any:
        calls.append(time.monotonic())
        return (503, {**JSON, "Retry-After": "1"}, b"{}") if len(calls) == 1 else (200, JSON, said("at last"))

    with scripted(script) as url:
        app = app_of(url, url, models={"weak": Model(retries=1), "strong": Model(retries=1)})

        with running(app) as client:
            assert "at last" in Stage(client, {}, None).chat("hello", model="weak").text
    assert len(calls) == 2 and calls[1] - calls[0] >= 0.9


def test_an_upstream_that_fails_is_left_alone_and_comes_back(monkeypatch):
    monkeypatch.setattr(breaker, "FIRST_S", 0.5)
    state = {"broken": True, "calls": 0}

    def script(path: str, body: dict[str, Any]) -> Any:
        state["calls"] += 1
        return (500, JSON, b"{}") if state["broken"] else (200, JSON, said("back"))

    with scripted(script) as url, scripted(lambda p, b: (200, JSON, said("good"))) as good:
        app = app_of(url, good)
        app.proxy.breaker("weak").pause_s = 0.5
        with running(app) as client:
            stage = Stage(client, {}, None)
            for _ in range(breaker.FAILURES + 3):
                assert stage.chat("hello").json()["model"] == "strong"
            assert state["calls"] == breaker.FAILURES, "it went on asking"
            assert client.get("/health/ready").json()["models"]["weak"] == "paused"
            paused = stage.chat("hello", model="weak")
            assert (
                paused.status_code == 503
                and paused.json()["error"]["code"] == "model_paused"
                and paused.headers["retry-after"]
            )
            state["broken"] = False
            until(lambda: stage.chat("hello").json()["model"] == "weak", 5)


def test_the_breaker_by_itself(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(breaker.time, "monotonic", lambda: now[0])
    b = Breaker()
    for _ in range(breaker.FAILURES - 1):
        b.bad()
    assert b.open_for_s() == 0
    b.bad()
    assert b.open_for_s() == breaker.FIRST_S
    now[0] += breaker.FIRST_S
    assert b.open_for_s() == 0
    b.begin()
    assert b.open_for_s() > 0, "one trial at a time"
    b.bad()
    assert b.open_for_s() == 2 * breaker.FIRST_S
    b.good()
    assert b.open_for_s() == 0 and b.pause_s == breaker.FIRST_S
    b.bad(retry_after_s=7)
    assert b.open_for_s() == 7


def test_a_private_request_fails_rather_than_leaves():
    reached: list[str] = []

    def script(path: str, body: dict[str, Any]) -> Any:
        reached.append(json.dumps(body))
        return 200, JSON, said("out")

    policy = policy_of(privacy={"patterns": ["email"]})
    policy.policy.candidates[1]["remote"] = True
    with scripted(script) as url, running(app_of(nobody(), url, policy=policy)) as client:
        stage = Stage(client, {}, None)
        for text in ("mail me@example.org", "a refund for me@example.org"):
            for stream in (False, True):
                assert stage.chat(text, stream=stream).status_code in (502, 503)
        assert stage.chat("me@example.org", model="strong").status_code == 403
        assert stage.chat("hello", edgeft={"private": True}).status_code in (502, 503)
        assert not reached
        assert stage.chat("hello").json()["model"] == "strong", "what is not private may go there"


def test_a_private_answer_is_not_kept(tmp_path):
    engine = Engine("weak")
    policy = policy_of("weak", privacy={"patterns": ["email"]})
    with running(
        create_app(policy, {"weak": upstream_of(engine)}, cache_in(tmp_path), config=config_of(models={}))
    ) as client:
        stage = Stage(client, {}, None)
        for _ in range(2):
            assert stage.chat("me@example.org", temperature=0).headers["x-edgeft-cache"] == "off"
        assert [stage.chat("hi", temperature=0).headers["x-edgeft-cache"] for _ in range(2)] == [
            "miss",
            "hit",
        ]


def test_what_is_expected_to_be_late_goes_elsewhere_or_is_refused_before_it_waits():
    engines = {name: Engine(name) for name in ("weak", "strong")}
    app = create_app(
        policy_of(),
        {n: upstream_of(e) for n, e in engines.items()},
        config=config_of(limits=Limits(ttft_s=1.0)),
    )
    with running(app) as client:
        stage = Stage(client, {}, None)
        for name, engine in engines.items():
            engine.gate.clear()
            app.proxy.admission(name).service_s = 8.0
        import threading

        held = [threading.Thread(target=stage.chat, args=("held", name)) for name in engines]
        held[0].start()
        until(lambda: app.proxy.admission("weak").in_flight == 1)
        other = threading.Thread(target=stage.chat, args=("goes to strong",))
        other.start()
        until(lambda: app.proxy.admission("strong").in_flight == 1)
        started = time.monotonic()
        refused = stage.chat("late")
        assert (
            refused.status_code == 429
            and refused.json()["error"]["code"] == "ttft"
            and time.monotonic() - started < 1
        )
        assert int(refused.headers["retry-after"]) >= 7
        for engine in engines.values():
            engine.gate.set()
        held[0].join()
        other.join()
    assert engines["strong"].calls == 1 and engines["weak"].calls == 1


def test_retry_after_in_both_of_its_forms():
    from datetime import UTC, datetime, timedelta
    from email.utils import format_datetime

    assert seconds("7") == 7 and seconds(None) is None and seconds("soon") is None
    assert 8 < (seconds(format_datetime(datetime.now(UTC) + timedelta(seconds=10), usegmt=True)) or 0) <= 10
