"""The paths beside chat, and what chat can beyond one answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("starlette", reason="edgeft[serve] is not installed")
pytest.importorskip("uvicorn", reason="edgeft[serve] is not installed")
pytest.importorskip("aiohttp", reason="edgeft[serve] is not installed")

from edgeft.serve.app import create_app
from edgeft.serve.upstream import Features, HttpUpstream
from tests.serve_stage import JSON, SECRET, Stage, config_of, events, policy_of, running, said, scripted
from tests.serve_stage import stage as stage


def two(url: str, features: Features | None = None, **parts: Any) -> Any:
    upstreams = {name: HttpUpstream(url, name, None, features=features) for name in ("weak", "strong")}
    return create_app(policy_of(**parts), upstreams, config=config_of())


def test_several_answers_of_an_engine_that_gives_one(stage):
    response = stage.chat("one two", n=3, seed=5).json()
    assert [c["index"] for c in response["choices"]] == [0, 1, 2] and stage.engines["weak"].calls == 3
    assert {c["message"]["content"] for c in response["choices"]} == {"weak: one two"}
    assert response["usage"] == {"prompt_tokens": 6, "completion_tokens": 9, "total_tokens": 15}
    streamed = events(stage.chat("one", n=2, stream=True, stream_options={"include_usage": True}))
    told = {c["choices"][0]["index"] for c in streamed if c["choices"]}
    assert told == {0, 1} and streamed[-1]["usage"]["completion_tokens"] == 4


def test_several_answers_are_asked_for_at_once_where_the_upstream_can():
    asked = []

    def script(path: str, body: dict[str, Any]) -> Any:
        asked.append(body)
        value = json.loads(said("a"))
        value["choices"].append({**value["choices"][0], "index": 1})
        return 200, JSON, json.dumps(value).encode()

    with scripted(script) as url, running(two(url)) as client:
        answer = Stage(client, {}, None).chat("x", n=2).json()
        assert len(answer["choices"]) == 2 and answer["usage"]["total_tokens"] == 5
        assert [body["n"] for body in asked] == [2] and "stream" not in asked[0]


def test_completions_streamed_and_whole():
    def script(path: str, body: dict[str, Any]) -> Any:
        assert path == "/v1/completions" and body["prompt"] in ("once", [1, 2])
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
        if not body.get("stream"):
            choice = {"index": 0, "text": " upon", "finish_reason": "length", "logprobs": None}
            return 200, JSON, json.dumps({"choices": [choice], "usage": usage}).encode()
        parts = [
            {"choices": [{"index": 0, "text": " up", "finish_reason": None}]},
            {"choices": [{"index": 0, "text": "on", "finish_reason": "length"}]},
            {"choices": [], "usage": usage},
        ]
        data = b"".join(b"data: " + json.dumps(p).encode() + b"\n\n" for p in parts) + b"data: [DONE]\n\n"
        return 200, {"Content-Type": "text/event-stream"}, data

    with scripted(script) as url, running(two(url)) as client:
        body: dict[str, Any] = {"model": "weak", "prompt": "once"}
        whole = client.post("/v1/completions", json=body).json()
        assert whole["object"] == "text_completion" and whole["choices"][0]["text"] == " upon"
        assert client.post("/v1/completions", json={**body, "prompt": [1, 2]}).status_code == 200
        shown = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = events(client.post("/v1/completions", json={**body, **shown}))
        assert "".join(c["choices"][0]["text"] for c in chunks if c["choices"]) == " upon"
        assert chunks[-1]["usage"] == whole["usage"]
        for wrong in (["a", "b"], [], 3, None):
            refused = client.post("/v1/completions", json={**body, "prompt": wrong})
            assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt", wrong


def test_an_engine_without_completions_is_not_asked():
    with running(two("http://127.0.0.1:9", Features(completions=False))) as client:
        auto = client.post("/v1/completions", json={"model": "auto", "prompt": "x"})
        assert auto.status_code == 400 and "no completions" in auto.json()["error"]["message"]
        pinned = client.post("/v1/completions", json={"model": "weak", "prompt": "x"})
        assert pinned.status_code == 400 and "no completions" in pinned.json()["error"]["message"]


def test_embeddings_go_to_who_can_and_may():
    seen: list[str] = []

    def script(path: str, body: dict[str, Any]) -> Any:
        assert path == "/v1/embeddings"
        seen.append(body["model"])
        texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
        data = [{"object": "embedding", "index": i, "embedding": [0.5, 1.0]} for i in range(len(texts))]
        return (
            200,
            JSON,
            json.dumps(
                {"object": "list", "data": data, "usage": {"prompt_tokens": 4, "total_tokens": 4}}
            ).encode(),
        )

    with scripted(script) as url:
        policy = policy_of(privacy={"patterns": ["email"]})
        policy.policy.candidates[1]["remote"] = True
        upstreams = {
            "weak": HttpUpstream(url, "weak", None, features=Features(embeddings=False)),
            "strong": HttpUpstream(url, "strong", None),
        }
        with running(create_app(policy, upstreams, config=config_of())) as client:
            answer = client.post("/v1/embeddings", json={"model": "auto", "input": ["a", "b"]})
            assert (
                len(answer.json()["data"]) == 2
                and answer.json()["model"] == "strong" == answer.headers["x-edgeft-route"]
            )
            private = client.post(
                "/v1/embeddings", json={"model": "strong", "input": "write to me@example.org"}
            )
            assert private.status_code == 403 and "me@example" not in private.text
            assert (
                client.post("/v1/embeddings", json={"model": "auto", "input": "me@example.org"}).status_code
                == 400
            )
            assert client.post("/v1/embeddings", json={"model": "weak", "input": "a"}).status_code == 400
            assert client.post("/v1/embeddings", json={"model": "nope", "input": "a"}).status_code == 404
            for wrong in ("", [], [""], [1, "a"], {}, None):
                assert (
                    client.post("/v1/embeddings", json={"model": "strong", "input": wrong}).status_code == 400
                ), wrong
            assert seen == ["strong"]
            assert 'edgeft_tokens_total{direction="in",route="strong"} 4.0' in client.get("/metrics").text


def test_responses_in_one_piece_and_streamed(stage):
    body: dict[str, Any] = {"model": "auto", "input": "a refund", "instructions": "be short"}
    made = stage.client.post("/v1/responses", json=body).json()
    assert made["object"] == "response" and made["status"] == "completed" and made["model"] == "strong"
    assert made["output"][0]["content"][0]["text"] == "strong: a refund"
    assert made["usage"]["input_tokens"] == 4 and made["usage"]["output_tokens"] == 3
    cut = stage.client.post("/v1/responses", json={**body, "max_output_tokens": 2}).json()
    assert cut["status"] == "incomplete" and cut["incomplete_details"] == {"reason": "max_output_tokens"}
    text = stage.client.post("/v1/responses", json={**body, "stream": True}).text
    told = [json.loads(p.split("data: ", 1)[1]) for p in text.split("\n\n") if p]
    kinds = [t["type"] for t in told]
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert "".join(t["delta"] for t in told if t["type"].endswith("text.delta")) == "strong: a refund"
    assert [t["sequence_number"] for t in told] == list(range(len(told)))
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}]
    assert (
        stage.client.post("/v1/responses", json={"model": "weak", "input": parts}).json()[
            "output_text" if False else "status"
        ]
        == "completed"
    )
    for change in (
        {"previous_response_id": "r"},
        {"background": True},
        {"tools": [{"type": "web_search"}]},
        {"input": []},
        {"input": [3]},
    ):
        refused = stage.client.post("/v1/responses", json={**body, **change})
        assert refused.status_code == 400 and refused.json()["error"]["message"], change


def test_responses_carry_function_calls():
    def script(path: str, body: dict[str, Any]) -> Any:
        assert body["tools"] == [{"type": "function", "function": {"name": "look", "parameters": {}}}]
        assert (
            body["messages"][1]["tool_calls"][0]["id"] == "c0" and body["messages"][2]["tool_call_id"] == "c0"
        )
        call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": None, "tool_calls": [call]},
            "finish_reason": "tool_calls",
        }
        return 200, JSON, json.dumps({"choices": [choice], "usage": None}).encode()

    given = [
        {"role": "user", "content": "x"},
        {"type": "function_call", "call_id": "c0", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c0", "output": "seen"},
    ]
    with scripted(script) as url, running(two(url)) as client:
        body = {
            "model": "weak",
            "input": given,
            "tools": [{"type": "function", "name": "look", "parameters": {}}],
        }
        made = client.post("/v1/responses", json=body).json()
        assert [(o["type"], o.get("name")) for o in made["output"]] == [("function_call", "look")] and made[
            "usage"
        ] is None


def test_generate_as_the_guide_has_it(stage):
    answer = stage.client.post("/generate", json={"prompt": "a refund"})
    assert set(answer.json()) == {"response", "model", "timestamp", "cached"}
    assert answer.json()["response"] == "strong: a refund" and answer.json()["cached"] is False
    for wrong in (
        {"prompt": ""},
        {"prompt": "x" * 1001},
        {"prompt": "x", "max_length": 10},
        {"prompt": "x", "temperature": 0},
        {"prompt": "x", "top_p": True},
    ):
        assert stage.client.post("/generate", json=wrong).status_code == 422, wrong


def test_a_model_by_its_name_and_the_openapi_page(stage):
    assert stage.client.get("/v1/models/weak").json()["id"] == "weak"
    assert stage.client.get("/v1/models/none").json()["error"]["code"] == "model_not_found"
    page = stage.client.get("/openapi.json").json()
    assert page["openapi"].startswith("3.1") and set(page["paths"]["/v1/chat/completions"]) == {"post"}
    known = page["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]["properties"]
    assert known["temperature"]["maximum"] == 2 and "lora" not in known
    for path, methods in page["paths"].items():
        for method in methods:
            assert stage.client.request(method, path).status_code not in (404, 405), f"{path} is not there"


def test_odd_names_and_deep_bodies_are_refused_and_no_fault(stage):
    body = {"model": "auto", "messages": [{"role": "user", "content": "x"}]}
    assert (
        stage.client.post("/v1/chat/completions", json=body, headers={"Origin": "http://["}).status_code
        == 403
    )
    assert stage.client.get("/metrics", headers={"Host": "["}).status_code == 403
    deep: Any = {}
    for _ in range(300):
        deep = {"a": deep}
    refused = stage.client.post("/v1/chat/completions", json={**body, "tools": [deep]})
    assert refused.status_code == 400 and "nested" in refused.json()["error"]["message"]


def test_a_web_page_from_elsewhere_is_refused(stage):
    body = {"model": "auto", "messages": [{"role": "user", "content": SECRET}]}
    refused = stage.client.post("/v1/chat/completions", json=body, headers={"Origin": "https://evil.example"})
    assert refused.status_code == 403 and refused.json()["error"]["code"] == "origin"
    rebound = {"Origin": "http://evil.example:8080", "Host": "evil.example:8080"}
    assert stage.client.post("/v1/chat/completions", json=body, headers=rebound).status_code == 403
    for path in ("/metrics", "/v1/models"):
        assert stage.client.get(path, headers={"Host": "evil.example:8080"}).status_code == 403
        assert stage.client.get(path).status_code == 200
    own = {"Origin": str(stage.client.base_url).rstrip("/")}
    assert stage.client.post("/v1/chat/completions", json=body, headers=own).status_code == 200
    assert "access-control-allow-origin" not in stage.client.get("/v1/models", headers=own).headers


def test_what_can_not_be_read_or_is_said_to_be_private_stays_here():
    seen: list[str] = []

    def script(path: str, body: dict[str, Any]) -> Any:
        seen.append(path)
        data = [{"object": "embedding", "index": 0, "embedding": [1.0]}]
        return (
            200,
            JSON,
            json.dumps(
                {
                    "object": "list",
                    "data": data,
                    "choices": [
                        {"index": 0, "text": "x", "message": {"content": "x"}, "finish_reason": "stop"}
                    ],
                }
            ).encode(),
        )

    with scripted(script) as url:
        policy = policy_of(privacy={"patterns": ["email"], "tags": ["hr"]})
        for candidate in policy.policy.candidates:
            candidate["remote"] = True
        upstreams = {name: HttpUpstream(url, name, None) for name in ("weak", "strong")}
        with running(create_app(policy, upstreams, config=config_of())) as client:
            ids = [4711, 88]
            for path, body in (
                ("/v1/completions", {"model": "weak", "prompt": ids}),
                ("/v1/completions", {"model": "auto", "prompt": ids}),
                ("/v1/embeddings", {"model": "weak", "input": ids}),
                ("/v1/embeddings", {"model": "strong", "input": "x", "edgeft": {"private": True}}),
                ("/v1/embeddings", {"model": "strong", "input": "x", "edgeft": {"tags": ["hr"]}}),
                ("/generate", {"prompt": "x", "edgeft": {"private": True}}),
            ):
                refused = client.post(path, json=body)
                assert refused.status_code in (400, 403), (path, body, refused.text)
            assert seen == []
            assert (
                client.post("/v1/completions", json={"model": "weak", "prompt": "hello"}).status_code == 200
            )


def test_own_options_are_checked_and_go_nowhere(stage):
    assert stage.chat("hello", edgeft={"tags": ["a"], "max_latency_s": 3}).status_code == 200
    for wrong in ({"tags": "a"}, {"tags": [1]}, {"what": 1}, {"floor": "high"}, 3):
        assert stage.chat("hello", edgeft=wrong).status_code == 400, wrong
    assert stage.chat("hello", edgeft={"adapter": "none"}).status_code == 400
