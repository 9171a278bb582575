"""OpenAI's own Python client against the proxy as a process, before a stand-in that fills in every field that it is asked for.

`benchmarks/serve_openai_suite.py` runs the client's own API tests and schemathesis; here is what is fast and installed.
"""

from __future__ import annotations

import base64
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

openai = pytest.importorskip("openai", reason="the openai package is not installed")
pytest.importorskip("starlette", reason="edgeft[serve] is not installed")
pytest.importorskip("uvicorn", reason="edgeft[serve] is not installed")
pytest.importorskip("aiohttp", reason="edgeft[serve] is not installed")

from tests.serve_faults import Served, served

STAND_IN = Path(__file__).resolve().parent.parent / "benchmarks" / "serving" / "openai_shaped.py"
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Look something up.",
            "parameters": {
                "type": "object",
                "properties": {"asked": {"type": "string"}},
                "required": ["asked"],
            },
        },
    },
    {"type": "function", "function": {"name": "other", "parameters": {"type": "object", "properties": {}}}},
]
SCHEMA: Any = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def proxy(tmp_path_factory) -> Iterator[Served]:
    """Candidates of the same stand-in; those that are made to fail are left alone afterwards, so each has its own failure."""
    process = subprocess.Popen([sys.executable, str(STAND_IN)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        url = json.loads(process.stdout.readline())["url"]
        ids = [f"openai:{url}#{name}" for name in ("small", "large", "fails-429", "fails-500", "fails-401")]
        with served(
            tmp_path_factory.mktemp("conformance"), ids, models={name: {"retries": 0} for name in ids}
        ) as made:
            yield made
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def loose(proxy) -> Any:
    """The client as people use it: what OpenAI itself sends does not always fit the client's types."""
    return openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def client(proxy) -> Any:
    """The client that checks every response against its types."""
    return openai.OpenAI(
        base_url=f"{proxy.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    )


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def test_chat(client):
    answer = client.chat.completions.create(model="auto", messages=user("one two three"))
    (choice,) = answer.choices
    assert choice.message.content == "one two three" and choice.message.role == "assistant"
    assert (
        choice.finish_reason == "stop" and answer.object == "chat.completion" and answer.id and answer.created
    )
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        3,
        3,
        6,
    )
    parts = [{"type": "text", "text": "in"}, {"type": "text", "text": "parts"}]
    history = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": parts},
    ]
    again = client.chat.completions.create(model="auto", messages=history, temperature=0.3, top_p=0.9, seed=1)
    assert again.choices[0].message.content == "in parts"


def test_limits_and_stops(client):
    short = client.chat.completions.create(
        model="auto", messages=user("one two three"), max_completion_tokens=2
    )
    assert short.choices[0].message.content == "one two" and short.choices[0].finish_reason == "length"
    stopped = client.chat.completions.create(model="auto", messages=user("a b STOP c"), stop=[" STOP"])
    assert stopped.choices[0].message.content == "a b"


@pytest.mark.parametrize("usage", [False, True])
def test_streamed_chat(client, usage):
    options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(
        client.chat.completions.create(model="auto", messages=user("one two three"), stream=True, **options)
    )
    said = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(said) == "one two three" and sum(map(bool, said)) == 3, "as it came, not in one burst"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert len({c.id for c in chunks}) == len({c.model for c in chunks}) == 1
    told = [c for c in chunks if c.usage]
    assert len(told) == usage and (
        not usage or (chunks[-1] is told[0] and told[0].usage.total_tokens == 6 and not told[0].choices)
    )


def test_the_clients_own_stream_helper(client):
    with client.chat.completions.stream(model="auto", messages=user("one two")) as stream:
        assert [e.delta for e in stream if e.type == "content.delta" and e.delta] == ["one", " two"]
        assert stream.get_final_completion().choices[0].message.content == "one two"


@pytest.mark.parametrize("stream", [False, True])
def test_tools(client, stream):
    asked: dict[str, Any] = {"model": "auto", "messages": user("the weather"), "tools": TOOLS}
    if stream:
        with client.chat.completions.stream(**asked) as events:
            message = events.get_final_completion().choices[0].message
    else:
        answer = client.chat.completions.create(**asked)
        assert answer.choices[0].finish_reason == "tool_calls"
        message = answer.choices[0].message
    (call,) = message.tool_calls
    assert (
        call.function.name == "look"
        and json.loads(call.function.arguments) == {"asked": "the weather"}
        and call.id
    )
    named = {"type": "function", "function": {"name": "other"}}
    chosen = client.chat.completions.create(model="auto", messages=user("x"), tools=TOOLS, tool_choice=named)
    assert chosen.choices[0].message.tool_calls[0].function.name == "other"
    follow_up = [
        *user("the weather"),
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call.model_dump(include={"id", "type", "function"})],
        },
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    assert (
        client.chat.completions.create(model="auto", messages=follow_up, tools=TOOLS)
        .choices[0]
        .message.content
        == "sunny"
    )
    none = client.chat.completions.create(model="auto", messages=user("x"), tools=TOOLS, tool_choice="none")
    assert none.choices[0].message.content == "x" and not none.choices[0].message.tool_calls


def test_json_schema(client):
    form: Any = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(model="auto", messages=user("a trip"), response_format=form)
    assert json.loads(answer.choices[0].message.content) == {"city": "text", "days": 7}
    pydantic = pytest.importorskip("pydantic", reason="the client's parse helper needs it")
    trip = pydantic.create_model("Trip", city=(str, ...), days=(int, ...))
    parsed = client.chat.completions.parse(model="auto", messages=user("a trip"), response_format=trip)
    assert parsed.choices[0].message.parsed.days == 7
    plain = client.chat.completions.create(
        model="auto", messages=user("hi"), response_format={"type": "json_object"}
    )
    assert json.loads(plain.choices[0].message.content) == {"said": "hi"}


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client, stream):
    asked: Any = {
        "model": "auto",
        "messages": user("one two"),
        "logprobs": True,
        "top_logprobs": 2,
        "stream": stream,
    }
    answer = client.chat.completions.create(**asked)
    chunks = [c for c in answer if c.choices] if stream else [answer]
    entries = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content or []]
    assert [(e.token, e.logprob, len(e.top_logprobs)) for e in entries] == [
        ("one", -0.5, 2),
        (" two", -0.5, 2),
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers(client, stream):
    asked: Any = {"model": "auto", "messages": user("one two"), "n": 3}
    if stream:
        said = ["", "", ""]
        for chunk in client.chat.completions.create(**asked, stream=True):
            for choice in chunk.choices:
                said[choice.index] += choice.delta.content or ""
        assert said == ["one two"] * 3
        return
    answer = client.chat.completions.create(**asked)
    assert [(c.index, c.message.content) for c in answer.choices] == [(i, "one two") for i in range(3)]
    assert answer.usage.completion_tokens == 6 and answer.usage.prompt_tokens == 2


def test_completions(client, loose):
    answer = client.completions.create(model="auto", prompt="one two", max_tokens=5)
    assert (
        answer.choices[0].text == "one two"
        and answer.object == "text_completion"
        and answer.usage.total_tokens == 4
    )
    chunks = list(
        loose.completions.create(
            model="auto", prompt="one two", stream=True, stream_options={"include_usage": True}
        )
    )
    assert (
        "".join(c.choices[0].text for c in chunks if c.choices) == "one two"
        and chunks[-1].usage.total_tokens == 4
    )


def test_embeddings(loose, proxy):
    answer = loose.embeddings.create(model="auto", input=["ab", "abcd"], dimensions=3)
    assert [e.embedding for e in answer.data] == [[2.0] * 3, [4.0] * 3] and answer.usage.total_tokens == 2
    plain = httpx.post(
        f"{proxy.url}/v1/embeddings", json={"model": "auto", "input": "abc", "encoding_format": "base64"}
    ).json()
    assert struct.unpack("<4f", base64.b64decode(plain["data"][0]["embedding"])) == (3.0,) * 4


def test_models(client):
    names = [model.id for model in client.models.list()]
    assert names[0] == "auto" and len(names) == 6
    for name in names:
        assert client.models.retrieve(name).id == name
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_responses(loose):
    answer = loose.responses.create(model="auto", input="one two", instructions="be brief")
    assert (
        answer.output_text == "one two" and answer.status == "completed" and answer.usage.output_tokens == 2
    )
    events = list(loose.responses.create(model="auto", input="one two", stream=True))
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "one two"
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert events[-1].response.output_text == "one two"
    tool: Any = {"type": "function", "strict": False, **TOOLS[0]["function"]}
    (call,) = loose.responses.create(model="auto", input="the weather", tools=[tool]).output
    assert call.type == "function_call" and json.loads(call.arguments) == {"asked": "the weather"}
    history: Any = [
        {"role": "user", "content": "the weather"},
        call.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    assert loose.responses.create(model="auto", input=history, tools=[tool]).output_text == "sunny"
    form: Any = {"format": {"type": "json_schema", "name": "trip", "schema": SCHEMA}}
    assert json.loads(loose.responses.create(model="auto", input="x", text=form).output_text)["days"] == 7


def test_responses_fit_the_clients_types(client):
    assert client.responses.create(model="auto", input="one two").output_text == "one two"


@pytest.mark.parametrize(
    ("asked", "error", "status"),
    [
        ({"model": "nobody"}, "NotFoundError", 404),
        ({"messages": []}, "BadRequestError", 400),
        ({"temperature": "hot"}, "BadRequestError", 400),
        ({"messages": user("fail 400 please")}, "BadRequestError", 400),
        ({"model": "fails-429", "messages": user("fail 429 please")}, "RateLimitError", 429),
        ({"model": "fails-500", "messages": user("fail 500 please")}, "InternalServerError", 502),
        ({"model": "fails-401", "messages": user("fail 401 please")}, "InternalServerError", 502),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_clients_exceptions(client, asked, error, status, stream):
    names = [model.id for model in client.models.list()]
    model = next((n for n in names if n.endswith(f"#{asked.get('model')}")), asked.get("model", "auto"))
    with pytest.raises(getattr(openai, error)) as caught:
        client.chat.completions.create(**{"messages": user("hi"), "stream": stream, **asked, "model": model})
    assert caught.value.status_code == status
    assert set(caught.value.body) == {"message", "type", "param", "code"} and caught.value.body["message"]


def test_the_response_can_be_read_raw(client):
    raw = client.chat.completions.with_raw_response.create(model="auto", messages=user("hi"))
    assert raw.headers["x-edgeft-route"] == client.models.list().data[1].id
    assert raw.headers["x-edgeft-request-id"] and raw.parse().choices[0].message.content == "hi"
