"""The fault list of docs/serving.md against the proxy as a process, before an upstream on raw sockets that misbehaves by script."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("starlette", reason="edgeft[serve] is not installed")
pytest.importorskip("uvicorn", reason="edgeft[serve] is not installed")
pytest.importorskip("aiohttp", reason="edgeft[serve] is not installed")

from tests.serve_faults import (
    DONE,
    USAGE,
    Call,
    Script,
    Served,
    Upstream,
    asking,
    chunk,
    events,
    knock,
    leave,
    said,
    served,
    usage_chunk,
)
from tests.serve_stage import until

SOON_S = 0.5  # within which an upstream sees that its client's client has left


def stream_of(*parts: bytes) -> Script:
    """A stream of these parts, ended properly as HTTP."""

    def script(call: Call) -> None:
        call.begin()
        for part in parts:
            call.part(part)
        call.end()

    return script


def bytewise(data: bytes) -> Script:
    """A stream in parts of one byte."""
    return stream_of(*(data[i : i + 1] for i in range(len(data))))


def fails(status: int, times: int = 1 << 30, **headers: str) -> Script:
    """A status, so many times; then an answer."""
    seen: list[Call] = []

    def script(call: Call) -> None:
        seen.append(call)
        call.status(status, b'{"error": {"message": "because"}}', **headers) if len(
            seen
        ) <= times else call.answer()

    return script


def breaks_off(call: Call) -> None:
    """RST after the first token."""
    call.begin()
    call.part(chunk("half"))
    time.sleep(0.1)
    call.reset()


def late(seconds: float) -> Script:
    """The headers at once, the first token later."""

    def script(call: Call) -> None:
        if call.streamed:
            call.begin()
        time.sleep(seconds)
        if call.streamed:
            call.part(chunk("late") + chunk(finish="stop") + usage_chunk() + DONE)
            call.end()
        else:
            call.answer("late")

    return script


GOOD = chunk("good") + chunk(finish="stop") + usage_chunk() + DONE
SCRIPTS: dict[str, Script] = {
    "error-500": fails(500),
    "error-500-once": fails(500, 1),
    "limit-429": fails(429, Retry_After="7"),
    "limit-429-once": fails(429, 1, Retry_After="1"),
    "late": late(0.8),
    "silent": late(2.0),
    "reset-first": Call.reset,
    "hung-up-first": Call.hang_up,
    "reset-mid": breaks_off,
    "no-json": stream_of(chunk("half"), b"data: {nonsense\n\n" + DONE),
    "cut-event": stream_of(chunk("half"), b'data: {"choices": [{"del'),
    "no-finish": stream_of(chunk("half")),
    "error-event": stream_of(chunk("half"), b'data: {"error": {"message": "x"}}\n\n', DONE),
    "odd-shape": stream_of(chunk("half"), b'data: {"choices": [{"delta": "text"}]}\n\n', DONE),
    "no-object": stream_of(chunk("half"), b"data: [1, 2]\n\n", DONE),
    "bytewise": bytewise(GOOD),
    "crlf": stream_of(b": comment\r\nevent: message\r\n" + GOOD.replace(b"\n", b"\r\n")),
    "no-space": stream_of(b"\n\n" + GOOD.replace(b"data: ", b"data:")),
    "no-done": stream_of(GOOD.removesuffix(DONE)),
    "no-usage": stream_of(chunk("good") + chunk(finish="stop") + DONE),
    "usage-with-choices": stream_of(chunk("good") + chunk(finish="stop", usage=USAGE) + DONE),
    "usage-everywhere": stream_of(
        chunk("go", usage={**USAGE, "completion_tokens": 1, "total_tokens": 12}),
        chunk("od", usage={**USAGE, "completion_tokens": 2, "total_tokens": 13}),
        chunk(finish="stop", usage=USAGE) + DONE,
    ),
}
BROKEN = ("reset-mid", "no-json", "cut-event", "no-finish", "error-event", "odd-shape", "no-object")
FINE = ("bytewise", "crlf", "no-space", "no-done")
TOLD = ("usage-with-choices", "usage-everywhere")


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    made = Upstream()
    made.scripts.update(SCRIPTS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def dead() -> Iterator[str]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        yield f"openai:http://127.0.0.1:{taken.getsockname()[1]}#refused"


@pytest.fixture(scope="module")
def proxy(upstream, dead, tmp_path_factory) -> Iterator[Served]:
    """A candidate for each script, always pinned: one fault's breaker is not another's."""
    names = [*SCRIPTS, *(f"leave-{i}" for i in range(len(LEAVING)))]
    ids = [upstream.id(name) for name in names]
    models = {name: {"retries": 0} for name in (*ids, dead)}
    models |= {upstream.id(f"{name}-once"): {"retries": 1} for name in ("error-500", "limit-429")}
    models |= {
        upstream.id(name): {"retries": 0, "stream": "always"} for name in (*BROKEN, *FINE, *TOLD, "no-usage")
    }
    models[upstream.id("silent")] = {"retries": 0, "silence_s": 0.7}
    with served(tmp_path_factory.mktemp("faults"), [*ids, dead], models=models) as made:
        yield made


def test_a_refused_connection_is_502(proxy, dead):
    for stream in (False, True):
        response = proxy.chat(dead, stream=stream)
        assert response.status_code == 502 and response.json()["error"]["type"] == "upstream_error"


def test_500_is_502_and_what_passes_is_tried_again(proxy, upstream):
    for stream in (False, True):
        response = proxy.chat(upstream.id("error-500"), stream=stream)
        assert response.status_code == 502 and "because" not in response.text
    assert proxy.chat(upstream.id("error-500-once")).json()["choices"][0]["message"]["content"] == "fine"
    assert len(upstream.of("error-500-once")) == 2


def test_429_is_passed_on_with_its_time(proxy, upstream):
    response = proxy.chat(upstream.id("limit-429"))
    assert response.status_code == 429 and 6 <= int(response.headers["retry-after"]) <= 11
    assert response.json()["error"]["type"] == "rate_limit_error"
    again = proxy.chat(upstream.id("limit-429"), stream=True)
    assert again.status_code == 429 and 5 <= int(again.headers["retry-after"]) <= 11
    assert len(upstream.of("limit-429")) == 1, "it asked again before the time that it was told"


def test_a_short_retry_after_is_waited_for(proxy, upstream):
    assert proxy.chat(upstream.id("limit-429-once")).status_code == 200
    first, second = upstream.of("limit-429-once")
    assert second.at_s - first.at_s >= 0.9


@pytest.mark.parametrize("stream", [False, True])
def test_a_slow_first_token_is_waited_for_and_silence_is_504(proxy, upstream, stream):
    assert "late" in proxy.chat(upstream.id("late"), stream=stream).text
    response = proxy.chat(upstream.id("silent"), stream=stream)
    assert response.status_code == 504 and response.json()["error"]["type"] == "upstream_error"


@pytest.mark.parametrize("name", ["reset-first", "hung-up-first"])
def test_a_connection_that_ends_before_the_first_byte_is_502(proxy, upstream, name):
    for stream in (False, True):
        response = proxy.chat(upstream.id(name), stream=stream)
        assert response.status_code == 502 and response.json()["error"]["type"] == "upstream_error"


@pytest.mark.parametrize("name", BROKEN)
def test_a_stream_that_breaks_is_never_passed_off_as_an_answer(proxy, upstream, name):
    whole = proxy.chat(upstream.id(name))
    assert whole.status_code == 502 and whole.json()["error"]["message"]
    streamed = proxy.chat(upstream.id(name), stream=True)
    assert streamed.status_code == 200 and said(streamed.text) == "half"
    assert "[DONE]" not in streamed.text and events(streamed.text)[-1]["error"]["message"]


@pytest.mark.parametrize("name", FINE)
def test_streams_that_are_odd_but_right_are_answers(proxy, upstream, name):
    whole = proxy.chat(upstream.id(name)).json()
    assert whole["choices"][0]["message"]["content"] == "good" and whole["usage"] == USAGE
    streamed = proxy.chat(upstream.id(name), stream=True, stream_options={"include_usage": True}).text
    assert (
        said(streamed) == "good"
        and events(streamed)[-1]["usage"] == USAGE
        and streamed.endswith("[DONE]\n\n")
    )


def test_usage_that_is_not_told_is_unresolved_and_not_guessed(proxy, upstream):
    route = upstream.id("no-usage")
    assert "usage" not in proxy.chat(route).json()
    streamed = proxy.chat(route, stream=True, stream_options={"include_usage": True})
    assert not any(event.get("usage") for event in events(streamed.text))
    assert proxy.metric("edgeft_usage_unresolved_total", route=route) == 2
    assert proxy.metric("edgeft_tokens_total", route=route) == 0


@pytest.mark.parametrize("name", TOLD)
def test_usage_in_a_chunk_with_choices_is_told_and_counted_once(proxy, upstream, name):
    route = upstream.id(name)
    whole = proxy.chat(route).json()
    assert whole["choices"][0]["message"]["content"] == "good" and whole["usage"] == USAGE
    streamed = proxy.chat(route, stream=True, stream_options={"include_usage": True})
    told = [event for event in events(streamed.text) if event.get("usage")]
    assert (
        said(streamed.text) == "good" and [e["usage"] for e in told] == [USAGE] and told[0]["choices"] == []
    )
    assert not any(e.get("usage") for e in events(proxy.chat(route, stream=True).text)), (
        "only where it is asked for"
    )
    assert proxy.metric("edgeft_tokens_total", route=route, direction="in") == 3 * USAGE["prompt_tokens"]
    assert proxy.metric("edgeft_tokens_total", route=route, direction="out") == 3 * USAGE["completion_tokens"]


LEAVING = [
    (how, when)
    for how in ("fin", "rst")
    for when in ("before the head", "before the first token", "mid-stream", "in one piece")
]


@pytest.mark.parametrize(("how", "when"), LEAVING)
def test_a_client_that_leaves_ends_the_work(proxy, upstream, how, when):
    name = f"leave-{LEAVING.index((how, when))}"

    def script(call: Call) -> None:
        if when != "before the head" and call.streamed:
            call.begin()
        if when == "mid-stream":
            call.part(chunk("half"))
        call.here.set()
        call.until_closed(5)

    upstream.scripts[name] = script
    connection = knock(proxy.url, asking(upstream.id(name), stream=when != "in one piece"))
    until(lambda: upstream.of(name) and upstream.of(name)[0].here.is_set())
    call = upstream.of(name)[0]
    if when == "mid-stream":
        received = b""
        while b"half" not in received:
            received += connection.recv(4096)
    left_s = time.monotonic()
    leave(connection, how)
    until(lambda: call.closed_s, 5)
    connection.close()
    assert call.closed_s is not None and call.closed_s - left_s < SOON_S
    upstream.scripts[name] = Call.answer
    assert proxy.chat(upstream.id(name)).status_code == 200, "the slot is free again"
    assert len(upstream.of(name)) == 2, "the call that was left is not tried again"
    until(lambda: proxy.metric("edgeft_requests_total", route=upstream.id(name), status="499") == 1)
    assert proxy.metric("edgeft_usage_unresolved_total", route=upstream.id(name)) == 1, (
        "what was left is listed"
    )


# With a second candidate.

EARLY: dict[str, Script] = {
    "500": fails(500),
    "503": fails(503),
    "429": fails(429, Retry_After="1"),
    "reset": Call.reset,
    "hung up": Call.hang_up,
    "broken before the first token": stream_of(b"data: {nonsense\n\n"),
    "empty stream": stream_of(),
    "no JSON in one piece": lambda call: call.status(200, b"<html>"),
    "silent": late(2.0),
}


@pytest.fixture(scope="module")
def pair(upstream, tmp_path_factory) -> Iterator[Served]:
    ids = [upstream.id("first"), upstream.id("second")]
    models = {ids[0]: {"retries": 0, "silence_s": 0.7}}
    with served(tmp_path_factory.mktemp("pair"), ids, models=models) as made:
        yield made


@pytest.mark.parametrize("name", EARLY)
def test_a_failure_before_the_first_byte_is_answered_by_the_other_candidate(pair, upstream, name):
    upstream.scripts["second"] = lambda call: call.answer("second")
    for stream in (False, True):
        upstream.scripts["first"] = lambda call: call.answer("first")
        until(
            lambda: pair.chat().headers["x-edgeft-route"] == upstream.id("first"), 10
        )  # its breaker is shut again
        upstream.scripts["first"] = EARLY[name]
        asked = len(upstream.of("first"))
        response = pair.chat(stream=stream)
        assert response.status_code == 200 and response.headers["x-edgeft-route"] == upstream.id("second")
        assert "second" in response.text and "failed" in response.headers["x-edgeft-reason"]
        assert asked < len(upstream.of("first")) <= asked + 2, "not asked at all, or again and again"


def test_after_the_first_token_nobody_else_goes_on(pair, upstream):
    upstream.scripts["first"] = lambda call: call.answer("first")
    until(lambda: pair.chat().headers["x-edgeft-route"] == upstream.id("first"), 10)
    before = len(upstream.of("second"))
    upstream.scripts["first"] = breaks_off
    streamed = pair.chat(stream=True)
    assert said(streamed.text) == "half" and "[DONE]" not in streamed.text
    assert len(upstream.of("second")) == before


def test_the_clients_own_fault_is_passed_on_and_answered_by_nobody_else(pair, upstream):
    upstream.scripts["first"] = lambda call: call.answer("first")
    until(lambda: pair.chat().headers["x-edgeft-route"] == upstream.id("first"), 10)
    before = len(upstream.of("second"))
    upstream.scripts["first"] = fails(400)
    response = pair.chat()
    assert response.status_code == 400 and "because" in response.json()["error"]["message"]
    assert len(upstream.of("second")) == before
