"""The command line: parse, call one function, print. One file a command, imported when it is used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import click

from edgeft import __version__

# name -> what `edgeft --help` says of it. The command is `command` in edgeft.cli.<name>; a test
# holds these lines to the commands' own.
COMMANDS = {
    "doctor": "Show what this machine has and what it lacks.",
    "pull": "Fetch a base model and print its folder.",
    "tune": "Train a LoRA adapter on rows.",
    "compress": "Merge an adapter into its base and quantize.",
    "verify": "Check finished artefacts again.",
    "rebuild": "Make an artefact again and compare it bit by bit.",
    "bench": "Measure artefacts on this box.",
    "profiles": "List, show and detect hardware profiles.",
    "route": "Fit and use a routing policy.",
    "serve": "Serve a policy as an OpenAI-compatible proxy.",
    "keys": "Make, list and revoke the proxy's API keys.",
    "tco": "Show what own hardware and API calls cost.",
    "bundle": "Pack artefacts into one file that a box installs and serves.",
    "deploy": "Bring a bundle onto boxes over ssh.",
}


class Group(click.Group):
    """A group whose commands are imported when used and whose default command may be left out."""

    def __init__(self, *args: Any, default: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.default = default

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Options that every command knows may stand before a command's name.
        first = next((word for word in args if word not in {f"--{name}" for name, _ in SHARED}), None)
        if self.default and first not in self.commands and first not in ("--help", "-h"):
            args = [self.default, *args]
        return super().parse_args(ctx, args)


class Root(click.Group):
    """The top group: knows its commands by name alone."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"edgeft.cli.{name}").command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS:
            from edgeft.errors import unknown

            raise unknown("the command", args[0], COMMANDS, "edgeft --help")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _set_output(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from edgeft.console import output

        setattr(output, str(param.name), True)


SHARED: Sequence[tuple[str, str]] = (
    ("json", "Print one JSON value on standard output."),
    ("quiet", "No progress."),
    ("debug", "Show tracebacks."),
)


def options(function: Any) -> Any:
    """Add --json, --quiet and --debug."""
    for name, text in reversed(SHARED):
        function = click.option(
            f"--{name}", name, is_flag=True, expose_value=False, callback=_set_output, help=text
        )(function)
    return function


@click.group(cls=Root, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="edgeft")
@options
def cli() -> None:
    """From a LoRA adapter to measured artefacts, a router and the bill."""


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit; the one place where errors become two lines."""
    sys.exit(run(args))


def run(args: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    try:
        value = cli.main(args=args, prog_name="edgeft", standalone_mode=False)
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except (click.Abort, KeyboardInterrupt):
        print("Error: interrupted.\n  the same command goes on from what is finished", file=sys.stderr)
        return 130
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "edgeft"
        _complain(error.format_message(), f"{path} --help")
        return 2
    except click.ClickException as error:
        _complain(error.format_message(), "edgeft --help")
        return 2
    except BrokenPipeError:
        return 1
    except Exception as error:
        return _fail(error)
    return value if isinstance(value, int) else 0


def _fail(error: Exception) -> int:
    from edgeft.console import output
    from edgeft.errors import EdgeftError

    if output.debug:
        import traceback

        traceback.print_exc()
    if isinstance(error, EdgeftError):
        _complain(error.message, error.hint)
        return error.exit_code
    _complain(
        f"{type(error).__name__}: {error}",
        "this is a fault of edgeft's; run again with --debug and report it",
    )
    return 3


def _complain(message: str, hint: str) -> None:
    print(f"Error: {message}\n  {hint}" if hint else f"Error: {message}", file=sys.stderr)
