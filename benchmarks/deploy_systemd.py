"""The unit of a bundle under a real systemd, without a machine for it: PID 1 of namespaces of its own, on an overlay of this root.

    edgeft bundle dist/gguf-q4_k_m --for auto --out box.tar
    sudo python benchmarks/deploy_systemd.py box.tar [--work /var/tmp]

Needs root, Debian's systemd and overlayfs; nothing of this machine's own files is changed, and its systemd (if it runs one) is not
spoken to. Installs as root; kills the service; stops it amid a prompt; brings a bundle whose policy alone differs; boots again; installs as a
user, whose manager may not be lasting, and as one who lingers. Prints one JSON line; exit code 1 where a step fails. No rival: a contract.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deploy_loopback import policy_changed

from edgeft.deploy.archive import Bundle
from edgeft.errors import EdgeftError, EnvironmentFault, GateError

USER = "edge"
PATH = "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
BOOT = """
set -e
ip link set lo up
r=$1/root
mount -t overlay -o "lowerdir=/,upperdir=$1/up,workdir=$1/wk" overlay "$r"
mount -t proc proc "$r/proc"; mount --rbind /dev "$r/dev"; mount -t sysfs sysfs "$r/sys"
if [ -d /sys/fs/cgroup/systemd ]; then
    mount -t tmpfs tmpfs "$r/sys/fs/cgroup"; mkdir "$r/sys/fs/cgroup/systemd"
    mount -t cgroup -o none,name=systemd cgroup "$r/sys/fs/cgroup/systemd"
else
    mount -t cgroup2 cgroup2 "$r/sys/fs/cgroup"
fi
mount -t tmpfs tmpfs "$r/run"; mount -t tmpfs tmpfs "$r/tmp"; mkdir -p "$r/run/lock" "$r/box"; mount --bind "$1/box" "$r/box"
exec env -i container=try "$2" HOME=/root chroot "$r" /lib/systemd/systemd --system --unit=multi-user.target --log-target=null
"""
ASK = """
import json, sys, urllib.request as u
body = {"model": "auto", "max_tokens": 4, "messages": [{"role": "user", "content": "tell me a word " * int(sys.argv[2])}]}
asked = u.Request(f"http://127.0.0.1:{sys.argv[1]}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
print(json.load(u.urlopen(asked, timeout=300))["usage"]["prompt_tokens"])
"""


class Box:
    """The booted system. Raises EnvironmentFault where it does not boot."""

    def __init__(self, work: Path) -> None:
        self.work = work
        groups = Path("/sys/fs/cgroup/systemd")
        own = (groups if groups.is_dir() else groups.parent) / "edgeft-try"
        own.mkdir(exist_ok=True)
        spaces = "--pid --mount --uts --ipc --cgroup --net --fork --kill-child --propagation private"
        command = f'echo $$ > "$0/cgroup.procs"; exec unshare {spaces} sh -c "$1" sh "$2" "$3"'
        self.outer = subprocess.Popen(["sh", "-c", command, own, BOOT, work, PATH], stdout=sys.stderr)
        self.pid = self._wait(60, self._first)
        self._wait(
            60, lambda: self.run("systemctl is-system-running").stdout.strip() in ("running", "degraded")
        )

    def _first(self) -> int:
        below = Path(f"/proc/{self.outer.pid}/task/{self.outer.pid}/children").read_text().split()
        return int(below[0]) if below and "systemd" in Path(f"/proc/{below[0]}/comm").read_text() else 0

    def _wait(self, seconds: float, there: Callable[[], Any]) -> Any:
        end = time.monotonic() + seconds
        while self.outer.poll() is None and time.monotonic() < end:
            if found := there():
                return found
            time.sleep(0.2)
        self.outer.kill()
        raise EnvironmentFault("systemd did not boot in namespaces of its own.", "see what it wrote above")

    def run(self, line: str, user: str = "root") -> subprocess.CompletedProcess[str]:
        """A shell's line in there."""
        home = "/root" if user == "root" else f"/home/{user}"
        become = [] if user == "root" else ["setpriv", "--reuid", user, "--regid", user, "--init-groups"]
        enter = ["nsenter", "-t", str(self.pid), "-m", "-p", "-C", "-u", "-i", "-n", "-r", "-w"]
        words = [*enter, *become, "env", "-i", PATH, f"HOME={home}", "sh", "-c", line]
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=600)

    def say(self, line: str, user: str = "root") -> str:
        """What a line wrote. Raises GateError where it fails."""
        ran = self.run(line, user)
        if ran.returncode:
            raise GateError(f"'{line}' ended with {ran.returncode}: {ran.stderr[-400:]}", "see above")
        return ran.stdout.strip()

    def end(self) -> None:
        """Power off."""
        self.run("systemctl poweroff")
        try:
            self.outer.wait(90)
        except subprocess.TimeoutExpired:
            self.outer.kill()


def trial(box: Box, port: int) -> dict[str, Any]:
    """What root's service does when it is installed, killed, stopped and given another policy."""
    ready = f"sh /srv/edgeft/current/service.sh /srv/edgeft wait 120 && python3 /box/ask.py {port} 1"
    show = "systemctl show --value -p MainPID edgeft"
    box.say("mkdir /srv/one && tar -xf /box/one.tar -C /srv/one && sh /srv/one/install.sh /srv/edgeft")
    found: dict[str, Any] = {
        "installed": box.say("systemctl is-active edgeft; systemctl is-enabled edgeft").split()
    }
    box.say(f"kill -9 $({show}); sleep 1; {ready}")
    found["restarts_after_kill"] = int(box.say("systemctl show --value -p NRestarts edgeft"))
    asked = f"python3 /box/ask.py {port} 300 > /tmp/answer & sleep 1; systemctl stop edgeft; wait; grep . /tmp/answer"
    found["prompt_tokens_of_an_answer_amid_a_stop"] = int(box.say(asked))
    before = box.say(f"systemctl start edgeft; {ready} >/dev/null; {show}")
    box.say("mkdir /srv/two && tar -xf /box/two.tar -C /srv/two && sh /srv/two/install.sh /srv/edgeft")
    found["policy_taken_over_without_restart"] = box.say(f"{ready} >/dev/null; {show}") == before
    return found


def as_user(box: Box) -> dict[str, Any]:
    """How it runs for a user without and with lingering."""
    box.say(
        f"systemctl stop edgeft; systemctl disable --quiet edgeft; useradd -m -s /bin/sh {USER}; systemctl start user@$(id -u {USER})"
    )
    install = "mkdir -p one && tar -xf /box/one.tar -C one && sh one/install.sh 2>&1"
    active = "XDG_RUNTIME_DIR=/run/user/$(id -u) systemctl --user is-active edgeft || true"
    said = box.say(f"cd; {install}", USER)
    found = {"user": box.say(active, USER), "told_to_linger": "enable-linger" in said}
    box.say(f"loginctl enable-linger {USER}")
    box.say(f"cd; {install}", USER)
    return {**found, "lingering_user": box.say(active, USER), "left_beside": box.say("ls ~/edgeft/run", USER)}


def both_boots(work: Path, bundle: Path) -> dict[str, Any]:
    """What the box said, booted twice in `work`. Raises UsageError for a file that is no bundle."""
    port = int(Bundle(bundle).manifest["config"]["port"])
    for name in ("up", "wk", "root", "box"):
        (work / name).mkdir()
    shutil.copyfile(bundle, work / "box/one.tar")
    policy_changed(bundle, work / "box/two.tar")
    (work / "box/ask.py").write_text(ASK)
    work.chmod(0o755)  # a user reads the bundle
    box = Box(work)
    try:
        found = {"systemd": box.say("systemctl --version").split("\n")[0], **trial(box, port)}
    finally:
        box.end()
    box = Box(work)
    try:
        box.say("sh /srv/edgeft/current/service.sh /srv/edgeft wait 120")
        return {**found, "ready_after_boot": True, **as_user(box)}
    finally:
        box.end()


def main() -> None:
    """Boot, try and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--work", type=Path, default=Path("/var/tmp"), help="on a disk: some 2 GB, gone afterwards"
    )
    asked = parser.parse_args()
    try:
        if os.geteuid() != 0 or not Path("/lib/systemd/systemd").exists():
            raise EnvironmentFault(
                "this needs root and systemd's files.", "sudo python …; apt install systemd"
            )
        with tempfile.TemporaryDirectory(prefix="edgeft-systemd-", dir=asked.work) as work:
            found = both_boots(Path(work), asked.bundle)
    except EdgeftError as error:
        print(f"{error.message}\n{error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(found))
    good = found["restarts_after_kill"] == 1 and found["policy_taken_over_without_restart"]
    sys.exit(
        not (good and found["lingering_user"] == "active" and found["installed"] == ["active", "enabled"])
    )


if __name__ == "__main__":
    main()
