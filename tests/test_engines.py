"""Engines: the little chat server, the client, and every real engine answering through its own template."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import SimpleNamespace

import httpx
import pytest

from edgeft.engines.chat_server import Sampling, Token, listen, until_stop
from edgeft.engines.client import Loopback, chat
from edgeft.engines.gguf import model_parameters
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


# --- the client of engines on this box


def words_server(key="k"):
    """A server of ours whose model says five words, or fails where it is told to."""

    def chat(messages, sampling):
        def tokens():
            for word in ("one", " two", " three", " four", " five"):
                if messages[0]["content"] == "break":
                    raise RuntimeError("the engine broke")
                yield Token(word, None)

        return 7, tokens()

    return listen(chat, key, "words")


def said(text: str) -> dict:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 9}


def test_loopback_keeps_its_connection_and_reads_what_chat_reads():
    port = words_server()
    with closing(Loopback(port, "k")) as loopback, httpx.Client() as client:
        first, local_port = loopback.chat(said("go")), loopback._connection().sock.getsockname()
        again = loopback.chat(said("go"))
        assert loopback._connection().sock.getsockname() == local_port, "one connection for both"
        plain = chat(client, f"http://127.0.0.1:{port}", said("go"), "k")
        left = chat(client, f"http://127.0.0.1:{port}", said("go"), "k", lambda text: "two" in text)
    for reply in (first, again, plain):
        assert (reply.text, reply.prompt_tokens, reply.output_tokens) == ("one two three four five", 7, 5)
        assert reply.finish_reason == "stop" and len(reply.chunk_s) == 5
        assert 0 < reply.ttft_s <= reply.chunk_s[-1] <= reply.e2e_s and sorted(reply.chunk_s) == reply.chunk_s
    assert left.text == "one two"


def test_loopback_has_a_connection_a_thread():
    port = words_server()
    with closing(Loopback(port, "k")) as loopback, ThreadPoolExecutor(4) as threads:
        replies = list(threads.map(lambda _: loopback.chat(said("go")), range(12)))
    assert {reply.text for reply in replies} == {"one two three four five"}


def test_loopback_says_what_was_refused_and_goes_on_after_a_break():
    port = words_server()
    with closing(Loopback(port, "wrong")) as loopback:
        with pytest.raises(EnvironmentFault, match=r"answered 401: .*wrong key"):
            loopback.chat(said("go"))
    with closing(Loopback(port, "k")) as loopback:
        with pytest.raises(EnvironmentFault, match="broke off"):
            loopback.chat(said("break"))
        assert loopback.chat(said("go")).text == "one two three four five"
    nobody = Loopback(unused_port(), "k")
    with pytest.raises(EnvironmentFault, match="broke off: ConnectionRefused"):
        nobody.chat(said("go"))


@pytest.mark.parametrize("seen", [True, False])
def test_loopback_opens_anew_where_the_server_hung_up(seen, monkeypatch):
    """As llama.cpp's server does after a stream: seen before the next request, or only with it."""
    if not seen:
        monkeypatch.setattr("edgeft.engines.client.select.select", lambda *_: ([], [], []))
    with socket.create_server(("127.0.0.1", 0)) as server:
        answer = b'data: {"choices": [{"delta": {"content": "x"}}]}\n\ndata: [DONE]\n\n'
        whole = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer

        def serve_two():
            for _ in range(2):
                connection, _ = server.accept()
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(whole)

        thread = threading.Thread(target=serve_two)
        thread.start()
        with closing(Loopback(server.getsockname()[1], "k")) as loopback:
            assert loopback.chat(said("go")).text == "x"
            time.sleep(0.1)  # for the hang-up to come
            assert loopback.chat(said("go")).text == "x"
        thread.join()


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("amx", [True, False])
def test_llama_cpp_python_multiplies_without_amx(amx):
    """A library built by gcc 12 dies in it; on a processor without it nothing is given up."""
    said = b"CPU : AVX512 = 1 | AMX_INT8 = 1 | " if amx else b"CPU : AVX2 = 1 | REPACK = 1 | "
    llama = SimpleNamespace(
        llama_model_default_params=lambda: SimpleNamespace(use_extra_bufts=True, n_gpu_layers=-1),
        llama_print_system_info=lambda: said,
    )
    found = model_parameters(llama, 3)
    assert (found.use_extra_bufts, found.n_gpu_layers) == (not amx, 3)
