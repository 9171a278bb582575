"""Boxes for the tests of deploying: real sshd, each in a network namespace of its own; and small bundles for them.

The bundles' scripts, virtual environment, pip and checksums are the real ones. What they install is a stand-in for edgeft that
answers /health and behaves as its policy file says, so that no test waits for a model; a slow test serves the real one.
"""

from __future__ import annotations

import base64
import ensurepip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edgeft.deploy import archive, templates
from edgeft.deploy.packages import MACHINES

SSHD = "/usr/sbin/sshd"
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
SERVER = """
import http.server, json, os, sys, time
behave = json.load(open("current/policy/policy.json"))
port = int(sys.argv[sys.argv.index("--port") + 1])
if behave.get("broken"):
    sys.exit("broken on purpose")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(behave).encode())
    def log_message(self, *words):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
CHECK = """
import json, sys, urllib.request
behave = json.load(urllib.request.urlopen(sys.argv[1] + "/health", timeout=5))
s = behave.get("ttft_s", 0.1)
print(json.dumps({"requests": 3, "ttft_s": {"p50": s, "p95": s, "p50_ci95": [s, s], "n": 3}}))
"""


def wheel() -> tuple[str, bytes]:
    """A stand-in wheel called edgeft."""
    files = {
        "edgeft/__init__.py": b"", "edgeft/__main__.py": SERVER.encode(), "edgeft/deploy/__init__.py": b"",
        "edgeft/deploy/check.py": CHECK.encode(), "edgeft-0.0.1.dist-info/METADATA": b"Metadata-Version: 2.1\nName: edgeft\nVersion: 0.0.1\n",
        "edgeft-0.0.1.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }  # fmt: skip
    lines = [
        f"{n},sha256={base64.urlsafe_b64encode(hashlib.sha256(c).digest()).rstrip(b'=').decode()},{len(c)}"
        for n, c in files.items()
    ]
    files["edgeft-0.0.1.dist-info/RECORD"] = (
        "\n".join([*lines, "edgeft-0.0.1.dist-info/RECORD,,"]) + "\n"
    ).encode()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        for name, content in files.items():
            made.writestr(zipfile.ZipInfo(name), content)
    return "edgeft-0.0.1-py3-none-any.whl", out.getvalue()


def small_bundle(
    path: Path, policy: dict[str, Any], blob: bytes = b"weights", **needs: Any
) -> archive.Bundle:
    """A bundle of a stand-in service; `policy` says how it behaves, `blob` is its artefact."""
    found = sorted(Path(ensurepip.__file__).parent.glob("_bundled/pip-*.whl"))
    if not found:
        pytest.skip("this Python brings no pip wheel (ensurepip)")
    name, content = wheel()
    locked = f"edgeft==0.0.1 --hash=sha256:{hashlib.sha256(content).hexdigest()}\n".encode()
    venv = hashlib.sha256(locked).hexdigest()[:16]
    config = {"host": "127.0.0.1", "port": 8080, "context": 2048, "threads": None, "slots": 1}
    files: dict[str, archive.Source] = {
        "artifacts/tiny/model.bin": blob, "policy/policy.json": json.dumps(policy).encode(), f"wheels/{name}": content,
        f"wheels/{found[0].name}": found[0], "requirements.lock": locked, **templates.scripts(config, venv, PYTHON),
    }  # fmt: skip
    facts = archive.facts_of(files)
    manifest = {
        "schema": archive.SCHEMA, "id": hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16], "for": {"profile": "a test's box"},
        "promised": {"ttft_s": 1.0}, "config": config, "venv": venv,
        "needs": {"machine": os.uname().machine, "python": PYTHON, "memory_bytes": 100_000_000, "disk_bytes": 10_000_000 + len(blob),
                  "cpu_flags": [], **needs},
        "files": facts,
    }  # fmt: skip
    encoded = archive.encode(manifest)
    archive.write(path, {archive.MANIFEST: encoded, archive.SUMS: archive.sums(facts, encoded), **files})
    return archive.Bundle(path)


def lacks() -> str | None:
    """Why no boxes can be had here; None where they can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    for tool in (SSHD, "ip", "tc", "nsenter", "ssh", "ssh-keygen"):
        if shutil.which(tool) is None:
            return f"needs {tool} (apt install openssh-server iproute2)"
    if os.uname().machine not in MACHINES.values():
        return f"no bundles for {os.uname().machine}"
    probe = subprocess.run(["ip", "netns", "add", "edgeft-probe"], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", "edgeft-probe"], capture_output=True, check=False)
    return "no network namespaces here" if probe.returncode else None


class Boxes:
    """Three boxes, b1 to b3, by the names that `config` gives ssh."""

    def __init__(self, root: Path) -> None:
        self.root, self.config = root, root / "ssh_config"
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.tag = f"e{os.getpid() % 10000}"

    def prefix(self, name: str) -> str:
        return str(self.root / name)

    def names(self) -> list[str]:
        return ["b1", "b2", "b3"]

    def start(self, group: Path | None = None) -> None:
        """Keys, namespaces, links, daemons; b3's daemon in a control group where one is given."""
        for key in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.root / key], check=True)
        shutil.copy(self.root / "user.pub", self.root / "authorized")
        Path("/run/sshd").mkdir(exist_ok=True)
        lines = []
        for number, name in enumerate(self.names(), 1):
            ns, here, there = f"{self.tag}{name}", f"{self.tag}h{number}", f"{self.tag}n{number}"
            net = f"10.{200 + os.getpid() % 50}.{number}"
            for command in (
                f"netns add {ns}", f"link add {here} type veth peer name {there} netns {ns}", f"addr add {net}.1/24 dev {here}",
                f"link set {here} up", f"-n {ns} addr add {net}.2/24 dev {there}", f"-n {ns} link set {there} up", f"-n {ns} link set lo up",
            ):  # fmt: skip
                subprocess.run(["ip", *command.split()], check=True, capture_output=True)
            conf = self.root / f"sshd_{name}"
            conf.write_text(
                f"Port 22\nListenAddress {net}.2\nHostKey {self.root}/host\nAuthorizedKeysFile {self.root}/authorized\nStrictModes no\n"
                f"UsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\nPidFile none\nMaxSessions 50\n"
            )
            # not `ip netns exec`, which puts another /sys over the control groups
            words = ["nsenter", f"--net=/run/netns/{ns}", SSHD, "-D", "-e", "-f", str(conf)]
            if group and name == "b3":
                words = ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh", *words]
            self.daemons[name] = subprocess.Popen(words, stderr=(self.root / f"{name}.log").open("wb"))
            lines.append(
                f"Host {name}\n  HostName {net}.2\n  User root\n  IdentityFile {self.root}/user\n  IdentitiesOnly yes\n"
                f"  UserKnownHostsFile {self.root}/known\n  StrictHostKeyChecking accept-new\n"
            )
        self.config.write_text("".join(lines))
        for name in self.names():
            deadline = time.monotonic() + 20
            while subprocess.run(
                ["ssh", "-F", self.config, name, "true"], capture_output=True, check=False
            ).returncode:
                assert time.monotonic() < deadline, (self.root / f"{name}.log").read_text()
                time.sleep(0.1)

    def link(self, name: str, state: str) -> None:
        subprocess.run(["ip", "link", "set", f"{self.tag}h{name[1:]}", state], check=True)

    def slow_down(self, name: str, rate: str) -> None:
        command = f"qdisc add dev {self.tag}h{name[1:]} root tbf rate {rate} burst 32kbit latency 400ms"
        subprocess.run(["tc", *command.split()], check=True)

    def full_speed(self, name: str) -> None:
        subprocess.run(
            ["tc", "qdisc", "del", "dev", f"{self.tag}h{name[1:]}", "root"], check=False, capture_output=True
        )

    def on(self, name: str, command: str) -> str:
        return subprocess.run(
            ["ssh", "-F", self.config, name, command], check=True, capture_output=True, text=True
        ).stdout.strip()

    def answer(self, name: str) -> Any:
        """What the box's service says of itself."""
        return json.loads(self.on(name, "curl -sf http://127.0.0.1:8080/health || echo null"))

    def end_service(self, name: str) -> None:
        """End what an earlier test left running: its port is the next one's."""
        subprocess.run(
            ["sh", "-c", f"kill $(cat {self.prefix(name)}/run/serve.pid) 2>/dev/null; sleep 0.5"], check=False
        )

    def stop(self) -> None:
        for name in self.names():
            self.end_service(name)
        for daemon in self.daemons.values():
            daemon.terminate()
            daemon.wait(10)
        for number, name in enumerate(self.names(), 1):
            subprocess.run(["ip", "link", "del", f"{self.tag}h{number}"], check=False, capture_output=True)
            subprocess.run(["ip", "netns", "del", f"{self.tag}{name}"], check=False, capture_output=True)


@contextmanager
def boxes(root: Path) -> Iterator[Boxes]:
    """Three running boxes; b3 has 64 MB of memory where control groups can be made, as `small_memory` then says."""
    made = Boxes(root)
    group = Path(f"/sys/fs/cgroup/memory/edgeft-{made.tag}")
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(64 << 20))
    except OSError:
        group = Path()
    made.small_memory = bool(group.name)  # type: ignore[attr-defined]
    try:
        made.start(group if group.name else None)
        yield made
    finally:
        made.stop()
        if group.name:
            for _ in range(50):
                try:
                    group.rmdir()
                    break
                except OSError:
                    time.sleep(0.1)
