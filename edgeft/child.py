"""Run a function in a process of its own.

Heavy imports, banners, thread pools and aborts of native libraries stay out of the caller. The
child's output goes to a log file; its result comes back as JSON; errors of edgeft come back as
themselves, others as an error that names the log.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from edgeft.errors import BY_NAME, EdgeftError, EnvironmentFault

ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
COST = ("wall_s", "peak_rss_bytes", "peak_anon_bytes")
# Tools spin shortly: with libgomp's default, threads that wait burn the core that another process needs. On two cores a
# training step took 3.7 s alone and 12.5 s beside one busy process; with this 4.6 s and 6 to 7 s. Engines, which are
# measured on a quiet box, keep the default: a short spin costs them up to a fifth of their tokens.
SHORT_SPIN = {"GOMP_SPINCOUNT": "30000"}
# On Linux a child is killed when its parent ends, however it ends (prctl(2), PR_SET_PDEATHSIG = 1): a `kill -9` must not
# leave tools behind that write on. Set in the child itself before it becomes the command, since forking with a Python
# callback is not safe beside threads.
LEASH = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    sys.exit(137)
os.execvp(sys.argv[2], sys.argv[2:])
"""

_steps: ContextVar[tuple[list[dict[str, Any]], Path | None] | None] = ContextVar("steps", default=None)


def call(
    function: str,
    *,
    log: Path,
    title: str,
    env: dict[str, str] | None = None,
    timeout_s: float | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Call `package.module:function(**arguments)` in a child process and return its dict.

    The answer carries the keys of COST more, as `run` gives them.
    Raises what the function raised where that is an EdgeftError, else EnvironmentFault naming `log`.
    """
    with tempfile.TemporaryDirectory(prefix="edgeft-") as scratch:
        spec, answer = Path(scratch, "spec.json"), Path(scratch, "answer.json")
        spec.write_text(json.dumps({"function": function, "arguments": arguments, "answer": str(answer)}))
        command = [sys.executable, "-m", "edgeft.child", str(spec)]
        spent = run(command, log=log, title=title, env=env, check=False, timeout_s=timeout_s)
        if answer.exists():
            value = json.loads(answer.read_text())
            if "error" in value:
                raise BY_NAME[value["error"]](value["message"], value["hint"])
            return {**value["result"], **{key: spent[key] for key in COST}}
    raise failed(title, spent["exit_code"], log)


def run(
    command: list[str],
    *,
    log: Path,
    title: str = "",
    env: dict[str, str] | None = None,
    check: bool = True,
    timeout_s: float | None = None,
) -> dict[str, Any]:
    """Run a command with its output appended to `log`; its process group ends when the caller is interrupted.

    Returns `exit_code`, `wall_s`, `peak_rss_bytes` (the largest sum of resident memory over the process tree,
    sampled every 50 ms) and `peak_anon_bytes` (likewise, file-backed pages left out). Raises EnvironmentFault
    where `check` and the command fails, or where it is not done after `timeout_s`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        started = time.monotonic()
        process = subprocess.Popen(
            leashed(command),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT, **SHORT_SPIN, **(env or {})},
            start_new_session=True,
        )
        peak = PeakMemory(process.pid)
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            end_group(process, grace_s=0.5)
            raise EnvironmentFault(f"{title} was not done after {timeout_s:g} s.", f"less {log}") from None
        except BaseException:
            end_group(process)
            raise
        finally:
            peak_bytes = peak.stop()
    if check and code != 0:
        raise failed(title, code, log)
    spent = {
        "wall_s": time.monotonic() - started,
        "peak_rss_bytes": peak_bytes,
        "peak_anon_bytes": peak.largest_anon_bytes,
    }
    if recording := _steps.get():
        _record(*recording, {"name": title, **spent})
    return {"exit_code": code, **spent}


def leashed(command: list[str]) -> list[str]:
    """The command so that it ends with this process; as it is where the system is not Linux."""
    if sys.platform != "linux":
        return command
    return [sys.executable, "-I", "-S", "-c", LEASH, str(os.getpid()), *command]


@contextmanager
def recorded(ledger: Path | None = None) -> Iterator[list[dict[str, Any]]]:
    """Collect what the children cost that end in the block: `name` (their title) and the keys of COST, in order.

    Each is also added to the file `ledger`, one JSON line, as soon as it ends: a kill afterwards does not lose it.
    """
    steps: list[dict[str, Any]] = []
    token = _steps.set((steps, ledger))
    try:
        yield steps
    finally:
        _steps.reset(token)


def _record(steps: list[dict[str, Any]], ledger: Path | None, step: dict[str, Any]) -> None:
    steps.append(step)
    if ledger:
        with ledger.open("a") as file:
            file.write(json.dumps(step) + "\n")


def failed(title: str, code: int, log: Path) -> EnvironmentFault:
    """The error for a tool that failed, with the last line of its log."""
    text = log.read_text(errors="replace") if log.exists() else ""
    if "No space left on device" in text:
        return EnvironmentFault(f"the disk is full: {title} stopped.", "df -h")
    return EnvironmentFault(f"{title} failed (exit {code}): {last_line(log)}", f"less {log}")


def end_group(process: subprocess.Popen[bytes], grace_s: float = 2.0) -> None:
    """End a child and all it started: ask first, then kill."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(grace_s)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


class PeakMemory:
    """Samples the resident memory of a process tree until stopped.

    Anonymous and file-backed pages apart; the peak is that of their sum. Pages shared by several
    processes of the tree count once a process; a new child is found within a second.
    """

    def __init__(self, pid: int, interval_s: float = 0.05) -> None:
        self.pid, self.interval_s = pid, interval_s
        self.peak = {"rss_bytes": 0, "anon_bytes": 0, "file_bytes": 0}
        self.largest_anon_bytes = 0
        self._tree: list[Any] = []
        self._samples = 0
        self.paused = False  # nothing is sampled meanwhile: looking would disturb what else is measured
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stop.wait(self.interval_s):
            if not self.paused:
                self.sample_once()

    def sample_once(self) -> None:
        """Take one sample now."""
        # New children are looked for once a second: it would disturb what is measured.
        if self._samples % round(1 / self.interval_s) == 0:
            self._tree = process_tree(self.pid)
        self._samples += 1
        total, anon = resident(self._tree)
        self.largest_anon_bytes = max(self.largest_anon_bytes, anon)
        if total > self.peak["rss_bytes"]:
            self.peak = {"rss_bytes": total, "anon_bytes": anon, "file_bytes": total - anon}

    def stop(self) -> int:
        """End sampling and return the peak in bytes."""
        self._stop.set()
        self._thread.join()
        return self.peak["rss_bytes"]


def process_tree(pid: int) -> list[Any]:
    """A process and its descendants, as psutil's; empty where it is gone."""
    import psutil

    try:
        parent = psutil.Process(pid)
        found = descendants(pid)
        return [parent, *(parent.children(recursive=True) if found is None else map(psutil.Process, found))]
    except psutil.Error:
        return []


def descendants(pid: int) -> list[int] | None:
    """All processes under one, as Linux lists each thread's children; None where it doesn't, or they change just now.

    psutil reads the state of every process of the box instead: 1.8 ms where this takes 0.1.
    """
    try:
        tasks = Path(f"/proc/{pid}/task")
        own = [int(word) for task in tasks.iterdir() for word in (task / "children").read_text().split()]
    except OSError:
        return None
    below = [descendants(child) for child in own]
    return None if None in below else own + [one for more in below for one in more or ()]


def resident(tree: list[Any]) -> tuple[int, int]:
    """(resident, anonymous) bytes summed over processes."""
    import psutil

    total = anon = 0
    for process in tree:
        try:
            memory = process.memory_info()
        except psutil.Error:
            continue
        total += memory.rss
        anon += memory.rss - getattr(memory, "shared", 0)
    return total, anon


def main(spec_path: str) -> None:
    """The child's side."""
    spec = json.loads(Path(spec_path).read_text())
    module, name = spec["function"].split(":")
    try:
        value: dict[str, Any] = {
            "result": getattr(importlib.import_module(module), name)(**spec["arguments"])
        }
    except EdgeftError as error:
        value = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    except ImportError as error:
        if error.name is None or error.name.startswith("edgeft"):
            raise
        value = {
            "error": "EnvironmentFault",
            "message": f"this needs the package '{error.name}', which is not installed.",
            "hint": f"pip install {error.name}",
        }
    except OSError as error:
        import errno

        if error.errno != errno.ENOSPC:
            raise
        value = {"error": "EnvironmentFault", "message": f"the disk is full: {error}", "hint": "df -h"}
    answer = Path(spec["answer"])
    partial = answer.with_suffix(".part")
    partial.write_text(json.dumps(value))
    partial.replace(answer)


if __name__ == "__main__":
    main(sys.argv[1])
