"""The cache of the router: keys, what may be kept, one call for equal requests, meaning behind guards and a budget."""

from __future__ import annotations

import asyncio
import pickle
import sqlite3
from collections.abc import AsyncIterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeft.errors import Inconclusive
from edgeft.router.cache import ExactCache, Flights, Settings, keepable, key_of
from edgeft.router.cache.guards import differs
from edgeft.router.cache.semantic import Audit, SemanticCache, calibrate, partition_of
from edgeft.router.certificate import upper_bound

BODY = {"model": "auto", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}


def test_the_key_counts_everything_but_what_has_no_effect():
    base = key_of(BODY, "m", tenant="a", artifact_sha256="s")
    same = {
        **BODY,
        "stream": True,
        "user": "u",
        "stream_options": {"include_usage": True},
        "model": "m",
        "metadata": {"a": 1},
    }
    assert key_of(same, "m", tenant="a", artifact_sha256="s") == base
    assert key_of(dict(reversed(BODY.items())), "m", tenant="a", artifact_sha256="s") == base, (
        "the order of fields does not count"
    )
    others = [
        key_of(BODY, "n", tenant="a", artifact_sha256="s"), key_of(BODY, "m", tenant="b", artifact_sha256="s"),
        key_of(BODY, "m", tenant=None, artifact_sha256="s"), key_of(BODY, "m", tenant="a", artifact_sha256="t"),
        key_of(BODY, "m", tenant="a", artifact_sha256="s", adapter_sha256="x"),
        key_of(BODY, "m", tenant="a", artifact_sha256="s", template_sha256="x"),
        *(key_of({**BODY, name: value}, "m", tenant="a", artifact_sha256="s") for name, value in (
            ("tools", []), ("response_format", {"type": "json_object"}),
            ("temperature", 0.1), ("never_heard_of", 1), ("seed", 1), ("stop", "x"))),
    ]  # fmt: skip
    assert len({base, *others}) == len(others) + 1


def test_what_may_be_served_again():
    plain = Settings()
    assert plain.allows({"temperature": 0}) and plain.allows({"seed": 3})
    assert not plain.allows({}) and not plain.allows({"temperature": 0.7})
    own = Settings(sampled={("desk", "*"): True, ("desk", "strong"): False, ("*", "weak"): True})
    assert own.allows({}, "desk", "x") and not own.allows({}, "desk", "strong")
    assert own.allows({}, "other", "weak") and not own.allows({}, "other", "strong") and not own.allows({})


def test_what_is_never_kept():
    assert keepable("stop") and keepable("tool_calls", {"content": None})
    for reason in ("length", "content_filter", None, "error"):
        assert not keepable(reason)
    assert not keepable("stop", {"refusal": "I can't"}) and not keepable("stop", {}, error="broke")


def test_answers_come_back_until_they_are_too_old_or_dropped(tmp_path):
    cache = ExactCache(tmp_path / "c")
    answer = {"text": "Grüße \u2028 \U0001f600", "usage": {"n": 1}, "chunks": [["a", None], ["b", 0.5]]}
    cache.put("k", answer, 60, ["model:m", "tenant:a"])
    cache.put("l", "other", 60, ["model:m", "tenant:ab"])
    cache.put("old", "x", 0.0)
    assert cache.get("k") == answer and cache.get("old") is None and cache.get("none") is None
    assert cache.drop("tenant:a") == 1 and cache.get("k") is None and cache.get("l") == "other"
    assert cache.drop("model:m") == 1 and cache.get("l") is None
    large = "x" * 200_000  # over the size that sqlite keeps itself
    cache.put("large", large, 60)
    assert cache.get("large") == large
    cache.close()
    again = ExactCache(tmp_path / "c")
    assert again.get("large") == large
    assert (tmp_path / "c").stat().st_mode & 0o077 == 0


class Bomb:
    def __reduce__(self):
        raise AssertionError("pickled")


def test_nothing_is_pickled_and_a_planted_pickle_is_not_loaded(tmp_path):
    cache = ExactCache(tmp_path / "c")
    cache.put("k", Bomb(), 60)  # not JSON: the hit is lost, nothing else
    assert cache.get("k") is None
    cache.put("k", "fine", 60)
    planted = pickle.dumps("planted")
    with sqlite3.connect(tmp_path / "c" / "cache.db") as db:
        db.execute("UPDATE Cache SET mode = 4, value = ?", (planted,))
    assert cache.get("k") is None


def test_a_full_cache_stays_within_its_bound(tmp_path):
    cache = ExactCache(tmp_path / "c", size_limit_bytes=400_000)
    for i in range(400):
        cache.put(str(i), "y" * 4000, 60)
    assert cache.disk.volume() < 600_000 and cache.get("399") is not None


async def _count(calls: list[int], gate: asyncio.Event, n: int = 3) -> AsyncIterator[int]:
    calls[0] += 1
    for i in range(n):
        if i == 1:
            await gate.wait()
        yield i


def test_a_hundred_equal_requests_make_one_call():
    async def run() -> None:
        flights: Flights[int] = Flights()
        calls, gate = [0], asyncio.Event()

        async def one() -> list[int]:
            return [c async for c in flights.stream("k", lambda: _count(calls, gate))]

        tasks = [asyncio.create_task(one()) for _ in range(100)]
        await asyncio.sleep(0.01)
        gate.set()
        assert await asyncio.gather(*tasks) == [[0, 1, 2]] * 100
        assert calls == [1] and not flights.under_way
        assert await one() == [0, 1, 2] and calls == [2], "what has ended is not joined"

    asyncio.run(run())


def test_the_leader_may_leave_and_the_last_one_ends_the_call():
    async def run() -> None:
        flights: Flights[int] = Flights()
        calls, gate, ended = [0], asyncio.Event(), asyncio.Event()

        async def call() -> AsyncIterator[int]:
            try:
                async for chunk in _count(calls, gate):
                    yield chunk
            finally:
                ended.set()

        async def one() -> list[int]:
            found = []
            source = flights.stream("k", call)
            try:
                async for chunk in source:
                    found.append(chunk)
            finally:
                await source.aclose()  # type: ignore[attr-defined]
            return found

        leader, follower = asyncio.create_task(one()), asyncio.create_task(one())
        await asyncio.sleep(0.01)
        leader.cancel()
        await asyncio.sleep(0.01)
        assert not ended.is_set()
        gate.set()
        assert await follower == [0, 1, 2] and calls == [1]
        gate.clear()
        ended.clear()
        last = asyncio.create_task(one())
        await asyncio.sleep(0.01)
        last.cancel()
        await asyncio.wait_for(ended.wait(), 2)
        assert not flights.under_way

    asyncio.run(run())


def test_an_error_reaches_everybody():
    async def run() -> None:
        flights: Flights[int] = Flights()

        async def broken() -> AsyncIterator[int]:
            yield 1
            raise ValueError("broke")

        async def one() -> list[int]:
            return [c async for c in flights.stream("k", broken)]

        found = await asyncio.gather(one(), one(), return_exceptions=True)
        assert all(isinstance(f, ValueError) for f in found)

    asyncio.run(run())


@pytest.mark.parametrize(
    "one, two, what",
    [
        ("What is the limit of card 3?", "What is the limit of card 4?", "numbers"),
        ("Wait two days", "Wait three days", "numbers"),
        ("Can I cancel the order?", "Can't I cancel the order?", "negation"),
        ("It is supported", "It is not supported", "negation"),
        ("How do I increase the limit?", "How do I decrease the limit?", "opposites"),
        ("Trains from Berlin to Paris", "Trains from Paris to Berlin", "order"),
        ("Does the parent owe the child money?", "Does the child owe the parent money?", "order"),
        ("the price of Bitcoin", "the price of Ethereum", "names"),
        ("Does it run on Linux?", "Does it run on Windows?", "names"),
    ],
)
def test_the_guards_stop_what_an_embedding_lets_pass(one, two, what):
    assert differs(one, two) is not None and differs(two, one) is not None
    assert differs(one, two) == what


@pytest.mark.parametrize(
    "one, two",
    [
        ("How do I reset my password?", "What is the way to reset my password?"),
        ("It costs 1,000 euros", "The cost is 1000 euros"),
        ("Wait 2 days", "Wait two days"),
        ("You can split your dataset using take", "You can divide your dataset by employing take"),
    ],
)
def test_paraphrases_pass(one, two):
    assert differs(one, two) is None and differs(two, one) is None


@given(st.text(max_size=80))
def test_a_text_passes_itself(text):
    assert differs(text, text) is None


def test_the_threshold_keeps_its_budget_or_nothing():
    chance = np.random.default_rng(0)
    right = chance.random(2000) < 0.5
    likeness = np.where(right, chance.normal(0.9, 0.05, 2000), chance.normal(0.6, 0.05, 2000))
    found = calibrate(likeness, right, np.ones(2000, bool), 0.01)
    assert (
        upper_bound(found.wrong, found.hits, 0.05) == found.bound <= 0.01 and found.share_of_pairs_hit > 0.8
    )
    with pytest.raises(Inconclusive, match="are the least"):
        calibrate(likeness[:100], right[:100], np.ones(100, bool), 0.01)
    with pytest.raises(Inconclusive):
        calibrate(chance.random(2000), right, np.ones(2000, bool), 0.01)


def test_the_audit_switches_off_when_the_budget_is_spent_and_not_before():
    bad, good, chance = Audit(0.01), Audit(0.05), np.random.default_rng(1)
    for _ in range(300):
        bad.saw(bool(chance.random() > 0.2))
    assert bad.off
    off = 0
    for world in range(100):
        good, chance = Audit(0.05), np.random.default_rng(world)
        for _ in range(300):
            good.saw(bool(chance.random() > 0.05))
        off += good.off
    assert off <= 5, "at the budget itself it goes off by chance alone"


def test_meaning_is_looked_for_within_a_partition_alone():
    def encoder(text: str) -> np.ndarray:
        return np.array([1.0, 0.0], np.float32) if "password" in text else np.array([0.0, 1.0], np.float32)

    cache = SemanticCache(encoder, 0.9, Audit(0.01))
    partition, text = partition_of(
        {**BODY, "messages": [{"role": "user", "content": "reset my password"}]}, "m", tenant="a"
    ) or ("", "")
    cache.add(partition, text, "key-1")
    assert cache.find(partition, "how to reset a password") == ("key-1", 1.0)
    assert cache.find(partition, "how to reset 2 passwords") is None, "a guard"
    assert cache.find(partition, "something else") is None
    for changed in (
        {"tools": [{}]},
        {"temperature": 1},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "reset my password"}]},
    ):
        other = partition_of(
            {**BODY, **({"messages": [{"role": "user", "content": "reset my password"}]} | changed)},
            "m",
            tenant="a",
        )
        assert other is not None and other[0] != partition
    assert (
        partition_of(
            {**BODY, "messages": [{"role": "user", "content": "reset my password"}]}, "m", tenant="b"
        )
        or ("", "")
    )[0] != partition
    cache.audit.off = True
    assert cache.find(partition, "how to reset a password") is None
    assert partition_of({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "m") is None
