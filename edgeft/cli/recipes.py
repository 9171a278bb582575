"""`--recipe FILE.yaml` for a command: the file's words are the command's own options.

What they take, how often and with which limits is read off the command, so that a new option needs no second list.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeft.errors import UsageError, unknown


class FileOrMap(click.ParamType):
    """A file's path, or a map written out in YAML or JSON: {…}."""

    name = "file or map"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A Path, or the map."""
        if not isinstance(value, str):
            return value
        if not value.lstrip().startswith("{"):
            return Path(value)
        import yaml

        try:
            return yaml.safe_load(value)
        except yaml.YAMLError as error:
            self.fail(f"{value} is not valid YAML: {str(error).splitlines()[0]}.", param, ctx)


NO_WORDS = ("recipe", "help", "dry_run")  # how to run, not what to make


def option(function: Any) -> Any:
    """Add --recipe to a command."""
    return click.option(
        "--recipe",
        metavar="FILE|NAME",
        is_eager=True,
        expose_value=False,
        callback=_take,
        help="YAML file with the words of these options; flags given beside it win.",
    )(function)


def words(command: click.Command) -> dict[str, click.Parameter]:
    """What may stand in a recipe of a command -> the parameter it sets: `base`, `to`, `allow-seen-rows`, …"""
    found: dict[str, click.Parameter] = {}
    for parameter in command.params:
        if parameter.expose_value and parameter.name not in NO_WORDS:
            name = (
                max(parameter.opts, key=len) if isinstance(parameter, click.Option) else str(parameter.name)
            )
            found[name.lstrip("-")] = parameter
    return found


def _take(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    """Make the file's values the defaults of this run; the command line goes before defaults."""
    if not value or ctx.resilient_parsing:
        return
    from edgeft.compress import recipe

    path = recipe.find(value)
    entries = recipe.read(path)
    known = words(ctx.command)
    defaults: dict[str, Any] = {}
    for entry in entries.values():
        if entry.word not in known:
            raise unknown(
                f"{path} line {entry.line}: the word", entry.word, known, recipe.look(path, entry.line)
            )
        parameter = known[entry.word]
        defaults[str(parameter.name)] = _value(ctx, parameter, entry, path)
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    ctx.meta["edgeft.recipe"] = (path, entries)


def _value(ctx: click.Context, parameter: click.Parameter, entry: Any, path: Path) -> Any:
    """An entry's value in the parameter's own type, read as the command line would read its text."""
    from edgeft.compress.recipe import look

    values = []
    for text, line in zip(entry.texts, entry.lines, strict=True):
        try:
            values.append(parameter.type.convert(text, parameter, ctx))
        except click.BadParameter as error:
            reason = f"'{entry.word}': {error.message.rstrip('.')}."
            raise UsageError(f"{path} line {line}: {reason}", look(path, line)) from None
        except UsageError as error:
            raise UsageError(f"{path} line {line}: {error.message}", error.hint) from None
    if parameter.multiple if isinstance(parameter, click.Option) else parameter.nargs != 1:
        return values
    if entry.is_list:
        raise UsageError(
            f"{path} line {entry.line}: '{entry.word}' takes one value, and a list is given.",
            look(path, entry.line),
        )
    return values[0]


def naming_its_line(ctx: click.Context, error: UsageError) -> UsageError:
    """An error of the work with the recipe's line in front, where it speaks of a value that stands there."""
    if "edgeft.recipe" not in ctx.meta:
        return error
    from edgeft.compress.recipe import located

    return located(error, *ctx.meta["edgeft.recipe"])
