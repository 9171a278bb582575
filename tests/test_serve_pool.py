"""The pool of local models: loading once, counting users, making room, restarting what died, ending everything."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from edgeft.engines import memory
from edgeft.serve import pool as pool_module
from edgeft.serve.pool import LocalSpec, NotReady, Pool, backoff_s

MEMORY_PROGRAM = "import sys; held = b'x' * int(sys.argv[1]); sys.stdout.write('up\\n'); sys.stdout.flush(); sys.stdin.read()"


class Child:
    """A stand-in for LocalModel: a real process that holds so many bytes and ends with its standard input."""

    slots = 2

    def __init__(self, spec, spawned, held=0, gate=None):
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", MEMORY_PROGRAM, str(held)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.pid = self.process.pid
        self.gate = gate or threading.Event()
        if gate is None:
            self.gate.set()
        spawned(self)
        if not self.process.stdout.readline() or not self.gate.wait(20) or self.process.poll() is not None:
            raise RuntimeError("ended while it loaded")

    def alive(self):
        return self.process.poll() is None

    def close(self):
        self.gate.set()
        self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Starter:
    """Starts stand-ins and remembers them."""

    def __init__(self, held=0, gate=None):
        self.held, self.gate, self.made, self.broken = held, gate, [], False

    def __call__(self, spec, spawned):
        if self.broken:
            raise RuntimeError("secret words of a request")

        def note(model):
            self.made.append(model)
            spawned(model)

        return Child(spec, note, self.held, self.gate)


def spec(name: str, tmp_path: Path, size: int = 10) -> LocalSpec:
    file = tmp_path / f"{name}.gguf"
    file.write_bytes(b"x" * size)
    return LocalSpec(name, file, "gguf", 256, tmp_path / f"{name}.log")


async def until(true, within_s=10.0):
    """Wait for a condition; how long it took."""
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < within_s, "never came true"
        await asyncio.sleep(0.005)
    return time.monotonic() - begun


def ended(model) -> bool:
    return model.process.poll() is not None


def test_ten_at_once_load_it_once_and_are_counted(tmp_path):
    async def run():
        starter = Starter()
        pool = Pool([spec("a", tmp_path)], starter=starter)
        assert pool.state("a") == "unloaded" and pool.describe("a")["pid"] is None
        seen, inside, go = [], asyncio.Event(), asyncio.Event()

        async def one():
            async with pool.lease("a") as model:
                seen.append(model)
                if len(seen) == 10:
                    inside.set()
                await go.wait()

        users = [asyncio.create_task(one()) for _ in range(10)]
        await inside.wait()
        described = pool.describe("a")
        assert described["in_use"] == 10 and described["loads"] == 1 and described["state"] == "ready"
        assert described["slots"] == 2 and described["rss_bytes"] > 1e6 and described["idle_since"] is None
        go.set()
        await asyncio.gather(*users)
        assert pool.describe("a")["in_use"] == 0 and abs(pool.describe("a")["idle_since"] - time.time()) < 5
        assert len(starter.made) == 1 and set(map(id, seen)) == {id(starter.made[0])}
        await pool.aclose()
        assert ended(starter.made[0])
        with pytest.raises(NotReady):
            async with pool.lease("a"):
                pass
        with pytest.raises(KeyError):
            async with pool.lease("b"):
                pass

    asyncio.run(run())


def test_who_does_not_wait_is_told_when_and_the_load_goes_on(tmp_path):
    async def run():
        gate = threading.Event()
        pool = Pool([spec("a", tmp_path)], starter=Starter(gate=gate))
        with pytest.raises(NotReady) as told:
            async with pool.lease("a", wait_s=0.05):
                pass
        assert told.value.state == "loading" == pool.state("a") and told.value.retry_after_s >= 1
        waiter = asyncio.create_task(pool.lease("a").__aenter__())
        await asyncio.sleep(0.02)
        waiter.cancel()  # a client that leaves does not end the load
        gate.set()
        async with pool.lease("a", wait_s=20):
            assert pool.describe("a")["loads"] == 1 and pool.describe("a")["in_use"] == 1
        await pool.aclose()

    asyncio.run(run())


def test_idle_models_end_and_used_ones_stay(tmp_path):
    async def run():
        starter = Starter()
        pool = Pool([spec("a", tmp_path)], idle_s=0.2, starter=starter)
        async with pool.lease("a"):
            await asyncio.sleep(0.5)
            assert pool.state("a") == "ready"
        await until(lambda: pool.state("a") == "unloaded")
        await until(lambda: ended(starter.made[0]))
        async with pool.lease("a"):
            assert pool.describe("a")["loads"] == 2
        await pool.aclose()

    asyncio.run(run())


def test_a_killed_child_is_noticed_and_comes_back(tmp_path):
    async def run():
        starter = Starter()
        pool = Pool([spec("a", tmp_path)], starter=starter)
        for death in (1, 2):
            async with pool.lease("a", wait_s=20) as model:
                os.kill(model.pid, signal.SIGKILL)
                took = await until(lambda: pool.state("a") == "restarting")
                assert took < 10  # a pidfd tells it at once; the rest is this box
                with pytest.raises(NotReady) as told:
                    async with pool.lease("a"):
                        pass
                assert told.value.state == "restarting" and 0 < told.value.retry_after_s <= backoff_s(death)
            await until(lambda: pool.state("a") == "ready")
        described = pool.describe("a")
        assert described["restarts"] == 2 and described["loads"] == 3 and described["in_use"] == 0
        await pool.aclose()
        assert all(map(ended, starter.made))

    asyncio.run(run())


def test_backoff_doubles_and_a_healthy_minute_forgets(tmp_path, monkeypatch):
    assert [backoff_s(n) for n in (1, 2, 3, 8, 2000)] == [0.5, 1.0, 2.0, 60.0, 60.0]
    monkeypatch.setattr(pool_module, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(pool_module, "HEALTHY_S", 0.0)

    async def run():
        pool = Pool([spec("a", tmp_path)], starter=Starter())
        for _ in range(3):
            async with pool.lease("a") as model:
                os.kill(model.pid, signal.SIGKILL)
                await until(lambda: pool.state("a") != "ready")
            await until(lambda: pool.state("a") == "ready")
            assert pool.entries["a"].failures == 1
        await pool.aclose()

    asyncio.run(run())


def test_a_load_that_fails_is_told_without_the_error_s_text_and_tried_again_later(tmp_path, monkeypatch):
    monkeypatch.setattr(pool_module, "FIRST_BACKOFF_S", 0.1)

    async def run():
        starter = Starter()
        starter.broken = True
        pool = Pool([spec("a", tmp_path)], starter=starter)
        for _ in range(2):  # the second time without a try
            with pytest.raises(NotReady) as told:
                async with pool.lease("a"):
                    pass
            assert told.value.state == "failed" and "secret" not in str(told.value)
        assert pool.entries["a"].failures == 1
        starter.broken = False
        await asyncio.sleep(0.2)
        async with pool.lease("a"):
            assert pool.state("a") == "ready"
        await pool.aclose()

    asyncio.run(run())


def test_memory_ends_the_longest_idle_and_never_one_in_use(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "FIXED_BYTES", {"gguf": 0})
    monkeypatch.setattr(memory, "ASSUMED_KV_BYTES", 0)
    held = 40 << 20

    async def run():
        starter = Starter(held=held)
        specs = [spec(name, tmp_path, held) for name in "abc"] + [spec("huge", tmp_path, 4 * held)]
        pool = Pool(specs, memory_bytes=int(2.9 * held), starter=starter)
        await pool.preload("ab")
        async with pool.lease("a"):
            pass
        async with pool.lease("c"):  # b is idle for longer than a
            assert [pool.state(name) for name in "abc"] == ["ready", "unloaded", "ready"]
            async with pool.lease("a"):
                with pytest.raises(NotReady, match="no memory"):
                    async with pool.lease("b"):
                        pass
                assert pool.state("b") == "unloaded"
            async with pool.lease("b"):
                assert [pool.state(name) for name in "abc"] == ["unloaded", "ready", "ready"]
        with pytest.raises(NotReady, match="are allowed"):
            async with pool.lease("huge"):
                pass
        await pool.aclose()
        assert all(map(ended, starter.made))

    asyncio.run(run())


def test_closing_ends_a_child_that_only_loads(tmp_path):
    async def run():
        starter = Starter(gate=threading.Event())
        pool = Pool([spec("a", tmp_path)], starter=starter)
        waiting = asyncio.create_task(pool.preload(["a"]))
        await until(lambda: starter.made)
        begun = time.monotonic()
        await pool.aclose()
        assert time.monotonic() - begun < 10 and ended(starter.made[0])
        with pytest.raises(NotReady):
            await waiting

    asyncio.run(run())


def test_closing_ends_a_real_process_that_only_loads(tmp_path):
    """The engine's imports alone take seconds."""
    pytest.importorskip("torch", reason="needs the extra: compress")
    spawned = []

    def starter(spec, then):
        def note(model):
            spawned.append(model)
            then(model)

        return pool_module.start(spec, note)

    async def run():
        pool = Pool(
            [LocalSpec("a", tmp_path, "transformers", 256, tmp_path / "log", threads=1)], starter=starter
        )
        waiting = asyncio.create_task(pool.preload(["a"]))
        await until(lambda: spawned)
        await pool.aclose()
        assert ended(spawned[0]) and pool.describe("a")["pid"] is None
        with pytest.raises(NotReady):
            await waiting

    asyncio.run(run())


def test_a_real_model_answers_dies_and_answers_again(tiny_dist, tmp_path):
    pytest.importorskip("xllamacpp", reason="needs the extra: gguf")
    import httpx

    folder = tiny_dist / "dist" / "gguf-f16"
    question = {"messages": [{"role": "user", "content": "go"}], "max_tokens": 3, "temperature": 0}

    async def run():
        pool = Pool(
            [LocalSpec("tiny", folder, "gguf", 256, tmp_path / "log", threads=1, slots=2)],
            memory_bytes=2_000_000_000,
        )
        texts = []
        for _ in range(2):
            async with pool.lease("tiny", wait_s=300) as model, httpx.AsyncClient() as client:
                assert model.slots == 2 and model.batch
                answer = await client.post(
                    f"{model.url}/v1/chat/completions",
                    json={**question, **model.fields(stream=False)},
                    headers={"Authorization": f"Bearer {model.key}"},
                    timeout=120,
                )
                texts.append(answer.json()["choices"][0]["message"]["content"])
                os.kill(model.pid, signal.SIGKILL)
                await until(lambda: pool.state("tiny") == "restarting")
            await until(lambda: pool.state("tiny") == "ready", 300)
        assert texts[0] == texts[1] and pool.describe("tiny")["restarts"] == 2
        pid = pool.describe("tiny")["pid"]
        await pool.aclose()
        assert not Path(f"/proc/{pid}").exists()

    asyncio.run(run())


def test_the_estimate_reads_a_file_s_own_shape(tiny_dist):
    file = next((tiny_dist / "dist" / "gguf-f16").glob("*.gguf"))
    assert memory.gguf_kv_bytes(file) == 2 * 2 * 2 * 64 * 2  # keys and values, layers, heads, width, float16
    assert memory.config_kv_bytes(tiny_dist / "dist" / "merged", 2) == memory.gguf_kv_bytes(file)
    size = file.stat().st_size
    assert memory.estimated_bytes(file, "gguf", 1000) == size + 1000 * 1024 + memory.FIXED_BYTES["gguf"]
