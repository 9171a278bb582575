"""`edgeft route decide|explain|replay`: what a policy does with a request, why, and with logged traffic."""

from __future__ import annotations

from pathlib import Path

import click

from edgeft import console
from edgeft.cli import options

FOLDER = click.Path(path_type=Path)


@click.command("decide")
@click.argument("policy", type=FOLDER)
@click.argument("text")
@options
def decide_command(policy: Path, text: str) -> None:
    """Show where a policy sends one request, and why."""
    from dataclasses import asdict

    from edgeft.router import decide, load_policy

    decision = decide(load_policy(policy), text)
    console.result(asdict(decision), f"{decision.choice}: {decision.reason}")


@click.command("explain")
@click.argument("policy", type=FOLDER)
@click.argument("text")
@options
def explain_command(policy: Path, text: str) -> None:
    """Show what spoke for a decision and what would have changed it."""
    from edgeft.router import load_policy
    from edgeft.router.explain import explain

    found = explain(load_policy(policy), text)
    rows = [(name, f"{score:.3f}", f"{found['costs'][name]:.3g}") for name, score in found["scores"].items()]
    rows += [(name, "–", why) for name, why in found["removed"].items()]
    console.table(("candidate", "expected score", "cost"), rows)
    if len(found["spoke_by_head"]) > 1:
        by_head = [(name, f"{gain:+.4f}") for name, gain in found["spoke_by_head"].items()]
        console.table(("head", "gain of the strongest, against its mean"), by_head)
    console.table(
        ("what spoke", "gain of the strongest"), [(s["text"], f"{s['gain']:+.4f}") for s in found["spoke"]]
    )
    lines = [f"{found['choice']}: {found['reason']}", f"certificate {found['certificate']}"]
    lines += [f"would change it: {line}" for line in found["would_change_it"]]
    console.result(found, "\n".join(lines))


@click.command("replay")
@click.argument("policy", type=FOLDER)
@click.argument("log", type=FOLDER)
@options
def replay_command(policy: Path, log: Path) -> None:
    """Show what a policy would have done with logged traffic."""
    from edgeft.router import load_policy
    from edgeft.router.replay import replay

    found = replay(load_policy(policy), log)
    rows = [
        (name, f"{found['shares_logged'][name]:.1%}", f"{share:.1%}")
        for name, share in found["shares"].items()
    ]
    console.table(("candidate", "logged", "this policy"), rows, title=f"{found['n']} requests")
    lines = [f"cost a request {found['cost_per_request']:.3g}, logged {found['cost_per_request_logged']:.3g}"]
    if quality := found["quality"]:
        for name in ("ips", "self_normalised", "doubly_robust"):
            if part := quality.get(name):
                ends = part["ci95"]
                lines.append(
                    f"score, {name}: {part['mean']:.3f}"
                    + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else "")
                )
    else:
        lines.append(found["quality_note"])
    console.result(found, "\n".join(lines))
