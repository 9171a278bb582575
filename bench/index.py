"""The index of all bench runs: one SQLite file that only grows.

Reports are kept whole under the SHA-256 of their `report.json`, so adding one twice changes nothing, and a merge that
was interrupted goes on by being typed again. Triggers refuse UPDATE and DELETE.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgeft.bench.compare import Side
from edgeft.bench.compare_speed import Repeats
from edgeft.bench.reading import checked, read_items, read_report
from edgeft.errors import EdgeftError, EnvironmentFault, UsageError, unknown
from edgeft.home import state_dir
from edgeft.types import BenchReport

VERSION = 1
TABLES = """
CREATE TABLE reports (
  sha256 TEXT PRIMARY KEY, created_at TEXT NOT NULL, added_at TEXT NOT NULL, origin TEXT NOT NULL,
  profile_id TEXT, box TEXT, machine TEXT, tasks_sha256 TEXT, json TEXT NOT NULL, items TEXT NOT NULL
);
CREATE TABLE runs (
  report_sha256 TEXT NOT NULL REFERENCES reports(sha256), result_id TEXT NOT NULL,
  created_at TEXT NOT NULL, profile_id TEXT, box TEXT, machine TEXT,
  kind TEXT, engine TEXT, engine_build TEXT, artifact_sha256 TEXT, model_name TEXT, format TEXT, variant TEXT,
  bits_per_weight REAL, size_bytes INTEGER, speed_workload TEXT,
  decode_tok_per_s REAL, prefill_tok_per_s REAL, ttft_s REAL, right_share REAL, right_n INTEGER, kld_mean REAL,
  peak_rss_bytes INTEGER, error TEXT,
  PRIMARY KEY (report_sha256, result_id)
);
CREATE TABLE baselines (
  number INTEGER PRIMARY KEY, name TEXT NOT NULL, report_sha256 TEXT NOT NULL, result_id TEXT NOT NULL,
  set_at TEXT NOT NULL, FOREIGN KEY (report_sha256, result_id) REFERENCES runs(report_sha256, result_id)
);
CREATE INDEX runs_by_artifact ON runs(artifact_sha256);
"""
ITEM_KEYS = ("item_id", "model_id", "row_hash", "correct", "score")  # what comparing needs; no texts
FILTERS = {"model": "result_id", "artifact": "artifact_sha256", "box": "box", "engine": "engine"}


def path() -> Path:
    """Where the index is."""
    return state_dir("bench.db")


@contextmanager
def opened(file: Path | None = None) -> Iterator[sqlite3.Connection]:
    """The index, made where it is not there yet. Raises EnvironmentFault where the file is broken or out of reach."""
    file = file or path()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(file, timeout=30)
    except (OSError, sqlite3.Error) as error:
        raise EnvironmentFault(f"{file} cannot be opened: {error}.", f"ls -ld {file.parent}") from None
    connection.row_factory = sqlite3.Row
    try:
        # WAL: readers go on while a bench adds its run. Without recursive triggers, REPLACE would slip past the ban.
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA recursive_triggers = ON")
        connection.execute("PRAGMA foreign_keys = ON")
        _make(connection, file)
        yield connection
    except sqlite3.OperationalError as error:  # locked for half a minute, disk full, read-only
        raise EnvironmentFault(f"{file}: {error}.", f"ls -l {file.parent}; df -h {file.parent}") from None
    except sqlite3.DatabaseError as error:
        hint = f"mv {file} {file}.broken, then edgeft bench merge over the folders of reports"
        raise EnvironmentFault(f"{file}: {error}.", hint) from None
    finally:
        connection.close()


def _make(connection: sqlite3.Connection, file: Path) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > VERSION:
        raise EnvironmentFault(f"{file} is of a newer edgeft (version {version}).", "pip install -U edgeft")
    if version == VERSION:
        return
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        if connection.execute("PRAGMA user_version").fetchone()[0] == VERSION:
            return  # another process made it meanwhile
        for statement in filter(str.strip, TABLES.split(";")):
            connection.execute(statement)
        for table in ("reports", "runs", "baselines"):
            for verb in ("UPDATE", "DELETE"):
                connection.execute(
                    f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                    f"BEGIN SELECT RAISE(ABORT, 'the index only grows'); END"
                )
        connection.execute(f"PRAGMA user_version = {VERSION}")


def add(folder: Path, file: Path | None = None) -> tuple[str, bool]:
    """Add the report in a folder. Returns (sha256 of its report.json, was it new).

    Raises UsageError where the report is broken; then nothing was added.
    """
    text, report, digest = read_report(folder)
    items = [{k: line[k] for k in ITEM_KEYS if k in line} for line in read_items(folder)]
    with opened(file) as connection, connection:
        row = (
            digest, report.created_at, _now(), folder.resolve().name, report.profile.get("id"), _box(report),
            _machine(report), report.workload.get("tasks_sha256"), text, json.dumps(items),
        )  # fmt: skip
        try:
            new = _insert(connection, "reports", row, " ON CONFLICT DO NOTHING")
            for result in report.results if new else ():
                _insert(connection, "runs", (digest, *_run_row(report, result)))
        except (ValueError, OverflowError) as error:  # a lone surrogate, a number beyond 64 bits
            raise UsageError(
                f"{folder / 'report.json'} cannot be kept: {error}.", f"ls -l {folder}"
            ) from None
    return digest, bool(new)


def _insert(connection: sqlite3.Connection, table: str, row: tuple[Any, ...], more: str = "") -> int:
    return connection.execute(f"INSERT INTO {table} VALUES ({','.join('?' * len(row))}){more}", row).rowcount


def after_run(out: Path) -> str:
    """Add a finished bench to the index and say so in a line; a fault is told and never fails the bench."""
    try:
        digest, new = add(out)
    except (EdgeftError, OSError, sqlite3.Error) as error:
        return f"not added to the index of runs: {error}"
    return f"run {digest[:12]} {'is in' if new else 'was in'} the index: edgeft bench runs"


def merge(folders: list[Path], file: Path | None = None) -> dict[str, Any]:
    """Add every report.json under the folders. Broken ones are skipped and listed with the reason, the rest is kept.

    Returns {added: [sha256], known: n, skipped: [{path, why}]}.
    """
    added: list[str] = []
    skipped: list[dict[str, str]] = []
    known = 0
    for found in reports_under(folders):
        try:
            digest, new = add(found, file)
        except (UsageError, OSError) as error:
            skipped.append({"path": str(found / "report.json"), "why": str(error)})
            continue
        known += not new
        added += [digest] * new
    return {"added": added, "known": known, "skipped": skipped}


def reports_under(folders: list[Path]) -> list[Path]:
    """Folders that hold a report.json, sorted; symbolic links are not followed."""
    found = set()
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"there is no folder {folder}.", f"ls {folder.parent}")
        found |= {Path(at) for at, _, files in os.walk(folder) if "report.json" in files}
    return sorted(found)


def runs(
    file: Path | None = None, *, limit: int | None = None, since: str | None = None, **filters: str | None
) -> list[dict[str, Any]]:
    """Runs, newest first. `filters` are model, artifact, box and engine: each a part of the value (artifact: its start)."""
    where, values = [], []
    for name, word in filters.items():
        if name not in FILTERS:
            raise unknown("the filter", name, FILTERS, "edgeft bench runs --help")
        if word:
            column = FILTERS[name]
            test = (
                f"substr({column}, 1, length(?)) = ?"
                if name == "artifact"
                else f"instr(lower({column}), lower(?))"
            )
            where.append(test)
            values += [word, word] if name == "artifact" else [word]
    if since:
        where.append("created_at >= ?")
        values.append(since)
    query = "SELECT * FROM runs" + (" WHERE " + " AND ".join(where) if where else "")
    query += " ORDER BY created_at DESC, report_sha256, rowid"
    with opened(file) as connection:
        return [dict(row) for row in connection.execute(query + " LIMIT ?", (*values, limit or -1))]


def set_baseline(name: str, digest: str, result_id: str, file: Path | None = None) -> None:
    """Name a run of the index; an earlier one of that name stays on record and the newest counts."""
    with opened(file) as connection, connection:
        known = [
            row["result_id"]
            for row in connection.execute("SELECT result_id FROM runs WHERE report_sha256 = ?", (digest,))
        ]
        if result_id not in known:
            raise unknown(f"report {digest[:12]}: the result", result_id, known, "edgeft bench runs")
        connection.execute(
            "INSERT INTO baselines (name, report_sha256, result_id, set_at) VALUES (?, ?, ?, ?)",
            (name, digest, result_id, _now()),
        )


def baselines(file: Path | None = None) -> dict[str, dict[str, Any]]:
    """Name -> {report_sha256, result_id, set_at}, the newest of each name."""
    with opened(file) as connection:
        rows = connection.execute("SELECT * FROM baselines ORDER BY number").fetchall()
    return {row["name"]: {k: row[k] for k in ("report_sha256", "result_id", "set_at")} for row in rows}


def stored(digest: str, file: Path | None = None) -> tuple[BenchReport, list[dict[str, Any]]]:
    """A report of the index and its items (ids, hashes, scores; no texts)."""
    with opened(file) as connection:
        row = connection.execute("SELECT json, items FROM reports WHERE sha256 = ?", (digest,)).fetchone()
    if row is None:
        raise UsageError(f"no report {digest[:12]} is in the index.", "edgeft bench runs")
    return checked(json.loads(row["json"]), digest[:12]), json.loads(row["items"])


def repeats(
    side: Side, leave_out: tuple[str | None, ...] = (), file: Path | None = None
) -> dict[str, Repeats]:
    """How far repeated runs on a box like this lie apart: figure -> spread of ln(median), for `compare`.

    Groups are runs of one artefact by one engine build with one speed workload; their deviations are pooled over all
    artefacts of the box, weighted by degrees of freedom. `leave_out`: reports that are being compared themselves.
    """
    report, result = side.report, side.result
    found: dict[str, Repeats] = {}
    with opened(file) as connection:
        for figure, column in (
            ("decode tok/s", "decode_tok_per_s"),
            ("prefill tok/s", "prefill_tok_per_s"),
            ("TTFT s", "ttft_s"),
        ):
            rows = connection.execute(
                f"SELECT report_sha256, artifact_sha256, {column} AS median FROM runs WHERE box = ? AND profile_id = ? AND engine_build = ? "
                f"AND speed_workload = ? AND artifact_sha256 IS NOT NULL AND {column} > 0",
                (
                    _box(report),
                    report.profile.get("id"),
                    result.get("engine_build"),
                    _speed_workload(report, result),
                ),
            ).fetchall()
            groups: dict[str, list[float]] = {}
            for row in rows:
                if row["report_sha256"] in leave_out:
                    continue
                groups.setdefault(row["artifact_sha256"], []).append(math.log(row["median"]))
            squares, freedom = 0.0, 0
            for logs in groups.values():
                mean = sum(logs) / len(logs)
                squares += sum((x - mean) ** 2 for x in logs)
                freedom += len(logs) - 1
            if freedom:
                found[figure] = Repeats(math.sqrt(squares / freedom), freedom)
    return found


def _run_row(report: BenchReport, r: dict[str, Any]) -> tuple[Any, ...]:
    speed, accuracy = r.get("speed") or {}, r.get("accuracy") or {}
    middle = {
        key: (speed.get(key) or {}).get("p50") for key in ("decode_tok_per_s", "prefill_tok_per_s", "ttft_s")
    }
    kld = ((r.get("fidelity") or {}).get("all") or {}).get("kld_mean")
    return (
        r["id"], report.created_at, report.profile.get("id"), _box(report), _machine(report),
        r.get("kind"), r.get("engine"), r.get("engine_build"), r.get("artifact_sha256"), r.get("model_name"),
        r.get("format"), r.get("variant"), r.get("bits_per_weight"), r.get("size_bytes"), _speed_workload(report, r),
        middle["decode_tok_per_s"], middle["prefill_tok_per_s"], middle["ttft_s"],
        accuracy.get("share"), accuracy.get("n"), kld, (r.get("memory") or {}).get("peak_rss_bytes"), r.get("error"),
    )  # fmt: skip


def _speed_workload(report: BenchReport, result: dict[str, Any]) -> str:
    """What speed was measured with, so that like is held against like: threads, what was asked, and of how many processes."""
    speed = result.get("speed") or {}
    asked = [p.get("asked") for p in speed.get("points") or []] or [
        report.workload.get(k) for k in ("prompt_chars", "output_tokens")
    ]
    restarts = report.workload.get("restarts") or 1
    more = [restarts] if restarts > 1 else []
    return json.dumps([report.workload.get("threads"), report.workload.get("context"), asked, *more])


def _box(report: BenchReport) -> str:
    from edgeft.bench.report import box_name

    return box_name(report)


def _machine(report: BenchReport) -> str | None:
    machine = report.environment.get("machine")
    return None if machine is None else str(machine)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
