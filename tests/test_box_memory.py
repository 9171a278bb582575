"""What box.sh finds of a box's memory: what programs may still take, what our own service holds, what a control group leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from edgeft.deploy.preflight import faults
from edgeft.deploy.remote import BOX, probed

HOLD = "import sys, time; held = bytearray(int(sys.argv[1])); print(len(held), flush=True); time.sleep(900)"
GROUPS = Path("/sys/fs/cgroup/memory")
MIB = 1 << 20


@contextmanager
def holding(size: int, program: str = sys.executable, first: str = ""):
    """A process that holds `size` bytes; `first` is what its shell does before."""
    words = ["sh", "-c", f'{first}exec "$@"', "sh", program, "-c", HOLD, str(size)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout and process.stdout.readline().strip() == str(size).encode()
            yield process
        finally:
            process.kill()


def probe(prefix: Path, first: str = "") -> dict:
    """What box.sh says here."""
    words = ["sh", "-c", f'{first}exec sh -s -- probe "$1"', "sh", str(prefix)]
    return probed(subprocess.run(words, input=BOX, capture_output=True, text=True, check=True).stdout)


def test_what_the_running_service_holds_is_counted_and_nobody_elses(tmp_path):
    program = tmp_path / "box" / "venvs" / "abc" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.symlink_to(sys.executable)
    with holding(64 * MIB):
        before = probe(tmp_path / "box")
        with holding(64 * MIB, str(program)):
            found = probe(tmp_path / "box")
    assert before["ours_bytes"] == 0 and 64 * MIB <= found["ours_bytes"] < 128 * MIB
    assert 0 < found["unused_bytes"] < found["memory_bytes"] <= psutil.virtual_memory().total * 1.001


@pytest.mark.skipif(
    os.geteuid() != 0 or not GROUPS.is_dir(), reason="needs root and memory control groups (v1)"
)
def test_a_control_group_leaves_its_limit_less_what_is_used_in_it(tmp_path):
    group = GROUPS / f"edgeft-memory-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(256 * MIB))
    except OSError:
        pytest.skip("no memory control group can be made here")
    enter = f"echo $$ > {group}/cgroup.procs; "
    try:
        alone = probe(tmp_path, enter)["unused_bytes"]
        with holding(128 * MIB, first=enter) as process:
            beside = probe(tmp_path, enter)["unused_bytes"]
        process.wait()
    finally:
        group.rmdir()
    assert 200 * MIB < alone <= 256 * MIB and 80 * MIB < beside < 140 * MIB


def box(**changed) -> dict:
    """A box that a bundle of 1 GB just fits."""
    return {
        "machine": "aarch64", "memory_bytes": 4e9, "unused_bytes": 1e9, "ours_bytes": 0, "disk_free_bytes": 1e9, "stored_bytes": 0,
        "python": "3.11", "cpu_flags": "", "libraries": "libstdc++.so.6 ", **changed,
    }  # fmt: skip


def test_what_other_programs_hold_is_not_there_for_a_bundle():
    needs = {"machine": "aarch64", "memory_bytes": 1e9, "disk_bytes": 0, "python": "3.11", "cpu_flags": []}
    manifest = {"needs": needs, "config": {"context": 2048}}
    assert faults(manifest, box()) == []
    (told,) = faults(manifest, box(unused_bytes=0.6e9))
    assert (
        told
        == "other programs leave 0.60 of its 4.00 GB of memory, and 1.00 GB are needed at a context of 2048"
    )
    assert faults(manifest, box(unused_bytes=0.6e9, ours_bytes=0.4e9)) == [], "the running service gives way"
    (told,) = faults(manifest, box(memory_bytes=0.5e9, unused_bytes=0.4e9))
    assert told.startswith("it has 0.50 GB of memory, and 1.00 GB are needed")


def test_libraries_that_the_wheels_take_from_the_system(tmp_path):
    needs = {"machine": "aarch64", "memory_bytes": 1e9, "disk_bytes": 0, "python": "3.11", "cpu_flags": [],
             "libraries": ["libgomp.so.1", "libstdc++.so.6"]}  # fmt: skip
    manifest = {"needs": needs, "config": {"context": 2048}}
    (told,) = faults(manifest, box())
    assert told.startswith("it lacks libgomp.so.1 (apt-get")
    assert faults(manifest, box(libraries="libgomp.so.1 libstdc++.so.6 ")) == []
    assert {"libstdc++.so.6"} <= set(probe(tmp_path)["libraries"].split()), "torch would not run here either"
