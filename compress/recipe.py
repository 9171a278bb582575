"""What `compress` makes and where, and the YAML file that says it: the same words as the flags.

A recipe file is read node by node, so that every value is known with its line and its text as it stands there;
what the words are and what they take is the command's own knowledge (`edgeft.cli.recipes`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.errors import UsageError, unknown

SHIPPED = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """What `compress` makes and where."""

    out: Path
    formats: tuple[str, ...]  # format:variant[,option=value…]
    calibration: Path | None = None  # rows for the formats that calibrate
    name: str | None = None  # the model's name in files and metadata
    threads: int = os.cpu_count() or 1
    allow_seen_rows: bool = False
    merge_base: str = "16bit"  # or dequantized, dequantized-double, auto: for a QLoRA adapter
    eval: Path | None = (
        None  # rows of kind select: for the gate (else calibration rows are kept aside), --merge-base auto
    )
    eval_limit: int = 64  # rows that the gate asks, spread over the file
    gate: Path | Mapping[Any, Any] | None = None  # limits that differ from gate.yaml
    no_gate: bool = False


@dataclass(frozen=True)
class Entry:
    """One word of a recipe file with its texts (several for a list) and the line of each."""

    word: str
    line: int
    texts: tuple[str, ...]
    lines: tuple[int, ...]
    is_list: bool


def shipped() -> dict[str, Path]:
    """The recipes that come with edgeft, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def find(word: str) -> Path:
    """The file of a recipe: a path, or the name of a shipped one. Raises UsageError with the nearest name."""
    path = Path(word).expanduser()
    if path.suffix in (".yaml", ".yml") or "/" in word:
        if not path.is_file():
            seen = f"{word} is a folder" if path.is_dir() else f"there is no file {path}"
            raise UsageError(f"{seen}.", f"ls {path.parent}; shipped: {', '.join(shipped())}")
        return path
    if word not in shipped():
        raise unknown("the recipe", word, shipped(), f"--recipe FILE.yaml, or one of {', '.join(shipped())}")
    return shipped()[word]


def read(path: Path) -> dict[str, Entry]:
    """The words of a recipe file in its order, read as text and not yet checked.

    Raises UsageError naming the line where it is no YAML, no map of words, a word stands twice, or a value is
    neither text nor a list of texts.
    """
    import yaml

    try:
        root: Any = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text.", f"file {path}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(error, "problem", None) or str(error)
        raise UsageError(f"{path} line {line} is not valid YAML: {problem}.", look(path, line)) from None
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(
            f"{path} holds no words: 'to: gguf:q4_k_m' is one.", f"edgeft compress --help; {look(path, 1)}"
        )
    entries: dict[str, Entry] = {}
    for key, value in root.value:
        entry = _entry(path, key, value)
        if entry.word in entries:
            raise UsageError(
                f"{path} line {entry.line}: '{entry.word}' stands on line {entries[entry.word].line} already.",
                look(path, entry.line),
            )
        entries[entry.word] = entry
    return entries


def _entry(path: Path, key: Any, value: Any) -> Entry:
    import yaml

    line = key.start_mark.line + 1
    if not isinstance(key, yaml.ScalarNode):
        raise UsageError(f"{path} line {line}: a word is wanted before the colon.", look(path, line))
    if key.value == "gate" and isinstance(value, yaml.MappingNode):
        text = json.dumps(yaml.safe_load(yaml.serialize(value)))
        return Entry(key.value, line, (text,), (value.start_mark.line + 1,), False)
    is_list = isinstance(value, yaml.SequenceNode)
    nodes = value.value if is_list else [value]
    for node in nodes:
        at = node.start_mark.line + 1
        if not isinstance(node, yaml.ScalarNode):
            raise UsageError(
                f"{path} line {at}: '{key.value}' takes a value or a list of values, not a "
                f"{'map' if isinstance(node, yaml.MappingNode) else 'list of lists'}.",
                look(path, at),
            )
        if node.tag == "tag:yaml.org,2002:null":
            raise UsageError(
                f"{path} line {at}: '{key.value}' has no value.",
                f"give one, or leave the line out; {look(path, at)}",
            )
    return Entry(
        key.value, line, tuple(n.value for n in nodes), tuple(n.start_mark.line + 1 for n in nodes), is_list
    )


def look(path: Path, line: int) -> str:
    """The command that shows a line."""
    return f"sed -n {line}p {path}"


def located(error: UsageError, path: Path, entries: dict[str, Entry]) -> UsageError:
    """The error with the line of the recipe whose value it names; as it is where it names none.

    What only the work itself finds out (a folder that is not there, a format that is not known) does not know of files.
    """
    found = [
        (text, line)
        for entry in entries.values()
        for text, line in zip(entry.texts, entry.lines, strict=True)
        if len(text) > 2 and re.search(rf"(?<![\w./-]){re.escape(text)}(?![\w/-])", error.message)
    ]
    if not found:
        return error
    _, line = max(found, key=lambda f: len(f[0]))
    return UsageError(f"{path} line {line}: {error.message}", error.hint)
