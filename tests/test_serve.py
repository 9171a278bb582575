"""The proxy, in front of fake engines that speak OpenAI's chat API on real sockets."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("starlette", reason="edgeft[serve] is not installed")
pytest.importorskip("uvicorn", reason="edgeft[serve] is not installed")


from edgeft.serve.admission import Admission, Busy
from edgeft.serve.app import create_app
from edgeft.serve.http import Departures, Reply
from edgeft.serve.protocol import Refusal, parse
from edgeft.serve.refusals import told_s
from edgeft.serve.upstream import HttpUpstream
from tests.serve_stage import (
    KEY,
    SECRET,
    Engine,
    Stage,
    cache_in,
    config_of,
    events,
    policy_of,
    running,
    text_of,
    until,
    upstream_of,
)
from tests.serve_stage import stage as stage


def test_auto_is_routed_by_the_policy_and_says_why(stage):
    one, two = stage.chat("where is my card"), stage.chat("a refund")
    assert one.json()["choices"][0]["message"] == {"role": "assistant", "content": "weak: where is my card"}
    assert two.json()["choices"][0]["message"]["content"] == "strong: a refund"
    assert one.json()["model"] == one.headers["x-edgeft-route"] == "weak"
    assert two.headers["x-edgeft-route"] == "strong" and float(two.headers["x-edgeft-gain"]) >= 0.3
    assert "at or above" in two.headers["x-edgeft-reason"]
    assert one.headers["x-edgeft-request-id"] != two.headers["x-edgeft-request-id"]


def test_an_id_pins_and_an_unknown_model_is_404(stage):
    pinned = stage.chat("a refund", model="weak")
    assert pinned.json()["choices"][0]["message"]["content"] == "weak: a refund"
    assert "pinned" in pinned.headers["x-edgeft-reason"] and "x-edgeft-gain" not in pinned.headers
    wrong = stage.chat("hello", model="gpt-9")
    assert wrong.status_code == 404
    error = wrong.json()["error"]
    assert error["code"] == "model_not_found" and "'auto', 'weak', 'strong'" in error["message"]
    assert [m["id"] for m in stage.client.get("/v1/models").json()["data"]] == ["auto", "weak", "strong"]


def test_a_stream_says_the_same_as_one_piece(stage):
    fields = {"max_tokens": 4, "logprobs": True}
    whole = stage.chat("one two three four five", **fields).json()
    response = stage.chat(
        "one two three four five", stream=True, stream_options={"include_usage": True}, **fields
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response)
    assert text_of(chunks) == whole["choices"][0]["message"]["content"] == "weak: one two three"
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [whole["usage"][name] for name in counts] == [5, 4, 9]
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "length"
    assert len({c["id"] for c in chunks}) == 1 and {c["model"] for c in chunks} == {"weak"}
    logprobs = [
        e["logprob"]
        for c in chunks
        if c["choices"]
        for e in (c["choices"][0].get("logprobs") or {}).get("content", [])
    ]
    assert (
        logprobs
        == [e["logprob"] for e in whole["choices"][0]["logprobs"]["content"]]
        == [-0.1, -0.2, -0.2, -0.2]
    )
    without = events(stage.chat("one", stream=True))
    assert all(c["choices"] and "usage" not in c for c in without), "usage only where it is asked for"


def test_tokens_come_as_they_are_made(stage):
    engine = stage.engines["weak"]
    engine.gate.clear()
    body = {"model": "weak", "messages": [{"role": "user", "content": "held back"}], "stream": True}
    with stage.client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        assert "weak:" in next(lines), "the first token is here while the engine still waits"
        assert engine.running == 1
        engine.gate.set()
        assert list(lines)[-1] == "data: [DONE]"


def test_openai_client(stage):
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    client = openai.OpenAI(base_url=f"{stage.client.base_url}/v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": "a refund"}]
    assert (
        client.chat.completions.create(model="auto", messages=messages).choices[0].message.content
        == "strong: a refund"
    )
    with client.chat.completions.stream(model="auto", messages=messages) as stream:
        assert stream.get_final_completion().choices[0].message.content == "strong: a refund"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nope", messages=messages)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 17}, "n"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "pirate", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0]"),
        ({"model": None}, "model"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": True}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": 3}, "stream_options"),
    ],
)
def test_wrong_fields_are_400_in_openais_form(stage, change, param):
    body = {"model": "auto", "messages": [{"role": "user", "content": SECRET}], **change}
    response = stage.client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (
        error["type"] == "invalid_request_error"
        and error["param"] == param
        and SECRET not in error["message"]
    )
    assert stage.engines["weak"].calls == 0


def test_bodies_that_are_no_json_or_too_large(stage):
    for body in (b"{", b"[]", b"\xff"):
        response = stage.client.post("/v1/chat/completions", content=body)
        assert response.status_code == 400 and response.json()["error"]["message"]
    large = b'{"x":"' + b"y" * (1 << 20) + b'"}'
    assert stage.client.post("/v1/chat/completions", content=large).status_code == 413
    parts = (large[i : i + 65536] for i in range(0, len(large), 65536))  # chunked: no length is declared
    assert stage.client.post("/v1/chat/completions", content=parts).status_code == 413
    assert stage.client.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert stage.client.get("/v1/chat/completions").status_code == 405


def test_only_listed_fields_go_upstream():
    request = parse(
        json.dumps(
            {
                "model": "auto", "messages": [{"role": "user", "content": "x"}], "id_slot": 1, "lora": [], "cache_salt": "s",
                "n_discard": 9, "n": 1, "temperature": 0, "seed": None, "user": "me",
            }
        ).encode()
    )  # fmt: skip
    assert set(request.fields) == {"messages", "temperature", "n"}


def test_the_engines_own_refusal_is_passed_on(stage):
    response = stage.chat("too long")
    assert response.status_code == 400 and "the context 8" in response.json()["error"]["message"]
    assert response.headers["x-edgeft-route"] == "weak"
    assert stage.chat("fine").status_code == 200, "the slot is free again"


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "in one piece"])
def test_a_client_that_leaves_frees_the_engine(stage, stream):
    engine = stage.engines["weak"]
    body = {
        "model": "weak",
        "messages": [{"role": "user", "content": "slow"}],
        "stream": stream,
        "max_tokens": 100000,
    }
    with pytest.raises(httpx.ReadTimeout):
        with httpx.Client(base_url=stage.client.base_url, timeout=0.5) as client:
            if stream:
                with client.stream("POST", "/v1/chat/completions", json=body, timeout=5) as response:
                    next(response.iter_lines())
                    assert engine.running == 1
                raise httpx.ReadTimeout("left by itself")
            client.post("/v1/chat/completions", json=body)
    assert engine.left.wait(5), "the engine went on for a client that is gone"
    until(lambda: stage.app.state.proxy.admission("weak").in_flight == 0)
    assert stage.chat("next", model="weak").status_code == 200
    until(lambda: 'edgeft_requests_total{route="weak",status="499"} 1.0' in stage.client.get("/metrics").text)


def test_a_full_queue_is_429_and_one_who_waited_is_served(stage):
    engine, admission = stage.engines["weak"], stage.app.state.proxy.admission("weak")
    engine.gate.clear()
    replies: list[httpx.Response] = []

    def ask(text: str) -> threading.Thread:
        thread = threading.Thread(target=lambda: replies.append(stage.chat(text, model="weak")))
        thread.start()
        return thread

    first = ask("in the slot")
    until(lambda: admission.in_flight == 1)
    second = ask("in the queue")
    until(lambda: len(admission.queue) == 1)
    refused = stage.chat("too many", model="weak")
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert int(refused.headers["retry-after"]) == math.ceil(int(refused.headers["retry-after-ms"]) / 1000)
    assert refused.json()["error"]["code"] == "queue_full"
    assert stage.chat("a refund").status_code == 200, "the other model has its own queue"
    assert engine.calls == 1, "one at a time"
    engine.gate.set()
    for thread in (first, second):
        thread.join(10)
    assert [r.status_code for r in replies] == [200, 200] and admission.in_flight == 0


@pytest.mark.parametrize(
    ("temperature", "full"), [(1, ("weak", "strong")), (0, ("weak", "strong")), (1, ("weak",))]
)
def test_a_refusal_leaves_nothing_for_the_collector(tmp_path, temperature, full):
    """An exception that its own traceback's frames know is freed by the collector alone, which stops everybody: at hundreds of 429s a
    second for tens of milliseconds. With the cache (temperature 0) it passes from one task to another; with one of two full it is
    answered by the other."""
    engine = Engine("weak")
    app = create_app(policy_of("weak", "strong"), {}, cache_in(tmp_path / "cache"), config=config_of())
    for name in ("weak", "strong"):
        app.proxy.upstreams[name] = upstream_of(engine)
        app.proxy.admissions[name] = admission = Admission(1, 0)
        admission.in_flight = int(name in full)
    body = json.dumps(
        {"model": "auto", "messages": [{"role": "user", "content": "?"}], "temperature": temperature}
    )
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}
    statuses: list[int] = []

    async def send(message: dict[str, Any]) -> None:
        statuses.append(message.get("status", 0))

    async def ask(times: int) -> None:
        for _ in range(times):
            parts = [{"type": "http.request", "body": body.encode(), "more_body": False}]

            async def receive(parts: list[dict[str, Any]] = parts) -> dict[str, Any]:
                return parts.pop() if parts else await asyncio.Event().wait()  # then it stays and waits

            await app(dict(scope), receive, send)

    async def play() -> int:
        await ask(3)
        gc.collect()
        gc.disable()
        try:
            await ask(20)
            return gc.collect()
        finally:
            gc.enable()

    found = asyncio.run(play())
    assert statuses.count(429 if len(full) == 2 else 200) == 23
    assert found < 20, f"{found} objects in circles after 20 refusals"


def test_each_who_is_refused_comes_back_at_a_time_of_its_own():
    times = {round(told_s(8.0), 3) for _ in range(50)}
    assert len(times) > 40 and min(times) >= 8 and max(times) <= 12
    assert all(told_s(0.003) >= 1 for _ in range(50)), "no storm at the end of a pause"
    assert all(told_s(119.0) <= 120 for _ in range(50)), "OpenAI's client does not wait longer"
    assert told_s(500.0) == 500


def test_a_client_that_leaves_is_seen_whichever_loop_runs():
    departures = Departures()

    async def work(seconds: float) -> bool:
        reply = Reply(None)  # type: ignore[arg-type]

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        await departures.while_connected(receive, reply, asyncio.sleep(seconds))
        return reply.left

    assert asyncio.run(work(5)), "left"
    assert not asyncio.run(work(0)), "answered at once; its loop ends with the timer set"
    assert asyncio.run(work(5)), "left"
    assert not departures.young and not departures.old and not departures.watchers


def test_admission_hands_on_slots_and_survives_cancelled_waiters():
    async def play() -> None:
        admission, order = Admission(1, 2), []

        async def use(name: str, pause: float = 0.0) -> None:
            async with admission.slot():
                order.append(name)
                await asyncio.sleep(pause)

        first = asyncio.create_task(use("first", 0.05))
        await asyncio.sleep(0)
        gone, waits = asyncio.create_task(use("gone")), asyncio.create_task(use("waits"))
        await asyncio.sleep(0)
        with pytest.raises(Busy):
            await use("too many")
        gone.cancel()
        await asyncio.gather(first, waits)
        assert order == ["first", "waits"] and admission.in_flight == 0 and not admission.queue
        # cancelled in the moment in which the slot is handed over
        holder = asyncio.create_task(use("holder", 0.01))
        await asyncio.sleep(0)
        unlucky = asyncio.create_task(use("unlucky"))
        await asyncio.sleep(0)
        admission._leave()
        unlucky.cancel()
        await asyncio.gather(unlucky, return_exceptions=True)
        admission.in_flight += 1  # what the holder gives back
        await holder
        assert admission.in_flight == 0

    asyncio.run(play())


def test_metrics_count(stage):
    stage.chat("one two", temperature=0)
    stage.chat("one two", temperature=0)
    stage.chat("a refund", stream=True)
    stage.chat("x", model="nope")
    text = stage.client.get("/metrics").text
    for line in (
        'edgeft_requests_total{route="weak",status="200"} 2.0',
        'edgeft_requests_total{route="strong",status="200"} 1.0',
        'edgeft_requests_total{route="none",status="404"} 1.0',
        'edgeft_cache_total{result="hit"} 1.0',
        'edgeft_cache_total{result="miss"} 1.0',
        'edgeft_tokens_total{direction="in",route="weak"} 2.0',
        'edgeft_tokens_total{direction="out",route="weak"} 3.0',
        'edgeft_tokens_total{direction="out",route="strong"} 3.0',
        'edgeft_request_duration_seconds_count{route="weak"} 2.0',
        'edgeft_ttft_seconds_count{route="weak"} 1.0',
    ):
        assert line in text, line


def test_health_tells_loading_from_ready_and_requests_wait_outside():
    engine, upstreams = Engine("weak"), {}
    with running(create_app(policy_of(), upstreams)) as client:
        stage = Stage(client, {"weak": engine}, None)
        assert client.get("/health").status_code == client.get("/health/live").status_code == 200
        early = client.get("/health/ready")
        assert early.status_code == 503 and early.json()["models"] == {"weak": "loading", "strong": "loading"}
        refused = stage.chat("hello")
        assert (
            refused.status_code == 503
            and refused.headers["retry-after"]
            and refused.json()["error"]["code"] == "model_loading"
        )
        for name in ("weak", "strong"):
            upstreams[name] = HttpUpstream(engine.url, name, KEY)
        assert client.get("/health/ready").json() == {
            "reloads": {"done": 0, "error": None},
            "status": "ready",
            "models": {"weak": "ready", "strong": "ready"},
        }
        assert stage.chat("hello").headers["x-edgeft-cache"] == "off"


def test_prompts_stand_in_no_log_and_no_metric(stage, caplog):
    caplog.set_level("DEBUG", logger="edgeft.serve")
    caplog.set_level("INFO")
    stage.chat(SECRET)
    stage.chat("slow " + SECRET, temperature=0, max_tokens=1)
    stage.chat("x", model=SECRET)
    stage.client.post("/v1/chat/completions", content=f'{{"model": "{SECRET}'.encode())
    assert SECRET not in caplog.text and SECRET not in stage.client.get("/metrics").text
    kept = Path(stage.app.state.proxy.cache.store.disk.directory)
    assert not any(SECRET.encode() in path.read_bytes() for path in kept.rglob("*") if path.is_file())


def test_a_request_refuses_as_parse_says():
    with pytest.raises(Refusal) as refused:
        parse(b'{"model": "auto", "messages": [{"role": "user", "content": "x"}], "n": true}')
    assert refused.value.status == 400
