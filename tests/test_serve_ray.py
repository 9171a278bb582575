"""Serving on a Ray cluster: the pieces without Ray, and two nodes with a real death where Ray is installed."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

pytest.importorskip("starlette", reason="edgeft[serve] is not installed")

from edgeft.errors import EnvironmentFault, UsageError
from edgeft.serve.answer import BrokenStream
from edgeft.serve.cluster import Cluster, Place, frames
from edgeft.serve.cluster.again import KEPT_BYTES, TRIES, Again
from edgeft.serve.cluster.deploy import connected
from edgeft.serve.cluster.settings import PORTION, app_name
from edgeft.serve.cluster.upstream import RayUpstream
from edgeft.serve.protocol import CHAT, Refusal
from edgeft.serve.upstream import Features
from tests.conftest import ROOT


def test_nothing_of_ray_is_imported_without_it():
    code = "import sys, edgeft.serve, edgeft.serve.cluster; sys.exit('ray' in sys.modules or 'redis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_ray_two_lines_say_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="'ray', which is not installed") as fault:
        with connected("auto"):
            pass
    assert "edgeft[cluster]" in fault.value.hint


def test_a_place_in_rays_words():
    fixed = Place(replicas=2, profile="intel-n100", cpus=4).options(slots=3)
    assert fixed == {
        "num_replicas": 2,
        "max_ongoing_requests": 3,
        "ray_actor_options": {"num_cpus": 4, "resources": {"edgeft:intel-n100": PORTION}},
    }
    scaled = Place(replicas=1, most=4).options(slots=2)
    assert scaled["autoscaling_config"] == {
        "min_replicas": 1,
        "max_replicas": 4,
        "target_ongoing_requests": 2,
    }
    assert "num_replicas" not in scaled and "resources" not in scaled["ray_actor_options"]


def test_settings_that_can_not_be_used_are_refused():
    Cluster("auto", {"weak": Place(2, 3)}).check(["weak", "strong"])
    with pytest.raises(UsageError, match="Did you mean 'weak'"):
        Cluster("auto", {"waek": Place()}).check(["weak", "strong"])
    for bad in (Place(replicas=0), Place(replicas=3, most=2), Place(cpus=-1)):
        with pytest.raises(UsageError, match="out of range"):
            Cluster("auto", {"weak": bad}).check(["weak"])
        with pytest.raises(UsageError, match="out of range"):
            Cluster("auto", proxy=bad).check(["weak"])


def test_names_of_applications_stay_apart():
    names = {app_name(i) for i in ("a/b:c", "a-b-c", "a b c", "ä", "ö")}
    assert len(names) == 5 and all(n.isascii() and "/" not in n and " " not in n for n in names)
    assert app_name("dist-gguf.q4") == "edgeft-engine-dist-gguf.q4"


def test_what_an_engine_says_arrives_as_it_was_said():
    chunk = {"choices": [{"index": 0, "delta": {"content": "é 日本"}}], "usage": None}
    assert frames.read(frames.chunk(chunk)) == chunk
    said = Refusal(
        429, "full", kind="rate_limit_error", param="p", code="queue_full", retry_after_s=3, elsewhere=True
    )
    with pytest.raises(Refusal) as refusal:
        frames.read(frames.refused(said))
    assert vars(refusal.value) == vars(said)
    with pytest.raises(BrokenStream, match="it broke"):
        frames.read(frames.broken(BrokenStream("it broke")))


class Replicas:
    """An ASGI application in front of replicas of which the first `die` end without a word, as Ray's HTTP proxy does then."""

    def __init__(self, die: int, after: int = 0) -> None:
        self.die, self.after, self.bodies = die, after, list[bytes]()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message["body"], message.get("more_body", False)
        self.bodies.append(body)
        scope["headers"].append((b"x-request-id", b"1"))  # as Ray's own middleware does
        if self.die and not self.after:
            self.die -= 1
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b"begun", "more_body": bool(self.after)})


def ask(app: Any, *parts: bytes, leaves: bool = False) -> list[dict[str, Any]]:
    """Send a request in parts; the messages that come back."""
    waiting: list[dict[str, Any]] = [
        {"type": "http.request", "body": part, "more_body": i < len(parts) - 1 or leaves}
        for i, part in enumerate(parts)
    ]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(app({"type": "http", "headers": []}, receive, send))
    return sent


def test_a_request_that_had_not_begun_is_asked_again_with_its_whole_body():
    replicas = Replicas(die=2)
    start, body = ask(Again(replicas), b"one ", b"two")
    assert replicas.bodies == [b"one two"] * 3
    assert start["headers"] == [(b"a", b"b"), (b"x-edgeft-again", b"2")] and body["body"] == b"begun"
    untouched = ask(Again(Replicas(die=0)), b"x")
    assert untouched[0]["headers"] == [(b"a", b"b")]


def test_what_has_begun_is_not_asked_again_and_trying_ends():
    begun = Replicas(die=1, after=1)
    assert len(ask(Again(begun), b"x")) == 2 and len(begun.bodies) == 1
    dead = Replicas(die=99)
    assert ask(Again(dead), b"x") == [] and len(dead.bodies) == TRIES
    large = Replicas(die=99)
    assert ask(Again(large), b"x" * KEPT_BYTES, b"x") == [] and len(large.bodies) == 1
    left = Replicas(die=99)
    assert ask(Again(left), b"x", leaves=True) == [] and left.bodies == []


class Answer:
    """What a handle of Ray's gives: pieces, then an end or an exception."""

    def __init__(self, pieces: list[bytes], end: Exception | None) -> None:
        self.pieces, self.end, self.cancelled = list(pieces), end, False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self.pieces:
            return self.pieces.pop(0)
        raise self.end or StopAsyncIteration

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A handle of Ray's whose calls give these answers, one after the other."""

    def __init__(self, *answers: Answer) -> None:
        self.answers, self.asked, self.stream = list(answers), list[Any](), self

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self, *sent: Any) -> Answer:
        self.asked.append(sent)
        return self.answers[len(self.asked) - 1]


def chunk(text: str) -> bytes:
    return frames.chunk({"choices": [{"index": 0, "delta": {"content": text}}]})


def upstream(*answers: Answer) -> Any:
    return RayUpstream("weak", Handle(*answers), 2, Features(), lambda: 1)


async def said(source: Any) -> tuple[list[str], Exception | None]:
    """What came out, and what it ended with."""
    texts: list[str] = []
    try:
        async with aclosing(source) as chunks:
            async for one in chunks:
                texts.append(one["choices"][0]["delta"]["content"])
    except (Refusal, BrokenStream) as error:
        return texts, error
    return texts, None


def died() -> Exception:
    return pytest.importorskip("ray.exceptions", reason="ray is not installed").ActorDiedError()


def test_a_lost_replica_costs_no_answer_that_had_not_begun():
    engines = upstream(Answer([], died()), Answer([chunk("a"), chunk("b")], None))
    assert asyncio.run(said(engines.stream(CHAT, {"messages": []}))) == (["a", "b"], None)
    assert (engines.lost, engines.again) == (1, 1) and all(a.cancelled for a in engines.unary.answers)
    asked = {"kind": "chat", "fields": {"messages": []}, "extra": {}}
    assert json.loads(engines.unary.asked[0][0]) == asked and len(set(engines.unary.asked)) == 1

    begun = upstream(Answer([chunk("a")], died()), Answer([chunk("b")], None))
    texts, error = asyncio.run(said(begun.stream(CHAT, {})))
    assert texts == ["a"] and isinstance(error, BrokenStream) and (begun.lost, begun.again) == (1, 0)

    role = frames.chunk({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    silent = upstream(Answer([role], died()), Answer([role, chunk("b")], None))
    assert asyncio.run(said(silent.stream(CHAT, {}))) == (["", "b"], None), "nothing had been said yet"

    whole = upstream(Answer([chunk("a")], died()), Answer([chunk("b"), chunk("c")], None))
    assert asyncio.run(said(whole.stream(CHAT, {}, False))) == (["b", "c"], None), "none of the first"

    gone = upstream(*[Answer([], died()) for _ in range(9)])
    texts, error = asyncio.run(said(gone.stream(CHAT, {})))
    assert isinstance(error, Refusal) and error.status == 502 and len(gone.unary.asked) == TRIES


def test_refusals_are_told_and_not_asked_again():
    pytest.importorskip("ray", reason="ray is not installed")
    from ray.serve.exceptions import BackPressureError

    for answer, status in (
        (Answer([frames.refused(Refusal(400, "too long"))], None), 400),
        (Answer([], BackPressureError(num_queued_requests=9, max_queued_requests=9)), 429),
        (Answer([], ValueError("a fault in the engine's code, with a text of a request")), 502),
    ):
        engines = upstream(answer)
        _, error = asyncio.run(said(engines.stream(CHAT, {})))
        assert isinstance(error, Refusal) and error.status == status and len(engines.unary.asked) == 1
        assert "text of a request" not in json.dumps(error.body)


def test_a_client_that_leaves_cancels_the_replicas_work():
    pytest.importorskip("ray", reason="ray is not installed")
    engines = upstream(Answer([chunk("a"), chunk("b")], None))

    async def leave() -> None:
        stream = engines.stream(CHAT, {})
        assert (await anext(stream))["choices"]
        await stream.aclose()

    asyncio.run(leave())
    assert engines.unary.answers[0].cancelled


def test_ready_follows_the_cluster():
    engines = upstream()
    counts = iter([2, 0])
    engines.running = lambda: next(counts)

    async def look() -> list[str]:
        seen = [engines.state()]
        await engines.looking
        seen.append(engines.state())
        async with engines.hold():
            engines.looked_s = float("-inf")
        engines.state()
        await engines.looking
        with pytest.raises(Refusal, match="not ready"):
            async with engines.hold():
                pass
        return [*seen, engines.state()]

    assert asyncio.run(look()) == ["loading", "ready", "restarting"]


@pytest.mark.slow
def test_a_node_killed_under_load_loses_no_request_that_had_not_begun(tmp_path):
    """The trial itself: two nodes, a real model, Redis. About two minutes."""
    for package in ("ray", "redis", "xllamacpp"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    if not shutil.which("redis-server"):
        pytest.skip("redis-server is not installed (make test-deps)")
    out = tmp_path / "trial.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "serve_ray.py"),
        "--seconds",
        "20",
        "--tokens",
        "8",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert found["lost"] == [] and found["processes killed"] >= 3 and found["under way at the kill"] > 0
    assert sum(found["became"].values()) == found["requests"] > found["under way at the kill"]
    assert found["cache"]["first"] == "miss"


def test_the_drain_times_of_the_manifest_agree():
    """A pod's grace covers its preStop hook and its server's drain; the command's covers the proxies' drain and the engines'."""
    import yaml

    found = yaml.safe_load_all((ROOT / "docs" / "cluster-k8s.yaml").read_text())
    parts = {part["metadata"]["name"]: part for part in found if part["kind"] != "Service"}
    page = (ROOT / "docs" / "cluster.md").read_text()
    drain_s = yaml.safe_load(page.split("```yaml")[1].split("```")[0])["cluster"]["drain_s"]

    def grace(spec: dict[str, Any]) -> tuple[int, int]:
        (container,) = spec["containers"]
        hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["", "0"])
        return spec["terminationGracePeriodSeconds"], int(hook[1])

    ray = parts["edgeft"]["spec"]
    for group in (ray["headGroupSpec"], *ray["workerGroupSpecs"]):
        whole, hook = grace(group["template"]["spec"])
        assert whole > hook + drain_s
    vllm = parts["vllm"]["spec"]["template"]["spec"]
    arguments = vllm["containers"][0]["args"]
    whole, hook = grace(vllm)
    assert whole > hook + int(arguments[arguments.index("--shutdown-timeout") + 1])
    assert grace(parts["edgeft-serve"]["spec"]["template"]["spec"])[0] > 2 * drain_s


def test_the_pages_settings_are_settings():
    import yaml

    from edgeft.serve.config_file import _build

    page = (ROOT / "docs" / "cluster.md").read_text()
    value = yaml.safe_load(page.split("```yaml")[1].split("```")[0])["cluster"]
    found = _build(Cluster, value, "docs/cluster.md", "cluster", ROOT)
    found.check(["gguf-q4_k_m", "openai:http://vllm:8000#big"])
    assert found.place("gguf-q4_k_m").largest == 4 and found.drain_s == 60.0
