"""Deploying for real: ssh to sshd in three network namespaces, with links that break, disks that fill and too little memory."""

from __future__ import annotations

import json
import os
import random
import subprocess
import threading
import time
from pathlib import Path

import pytest

from edgeft.cli import run
from edgeft.console import output
from edgeft.deploy import deploy
from edgeft.deploy.archive import Bundle
from edgeft.deploy.host import judged
from edgeft.deploy.remote import BOX, Box
from edgeft.errors import GateError, UsageError
from tests.deploy_stage import boxes, lacks, small_bundle

why_not = lacks()
needs_boxes = pytest.mark.skipif(why_not is not None, reason=why_not or "")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    with boxes(tmp_path_factory.mktemp("fleet")) as made:
        yield made


def to(fleet, bundle, *names, prefix=None, **options):
    """Deploy to boxes; each has its own folder, so one call a box unless a prefix is given."""
    found = []
    for name in names:
        found += deploy(
            bundle.path,
            [name],
            prefix=prefix or fleet.prefix(name),
            config=fleet.config,
            **{"check_s": 1, **options},
        )
    return found if len(found) > 1 else found[0]


@needs_boxes
def test_from_nothing_to_an_update_and_back(fleet, tmp_path):
    first = small_bundle(tmp_path / "one.tar", {"version": 1})
    done = to(fleet, first, "b1")
    assert (done.state, done.checked["verdict"]) == ("done", "PASS"), done.text
    assert fleet.answer("b1") == {"version": 1}
    again = to(fleet, first, "b1")
    assert again.state == "unchanged" and again.sent_bytes < 60_000, again
    second = small_bundle(tmp_path / "two.tar", {"version": 2})
    update = to(fleet, second, "b1", check_s=0)
    assert update.state == "done" and update.sent_bytes < 100_000 and fleet.answer("b1") == {"version": 2}
    with Box("b1", fleet.prefix("b1"), fleet.config) as box:
        state = box.probe("3")
        assert (state["current"], state["previous"]) == (second.id, first.id)
        assert second.manifest["files"]["artifacts/tiny/model.bin"]["sha256"] in state["stored"]
    assert (
        run(
            [
                "deploy",
                "rollback",
                "b1",
                "--prefix",
                fleet.prefix("b1"),
                "--ssh-config",
                str(fleet.config),
                "--quiet",
            ]
        )
        == 0
    )
    assert fleet.answer("b1") == {"version": 1}
    third = small_bundle(tmp_path / "three.tar", {"version": 3})
    to(fleet, third, "b1")
    kept = sorted(p.name for p in Path(fleet.prefix("b1"), "releases").iterdir())
    assert kept == sorted([first.id, third.id])  # the second is tidied away


@needs_boxes
@pytest.mark.parametrize(
    ("policy", "seen"),
    [({"broken": True}, "did not become ready"), ({"ttft_s": 9.0}, "slower than a test's box promises")],
)
def test_what_fails_goes_back_by_itself(fleet, tmp_path, policy, seen):
    good = small_bundle(tmp_path / "good.tar", {"good": True})
    assert to(fleet, good, "b2").good
    bad = to(fleet, small_bundle(tmp_path / "bad.tar", policy), "b2")
    assert bad.state == "rolled back" and seen in bad.text and f"{good.id} runs again" in bad.text
    assert fleet.answer("b2") == {"good": True}


@needs_boxes
def test_a_first_deployment_that_fails_leaves_nothing_running(fleet, tmp_path):
    prefix = str(tmp_path / "fresh")
    for name in fleet.names():
        fleet.end_service(name)
    bad = to(
        fleet,
        small_bundle(tmp_path / "bad.tar", {"broken": True}),
        "b3" if not fleet.small_memory else "b1",
        prefix=prefix,
    )
    assert bad.state == "failed" and "nothing ran before" in bad.text
    assert not Path(prefix, "current").exists()


@needs_boxes
def test_another_service_on_the_port_is_not_taken_for_ours(fleet, tmp_path):
    for name in fleet.names():
        fleet.end_service(name)
    first = str(tmp_path / "first")
    assert to(fleet, small_bundle(tmp_path / "a.tar", {"first": True}), "b2", prefix=first).state == "done"
    second = to(fleet, small_bundle(tmp_path / "b.tar", {}), "b2", prefix=str(tmp_path / "second"))
    assert second.state == "failed" and "another process answers at port 8080" in second.text, second.text
    assert fleet.answer("b2") == {"first": True}
    fleet.on("b2", f"kill $(cat {first}/run/serve.pid); sleep 0.3")


@needs_boxes
def test_too_little_memory_is_refused_before_anything_is_sent(fleet, tmp_path):
    if not fleet.small_memory:
        pytest.skip("no memory control group can be made here")
    refused = to(fleet, small_bundle(tmp_path / "big.tar", {}), "b3")
    assert refused.state == "refused" and "it has 0.07 GB of memory, and 0.10 GB are needed" in refused.text
    assert refused.sent_bytes < 4 * len(BOX) and not any(Path(fleet.prefix("b3"), "store").iterdir())


@needs_boxes
def test_another_machine_and_another_python_are_refused(fleet, tmp_path):
    refused = to(
        fleet,
        small_bundle(tmp_path / "a.tar", {}, machine="riscv64", python="3.2", cpu_flags=["warp"]),
        "b1",
        prefix=str(tmp_path / "p"),
    )
    assert refused.state == "refused"
    assert all(
        word in refused.text for word in ("the bundle is for riscv64", "the wheels are for 3.2", "lacks warp")
    )


@needs_boxes
def test_a_full_disk_ends_in_words_and_keeps_what_runs(fleet, tmp_path, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    fleet.end_service("b2")
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", small], capture_output=True, check=False
    ).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        before = small_bundle(tmp_path / "before.tar", {"before": True})
        assert to(fleet, before, "b2", prefix=str(small)).state == "done"
        blob = random.Random(1).randbytes(60_000_000)
        told = to(fleet, small_bundle(tmp_path / "told.tar", {}, blob), "b2", prefix=str(small))
        assert told.state == "refused" and "its disk has" in told.text
        monkeypatch.setattr(
            "edgeft.deploy.preflight.faults", lambda *_: []
        )  # as if it filled up after the look
        full = to(fleet, Bundle(tmp_path / "told.tar"), "b2", prefix=str(small))
        assert full.state == "failed" and "No space left on device" in full.text
        assert fleet.answer("b2") == {"before": True}
        assert (small / "current").readlink() == Path(f"releases/{before.id}")
        subprocess.run(["sh", str(small / "current" / "service.sh"), str(small), "stop"], check=True)
    finally:
        fleet.on("b2", f"kill $(cat {small}/run/serve.pid) 2>/dev/null; sleep 0.3; true")
        subprocess.run(["umount", "-l", small], check=False)


@needs_boxes
@pytest.mark.slow
def test_a_connection_that_breaks_midway_is_taken_up_again(fleet, tmp_path):
    prefix = tmp_path / "cut"
    size = 24_000_000
    bundle = small_bundle(tmp_path / "cut.tar", {"cut": 1}, random.Random(2).randbytes(size))
    fleet.slow_down("b1", "40mbit")  # five seconds of it
    digest = bundle.manifest["files"]["artifacts/tiny/model.bin"]["sha256"]
    cut_at = []

    def cut() -> None:
        part = prefix / "store" / f".{digest}.part"
        while not (part.exists() and part.stat().st_size > 6_000_000):
            time.sleep(0.05)
        cut_at.append(part.stat().st_size)
        fleet.link("b1", "down")
        time.sleep(14)
        fleet.link("b1", "up")

    thread = threading.Thread(target=cut, daemon=True)
    thread.start()
    done = to(fleet, bundle, "b1", prefix=str(prefix))
    thread.join(30)
    fleet.full_speed("b1")
    fleet.on("b1", f"sh {prefix}/current/service.sh {prefix} stop")
    assert cut_at and done.state == "done", done.text
    assert done.sent_bytes < size + 12_000_000  # pip, scripts, and what was on the way; not the whole again


@needs_boxes
def test_what_an_interrupted_deployment_sent_is_not_sent_again(fleet, tmp_path):
    prefix = tmp_path / "half"
    blob = random.Random(3).randbytes(8_000_000)
    bundle = small_bundle(tmp_path / "half.tar", {"half": 1}, blob)
    digest = bundle.manifest["files"]["artifacts/tiny/model.bin"]["sha256"]
    (prefix / "store").mkdir(parents=True)
    (prefix / "store" / f".{digest}.part").write_bytes(blob[:7_000_000])
    done = to(fleet, bundle, "b1", prefix=str(prefix))
    fleet.on("b1", f"sh {prefix}/current/service.sh {prefix} stop")
    assert done.state == "done" and done.sent_bytes < 4_500_000
    (prefix / "other").mkdir()
    damaged = Path(tmp_path / "other")
    (damaged / "store").mkdir(parents=True)
    (damaged / "store" / f".{digest}.part").write_bytes(
        b"x" * 7_000_000
    )  # another content: found out, and sent whole
    assert to(fleet, bundle, "b1", prefix=str(damaged)).state == "done"
    fleet.on("b1", f"sh {damaged}/current/service.sh {damaged} stop")


@needs_boxes
def test_two_deployments_to_one_box_are_not_mixed(fleet, tmp_path):
    from edgeft.deploy.host import alone
    from edgeft.errors import EnvironmentFault

    prefix = str(tmp_path / "shared")
    bundle = small_bundle(tmp_path / "one.tar", {"alone": 1})
    with Box("b1", prefix, fleet.config) as mine, alone(mine):
        second = to(fleet, bundle, "b1", prefix=prefix)
        assert (
            second.state == "failed"
            and "is under way" in second.text
            and not Path(prefix, "releases").exists()
        )
    with Box("b1", prefix, fleet.config) as box:
        box.ask("lock", "dead", "somebody")
        os.utime(Path(prefix, ".deploying"), (1, 1))
        with alone(box):
            assert Path(prefix, ".deploying", "token").read_text().strip() != "dead"
        assert not Path(prefix, ".deploying").exists()
        with pytest.raises(EnvironmentFault):
            box.ask("lock", "a", "x")
            box.ask("lock", "b", "y")


@needs_boxes
def test_hosts_stop_being_begun_when_too_many_fail(fleet, tmp_path, capfd):
    bad = small_bundle(tmp_path / "bad.tar", {}, machine="riscv64")
    words = [
        "deploy",
        str(bad.path),
        "b1",
        "b2",
        "b3",
        "--prefix",
        str(tmp_path / "x"),
        "--ssh-config",
        str(fleet.config),
    ]
    assert run([*words, "--at-once", "1", "--max-failures", "1", "--json"]) == 1
    states = [o["state"] for o in json.loads(capfd.readouterr().out)]
    output.json = False
    assert states == ["refused", "refused", "not tried"]


@needs_boxes
def test_status_and_a_host_that_is_not_there(fleet, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("edgeft.deploy.remote.PAUSE_S", 0.01)
    where = ["--prefix", str(tmp_path / "none"), "--ssh-config", str(fleet.config)]
    assert run(["deploy", "status", "b1", "b2", *where, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    output.json = False
    assert [(s["state"], s["current"]) for s in found] == [("none", None), ("none", None)]
    assert run(["deploy", "rollback", "b1", *where, "--quiet"]) == 1
    assert run(["deploy", "status", "nobody.invalid", *where]) == 3
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 4 and "keeps no version before" in err and "nobody.invalid" in err


def test_a_damaged_bundle_and_a_wrong_host_are_refused(tmp_path):
    bundle = small_bundle(tmp_path / "a.tar", {}, b"w" * 1000)
    begin, _ = bundle.places["artifacts/tiny/model.bin"]
    content = bytearray(bundle.path.read_bytes())
    content[begin + 5] ^= 1
    (tmp_path / "b.tar").write_bytes(content)
    with pytest.raises(UsageError, match=r"model\.bin is damaged"):
        deploy(tmp_path / "b.tar", ["nowhere"])
    (tmp_path / "c.tar").write_bytes(b"no tar")
    for path in (tmp_path / "c.tar", tmp_path / "d.tar"):
        with pytest.raises(UsageError):
            Bundle(path)
    for host in ("-oProxyCommand=x", "a b", ""):
        with pytest.raises(UsageError, match="is no host"):
            Box(host, "~/edgeft")
    with pytest.raises(UsageError, match="a shell reads"):
        Box("h", "/opt/$(x)")
    with pytest.raises(GateError, match="bears no signature"):
        deploy(bundle.path, ["nowhere"], signers=tmp_path / "k.pub")


def test_the_verdict_is_by_the_interval():
    def seen(low, high):
        return {"ttft_s": {"p50": (low + high) / 2, "p50_ci95": [low, high]}}

    assert judged(seen(0.1, 0.9), {"ttft_s": 1.0})["verdict"] == "PASS"
    assert judged(seen(0.9, 1.1), {"ttft_s": 1.0})["verdict"] == "INCONCLUSIVE"
    assert judged(seen(1.1, 1.3), {"ttft_s": 1.0})["verdict"] == "FAIL"
    rate = {"decode_tok_per_s": {"p50": 3, "p50_ci95": [2, 4]}}
    assert (
        judged(rate, {"decode_tok_per_s": 5.0})["verdict"] == "FAIL"
        and judged(rate, {})["verdict"] == "nothing promised"
    )
