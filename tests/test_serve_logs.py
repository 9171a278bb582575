"""Logs: whole lines of JSON, no text of requests, and no trouble for the proxy when they can't be written."""

from __future__ import annotations

import contextvars
import inspect
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeft.errors import EnvironmentFault
from edgeft.serve import logs
from edgeft.serve.logs import Lines, RequestLog, setup

SECRET = "planted-secret-7731"


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    kept = [
        (g, g.handlers, g.propagate, g.level) for n in ("edgeft", "uvicorn") if (g := logging.getLogger(n))
    ]
    yield
    for logger, handlers, propagate, level in kept:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def one(log: RequestLog, key: str = "r1", **more) -> None:
    log.write(key, **{"status": 200, "e2e_s": 1.23456, "path": "/v1/chat/completions", **more})


def written(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_a_request_with_what_was_decided(tmp_path):
    file = tmp_path / "logs" / "serve.jsonl"
    log = setup(file)
    one(
        log, tenant="support", route="weak", reason="gain below 0.3", ttft_s=0.2, stream=True, cache="miss",
        certificate="holds", prompt_tokens=10, output_tokens=3, cached_tokens=8, cost_usd=0.0,
    )  # fmt: skip
    one(log, "r2", status=429, code="queue_full")
    log.close()
    first, second = written(file)
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "request_id": "r1", "path": "/v1/chat/completions", "status": 200, "stream": True, "tenant": "support",
        "route": "weak", "reason": "gain below 0.3", "cache": "miss", "certificate": "holds", "ttft_s": 0.2, "e2e_s": 1.2346,
        "prompt_tokens": 10, "output_tokens": 3, "cached_tokens": 8, "cost_usd": 0.0,
    }  # fmt: skip
    assert second["code"] == "queue_full" and "tenant" not in second, "what is not known is left out"
    assert file.stat().st_mode & 0o777 == 0o600 and log.lines.lost == 0


def test_there_is_no_field_for_text_and_what_there_is_stays_one_short_line(tmp_path):
    fields = set(inspect.signature(RequestLog.write).parameters)
    assert not fields & {"messages", "prompt", "text", "body", "answer", "content", "error", "message"}
    log = setup(tmp_path / "log")
    one(log, reason="x\ny" * 1000, tenant="\ud800\x1b[31m")
    log.close()
    (line,) = written(tmp_path / "log")
    assert len(line["reason"]) == logs.LONGEST and "\x1b" not in (tmp_path / "log").read_text()


def test_other_records_carry_the_request_and_no_message_of_an_exception(tmp_path):
    log = setup(tmp_path / "log")
    logger = logging.getLogger("edgeft.serve")

    def handle() -> None:
        logs.request_id.set("r9")
        try:
            raise ValueError(f"could not parse {SECRET}")
        except ValueError:
            logger.exception("an answer of %s broke off", "weak")

    contextvars.copy_context().run(handle)
    logger.warning("nobody's")
    logging.getLogger("uvicorn.error").error("bind failed")
    logging.getLogger("uvicorn.access").info("GET /?q=secret")
    logger.info("%d", "no number")  # can't be formatted: lost, and nothing raised
    log.close()
    lines = written(tmp_path / "log")
    assert [line["message"] for line in lines] == ["an answer of weak broke off", "nobody's", "bind failed"]
    assert (
        lines[0]["request_id"] == "r9" and lines[0]["error"] == "ValueError" and lines[0]["level"] == "error"
    )
    assert lines[0]["at"].startswith("test_serve_logs.py:") and "request_id" not in lines[1]
    assert SECRET not in (tmp_path / "log").read_text() and log.lines.lost == 1


def test_a_full_disk_costs_lines_and_nothing_else():
    log = setup(Path("/dev/full"))
    for i in range(100):
        one(log, str(i))
        logging.getLogger("edgeft").warning("on")
    deadline = time.monotonic() + 5
    while log.lines.lost < 200 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert log.lines.lost == 200 and "No space left" in log.lines.trouble
    one(log, "later")
    log.close()
    assert log.lines.lost == 201


def test_a_disk_with_room_again_is_written_in_whole_lines(tmp_path, monkeypatch):
    file, real, room = tmp_path / "log", os.write, [40]
    lines = Lines(file)

    def little(handle: int, data: bytes) -> int:
        if handle != lines._handle:
            return real(handle, data)
        if room[0] <= 0:
            raise OSError(28, "No space left on device")
        done = real(handle, data[: room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr(logs.os, "write", little)
    log = RequestLog(lines)
    for i in range(3):
        one(log, f"full{i}")
    deadline = time.monotonic() + 5
    while lines.lost < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert lines.lost == 3 and lines.trouble
    room[0] = 10**9
    one(log, "after")
    lines.close()
    torn, after = file.read_text().splitlines()
    assert (
        len(torn) == 40
        and json.loads(after)["request_id"] == "after"
        and lines.lost == 3
        and lines.trouble is None
    )


def test_a_reader_that_stopped_reading_holds_nobody_up():
    """Standard error is a pipe that nobody empties: 65,536 bytes fit. The writer blocks holding at most MOST_WAITING lines
    while as many wait, so a third of three times that is lost on any box."""
    lines = 3 * logs.MOST_WAITING
    code = (
        "import time\nfrom edgeft.serve import logs\nlog = logs.setup()\nbegan = time.monotonic()\n"
        f"for i in range({lines}): log.write(str(i), status=200, e2e_s=1.0, path='/v1')\n"
        "log.lines.close(0.5)\nprint(time.monotonic() - began, log.lines.lost)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    seconds, lost = process.stdout.readline().split()
    process.stdout.close()
    assert process.stderr
    process.stderr.close()
    process.wait(20)
    assert float(seconds) < 60 and 0 < int(lost) < lines, "bounded, counted"


def test_rotation(tmp_path):
    file = tmp_path / "log"
    log = setup(file)
    one(log, "old")
    time.sleep(3 * logs.EVERY_S)
    file.rename(tmp_path / "log.1")
    log.lines.reopen()
    one(log, "new")
    log.close()
    assert [line["request_id"] for line in written(tmp_path / "log.1") + written(file)] == ["old", "new"]


def test_quiet_is_silent_and_a_file_is_still_written(tmp_path):
    code = (
        "import logging, sys\nfrom pathlib import Path\nfrom edgeft.serve import logs\n"
        "log = logs.setup(Path(sys.argv[1]) if len(sys.argv) > 1 else None, quiet=True)\n"
        "log.write('r', status=200, e2e_s=1.0, path='/v1')\nlogging.getLogger('edgeft.serve').error('x')\n"
        "log.close()"
    )
    for words in ([], [str(tmp_path / "log")]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
        )
        assert done.stderr == done.stdout == ""
    assert len(written(tmp_path / "log")) == 2


def test_many_threads_write_whole_lines(tmp_path):
    log = setup(tmp_path / "log")
    threads = [
        threading.Thread(target=lambda n=n: [one(log, f"{n}-{i}", reason="y" * 150) for i in range(500)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert len({line["request_id"] for line in written(tmp_path / "log")}) == 2000


def test_a_log_that_cannot_be_opened_is_said_at_the_start():
    with pytest.raises(EnvironmentFault, match="can't be written"):
        setup(Path("/proc/none/log"))
