"""API keys: made by the command line, known to a running store within a second, and to nobody else."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from edgeft.cli import run
from edgeft.errors import EnvironmentFault, UsageError
from edgeft.serve import keys
from edgeft.serve.keys import Key, KeyStore


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "state" / "keys.db"


def soon(condition, seconds: float = 1.0) -> None:
    """It holds within `seconds`, by looking as requests do."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within a second"
        time.sleep(0.01)


def test_a_key_is_shown_once_and_kept_as_its_hash(db):
    row, secret = keys.create(db, "bot", "support")
    assert secret.startswith("ek-") and len(secret) >= 3 + 43
    store = KeyStore(db)
    assert store.tenant_of(secret) == Key(row.id, "bot", "support") and len(store) == 1
    written = b"".join(p.read_bytes() for p in db.parent.iterdir())
    assert secret.encode() not in written and secret[3:].encode() not in written
    assert hashlib.sha256(secret.encode()).digest() in written
    assert all(p.stat().st_mode & 0o777 == 0o600 for p in db.parent.iterdir()), "journal and index too"
    store.close()


@pytest.mark.parametrize(
    "wrong", ["", "ek-", "ek", "x" * 100_000, "ek-\udce9", "ek-é", "EK-{}", "{} ", "{}x", "\0"]
)
def test_nothing_else_is_a_key(db, wrong):
    _, secret = keys.create(db, "bot")
    assert KeyStore(db).tenant_of(wrong.format(secret[3:] if wrong.startswith("EK") else secret)) is None


def test_two_keys_never_share_a_tenant_by_accident_and_can_by_wish(db):
    made = [keys.create(db, name, tenant) for name, tenant in (("a", None), ("b", None), ("c", "a"))]
    store = KeyStore(db)
    assert [store.tenant_of(secret).tenant for _, secret in made] == ["a", "b", "a"]
    assert len({secret for _, secret in made}) == len({row.id for row, _ in made}) == 3


def test_made_and_revoked_keys_are_known_within_a_second(db):
    keys.create(db, "first")
    store = KeyStore(db)
    row, secret = keys.create(db, "second")
    soon(lambda: store.tenant_of(secret))
    assert keys.revoke(db, row.id).state(time.time()) == "revoked"
    soon(lambda: store.tenant_of(secret) is None)
    again = keys.revoke(db, row.id)
    assert again.revoked_s == next(r for r in keys.listed(db) if r.id == row.id).revoked_s
    assert len(store) == 1


def test_an_expired_key_is_none_at_once(db, monkeypatch):
    row, secret = keys.create(db, "guest", days=2)
    store = KeyStore(db)
    assert store.tenant_of(secret)
    now = time.time()
    monkeypatch.setattr(keys.time, "time", lambda: now + 2 * 86400 + 1)
    assert store.tenant_of(secret) is None
    assert keys.told(row)["state"] == "expired"


def test_the_file_is_not_read_again_while_it_is_the_same(db):
    _, secret = keys.create(db, "bot")
    store = KeyStore(db)
    kept = store._keys
    time.sleep(keys.LOOK_EVERY_S + 0.05)
    assert store.tenant_of(secret) and store._keys is kept
    keys.create(db, "other")
    time.sleep(keys.LOOK_EVERY_S + 0.05)
    assert store.tenant_of(secret) and store._keys is not kept


def test_a_file_that_breaks_later_leaves_the_known_keys_and_says_so(db, tmp_path):
    _, secret = keys.create(db, "bot")
    store = KeyStore(db)
    whole = db.read_bytes()
    broken = tmp_path / "broken"
    broken.write_bytes(b"no database" * 1000)
    broken.replace(db)
    for left in db.parent.glob("keys.db-*"):
        left.unlink()
    soon(lambda: store.tenant_of(secret) and not store.healthy)
    assert "can't be read" in store.trouble and secret not in store.trouble
    db.unlink()
    store.look()
    assert store.tenant_of(secret) and not store.healthy
    mended = tmp_path / "mended"
    mended.write_bytes(whole)
    mended.replace(db)
    soon(lambda: store.tenant_of(secret) and store.healthy)


def test_a_file_that_is_broken_at_the_start_is_no_401_for_ever(db):
    with pytest.raises(EnvironmentFault, match="does not exist") as absent:
        KeyStore(db)
    assert absent.value.hint == "edgeft keys create NAME"
    db.parent.mkdir()
    for content in (b"", b"no database" * 1000):
        db.write_bytes(content)
        with pytest.raises(EnvironmentFault, match=r"keys\.db"):
            KeyStore(db)
    db.write_bytes(b"no database" * 1000)
    with pytest.raises(EnvironmentFault, match="not a database"):
        keys.create(db, "bot")


def test_a_writer_in_the_middle_of_its_work_stops_nobody(db):
    _, secret = keys.create(db, "bot")
    store = KeyStore(db)
    writer = sqlite3.connect(db, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("UPDATE keys SET revoked_s = 1")
    began = time.monotonic()
    store.look()
    assert store.healthy and store.tenant_of(secret) and time.monotonic() - began < 1
    writer.execute("COMMIT")
    writer.close()
    soon(lambda: store.tenant_of(secret) is None)


def test_several_processes_make_keys_in_a_file_that_is_not_there_yet(db):
    code = "import sys; from pathlib import Path; from edgeft.serve import keys\n"
    code += "for i in range(5): print(keys.create(Path(sys.argv[1]), sys.argv[2] + str(i))[1])"
    working = [
        subprocess.Popen([sys.executable, "-c", code, db, name], stdout=subprocess.PIPE, text=True)
        for name in ("a", "b", "c")
    ]
    secrets = [line for process in working for line in process.communicate(timeout=60)[0].split()]
    assert [process.returncode for process in working] == [0, 0, 0]
    one, two = KeyStore(db), KeyStore(db)
    assert len(secrets) == 15 and all(one.tenant_of(s) == two.tenant_of(s) is not None for s in secrets)


def test_threads_ask_while_keys_come_and_go(db):
    _, secret = keys.create(db, "bot")
    store, wrong, ended = KeyStore(db), [], threading.Event()

    def ask() -> None:
        while not ended.is_set():
            store.look()
            if store.tenant_of(secret) is None or not store.healthy:
                wrong.append(store.trouble)

    asking = [threading.Thread(target=ask) for _ in range(4)]
    for thread in asking:
        thread.start()
    for i in range(10):
        keys.revoke(db, keys.create(db, f"n{i}")[0].id)
    ended.set()
    for thread in asking:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("name", ["", "a b", "é", "a\n", "-a", "x" * 65, "a\x1b[31m"])
def test_names_that_would_not_sit_well_in_logs_are_refused(db, name):
    with pytest.raises(UsageError, match="can't be a"):
        keys.create(db, name)
    with pytest.raises(UsageError, match="can't be a tenant"):
        keys.create(db, "ok", name)
    assert not db.exists()


def test_command_line(db, capsys, monkeypatch, tmp_path):
    assert run(["keys", "create", "bot", "--tenant", "support", "--expires", "30", "--db", str(db)]) == 0
    out = capsys.readouterr()
    secret = out.out.strip()
    assert secret.startswith("ek-") and " " not in secret and "only time" in out.err
    assert KeyStore(db).tenant_of(secret).tenant == "support"
    assert run(["keys", "--json", "create", "two", "--db", str(db)]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["key"].startswith("ek-") and made["tenant"] == "two" and made["expires"] is None
    assert run(["keys", "revoke", made["id"], "--db", str(db), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "revoked"
    assert run(["keys", "list", "--db", str(db), "--json"]) == 0
    text = capsys.readouterr().out
    assert [(k["name"], k["state"]) for k in json.loads(text)] == [("bot", "active"), ("two", "revoked")]
    assert secret not in text and made["key"] not in text
    assert run(["keys", "list", "--db", str(db)]) == 0
    assert "support" in capsys.readouterr().out
    assert run(["keys", "revoke", "knope", "--db", str(db)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 2 and "knope" in error[0] and error[1] == "  edgeft keys list"
    monkeypatch.setenv("EDGEFT_HOME", str(tmp_path / "home"))
    assert run(["keys", "create", "mine"]) == 0 and (tmp_path / "home" / "keys.db").exists()


def test_a_place_that_cannot_be_written_is_a_two_line_error(capsys):
    assert run(["keys", "create", "bot", "--db", "/proc/none/keys.db"]) == 3
    error = capsys.readouterr()
    lines = error.err.strip().splitlines()
    assert (
        error.out == "" and len(lines) == 2 and "/proc/none" in lines[0] and "fault of edgeft" not in lines[1]
    )
