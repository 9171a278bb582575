"""Engines: the little chat server, the client, and every real engine answering through its own template."""

from __future__ import annotations

import httpx
import pytest

from edgeft.engines.chat_server import Sampling, Token, listen, until_stop
from edgeft.engines.client import chat
from edgeft.engines.local import LocalModel
from edgeft.errors import EnvironmentFault, UsageError


def sampling(**changed) -> Sampling:
    return Sampling(
        **{
            "max_tokens": 10,
            "temperature": 0.0,
            "top_p": 1.0,
            "seed": None,
            "stop": (),
            "ignore_eos": False,
            **changed,
        }
    )


def pieces(words: list[str], **changed) -> tuple[str, int, str | None]:
    found = list(until_stop((Token(w, -1.0) for w in words), sampling(**changed)))
    return "".join(p.text for p in found), sum(p.token is not None for p in found), found[-1].finish_reason


def test_stop_strings_across_tokens():
    assert pieces(["a", "b", "c"]) == ("abc", 3, "stop")
    assert pieces(["a", "b", "c"], max_tokens=2) == ("ab", 2, "length")
    assert pieces(["x", "<en", "d>", "y"], stop=("<end>",)) == ("x", 3, "stop")
    assert pieces(["x", "<en", "t>"], stop=("<end>",)) == ("x<ent>", 3, "stop")


def test_text_goes_out_with_its_own_token():
    first = next(until_stop((Token(w, None) for w in ["a", "b"]), sampling()))
    assert first.text == "a"


def echo(messages, wanted):
    words = messages[-1]["content"].split()
    return len(words), (Token(w, -0.5) for w in words)


def test_client_and_server_agree_on_text_and_tokens():
    url = f"http://127.0.0.1:{listen(echo, 'key', 'echo')}"
    with httpx.Client() as client:
        body = {"messages": [{"role": "user", "content": "one two three"}], "max_tokens": 8, "logprobs": True}
        reply = chat(client, url, body, "key")
        whole = client.post(
            f"{url}/v1/chat/completions", json=body, headers={"Authorization": "Bearer key"}
        ).json()
        assert reply.text == whole["choices"][0]["message"]["content"] == "onetwothree"
        assert reply.output_tokens == whole["usage"]["completion_tokens"] == 3
        assert (
            reply.mean_logprob == -0.5
            and reply.finish_reason == whole["choices"][0]["finish_reason"] == "stop"
        )
        with pytest.raises(EnvironmentFault, match="401"):
            chat(client, url, body, "another")
        bad = client.post(f"{url}/v1/chat/completions", content=b"{", headers={"Authorization": "Bearer key"})
        assert bad.status_code == 400 and bad.json()["error"]["type"] == "invalid_request_error"


def test_a_folder_that_is_no_model_fails_with_its_log(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUFnonsense")
    pytest.importorskip("xllamacpp", reason="needs the extra: gguf")
    with pytest.raises(EnvironmentFault, match="did not load"):
        LocalModel(tmp_path, "gguf", log=tmp_path / "log")


def test_unknown_engine(tmp_path):
    with pytest.raises(UsageError, match="Did you mean 'gguf'"):
        LocalModel(tmp_path, "ggfu", log=tmp_path / "log")


def test_other_servers_and_apis_stand_in_the_same_report(tmp_path, monkeypatch):
    """A server of our own, once by its URL and once through litellm as an OpenAI model."""
    import json

    from edgeft.bench import Workload, bench
    from tests.conftest import write_rows

    def answer(messages, wanted):
        return 7, iter([Token("order", -0.1), Token("_status", -0.1)])

    url = f"http://127.0.0.1:{listen(answer, 'secret', 'echo')}"
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("OPENAI_API_BASE", f"{url}/v1")
    models = [f"openai:{url}#echo"]
    if __import__("importlib.util").util.find_spec("litellm"):
        models.append("litellm:gpt-4o-mini")
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": right}]}
        for text, right in (("where is it", "order_status"), ("give it back", "return_start"))
    ]
    report = bench(
        [], models, Workload(tasks=write_rows(tmp_path / "r.jsonl", rows)), "auto", tmp_path / "report"
    )
    for result in report.results:
        assert result["accuracy"]["share"] == 0.5 and result["accuracy"]["prompt_tokens"] == 14
        assert result["speed"] is None and result["memory"] is None
    if len(models) == 2:
        price = report.results[1]["price"]
        assert price["usd_per_mtok_out"] > price["usd_per_mtok_in"] > 0
        tokens = report.results[1]["accuracy"]
        cost = (
            tokens["prompt_tokens"] * price["usd_per_mtok_in"]
            + tokens["output_tokens"] * price["usd_per_mtok_out"]
        )
        assert report.results[1]["run_cost_usd"] == pytest.approx(cost / 1e6)
    items = [json.loads(line) for line in (tmp_path / "report" / "items.jsonl").read_text().splitlines()]
    assert {i["model_id"] for i in items} == set(models) and items[0]["output"] == "order_status"


def test_a_name_that_is_no_model_is_refused(tmp_path):
    from edgeft.bench.targets import find

    with pytest.raises(UsageError, match="neither litellm:NAME nor openai:URL#NAME"):
        find([], ["gpt-4o"])
