"""Signatures by ssh-keygen, which every machine with ssh has: an SSH key signs SHA256SUMS, a list of keys checks it."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from edgeft.errors import EnvironmentFault, GateError, UsageError

NAMESPACE = "edgeft-bundle"
SIGNER = "edgeft"


def sign(content: bytes, key: Path) -> bytes:
    """An armoured signature; with an Ed25519 key the same each time. Raises UsageError where the key can't sign."""
    if not key.is_file():
        raise UsageError(f"there is no key {key}.", f"ssh-keygen -t ed25519 -N '' -f {key}")
    done = _run(["ssh-keygen", "-Y", "sign", "-f", str(key), "-n", NAMESPACE], content)
    if done.returncode:
        raise UsageError(
            f"{key} can't sign: {done.stderr.decode(errors='replace').strip()[-200:]}",
            "a private key without a passphrase, or an agent",
        )
    return done.stdout


def verify(content: bytes, signature: bytes | None, signers: Path) -> None:
    """Raise GateError where the signature is not by one of the keys in `signers` (ssh's allowed_signers, or a bare public key)."""
    if signature is None:
        raise GateError(
            "the bundle bears no signature.", "edgeft bundle … --sign KEY, or deploy without --signers"
        )
    if not signers.is_file():
        raise UsageError(f"there is no file {signers}.", "--signers KEY.pub")
    with tempfile.TemporaryDirectory() as scratch:
        lines = [
            line for line in signers.read_text().splitlines() if line.strip() and not line.startswith("#")
        ]
        bare = [f"{SIGNER} {line}" if line.startswith(("ssh-", "ecdsa-", "sk-")) else line for line in lines]
        allowed, signed = Path(scratch, "allowed"), Path(scratch, "sig")
        allowed.write_text("\n".join(bare) + "\n")
        signed.write_bytes(signature)
        names = sorted({line.split()[0] for line in bare})
        for name in names:
            command = [
                "ssh-keygen",
                "-Y",
                "verify",
                "-f",
                str(allowed),
                "-I",
                name,
                "-n",
                NAMESPACE,
                "-s",
                str(signed),
            ]
            if _run(command, content).returncode == 0:
                return
    raise GateError(
        f"the bundle's signature is by none of the keys in {signers}.", "ask who made it for their public key"
    )


def _run(command: list[str], content: bytes) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, input=content, capture_output=True, check=False)
    except FileNotFoundError:
        raise EnvironmentFault(
            "there is no ssh-keygen on this machine.", "apt install openssh-client"
        ) from None
