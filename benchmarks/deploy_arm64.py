"""The arm64 bundle run without an arm64 machine: in a Debian of that architecture whose programs qemu-user executes.

    edgeft bundle dist/gguf-q4_k_m --for raspberry-pi-5-8gb --out box.tar
    sudo python benchmarks/deploy_arm64.py box.tar [--root DIR] [--cpu cortex-a76]

Needs root (chroot), binfmt_misc with an entry for aarch64 (Debian: apt install qemu-user-static) and, where --root holds no Debian
yet, mmdebstrap and a Debian mirror; some 2 GB of disk. Asks the box what `edgeft deploy` asks, runs install.sh, sends one chat and
stops the service: with no network there but a loopback of its own, so that nothing is fetched in silence. Prints one JSON line;
exit code 1 where a step fails or the answer lacks the expected word. No rival and no times: an emulator's speed says nothing of a box.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgeft.deploy.archive import Bundle
from edgeft.deploy.packages import MACHINES
from edgeft.deploy.preflight import faults
from edgeft.deploy.remote import BOX, probed
from edgeft.errors import EdgeftError, EnvironmentFault, GateError

BINFMT = Path("/proc/sys/fs/binfmt_misc")
AARCH64 = "0200b700"  # ET_EXEC and EM_AARCH64, as an entry's magic ends
PREFIX = "/opt/edgeft"
# Outside: namespaces of its own, so that whatever is started there ends with this script.
ENTER = """
set -eu
ip link set lo up
mount -t proc proc "$1/proc"
mount -t sysfs -o ro sysfs "$1/sys"
mount -t tmpfs tmpfs "$1/dev/shm"
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 QEMU_CPU="$2" chroot "$1" sh /try/inside.sh "$3" "$4" "$5"
"""
# Inside, as a person (or `edgeft deploy`) would: unpack, install, ask, stop.
INSIDE = """
set -eu
cd /try
box() { sh /try/box.sh "$@"; }
box probe /opt/edgeft > said/probe
mkdir bundle && tar -xf box.tar -C bundle
EDGEFT_WAIT_S=3000 sh bundle/install.sh /opt/edgeft
box state /opt/edgeft > said/ready
/opt/edgeft/venvs/"$1"/bin/python ask.py "$2" "$3" > said/answer
box stop /opt/edgeft
box state /opt/edgeft > said/stopped
"""
ASK = """
import json, platform, sys, httpx
body = {"messages": [{"role": "user", "content": sys.argv[2]}], "model": "auto", "max_tokens": 24, "temperature": 0}
reply = httpx.post(f"http://127.0.0.1:{sys.argv[1]}/v1/chat/completions", json=body, timeout=3000).raise_for_status().json()
print(json.dumps({
    "machine": platform.machine(), "python": platform.python_version(), "glibc": platform.libc_ver()[1],
    "answer": reply["choices"][0]["message"]["content"], "model": reply["model"], "usage": reply["usage"],
}))
"""


def main() -> None:
    """Boot and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--root", type=Path, default=Path("/var/tmp/edgeft-arm64"))
    parser.add_argument("--cpu", default="cortex-a76", help="a Raspberry Pi 5's; cortex-a72 for a 4")
    parser.add_argument("--question", default="What is the capital of France?")
    parser.add_argument("--expect", default="Paris")
    asked = parser.parse_args()
    try:
        able(asked.root)
        found = boot(asked)
    except EdgeftError as error:
        print(f"{error.message}\n{error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(found))


def able(root: Path) -> None:
    """Raise EnvironmentFault where this machine can't run arm64 programs in a root of their own; make the root where there is none."""
    if os.geteuid() != 0:
        raise EnvironmentFault("another architecture's root needs chroot, which is root's.", "sudo python …")
    for tool in ("unshare", "ip", "chroot"):
        if shutil.which(tool) is None:
            raise EnvironmentFault(f"there is no '{tool}' here.", "apt install util-linux iproute2")
    entries = [p.read_text() for p in BINFMT.glob("*") if p.name not in ("register", "status")]
    runs = [e for e in entries if e.startswith("enabled") and AARCH64 in e and "F" in flags(e)]
    if platform.machine() != MACHINES["arm64"] and not runs:
        raise EnvironmentFault(
            "the kernel knows no interpreter of aarch64 programs, so no arm64 bundle was booted.",
            f"apt install qemu-user-static; where {BINFMT} is empty: mount -t binfmt_misc binfmt_misc {BINFMT} "
            f"&& cat /usr/lib/binfmt.d/qemu-aarch64.conf > {BINFMT}/register",
        )
    if not (root / "usr/bin/python3").exists():
        debian(root)


def flags(entry: str) -> str:
    """The flags of an entry of binfmt_misc."""
    return next((line[6:].strip() for line in entry.splitlines() if line.startswith("flags:")), "")


def debian(root: Path) -> None:
    """Debian 12's essential packages of arm64, python3 and its venv: unpacked, their scripts not run. Raises EnvironmentFault."""
    if shutil.which("mmdebstrap") is None:
        raise EnvironmentFault(f"there is no Debian in {root}, and no mmdebstrap.", "apt install mmdebstrap")
    part = root.with_name(root.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    hooks = [
        '--setup-hook=/usr/share/mmdebstrap/hooks/merged-usr/setup00.sh "$1"',
        '--customize-hook=ln -s mawk "$1/usr/bin/awk"',
        '--customize-hook=for f in passwd group; do cp "$1/usr/share/base-passwd/$f.master" "$1/etc/$f"; done',
    ]
    command = [
        "mmdebstrap",
        "--mode=root",
        "--variant=extract",
        "--arch=arm64",
        *hooks,
        "--include=?essential",
    ]
    ran = subprocess.run(
        [*command, "--include=python3,python3-venv,libstdc++6,libgomp1", "bookworm", part],
        stdout=sys.stderr,
        check=False,
    )
    if ran.returncode:
        raise EnvironmentFault(f"mmdebstrap could not make {root}.", "see what it wrote above")
    part.rename(root)


def boot(asked: argparse.Namespace) -> dict[str, Any]:
    """What the box said. Raises GateError where a step fails there."""
    whole = Bundle(asked.bundle)
    manifest, place = whole.manifest, asked.root / "try"
    for old in (place, asked.root / PREFIX.lstrip("/")):
        shutil.rmtree(old, ignore_errors=True)
    (place / "said").mkdir(parents=True)
    shutil.copyfile(asked.bundle, place / "box.tar")
    for name, text in (("box.sh", BOX), ("inside.sh", INSIDE), ("ask.py", ASK)):
        (place / name).write_text(text)
    command = ["unshare", "--mount", "--pid", "--net", "--fork", "--kill-child", "sh", "-c", ENTER, "sh"]
    words = [asked.root, asked.cpu, manifest["venv"], str(manifest["config"]["port"]), asked.question]
    ran = subprocess.run([*command, *words], stdout=sys.stderr, check=False)
    said = {p.name: p.read_text().strip() for p in (place / "said").iterdir()}
    if ran.returncode:
        log = asked.root / PREFIX.lstrip("/") / "run/serve.log"
        raise GateError(f"it ended with {ran.returncode}; it had said {said or 'nothing'}.", f"less {log}")
    answer, state = json.loads(said["answer"]), {**probed(said["probe"]), "stored_bytes": 0}
    wrong = faults(manifest, state)
    if wrong or asked.expect not in answer["answer"] or (said["ready"], said["stopped"]) != ("ready", "down"):
        raise GateError(f"{'; '.join(wrong) or 'wrong answer or state'}: {said}.", "the bundle is at fault")
    return {
        "bundle": whole.id, "for": manifest["for"]["profile"], "artifacts": manifest["artifacts"], "emulated_cpu": asked.cpu,
        "debian": (asked.root / "etc/debian_version").read_text().strip(), **answer,
    }  # fmt: skip


if __name__ == "__main__":
    main()
