"""What the page and /health say of engines and certificate."""

from __future__ import annotations

from typing import Any

from edgeft.serve.proxy import Proxy


def engines_of(proxy: Proxy) -> list[dict[str, Any]]:
    """Each candidate: state, slots, queue, and of a local one its process."""
    found = []
    for name, candidate in proxy.policy.candidates.items():
        upstream, admission = proxy.upstreams.get(name), proxy.admissions.get(name)
        process = upstream.describe() if upstream is not None and hasattr(upstream, "describe") else {}
        found.append(
            {
                **process,
                "route": name,
                "local": not candidate.get("remote", True),
                "state": proxy.state_of(name),
                "slots": upstream.slots if upstream else None,
                "in_flight": admission.in_flight if admission else 0,
                "waiting": len(admission.queue) if admission else 0,
                "waiting_limit": proxy.config.limits.waiting,
                "wait_s": round(admission.wait_s(), 2) if admission else 0.0,
            }
        )
    return found


def certificate_of(proxy: Proxy) -> dict[str, Any] | None:
    """The certificate's figures and whether it holds."""
    held = proxy.policy.certificate
    if held is None:
        return None
    suspended = (
        (held.get("suspended_because") or "by hand")
        if held.get("suspended")
        else proxy.watch and proxy.watch.suspended()
    )
    state = "void" if held.get("void") else "suspended" if suspended else "valid"
    return {
        "state": state,
        "detail": str(held.get("void") or suspended or "") or None,
        **{k: held.get(k) for k in ("alpha", "delta", "n", "share_kept", "date")},
    }
