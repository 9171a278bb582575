"""A model folder's tokenizer, as its tokenizer.json has it."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def load_tokenizer(folder: Path) -> Any:
    """The folder's transformers tokenizer.

    transformers 5 loads some model types (qwen2 among them) with the pre-tokenizer that their class has,
    whatever the file says: with a vocabulary of another family the ids would not be those of the other
    engines. The file is right.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = AutoTokenizer.from_pretrained(folder)
    file = Path(folder) / "tokenizer.json"
    if file.is_file() and hasattr(tokenizer, "backend_tokenizer"):
        wanted = json.loads(file.read_text(encoding="utf-8"))["pre_tokenizer"]
        if json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] != wanted:
            return PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer


@contextmanager
def go_by_the_file() -> Iterator[None]:
    """While inside, AutoTokenizer gives what `load_tokenizer` gives, and runs no code out of model folders."""
    from transformers import AutoTokenizer

    original = AutoTokenizer.from_pretrained

    def from_pretrained(name: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("trust_remote_code", None)
        if args or kwargs or not Path(name).is_dir():
            return original(name, *args, **kwargs)
        AutoTokenizer.from_pretrained = original  # type: ignore[method-assign]
        try:
            return load_tokenizer(Path(name))
        finally:
            AutoTokenizer.from_pretrained = from_pretrained  # type: ignore[assignment, method-assign]

    AutoTokenizer.from_pretrained = from_pretrained  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        AutoTokenizer.from_pretrained = original  # type: ignore[method-assign]


def run_with_file_tokenizers(script: str, *arguments: str) -> None:
    """Run a script that goes by the file."""
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    with go_by_the_file():
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    run_with_file_tokenizers(*sys.argv[1:])
