"""`edgeft route fit|evaluate|decide`."""

from pathlib import Path
from typing import Any

import click

from edgeft import console
from edgeft.cli import Group, options

FOLDER = click.Path(path_type=Path)


@click.group("route", cls=Group)
@options
def command() -> None:
    """Fit and use a routing policy."""


@command.command("fit")
@click.argument("reports", nargs=-1, required=True, type=FOLDER, metavar="REPORT_DIR...")
@click.option("--weak", required=True, metavar="ID", help="The cheap model, as the report calls it.")
@click.option("--strong", required=True, metavar="ID", help="The better model, as the report calls it.")
@click.option("--out", type=FOLDER, default=Path("policy"), show_default=True, help="Folder for the policy.")
@click.option(
    "--max-loss",
    type=click.FloatRange(0, 100),
    default=1.0,
    show_default=True,
    help="Points that the mean score may lie below always-strong's.",
)
@click.option("--allow-seen-rows", is_flag=True, help="Take items that training or calibration has seen.")
@options
def fit_command(
    reports: tuple[Path, ...], weak: str, strong: str, out: Path, max_loss: float, allow_seen_rows: bool
) -> None:
    """Fit a policy on reports of `edgeft bench`.

    Learns from the items that both models answered which requests gain from the strong one, chooses
    the threshold on items that the fit did not see, and says whether routing is worth it.
    """
    from edgeft.router import Options, fit

    options = Options(max_loss=max_loss / 100, allow_seen_rows=allow_seen_rows)
    policy = fit(reports, [weak, strong], out, options).policy
    shown = {k: v for k, v in policy.to_dict().items() if k != "seen_rows"}
    _table(policy.fitted["figures"], policy.candidates[0]["id"], policy.candidates[-1]["id"])
    if policy.fitted["n_unscored"]:
        console.note(f"{policy.fitted['n_unscored']} item(s) without a score were left out")
    console.result({"path": str(out), **shown}, f"{policy.fitted['verdict']}\n{out}")


@command.command("evaluate")
@click.argument("policy", type=FOLDER)
@click.argument("reports", nargs=-1, required=True, type=FOLDER, metavar="REPORT_DIR...")
@options
def evaluate_command(policy: Path, reports: tuple[Path, ...]) -> None:
    """Show what a policy gives on reports that it has not seen."""
    from edgeft.router import evaluate, load_policy

    found = evaluate(load_policy(policy), reports)
    _table(found["figures"], found["weak"], found["strong"])
    console.result(found, found["verdict"])


@command.command("decide")
@click.argument("policy", type=FOLDER)
@click.argument("text")
@options
def decide_command(policy: Path, text: str) -> None:
    """Show where a policy sends one request, and why."""
    from dataclasses import asdict

    from edgeft.router import decide, load_policy

    decision = decide(load_policy(policy), text)
    console.result(asdict(decision), f"{decision.choice}: {decision.reason}")


def _table(found: dict[str, Any], weak: str, strong: str) -> None:
    def row(name: str, mean: float, share: str, ends: list[float] | None = None) -> tuple[str, ...]:
        return name, f"{100 * mean:.1f}", f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}" if ends else "", share

    share = f"{found['share_strong']:.0%}"
    console.table(
        ("rule", "score", "95 % interval", "to strong"),
        [
            row("policy", found["policy"]["mean"], share, found["policy"]["ci95"]),
            row("random, same share", found["random_same_share"], share),
            row(f"always weak: {weak}", found["always_weak"]["mean"], "0%", found["always_weak"]["ci95"]),
            row(
                f"always strong: {strong}",
                found["always_strong"]["mean"],
                "100%",
                found["always_strong"]["ci95"],
            ),
            row("oracle", found["oracle"], ""),
            row("policy - random", found["gain_over_random"]["mean"], "", found["gain_over_random"]["ci95"]),
        ],
        title=f"{found['n']} items, score in points of 100",
    )
