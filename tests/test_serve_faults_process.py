"""The fault list of docs/serving.md, the process itself: ended under load, its engine killed, its disk full, its clock set."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

pytest.importorskip("starlette", reason="edgeft[serve] is not installed")
pytest.importorskip("uvicorn", reason="edgeft[serve] is not installed")
pytest.importorskip("aiohttp", reason="edgeft[serve] is not installed")

from tests.serve_faults import DONE, Call, Upstream, asking, chunk, events, said, served, usage_chunk
from tests.serve_stage import until


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    made = Upstream()
    yield made
    made.close()


def test_sigterm_under_load_loses_nothing_that_was_accepted(upstream, tmp_path):
    def script(call: Call) -> None:
        if not call.streamed:
            time.sleep(0.3)
            call.answer()
            return
        call.begin()
        for _ in range(6):
            time.sleep(0.05)
            call.part(chunk("word "))
        call.part(chunk(finish="stop") + usage_chunk() + DONE)
        call.end()

    upstream.scripts["load"] = script
    ended: list[tuple[str, str]] = []  # (the request's text, how it ended)
    stop = threading.Event()

    def user(index: int) -> None:
        for turn in range(1000):
            if stop.is_set():
                return
            text = f"{index}-{turn}"
            try:
                response = httpx.post(
                    made.url + "/v1/chat/completions",
                    json=asking(upstream.id("load"), text, stream=bool(turn % 2)),
                    timeout=20,
                )
                whole = response.status_code == 200 and (not turn % 2 or response.text.endswith("[DONE]\n\n"))
                ended.append((text, "whole" if whole else f"{response.status_code} {response.text[-200:]}"))
            except httpx.ConnectError:
                ended.append((text, "refused"))
                return
            except httpx.HTTPError as error:
                ended.append((text, type(error).__name__))

    with served(tmp_path, [upstream.id("load"), upstream.id("spare")]) as made:
        users = [threading.Thread(target=user, args=(i,)) for i in range(16)]
        for thread in users:
            thread.start()
        until(lambda: len(ended) > 40)
        made.process.terminate()
        assert made.process.wait(20) == 0
        stop.set()
        for thread in users:
            thread.join(20)
    reached = {call.body["messages"][0]["content"] for call in upstream.of("load")}
    lost = [(text, how) for text, how in ended if text in reached and how != "whole"]
    assert not lost and len(reached) > 40
    # One that the process never took from the kernel's queue is reset: it was not accepted, and may be sent again.
    assert {how.split(" ")[0] for _, how in ended} <= {
        "whole",
        "refused",
        "503",
        "ReadError",
        "RemoteProtocolError",
    }


def test_a_full_disk_costs_the_hit_and_not_the_answer(upstream, tmp_path):
    resource = pytest.importorskip("resource", reason="no limits of a process here")
    if not hasattr(resource, "prlimit"):
        pytest.skip("no prlimit here")
    cache = {"enabled": True, "folder": "answers"}
    with served(tmp_path, [upstream.id("cached"), upstream.id("spare")], cache=cache) as made:

        def state(text: str) -> str:
            response = made.chat(text=text, temperature=0)
            assert (
                response.status_code == 200 and response.json()["choices"][0]["message"]["content"] == "fine"
            )
            return response.headers["x-edgeft-cache"]

        assert [state("before"), state("before")] == ["miss", "hit"]
        unlimited = resource.prlimit(made.process.pid, resource.RLIMIT_FSIZE)
        # No file may be written beyond its first byte: what a write gets on a full disk (EFBIG in ENOSPC's place).
        resource.prlimit(made.process.pid, resource.RLIMIT_FSIZE, (1, unlimited[1]))
        assert [state(f"full {i}") for i in (1, 2, 1)] == ["miss"] * 3, "there was room after all"
        resource.prlimit(made.process.pid, resource.RLIMIT_FSIZE, unlimited)
        until(lambda: [state("after"), state("after")][1] == "hit", 10)
        assert made.process.poll() is None


def test_an_engine_that_is_killed_is_restarted_and_nothing_is_lost(upstream, tiny_dist, tmp_path):
    psutil = pytest.importorskip("psutil", reason="psutil finds the engine's process")
    pytest.importorskip("xllamacpp", reason="edgeft[gguf] is not installed")
    from edgeft.compress import load_artifact

    folder = tiny_dist / "dist" / "gguf-f16"
    local = {
        "kind": "artifact",
        "engine": "gguf",
        "path": str(folder),
        "artifact_sha256": load_artifact(folder).sha256,
    }

    def engine() -> int:
        children = psutil.Process(made.process.pid).children(recursive=True)
        return next((p.pid for p in children if "edgeft.engines.worker" in p.cmdline()), 0)

    def pinned(**fields: Any) -> httpx.Response:
        return made.chat("tiny", max_tokens=4, **fields)

    upstream.scripts["instead"] = lambda call: call.answer("instead")
    ids = ["tiny", upstream.id("instead")]
    models = {"tiny": {"slots": 2, "threads": 1, "context": 512}}
    with served(tmp_path, ids, local=local, models=models) as made:
        assert pinned().status_code == 200 and made.chat(max_tokens=4).headers["x-edgeft-route"] == "tiny"
        before = engine()
        os.kill(before, signal.SIGSTOP)  # so that it surely dies before the first byte
        replies: dict[str, httpx.Response] = {}
        asked = {
            "auto": lambda: made.chat(text="whoever can", max_tokens=4),
            "streamed": lambda: made.chat(text="whoever can", max_tokens=4, stream=True),
            "pinned": pinned,
        }
        threads = [
            threading.Thread(target=lambda name=name: replies.update({name: asked[name]()})) for name in asked
        ]
        for thread in threads:
            thread.start()
        until(lambda: made.metric("edgeft_in_flight", route="tiny") == 2)  # the third one waits for a slot
        os.kill(before, signal.SIGKILL)
        for thread in threads:
            thread.join(30)
        assert replies["auto"].status_code == replies["streamed"].status_code == 200
        assert "[DONE]" in replies["streamed"].text
        assert replies["pinned"].status_code in (200, 502, 503), "again by the new process, or refused"
        until(lambda: pinned().status_code == 200, 30)
        assert engine() not in (0, before)
        with httpx.stream(
            "POST",
            f"{made.url}/v1/chat/completions",
            json=asking("tiny", stream=True, max_tokens=400),
            timeout=30,
        ) as response:
            text = ""
            for part in response.iter_text():
                if not text:
                    os.kill(engine(), signal.SIGKILL)
                text += part
        assert "[DONE]" in text or events(text)[-1]["error"]["message"], "it ended as if it were whole"
        until(lambda: pinned().status_code == 200, 30)


CLOCK = """
import signal, sys, time
real, ahead = time.time, [0.0]
time.time = lambda: real() + ahead[0]
signal.signal(signal.SIGUSR1, lambda *_: ahead.__setitem__(0, ahead[0] + 86400.0))
signal.signal(signal.SIGUSR2, lambda *_: ahead.__setitem__(0, ahead[0] - 2 * 86400.0))
from edgeft.cli import main
sys.exit(main())
"""


def test_a_clock_that_jumps_changes_no_duration(upstream, tmp_path):
    gate = threading.Event()

    def script(call: Call) -> None:
        call.begin()
        call.part(chunk("before "))
        call.here.set()
        gate.wait(10)
        call.part(chunk("after") + chunk(finish="stop") + usage_chunk() + DONE)
        call.end()

    upstream.scripts["clock"] = script
    program = tmp_path / "clock.py"
    program.write_text(CLOCK)
    route = upstream.id("clock")
    models = {route: {"slots": 1, "retries": 0}}
    with served(
        tmp_path, [route, upstream.id("spare")], program=(str(program),), models=models, limits={"waiting": 1}
    ) as made:
        for sign in (signal.SIGUSR1, signal.SIGUSR2):
            gate.clear()
            seen = len(upstream.of("clock"))
            texts: list[str] = []

            def ask(texts: list[str] = texts) -> None:
                texts.append(made.chat(route, stream=True).text)

            asked = [threading.Thread(target=ask) for _ in range(2)]
            for thread in asked:
                thread.start()
            until(
                lambda seen=seen: len(upstream.of("clock")) > seen and upstream.of("clock")[-1].here.is_set()
            )
            until(lambda: made.metric("edgeft_waiting", route=route) == 1)
            made.process.send_signal(sign)  # one answer under way, one request in the queue
            time.sleep(0.2)
            refused = made.chat(route)
            assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) < 60
            gate.set()
            for thread in asked:
                thread.join(20)
            assert [said(text) for text in texts] == ["before after"] * 2
        created = made.chat(upstream.id("spare")).json()["created"]
        assert abs(created - (time.time() - 86400)) < 60, "the clock did not jump"
        for name in ("edgeft_request_duration_seconds_sum", "edgeft_ttft_seconds_sum"):
            assert 0 <= made.metric(name) < 60, name
        assert made.chat(route).status_code == 200
        made.process.terminate()
        assert made.process.wait(20) == 0
