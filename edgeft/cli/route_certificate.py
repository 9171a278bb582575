"""`edgeft route calibrate|suspend|recertify sample|judge|issue`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeft import console
from edgeft.cli import Group, options

FOLDER = click.Path(path_type=Path)
REPORTS = click.argument("reports", nargs=-1, required=True, type=FOLDER, metavar="REPORT...")


ALPHA = click.option(
    "--alpha",
    type=float,
    default=0.05,
    show_default=True,
    help="Share of requests that may lose by being kept.",
)
DELTA = click.option(
    "--delta", type=float, default=0.1, show_default=True, help="Chance that the promise is broken."
)


@click.command("calibrate")
@click.argument("policy", type=FOLDER)
@REPORTS
@ALPHA
@DELTA
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Of the reports' answers, and of serving.",
)
@click.option(
    "--judged",
    type=FOLDER,
    metavar="FILE",
    help="JSONL of judge_loss and human_loss: a judge model graded the reports.",
)
@options
def calibrate_command(
    policy: Path,
    reports: tuple[Path, ...],
    alpha: float,
    delta: float,
    temperature: float,
    judged: Path | None,
) -> None:
    """Certify a policy on rows that nothing else has seen.

    Moves the policy's rule to the laxest that is certified and writes certificate.json beside it.
    """
    from edgeft.router.calibrate import calibrate

    found = calibrate(policy, reports, alpha, delta, temperature, judged)
    risk = found["risk_given_kept"]["all"]
    console.result(
        found,
        f"certified on {found['n']} rows: with confidence {1 - delta:.0%} at most {alpha:.1%} of requests lose by being kept\n"
        f"kept {found['share_kept']:.1%} (random {found['share_kept_random']:.1%}, the same scores with full knowledge "
        f"{found['share_kept_full_knowledge']:.1%}); of the kept {risk['risk_given_kept']:.1%} lose, bound {risk['upper_bound']:.1%}\n"
        f"{policy / 'certificate.json'}",
    )


@click.command("suspend")
@click.argument("policy", type=FOLDER)
@click.option("--because", metavar="TEXT", help="Why; stands in the certificate.")
@click.option("--lift", is_flag=True, help="Put it in force again.")
@options
def suspend_command(policy: Path, because: str | None, lift: bool) -> None:
    """Suspend a policy's certificate, or put it in force again."""
    from edgeft.errors import UsageError
    from edgeft.router.calibrate import suspend

    if bool(because) == lift:
        raise UsageError("say why, or lift the suspension.", "--because 'new product line', or --lift")
    found = suspend(policy, because)
    console.result(found, "in force again" if lift else f"suspended: {because}")


@click.group("recertify", cls=Group)
@options
def recertify() -> None:
    """Earn a new certificate from graded traffic."""


@recertify.command("sample")
@click.argument("policy", type=FOLDER)
@click.argument("log", type=FOLDER)
@click.option(
    "--out", type=FOLDER, default=Path("grading"), show_default=True, help="Folder for answers and grades."
)
@click.option("--n", type=click.IntRange(1), default=500, show_default=True, help="Requests to draw.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draw.")
@click.option(
    "--server", metavar="URL", help="An edgeft serve, or another that knows the candidates by their ids."
)
@click.option("--at", "places", multiple=True, metavar="ID=URL#NAME", help="Where one candidate is asked.")
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Of the answers, and of serving.",
)
@click.option("--max-tokens", type=click.IntRange(1), default=512, show_default=True, help="Of an answer.")
@options
def sample_command(
    policy: Path, log: Path, out: Path, n: int, seed: int, server: str | None, places: tuple[str, ...], temperature: float, max_tokens: int
) -> None:  # fmt: skip
    """Draw logged requests, have every candidate answer, and queue the answers for grading.

    LOG is JSONL; lines that hold no `request` text are not drawn from. Fill in `scores` (0 to 1) in OUT/to_grade.jsonl from the top, or let
    `judge` do it.
    """
    from edgeft.router import load_policy
    from edgeft.router.certificate import least_n
    from edgeft.router.recertify import sample

    loaded = load_policy(policy)
    found = sample(
        loaded,
        log,
        out,
        _addresses(list(loaded.candidates), server, places),
        n,
        seed,
        temperature,
        max_tokens,
        _told("answers"),
    )
    least = least_n(0.05, 0.1)
    if least and found["drawn"] < least:
        console.note(f"{found['drawn']} rows; alpha 0.05 at delta 0.1 takes {least} at the very least")
    left_out = f"{found['no_text']} without a text, {found['seen']} that the policy has seen, {found['removed']} that not all may answer"
    console.result(
        {"path": str(out), **found},
        f"{found['drawn']} of {found['lines']} drawn; left out: {left_out}\n{out / 'to_grade.jsonl'}",
    )


@recertify.command("judge")
@click.argument("folder", type=FOLDER)
@click.option("--model", required=True, metavar="URL#NAME", help="The judge, at an OpenAI-shaped address.")
@options
def judge_command(folder: Path, model: str) -> None:
    """Have a model grade the queued answers.

    Its error is measured on the lines of to_grade.jsonl that a person graded, at least 100, and enters the bound.
    """
    from edgeft.router.grading import judge
    from edgeft.router.recertify import address_of

    name = model.removeprefix("openai:")
    found = judge(folder, address_of(name), f"openai:{name}", _told("grades"))
    console.result(
        found,
        f"{found['n']} lines, {found['unreadable']} replies could not be read, {found['private_kept_back']} private ones were kept back",
    )


@recertify.command("issue")
@click.argument("policy", type=FOLDER)
@click.argument("folder", type=FOLDER)
@ALPHA
@DELTA
@click.option(
    "--artifact",
    "artifacts",
    multiple=True,
    metavar="ID=DIR",
    help="The artefact that answered, where it is a new one.",
)
@options
def issue_command(policy: Path, folder: Path, alpha: float, delta: float, artifacts: tuple[str, ...]) -> None:
    """Certify the policy on the graded answers."""
    from edgeft.router.grading import issue

    found = issue(
        policy,
        folder,
        alpha,
        delta,
        {k: Path(v) for k, v in (_pair("--artifact", a, "DIR") for a in artifacts)},
    )
    judged = (
        "" if found["judge"] is None else f", the judge's misses bounded by {found['judge']['bound']:.1%}"
    )
    console.result(
        found,
        f"certified on {found['n']} rows{judged}: with confidence {1 - delta:.0%} at most {alpha:.1%} of requests lose by being kept\n"
        f"kept {found['share_kept']:.1%}\n{policy / 'certificate.json'}",
    )


def _addresses(names: list[str], server: str | None, places: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    from edgeft.errors import unknown
    from edgeft.router.recertify import address_of

    found = {name: address_of(f"{server}#{name}") for name in names} if server else {}
    found |= {
        n: address_of(n.removeprefix("openai:")) for n in names if n not in found and n.startswith("openai:")
    }
    for place in places:
        name, address = _pair("--at", place, "URL#NAME")
        if name not in names:
            raise unknown("the candidate", name, names, f"of: {', '.join(names)}")
        found[name] = address_of(address)
    return found


def _pair(option: str, text: str, form: str) -> tuple[str, str]:
    from edgeft.errors import UsageError

    name, mark, rest = text.partition("=")
    if not name or not mark or not rest:
        raise UsageError(f"{option} '{text}' is not ID={form}.", f"{option} ID={form}")
    return name, rest


def _told(what: str) -> Any:
    def told(done: int, of: int) -> None:
        if done % 20 == 0 or done == of:
            console.note(f"{what}: {done} of {of}")

    return told
