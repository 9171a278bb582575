"""Structured logs: one JSON line a request, and other records beside them. Never text of a request.

Lines are put into a bounded queue that a thread empties, so a full disk or a reader that has stopped reading costs lines,
which are counted, and never an answer. What a killed process had not written yet (a fifth of a second) is lost.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections import deque
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from edgeft.errors import EnvironmentFault

EVERY_S = 0.2
MOST_WAITING = 20_000  # lines, some 8 MB
LONGEST = 200  # characters of a field
request_id: ContextVar[str | None] = ContextVar("edgeft_request_id", default=None)


class Lines:
    """Whole lines to a file (mode 0600, appended) or to standard error. `lost` counts those that could not be written,
    `trouble` says why until it works again."""

    def __init__(self, path: Path | None = None) -> None:
        """Raises EnvironmentFault where the file can't be opened."""
        self.path = path
        self.lost = 0
        self.trouble: str | None = None
        self._waiting: deque[bytes] = deque()
        self._torn = False  # the last line was written in part
        self._ended = threading.Event()
        self._handle = self._open()
        self._writer = threading.Thread(target=self._run, name="edgeft-logs", daemon=True)
        self._writer.start()

    def put(self, line: bytes) -> None:
        """Queue a line without its newline; it is lost where too many wait."""
        if len(self._waiting) >= MOST_WAITING:
            self.lost += 1
        else:
            self._waiting.append(line)

    def reopen(self) -> None:
        """Go on in a new file under the same name (after logrotate); the old one where that can't be opened."""
        if self.path is None:
            return
        try:
            fresh = self._open()
        except EnvironmentFault as fault:
            self.trouble = fault.message
            return
        os.dup2(fresh, self._handle)  # whoever writes just now ends in the one or the other
        os.close(fresh)

    def close(self, seconds: float = 2.0) -> None:
        """Write what waits, at most for so long."""
        self._ended.set()
        self._writer.join(seconds)
        if self.path is not None and not self._writer.is_alive():
            os.close(self._handle)

    def _open(self) -> int:
        if self.path is None:
            return sys.stderr.fileno()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise EnvironmentFault(
                f"the log {self.path} can't be written: {error.strerror}.", f"ls -ld {self.path.parent}"
            ) from None

    def _run(self) -> None:
        while not self._ended.wait(EVERY_S):
            self._write()
        self._write()

    def _write(self) -> None:
        lines = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if not lines:
            return
        data = (b"\n" if self._torn else b"") + b"\n".join(lines) + b"\n"
        done = 0
        try:
            while done < len(data):
                done += os.write(self._handle, data[done:])
            self._torn, self.trouble = False, None
        except OSError as error:
            self.lost += data.count(b"\n", max(done, int(self._torn)))
            self._torn = (data[done - 1 : done] != b"\n") if done else self._torn
            self.trouble = f"log lines are lost: {error.strerror}"


class RequestLog:
    """A line for each request."""

    def __init__(self, lines: Lines | None) -> None:
        """`lines` is None where nothing is to be logged."""
        self.lines = lines

    def close(self) -> None:
        """Write what waits."""
        if self.lines is not None:
            self.lines.close()

    def write(
        self,
        request_id: str,
        *,
        status: int,
        e2e_s: float,
        path: str,
        tenant: str | None = None,
        route: str | None = None,
        reason: str | None = None,
        ttft_s: float | None = None,
        stream: bool = False,
        cache: str | None = None,
        certificate: str | None = None,
        prompt_tokens: int | None = None,
        output_tokens: int | None = None,
        cached_tokens: int | None = None,
        cost_usd: float | None = None,
        code: str | None = None,
    ) -> None:
        """Log a request that is over. There is no field for text of it, and every text is cut at LONGEST. `path` is the
        endpoint's own, not what the client typed; `code` the error's."""
        if self.lines is None:
            return
        line: dict[str, Any] = {
            "time": now(), "request_id": request_id, "path": path, "status": status, "stream": stream, "e2e_s": round(e2e_s, 4),
        }  # fmt: skip
        for name, value in (
            ("tenant", tenant), ("route", route), ("reason", reason), ("cache", cache), ("certificate", certificate),
            ("code", code), ("prompt_tokens", prompt_tokens), ("output_tokens", output_tokens),
            ("cached_tokens", cached_tokens), ("cost_usd", cost_usd),
        ):  # fmt: skip
            if value is not None:
                line[name] = value[:LONGEST] if isinstance(value, str) else value
        if ttft_s is not None:
            line["ttft_s"] = round(ttft_s, 4)
        self.lines.put(_json(line))


class JsonFormatter(logging.Formatter):
    """Other records as JSON with the request's id. Of an exception its type and place alone: a message may quote."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": request_id.get(),
        }
        if record.exc_info and record.exc_info[0]:
            line["error"] = record.exc_info[0].__name__
            line["at"] = _place(record.exc_info[2])
        return _json({key: value for key, value in line.items() if value is not None}).decode()


class LinesHandler(logging.Handler):
    """Records into the same lines as the requests'."""

    def __init__(self, lines: Lines) -> None:
        super().__init__()
        self.lines = lines
        self.setFormatter(JsonFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.lines.put(self.format(record).encode(errors="replace"))
        except Exception:  # a record that can't be formatted ends no request
            self.lines.lost += 1


def setup(path: Path | None = None, *, quiet: bool = False) -> RequestLog:
    """Send `edgeft`'s and uvicorn's records and the requests' lines to `path`, or to standard error. With `quiet` standard
    error stays silent and a file is still written. Call `close` at the end."""
    for name in ("edgeft", "uvicorn"):
        logger = logging.getLogger(name)
        logger.propagate = False
        logger.setLevel(logging.INFO if name == "edgeft" else logging.WARNING)
        logger.handlers = [logging.NullHandler()]
    if quiet and path is None:
        return RequestLog(None)
    lines = Lines(path)
    for name in ("edgeft", "uvicorn"):
        logging.getLogger(name).handlers = [LinesHandler(lines)]
    return RequestLog(lines)


def now() -> str:
    """The time in UTC, to the millisecond."""
    seconds, millis = divmod(int(time.time() * 1000), 1000)
    return f"{_date(seconds)}.{millis:03d}+00:00"


@lru_cache(maxsize=1)
def _date(seconds: int) -> str:
    """Of this second, which has many lines."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _json(value: dict[str, Any]) -> bytes:
    try:
        import orjson

        return orjson.dumps(value)
    except (ImportError, TypeError):  # orjson refuses lone surrogates
        return json.dumps(value).encode()


def _place(trace: Any) -> str | None:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return None if trace is None else f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
