"""From artefacts and a policy to a running, verified service on a fresh box, and an update of the policy alone: over loopback ssh.

    python benchmarks/deploy_loopback.py dist/gguf-q4_k_m [--policy policy/]

Starts an sshd of its own on a free port of 127.0.0.1 (needs Debian's openssh-server), bundles, deploys into an empty folder, then deploys a
bundle that differs in its policy alone. Prints one JSON line; the rival is copying the same tar with scp and running its install.sh by hand.
"""

from __future__ import annotations

import argparse
import getpass
import json
import socket
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeft.deploy import Wanted, bundle, deploy
from edgeft.profiles import load_profiles


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--policy", type=Path)
    parser.add_argument("--profile", default="intel-n100")
    parser.add_argument("--port", type=int, default=18080)
    asked = parser.parse_args()
    profile = replace(
        load_profiles()[asked.profile], limits={"memory_budget_gb": 13}
    )  # this box is not that one: nothing is promised
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        daemon, config = sshd(root)
        try:
            wanted = Wanted([asked.artifact], profile, asked.policy, port=asked.port)
            found: dict[str, Any] = {"artifact": asked.artifact.name}
            began = time.monotonic()
            manifest = bundle(wanted, root / "box.tar")
            found["bundle_s"] = time.monotonic() - began
            found["bundle_mb"] = (root / "box.tar").stat().st_size / 1e6
            bundle(wanted, root / "again.tar")
            found["same_bytes"] = (root / "box.tar").read_bytes() == (root / "again.tar").read_bytes()
            found["fresh"] = once(root / "box.tar", root, config, check_s=5)
            found["policy_update"] = once(
                policy_changed(root / "box.tar", root / "two.tar"), root, config, check_s=0
            )
            stop(root / "box")
            began = time.monotonic()
            by_hand(root, config)
            found["by_hand_s"] = time.monotonic() - began
            stop(root / "hand")
            found["fresh_over_by_hand"] = found["fresh"]["seconds"] / found["by_hand_s"]
            found["needs_gb"] = manifest["needs"]["memory_bytes"] / 1e9
            print(json.dumps(found))
        finally:
            stop(root / "box")
            daemon.terminate()


def once(tar: Path, root: Path, config: Path, check_s: float) -> dict[str, Any]:
    """Deploy and say what it took."""
    (outcome,) = deploy(tar, ["box"], prefix=str(root / "box"), config=config, check_s=check_s)
    if not outcome.good:
        raise SystemExit(outcome.text)
    return {
        "state": outcome.state,
        "seconds": outcome.seconds,
        "sent_kb": outcome.sent_bytes / 1e3,
        "check": outcome.checked.get("ttft_s"),
    }


def policy_changed(tar: Path, out: Path) -> Path:
    """The same bundle with another date in its policy."""
    from edgeft.deploy import archive

    old = archive.Bundle(tar)
    files: dict[str, archive.Source] = {name: old.read(name) for name in old.manifest["files"]}
    policy = json.loads(files["policy/policy.json"])  # type: ignore[arg-type]
    files["policy/policy.json"] = json.dumps({**policy, "created_at": "later"}).encode()
    facts = archive.facts_of(files)
    manifest = {**old.manifest, "files": facts, "id": "feed" + old.manifest["id"][4:]}
    encoded = archive.encode(manifest)
    archive.write(out, {archive.MANIFEST: encoded, archive.SUMS: archive.sums(facts, encoded), **files})
    return out


def by_hand(root: Path, config: Path) -> None:
    """What a person would type: scp, tar, install.sh."""
    subprocess.run(["scp", "-q", "-F", config, root / "box.tar", f"box:{root}/hand.tar"], check=True)
    line = f"mkdir -p {root}/src && tar -xf {root}/hand.tar -C {root}/src && sh {root}/src/install.sh {root}/hand"
    subprocess.run(["ssh", "-F", config, "box", line], check=True, stdout=subprocess.DEVNULL)


def stop(prefix: Path) -> None:
    """End the service of a folder."""
    if (prefix / "current").exists():
        subprocess.run(["sh", prefix / "current" / "service.sh", prefix, "stop"], check=False)


def sshd(root: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """(a daemon on a free port of loopback, an ssh config whose host 'box' is it)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", root / key], check=True)
    if getpass.getuser() == "root":
        Path("/run/sshd").mkdir(exist_ok=True)
    (root / "sshd").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {root}/host\nAuthorizedKeysFile {root}/user.pub\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nPidFile none\nSubsystem sftp internal-sftp\nMaxSessions 50\n"
    )
    (root / "ssh").write_text(
        f"Host box\n  HostName 127.0.0.1\n  Port {port}\n  IdentityFile {root}/user\n  IdentitiesOnly yes\n  UserKnownHostsFile {root}/known\n"
        "  StrictHostKeyChecking accept-new\n"
    )
    daemon = subprocess.Popen(["/usr/sbin/sshd", "-D", "-f", root / "sshd"], stderr=subprocess.DEVNULL)
    for _ in range(100):
        if (
            subprocess.run(
                ["ssh", "-F", root / "ssh", "box", "true"], capture_output=True, check=False
            ).returncode
            == 0
        ):
            break
        time.sleep(0.1)
    return daemon, root / "ssh"


if __name__ == "__main__":
    main()
