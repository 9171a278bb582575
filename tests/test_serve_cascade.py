"""Drafts that are judged before a byte of them is sent; one call for equal requests; slots by tenant and prefix."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette", reason="edgeft[serve] is not installed")
pytest.importorskip("uvicorn", reason="edgeft[serve] is not installed")
pytest.importorskip("aiohttp", reason="edgeft[serve] is not installed")

from edgeft.engines.chat_server import Token
from edgeft.router import LoadedPolicy
from edgeft.router.cascade import fit_judge
from edgeft.router.drafts import Draft
from edgeft.serve.app import create_app
from edgeft.serve.choose import conversation_hash, last_said
from edgeft.serve.prefixes import Slots, chain_of
from edgeft.serve.upstream import HttpUpstream
from tests.serve_stage import (
    JSON,
    Engine,
    Stage,
    cache_in,
    config_of,
    events,
    policy_of,
    running,
    said,
    scripted,
    text_of,
    until,
    upstream_of,
)
from tests.serve_stage import stage as stage


def drafting(**changes: Any) -> LoadedPolicy:
    """A policy whose weak candidate drafts; its judge has seen that drafts whose equations don't hold lose."""
    good = [(f"what is {n} + {n}", Draft(f"{n} + {n} = {2 * n}\n#### {2 * n}", "stop")) for n in range(2, 42)]
    bad = [
        (f"what is {n} + {n}", Draft(f"{n} + {n} = {2 * n + 1}\n#### {2 * n + 1}", "stop"))
        for n in range(2, 42)
    ]
    gain = np.array([0.0] * len(good) + [1.0] * len(bad))
    judge = replace(fit_judge([*good, *bad], gain, 1 - gain), threshold=0.5)
    policy = policy_of(**changes)
    policy.policy.features["cascade"] = {"draft": "weak"}
    return replace(policy, judge=judge)


def answering(text: str, calls: list[dict[str, Any]]) -> Any:
    def script(path: str, body: dict[str, Any]) -> Any:
        calls.append(body)
        return 200, JSON, said(text, 5, 7)

    return scripted(script)


@pytest.mark.parametrize("stream", [False, True], ids=["in one piece", "streamed"])
def test_a_draft_is_kept_or_sent_on_before_a_byte_of_it_is_seen(stream, tmp_path):
    weak_calls: list[dict[str, Any]] = []
    strong_calls: list[dict[str, Any]] = []
    draft = {"text": "7 + 7 = 14\n#### 14"}

    def weak(path: str, body: dict[str, Any]) -> Any:
        weak_calls.append(body)
        return 200, JSON, said(draft["text"], 5, 7)

    with scripted(weak) as weak_url, answering("#### 14", strong_calls) as strong_url:
        upstreams = {
            "weak": HttpUpstream(weak_url, "weak", None),
            "strong": HttpUpstream(strong_url, "strong", None),
        }
        app = create_app(drafting(), upstreams, cache_in(tmp_path), config=config_of())
        with running(app) as client:
            stage = Stage(client, {}, None)

            def text(response: Any) -> str:
                return (
                    text_of(events(response))
                    if stream
                    else response.json()["choices"][0]["message"]["content"]
                )

            kept = stage.chat("what is 7 + 7", stream=stream)
            assert text(kept) == draft["text"] and kept.headers["x-edgeft-route"] == "weak"
            assert "draft kept" in kept.headers["x-edgeft-reason"] and not strong_calls
            assert weak_calls[0]["logprobs"] is True, "the judge wants log-probabilities"
            draft["text"] = "7 + 7 = 15\n#### 15"
            sent = stage.chat("what is 7 + 7", stream=stream, temperature=0)
            assert (
                text(sent) == "#### 14"
                and sent.headers["x-edgeft-route"] == "strong"
                and "= 15" not in sent.text
            )
            assert "draft escalated" in sent.headers["x-edgeft-reason"]
            again = stage.chat("what is 7 + 7", stream=stream, temperature=0)
            assert again.headers["x-edgeft-cache"] == "hit" and again.headers["x-edgeft-route"] == "strong"
            metrics = client.get("/metrics").text
            assert 'edgeft_tokens_total{direction="out",route="weak"} 14.0' in metrics, (
                "drafts that were sent on are paid for"
            )
            assert 'edgeft_tokens_total{direction="out",route="strong"} 7.0' in metrics
            pinned = stage.chat("what is 7 + 7", model="weak", stream=stream)
            assert text(pinned) == draft["text"], "who pins a model gets it unjudged"


def test_a_judge_of_first_tokens_sends_on_early_and_ends_the_draft(tmp_path):
    policy = drafting()
    policy = replace(policy, judge=replace(policy.judge, after_tokens=4))
    text = {"draft": "7 + 7 = 15 so the answer that I give is in any case the one that comes now: #### 15"}
    engine = Engine("weak")
    engine.tokens = lambda _: (Token(f"{word} ", -0.1) for word in slowly(text["draft"], engine))  # type: ignore[method-assign]
    with answering("#### 14", []) as strong_url:
        upstreams = {"weak": upstream_of(engine), "strong": HttpUpstream(strong_url, "strong", None)}
        with running(create_app(policy, upstreams, config=config_of())) as client:
            stage = Stage(client, {}, None)
            for threshold, route in ((-9.0, "strong"), (9.0, "weak")):
                object.__setattr__(policy.judge, "threshold", threshold)
                engine.said = 0
                answer = stage.chat("what is 7 + 7", stream=True)
                assert answer.headers["x-edgeft-route"] == route
                if route == "weak":
                    assert (
                        text_of(events(answer)).split() == text["draft"].split()
                        and "logprobs" not in answer.text
                    )
                else:
                    until(lambda: engine.said < len(text["draft"].split()))
                    assert "#### 14" in answer.text and "answer" not in answer.text


def slowly(text: str, engine: Any) -> Any:
    """Words that come one by one, counted."""
    for word in text.split():
        time.sleep(0.05)
        engine.said += 1
        yield word


def test_a_private_draft_is_never_sent_on():
    strong_calls: list[dict[str, Any]] = []
    policy = drafting(privacy={"tenants": ["*"]})
    policy.policy.candidates[1]["remote"] = True
    with answering("7 + 7 = 15\n#### 15", []) as weak_url, answering("14", strong_calls) as strong_url:
        upstreams = {
            "weak": HttpUpstream(weak_url, "weak", None),
            "strong": HttpUpstream(strong_url, "strong", None),
        }
        with running(create_app(policy, upstreams, config=config_of())) as client:
            assert "15" in Stage(client, {}, None).chat("what is 7 + 7").text and not strong_calls


def test_a_second_local_model_is_asked_beside_and_never_a_remote_one_for_a_private_request():
    asked: list[dict[str, Any]] = []
    policy = drafting(privacy={"patterns": ["email"]})
    policy.policy.features["cascade"] = {"draft": "weak", "second": "strong"}
    policy.policy.candidates[1]["remote"] = True
    with answering("7 + 7 = 14\n#### 14", []) as weak_url, answering("#### 14", asked) as second_url:
        upstreams = {
            "weak": HttpUpstream(weak_url, "weak", None),
            "strong": HttpUpstream(second_url, "strong", None),
        }
        with running(create_app(policy, upstreams, config=config_of())) as client:
            stage = Stage(client, {}, None)
            assert stage.chat("what is 7 + 7").headers["x-edgeft-route"] == "weak" and len(asked) == 1
            assert 'direction="out",route="strong"} 7.0' in client.get("/metrics").text, "it is paid for"
            assert stage.chat("what is 7 + 7, me@example.org").status_code == 200 and len(asked) == 1


def test_a_drafter_that_fails_is_not_waited_for():
    with scripted(lambda p, b: (500, JSON, b"{}")) as weak_url, answering("14", []) as strong_url:
        upstreams = {
            "weak": HttpUpstream(weak_url, "weak", None),
            "strong": HttpUpstream(strong_url, "strong", None),
        }
        with running(create_app(drafting(), upstreams, config=config_of())) as client:
            assert Stage(client, {}, None).chat("what is 7 + 7").headers["x-edgeft-route"] == "strong"


def test_equal_requests_make_one_call_and_the_leader_may_leave(tmp_path):
    import httpx

    engine = Engine("weak")
    engine.gate.clear()
    app = create_app(
        policy_of("weak"), {"weak": upstream_of(engine)}, cache_in(tmp_path), config=config_of(models={})
    )
    body = {"model": "auto", "messages": [{"role": "user", "content": "the same"}], "temperature": 0}
    replies: list[Any] = []
    with running(app) as client:

        def ask(timeout_s: float = 20) -> threading.Thread:
            def run() -> None:
                try:
                    replies.append(
                        httpx.post(f"{client.base_url}/v1/chat/completions", json=body, timeout=timeout_s)
                    )
                except httpx.ReadTimeout:
                    replies.append(None)

            thread = threading.Thread(target=run)
            thread.start()
            return thread

        leader = ask(1.0)
        until(lambda: engine.calls == 1)
        rest = [ask() for _ in range(20)]
        leader.join()
        assert replies == [None], "the leader has left"
        until(lambda: sum(f.waiting for f in app.proxy.flights.under_way.values()) == 20)
        engine.gate.set()
        for thread in rest:
            thread.join()
    assert engine.calls == 1
    assert {r.json()["choices"][0]["message"]["content"] for r in replies if r} == {"weak: the same"}
    assert len([r for r in replies if r]) == 20


def test_a_conversation_stays_with_who_began_it(stage):
    first = stage.chat("a refund")
    assert first.json()["model"] == "strong"
    history = [
        {"role": "user", "content": "a refund"},
        {"role": "assistant", "content": first.json()["choices"][0]["message"]["content"]},
        {"role": "user", "content": "and now"},
    ]
    again = stage.client.post("/v1/chat/completions", json={"model": "auto", "messages": history}).json()
    assert again["model"] == "strong", "alone, 'and now' would go to weak"
    assert stage.chat("and now").json()["model"] == "weak"
    assert last_said(history) == 2 and conversation_hash("a", history) != conversation_hash("b", history)


def test_slots_are_shared_by_prefix_within_a_tenant_and_never_across():
    slots = Slots.of(2)
    system = {"role": "system", "content": "long"}
    one, two = (
        chain_of([system, {"role": "user", "content": "1"}]),
        chain_of([system, {"role": "user", "content": "2"}]),
    )
    first, mine = slots.take("a", None, one)
    assert not mine, "nothing of a's lies there yet"
    slots.give(first, True)
    again, mine = slots.take("a", None, two)
    assert again == first and mine, "the system prompt is there"
    other, mine = slots.take("b", None, two)
    assert other != first and not mine
    slots.give(first, True)
    slots.give(other, True)
    taken, mine = slots.take("b", "adapter", two)
    assert not mine, "another adapter makes other keys and values"
    slots.give(taken, True)
    last, mine = slots.take("c", None, two)
    assert not mine
    slots.give(last, True)
    assert slots.take("c", None, two)[1] is True
    slots.give(last, False)
    assert slots.take("c", None, two)[1] is False, "the engine may never have touched it"
    slots.forget()
    assert json.dumps([len(c) for c in (one, two)]) == "[3, 3]"
