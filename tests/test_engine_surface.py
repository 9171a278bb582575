"""OpenAI's paths of engines: bodies, refusals, log-probabilities, embeddings, slots, adapters by request."""

from __future__ import annotations

import base64
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import httpx
import numpy as np
import pytest

from edgeft.engines import bodies, micro_batch
from edgeft.engines.chat_server import Reader, features, listen
from edgeft.engines.decoding import (
    BadRequest,
    Pace,
    Token,
    chosen,
    likeliest,
    log_softmax,
    sampling_of,
    tokens_in,
)
from edgeft.engines.local import LocalModel
from edgeft.errors import UsageError

KEY = {"Authorization": "Bearer k"}


def words_engine(**more) -> str:
    """A server whose tokens are the prompt's ids as words, each with two likeliest."""

    def complete(ids, sampling):
        yield None
        for one in ids:
            yield Token(f"w{one} ", -0.5, (("a", -0.5), ("b", -1.5))[: sampling.top_logprobs])

    def embed(ids) -> Iterator[list[float] | None]:
        yield None
        yield [float(len(ids)), 0.5]

    given = {"embed": embed, **more}
    reader = Reader(
        lambda text: [len(w) for w in text.split()], lambda m: m[-1]["content"], complete, (7,), **given
    )
    return f"http://127.0.0.1:{listen(lambda m, s: (2, complete([1, 2], s)), 'k', 'words', reader)}"


def post(url: str, path: str, **body) -> httpx.Response:
    return httpx.post(f"{url}{path}", json=body, headers=KEY, timeout=120)


def test_text_completions_of_a_text_and_of_ids():
    url = words_engine()
    answer = post(url, "/v1/completions", prompt="one three", logprobs=1).json()
    assert answer["object"] == "text_completion" and answer["choices"][0]["text"] == "w7 w3 w5 "
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["w7 ", "w3 ", "w5 "], "token_logprobs": [-0.5] * 3, "top_logprobs": [{"a": -0.5}] * 3,
        "text_offset": [0, 3, 6],
    }  # fmt: skip
    for prompt in ([4, 9], [[4, 9]]):
        assert post(url, "/v1/completions", prompt=prompt).json()["choices"][0]["text"] == "w4 w9 "
    cut = post(url, "/v1/completions", prompt=[4, 9, 1], stop="9", max_tokens=9).json()["choices"][0]
    assert (cut["text"], cut["finish_reason"]) == ("w4 w", "stop")


def test_streams_say_their_usage_and_their_likeliest():
    url = words_engine()
    for path, given in (
        ("/v1/completions", {"prompt": [4, 9], "logprobs": 2}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 2},
        ),
    ):
        text = post(url, path, **given, stream=True, stream_options={"include_usage": True}).text
        *chunks, last = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        assert text.rstrip().endswith("data: [DONE]") and last["choices"] == []
        assert last["usage"]["completion_tokens"] == 2 and chunks[-1]["choices"][0]["finish_reason"] == "stop"
        tops = [c["choices"][0]["logprobs"] for c in chunks if "logprobs" in c["choices"][0]]
        first = (
            tops[0]["top_logprobs"][0] if "top_logprobs" in tops[0] else tops[0]["content"][0]["top_logprobs"]
        )
        assert len(tops) == 2 and len(first) == 2


def test_embeddings_or_a_501():
    url = words_engine()
    answer = post(url, "/v1/embeddings", input=["a b", [1, 2, 3]]).json()
    assert [d["embedding"] for d in answer["data"]] == [[3.0, 0.5], [3.0, 0.5]]
    assert answer["usage"] == {"prompt_tokens": 6, "total_tokens": 6} and [
        d["index"] for d in answer["data"]
    ] == [0, 1]
    coded = post(url, "/v1/embeddings", input="a", encoding_format="base64").json()["data"][0]["embedding"]
    assert struct.unpack("<2f", base64.b64decode(coded)) == (2.0, 0.5)
    without = post(words_engine(embed=None), "/v1/embeddings", input="a")
    assert without.status_code == 501 and without.json()["error"]["type"] == "not_supported_error"


@pytest.mark.parametrize(
    "path, body, says",
    [
        ("chat/completions", {"n": 2}, "n must be 1"),
        ("chat/completions", {"tools": [{}]}, "no tool calls"),
        ("chat/completions", {"response_format": {"type": "json_object"}}, "no grammars"),
        ("chat/completions", {"response_format": {"type": "xml"}}, "response_format must be"),
        ("chat/completions", {"logprobs": True, "top_logprobs": 21}, "0 to 20"),
        ("chat/completions", {"top_p": 0}, "top_p"),
        ("chat/completions", {"max_tokens": -1}, "max_tokens"),
        ("chat/completions", {"temperature": "hot"}, "bad request"),
        ("chat/completions", {"messages": None}, "bad request"),
        ("completions", {"prompt": ["a", "b"]}, "one text or one list"),
        ("completions", {"prompt": [1, -1]}, "one text or one list"),
        ("completions", {"prompt": []}, "empty"),
        ("completions", {"prompt": "a", "echo": True}, "no echo"),
        ("embeddings", {"input": "a", "encoding_format": "int8"}, "float or base64"),
    ],
)
def test_what_can_not_be_done_is_a_400_that_says_so(path, body, says):
    if path == "chat/completions":
        body = {"messages": [{"role": "user", "content": "x"}], **body}
        if body["messages"] is None:
            del body["messages"]
    answer = post(words_engine(), f"/v1/{path}", **body)
    assert answer.status_code == 400 and says in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_schema_reaches_an_engine_that_has_grammars():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert json.loads(bodies.schema_of(wanted, True)) == schema
    assert json.loads(bodies.schema_of({"type": "json_object"}, True)) == {"type": "object"}
    assert bodies.schema_of({"type": "text"}, False) is None
    with pytest.raises(BadRequest, match=r"schema must be"):
        bodies.schema_of({"type": "json_schema"}, True)


def test_numbers_of_log_probabilities_and_batches():
    values = np.array([1.0, 3.0, 2.0, -50.0], dtype=np.float32)
    logprobs = log_softmax(values)
    assert (
        math.isclose(np.exp(logprobs).sum(), 1.0)
        and likeliest(logprobs, 2) == [1, 2]
        and likeliest(logprobs, 0) == []
    )
    # 1,000 tokens/s for 0.25 s are 250; 1.5 times as slow deep in the context: 166, so 128
    assert tokens_in(1000, 0.25) == 128 and tokens_in(1, 0.25) == 8
    assert micro_batch.within(1000, 0.25, {"batch": 64, "ubatch": 512}) == {"batch": 64, "ubatch": 64}
    assert micro_batch.within(1000, 0.25, {"batch": 2048}) == {"batch": 128, "ubatch": 128}


def test_pieces_make_the_prompt_and_follow_the_speed():
    import time

    ids = list(range(1000))
    assert [len(p) for p in Pace(None).pieces(ids)] == [1000]
    quick, slow = Pace(0.25), Pace(0.25)
    assert [i for piece in quick.pieces(ids) for i in piece] == ids and quick.size > 1000
    for piece in slow.pieces(ids[:64]):
        time.sleep(0.01 * len(piece))  # at most 100 tokens a second
    assert slow.size in (8, 16)


def test_features_tell_what_there_is():
    reader = Reader(lambda t: [], lambda m: "", lambda i, s: iter(()))
    assert features(reader)["embeddings"] is False and features(reader)["completions"] is True


# --- real engines, on tiny random models


def ask(local: LocalModel, path: str, **body) -> dict:
    answer = httpx.post(
        f"{local.url}{path}", json=body, headers={"Authorization": f"Bearer {local.key}"}, timeout=300
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def user(text: str) -> dict:
    return {"messages": [{"role": "user", "content": text}], "temperature": 0}


LONG = "the way of all that is and was " * 12


@pytest.mark.parametrize(
    "engine, folder, package",
    [
        ("gguf", "gguf-f16", "xllamacpp"),
        ("llama_cpp", "gguf-f16", "llama_cpp"),
        ("onnx", "onnx-int8", "onnxruntime_genai"),
        ("transformers", "merged", "torch"),
    ],
)
def test_an_engine_does_what_its_features_say(tiny_dist, tmp_path, engine, folder, package):
    pytest.importorskip(package, reason="an extra is missing")
    options = {"slots": 1, "batch_s": 0.25, "embeddings": True}
    place = tiny_dist / "dist" / folder
    with LocalModel(place, engine, log=tmp_path / "log", threads=1, context=256, options=options) as local:
        has = local.features
        assert local.slots == 1 and has["completions"] and has["logprobs"]
        chat = ask(local, "/v1/chat/completions", **user(LONG), max_tokens=4, logprobs=True, top_logprobs=3)
        entries = chat["choices"][0]["logprobs"]["content"]
        assert chat["usage"]["completion_tokens"] == 4 == len(entries)
        for entry in entries:  # greedy: the token is the likeliest, the rest in order below it
            tops = [top["logprob"] for top in entry["top_logprobs"]]
            assert len(tops) == 3 and sorted(tops, reverse=True) == tops
            assert entry["logprob"] == pytest.approx(tops[0], abs=1e-5) and tops[0] < 0
        whole = ask(local, "/v1/completions", prompt=[1, 5, 99, 1234], max_tokens=3, temperature=0)
        assert whole["usage"]["prompt_tokens"] == 4 and whole["usage"]["completion_tokens"] == 3
        schema = {
            "type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False,
        }  # fmt: skip
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        answer = httpx.post(
            f"{local.url}/v1/chat/completions", json={**user("x"), "max_tokens": 200, "response_format": wanted},
            headers={"Authorization": f"Bearer {local.key}"}, timeout=300,
        )  # fmt: skip
        if has["json_schema"]:
            said = answer.json()["choices"][0]["message"]["content"]
            # a grammar allows white space, of which random weights may never tire
            assert '{"a":1}'.startswith("".join(said.split())) and said.startswith("{")
        else:
            assert answer.status_code == 400 and "no grammars" in answer.text
        if has["embeddings"]:
            found = [
                d["embedding"]
                for d in ask(local, "/v1/embeddings", input=["one two", LONG, "one two"])["data"]
            ]
            assert sum(x * x for x in found[1]) == pytest.approx(1, abs=1e-3)
            assert found[0] == pytest.approx(found[2], abs=1e-4) and found[0] != pytest.approx(
                found[1], abs=1e-3
            )
        else:
            head = {"Authorization": f"Bearer {local.key}"}
            refused = httpx.post(f"{local.url}/v1/embeddings", json={"input": "a"}, headers=head)
            assert refused.status_code == 501


def test_a_prompt_in_pieces_is_answered_like_a_whole_one(tiny_dist):
    """transformers: the first token's distribution and the embedding do not depend on the pieces."""
    pytest.importorskip("torch", reason="needs the extra: compress")
    from edgeft.engines.decoding import Sampling
    from edgeft.engines.transformers import embedding, generate, load

    model, tokenizer = load(tiny_dist / "dist" / "merged", 1)
    ids = [1, 5, 99, 1234, 4321, 7, 42, 17] * 9
    asked = Sampling(1, 0.0, 1.0, None, (), False, True, 5)
    whole, cut = Pace(None), Pace(0.25)
    cut.size = 8
    seen = [list(islice(generate(model, tokenizer, ids, asked, pace), 12)) for pace in (whole, cut)]
    assert seen[0].count(None) == 1 and seen[1].count(None) > 1
    first, second = (next(t for t in steps if t) for steps in seen)
    assert first.text == second.text and first.logprob == pytest.approx(second.logprob, abs=1e-4)
    cut.size = 8
    for mean in (False, True):
        vectors = [list(embedding(model, ids, pace, mean))[-1] for pace in (whole, cut)]
        assert vectors[0] == pytest.approx(vectors[1], abs=1e-4)


@pytest.fixture(scope="module")
def two_adapters(tiny_models, tmp_path_factory) -> tuple[Path, list[Path]]:
    """(a base's GGUF file, two adapters' folders beside it)."""
    torch = pytest.importorskip("torch", reason="needs the extra: compress")
    pytest.importorskip("llama_cpp", reason="needs the extra: compress")
    pytest.importorskip("peft", reason="needs the extra: tune")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from edgeft.compress import Recipe, compress

    home, made = tmp_path_factory.mktemp("two"), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.float32)
        model = get_peft_model(
            model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.normal_(0.0, 0.2)
        model.save_pretrained(home / f"adapter{seed}")
        recipe = Recipe(
            out=home / f"dist{seed}", formats=("gguf-lora:f32,base=f32",), name="t", threads=1, no_gate=True
        )
        compress(tiny_models["llama"], home / f"adapter{seed}", recipe)
        made.append(next(f.parent for f in (home / f"dist{seed}").rglob("base.json")))
    from edgeft.engines.gguf import model_and_adapter

    return model_and_adapter(made[0])[0], made


def binary() -> str | None:
    return os.environ.get("EDGEFT_LLAMA_SERVER") or shutil.which("llama-server")


@pytest.mark.parametrize("engine", ["gguf", "llama_server"])
def test_adapters_by_request_answer_as_alone(two_adapters, tmp_path, engine):
    """In one slot, with the prefix kept, in every order; a slot's cache of another adapter must not be used."""
    if engine == "gguf":
        pytest.importorskip("xllamacpp", reason="needs the extra: gguf")
    elif not binary():
        pytest.skip("no llama-server: EDGEFT_LLAMA_SERVER names one")
    base, folders = two_adapters
    more = {"slots": 1, "batch_s": 0.25}
    asked = {**user(LONG), "max_tokens": 6, "logprobs": True, "cache_prompt": True}

    def said(local: LocalModel, adapter: str | None) -> tuple[str, float]:
        choice = ask(
            local, "/v1/chat/completions", **asked, **local.fields(adapter=adapter, slot=0, stream=False)
        )["choices"][0]
        return choice["message"]["content"], sum(e["logprob"] for e in choice["logprobs"]["content"])

    alone = {}
    for name, folder in ((None, base), ("one", folders[0]), ("two", folders[1])):
        with LocalModel(folder, engine, log=tmp_path / "log", threads=1, context=512, options=more) as local:
            alone[name] = said(local, None)
    assert len({text for text, _ in alone.values()}) == 3, (
        "the adapters must differ for this to test anything"
    )
    named = {"one": str(folders[0]), "two": str(folders[1])}
    with LocalModel(
        base, engine, log=tmp_path / "log", threads=1, context=512, options={**more, "adapters": named}
    ) as local:
        assert local.features["adapters"] == ["one", "two"] and local.features["id_slot"]
        for name in (None, "one", None, "two", "one", "one", "two", None):
            text, logprob = said(local, name)
            assert text == alone[name][0] and logprob == pytest.approx(alone[name][1], abs=2e-2), name
        with pytest.raises(KeyError):
            local.fields(adapter="three")


def test_adapters_that_do_not_fit_are_refused(tiny_dist, tmp_path):
    pytest.importorskip("xllamacpp", reason="needs the extra: gguf")
    place = tiny_dist / "dist" / "gguf-f16"
    for engine, folder in (("gguf", place), ("transformers", tiny_dist / "dist" / "merged")):
        with pytest.raises(UsageError, match=r"adapter"):
            LocalModel(
                folder, engine, log=tmp_path / "log", options={"adapters": {"x": str(tmp_path / "none")}}
            )


def test_slots_have_a_context_each_and_keep_prefixes(tiny_dist, tmp_path):
    pytest.importorskip("xllamacpp", reason="needs the extra: gguf")
    place = tiny_dist / "dist" / "gguf-f16"
    with LocalModel(
        place, "gguf", log=tmp_path / "log", threads=1, context=256, options={"slots": 3}
    ) as local:
        assert local.slots == 3
        ids = [5 + i % 90 for i in range(250)]  # no other slot's context is needed for it
        for slot in range(3):
            told = ask(
                local,
                "/v1/completions",
                prompt=ids,
                max_tokens=2,
                cache_prompt=True,
                **local.fields(slot=slot, stream=False),
            )
            assert told["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        for slot in (2, 0, 1):
            told = ask(
                local,
                "/v1/completions",
                prompt=ids,
                max_tokens=2,
                cache_prompt=True,
                **local.fields(slot=slot, stream=False),
            )
            assert (
                told["usage"]["prompt_tokens_details"]["cached_tokens"] == 249 == told["timings"]["cache_n"]
            )
        told = ask(
            local,
            "/v1/completions",
            prompt=ids,
            max_tokens=2,
            cache_prompt=False,
            **local.fields(slot=1, stream=False),
        )
        assert told["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        closed = httpx.get(f"{local.url}/slots", headers={"Authorization": f"Bearer {local.key}"})
        assert closed.status_code in (404, 501) and not closed.headers.get("Access-Control-Allow-Origin")
        assert httpx.post(f"{local.url}/v1/completions", json={"prompt": "x"}).status_code == 401


def test_onnx_computes_what_a_prompt_shares_with_the_last_one_only_where_it_is_asked_to(tiny_dist, tmp_path):
    pytest.importorskip("onnxruntime_genai", reason="needs the extra: onnx")
    place = tiny_dist / "dist" / "onnx-int8"
    first, other = [5 + i % 90 for i in range(120)], [7 + i % 80 for i in range(120)]
    forked = first[:80] + other[:30]

    def said(local: LocalModel, prompt: list[int], reuse: bool, **more) -> tuple[str, list[float], int]:
        body = {"prompt": prompt, "max_tokens": 6, "logprobs": 1, "temperature": 0, **more}
        told = ask(local, "/v1/completions", **body, cache_prompt=reuse, **local.fields(slot=0, stream=False))
        choice = told["choices"][0]
        cached = told["usage"]["prompt_tokens_details"]["cached_tokens"]
        return choice["text"], choice["logprobs"]["token_logprobs"], cached

    options = {"slots": 1, "batch_s": 0.25}
    with LocalModel(place, "onnx", log=tmp_path / "log", threads=1, context=128, options=options) as local:
        assert local.features["id_slot"]
        cold = {name: said(local, prompt, False) for name, prompt in (("first", first), ("forked", forked))}
        assert [answer[2] for answer in cold.values()] == [0, 0]
        said(local, first, False)
        for name, prompt, cached in (("forked", forked, 80), ("forked", forked, 109), ("first", first, 80)):
            text, logprobs, found = said(local, prompt, True)
            assert (text, found) == (cold[name][0], cached), name
            assert logprobs == pytest.approx(cold[name][1], abs=1e-3)
        assert said(local, first, False)[2] == 0, "another tenant's prompt is read again"
        sampled = {said(local, first, True, temperature=1.5, top_p=0.9, seed=seed)[0] for seed in (1, 1, 2)}
        assert len(sampled) == 2, "a seed draws the same, another one something else"
        body = {"prompt": first, "max_tokens": 60, "ignore_eos": True, "temperature": 0}
        told = ask(local, "/v1/completions", **body)
        assert told["usage"]["completion_tokens"] == 8, "the context holds no more"
        assert said(local, forked, True)[0] == cold["forked"][0]
    longer = 1 << 20  # than the model was made for
    with LocalModel(place, "onnx", log=tmp_path / "log", threads=1, context=longer, options=options) as local:
        assert said(local, first, True)[0] == cold["first"][0]


def test_tokens_are_drawn_by_their_odds_within_the_nucleus():
    import numpy as np

    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    chance = np.random.default_rng(3)

    def shares(temperature: float, top_p: float) -> list[float]:
        wanted = sampling_of({"temperature": temperature, "top_p": top_p})
        drawn = [chosen(logits, wanted, chance) for _ in range(8000)]
        return [drawn.count(i) / len(drawn) for i in range(4)]

    assert shares(0.0, 1.0) == [1.0, 0.0, 0.0, 0.0]
    assert shares(1.0, 1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.02)
    assert shares(1.0, 0.7) == pytest.approx([0.625, 0.375, 0.0, 0.0], abs=0.02)
    squared = np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365
    assert shares(0.5, 1.0) == pytest.approx(list(squared), abs=0.02)


def test_adapters_are_switched_by_request_through_the_proxy(two_adapters, tmp_path):
    pytest.importorskip("xllamacpp", reason="needs the extra: gguf")
    from edgeft.serve.app import create_app
    from edgeft.serve.local import LocalUpstream
    from edgeft.serve.pool import LocalSpec, Pool
    from tests.serve_stage import cache_in, config_of, policy_of, running

    base, folders = two_adapters
    named = {"one": str(folders[0]), "two": str(folders[1])}
    pool = Pool([LocalSpec("base", base, "gguf", 512, tmp_path / "log", threads=1, adapters=named)])
    upstream = LocalUpstream(pool, pool.entries["base"].spec, 300.0)
    upstream.aclose = pool.aclose  # type: ignore[method-assign]
    app = create_app(
        policy_of("base"), {"base": upstream}, cache_in(tmp_path / "cache"), config=config_of(models={})
    )
    with running(app) as client:
        client.timeout = 300
        told = {}
        for name in (None, "one", "two", "one", None):
            body = {
                "model": "auto",
                **user(LONG),
                "max_tokens": 6,
                "temperature": 0,
                "edgeft": {"adapter": name} if name else {},
            }
            reply = client.post("/v1/chat/completions", json=body)
            assert reply.status_code == 200, reply.text
            text = reply.json()["choices"][0]["message"]["content"]
            assert told.setdefault(name, text) == text
        assert len(set(told.values())) == 3, "each adapter says something else, and no cache mixes them up"
        unknown = client.post("/v1/chat/completions", json={**body, "edgeft": {"adapter": "three"}})
        assert unknown.status_code == 400 and "no such adapter" in unknown.json()["error"]["message"]
