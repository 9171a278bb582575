"""The page at `/`: one file, served with a policy that lets it load nothing but its own figures."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib import resources

STATE_PATH = "/edgeft/state"


@functools.cache
def page() -> tuple[bytes, dict[str, str]]:
    """(body, headers). The script and the style are allowed by their SHA-256, so nothing that is inserted runs."""
    body = resources.files(__name__).joinpath("index.html").read_bytes()
    policy = (
        "default-src 'none'",
        f"script-src {_hashes(b'script', body)}",
        f"style-src {_hashes(b'style', body)}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return body, {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": "; ".join(policy),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-cache",
    }


def _hashes(tag: bytes, body: bytes) -> str:
    found = re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), body, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in found)
