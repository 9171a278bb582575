"""The exact cache in Redis, before a real redis-server."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeft.errors import EnvironmentFault, UsageError
from edgeft.router.cache.shared import LABELS_BYTES, MOST_BYTES, Breaker, RedisCache

redis = pytest.importorskip("redis", reason="edgeft[redis] is not installed")

PASSWORD = "planted-password-4417"
ANSWER = {"text": "é 日本 \n", "usage": {"total_tokens": 3}, "logprobs": [-0.5, None]}


class Server:
    """A redis-server of this test alone: loopback, a password, nothing on disk."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.file = folder / "redis.conf"
        self.file.write_text(
            f'bind 127.0.0.1\nport {self.port}\nrequirepass {PASSWORD}\nsave ""\nappendonly no\ndir {folder}\n'
        )
        self.url = f"redis://:{PASSWORD}@127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(["redis-server", str(self.file)], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            try:
                with redis.Redis.from_url(self.url) as client:
                    client.ping()
                    return
            except redis.RedisError:
                assert time.monotonic() < deadline and self.process.poll() is None
                time.sleep(0.02)

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    if not shutil.which("redis-server"):
        pytest.skip("redis-server is not installed (make test-deps)")
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


def cache_at(url: str, **settings) -> RedisCache:
    """A cache that waits longer than it would in earnest: what is tested here runs beside other tests."""
    return RedisCache(url, **{"timeout_s": 10.0, **settings})


def test_two_clients_see_the_same_answers(server):
    one, two = cache_at(server.url), cache_at(server.url)
    assert two.get("k") is None
    one.put("k", ANSWER, 60, ["model:weak", "tenant:a"])
    assert two.get("k") == ANSWER == asyncio.run(_aget(server.url, "k"))
    other = cache_at(server.url, prefix="other")
    assert other.get("k") is None and other.drop("tenant:a") == 0
    asyncio.run(_aput(server.url, "async", [1, "two"]))
    assert one.get("async") == [1, "two"]
    one.close()
    assert two.get("k") == ANSWER


async def _aget(url: str, key: str):
    cache = cache_at(url)
    try:
        return await cache.aget(key)
    finally:
        await cache.aclose()


async def _aput(url: str, key: str, value) -> None:
    cache = cache_at(url)
    await cache.aput(key, value, 60, ["model:x"])
    await cache.aclose()


def test_redis_forgets_in_time_and_labels_drop(server):
    cache = cache_at(server.url, prefix="a*[b]")
    cache.put("short", 1, 0.15)
    assert cache.get("short") == 1
    for i in range(1200):  # more than are looked at in one round trip
        cache.put(f"k{i}", i, 60, ["model:even" if i % 2 == 0 else "model:odd", "tenant:é"])
    many = [f"tag:{i}:{'x' * 40}" for i in range(60)]
    assert len(json.dumps(many)) > LABELS_BYTES
    cache.put("many", "labels", 60, [*many, "model:even"])
    outsider = cache_at(server.url, prefix="aXb")
    outsider.put("k", 1, 60, ["model:even"])
    assert cache.drop("model:even") == 601 and cache.get("k0") is None and cache.get("many") is None
    assert cache.get("k1") == 1 and outsider.get("k") == 1
    assert cache.drop("model:eve") == 0 and cache.drop("tenant:é") == 600
    time.sleep(0.2)
    assert cache.get("short") is None
    assert cache.redis.dbsize() == 1, "nothing is left but the outsider's"


def test_only_json_is_kept_and_what_another_wrote_is_no_fault(server, caplog):
    cache = cache_at(server.url)
    cache.put("pickle", object(), 60)
    cache.put("long", "x" * MOST_BYTES, 60)
    assert cache.redis.dbsize() == 0 and cache.breaker.asks(), "not kept, and no reason to stop asking"
    for odd in ("", "no newline", "[]\n{", b"\x80\x04K\x01.", b"\xff" * 2000):
        cache.redis.set(f"{cache.prefix}odd", odd)
        assert cache.get("odd") is None and cache.breaker.closed_until_s is None
        assert cache.drop("x") == 0
    cache.put("k", 1, 60, ["x"])
    cache.redis.lpush(f"{cache.prefix}list", "1")
    assert cache.drop("x") == 1 and cache.get("list") is None
    assert PASSWORD not in caplog.text


def test_a_server_killed_in_the_middle_costs_hits_alone(server, caplog):
    cache = cache_at(server.url)
    cache.breaker.pause_s = 0.3
    cache.put("k", ANSWER, 60)
    server.kill()
    began = time.monotonic()
    for _ in range(200):
        assert cache.get("k") is None
        cache.put("k", ANSWER, 60)
    assert time.monotonic() - began < 20, "after a failure nobody waits"
    assert "cache read failed" in caplog.text and PASSWORD not in caplog.text
    with pytest.raises(EnvironmentFault, match="did not forget 'tenant:a'"):
        cache.drop("tenant:a")
    server.start()
    assert _within(3, lambda: cache.put("k", 2, 60) or cache.get("k") == 2), "asked again after the pause"


def test_a_kept_connection_that_the_server_hung_up_costs_nothing(server):
    cache = cache_at(server.url)
    cache.put("k", 1, 60)
    with redis.Redis.from_url(server.url) as other:
        other.client_kill_filter(_type="normal", skipme=True)
    assert cache.get("k") == 1


def test_a_server_that_hangs_is_left_alone_and_the_loop_goes_on():
    """It accepts and says nothing, as a machine that swaps does."""

    async def both(url: str) -> tuple[float, int]:
        cache = RedisCache(url, timeout_s=1.0)
        beats = 0

        async def beat() -> None:
            nonlocal beats
            while True:
                await asyncio.sleep(0.01)
                beats += 1

        heart = asyncio.create_task(beat())
        began = time.monotonic()
        assert await cache.aget("k") is None
        for _ in range(100):
            assert await cache.aget("k") is None
            await cache.aput("k", 1, 60)
        seconds = time.monotonic() - began
        heart.cancel()
        await cache.aclose()
        return seconds, beats

    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(8)
        url = f"redis://127.0.0.1:{deaf.getsockname()[1]}"
        seconds, beats = asyncio.run(both(url))
        assert 0.9 < seconds < 20 and beats >= 5
        cache = RedisCache(url, timeout_s=1.0)
        began = time.monotonic()
        assert cache.get("k") is None and cache.get("k") is None
        assert 0.9 < time.monotonic() - began < 20


def test_many_at_once_after_a_failure_send_one_to_look():
    now = 0.0
    breaker = Breaker(5.0, clock=lambda: now)
    assert breaker.asks()
    breaker.failed()
    assert not breaker.asks()
    now = 5.1
    assert [breaker.asks() for _ in range(3)] == [True, False, False]
    breaker.answered()
    assert breaker.asks() and breaker.asks()


def test_parallel_threads_share_one_cache(server):
    cache = cache_at(server.url)
    wrong: list[int] = []

    def work(n: int) -> None:
        for i in range(50):
            cache.put(f"{n}-{i}", [n, i], 60)
            if cache.get(f"{n}-{i}") != [n, i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_password_comes_from_a_file_and_is_shown_nowhere(server, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    bare = f"redis://127.0.0.1:{server.port}"
    file = tmp_path / "password"
    file.write_text(f"{PASSWORD}\n")
    cache = cache_at(bare, password_file=file)
    cache.put("k", 1, 60)
    assert cache.get("k") == 1 and repr(cache) == f"RedisCache(127.0.0.1:{server.port})"
    for url in (bare, server.url.replace(PASSWORD, "wrong-" + PASSWORD)):
        refused = cache_at(url)
        assert refused.get("k") is None and PASSWORD not in repr(refused)
        with pytest.raises(EnvironmentFault) as fault:
            refused.drop("x")
        assert PASSWORD not in str(fault.value)
    assert PASSWORD not in caplog.text


@pytest.mark.parametrize(
    "url", [f"http://u:{PASSWORD}@h", PASSWORD, f"redis://:{PASSWORD}@h:port", f"redis://:{PASSWORD}@h/0?db=x", "redis://"]
)  # fmt: skip
def test_a_wrong_address_is_told_without_its_password(url):
    with pytest.raises(UsageError) as error:
        RedisCache(url)
    assert PASSWORD not in error.value.message + error.value.hint


def test_a_wrong_password_file_is_told(tmp_path):
    with pytest.raises(UsageError, match="can't be read"):
        RedisCache("redis://h", password_file=tmp_path / "none")
    (tmp_path / "two").write_text("a\nb\n")
    with pytest.raises(UsageError, match="must hold one line"):
        RedisCache("redis://h", password_file=tmp_path / "two")


def test_redis_is_imported_only_where_it_is_used():
    code = "import sys, edgeft.router.cache.shared; sys.exit('redis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _within(seconds: float, done) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if done():
            return True
        time.sleep(0.05)
    return False
