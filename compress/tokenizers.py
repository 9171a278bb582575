"""The tokenizer that the merged model will have, against its embedding: looked at before the work begins."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeft.compress.adapter import ends_of
from edgeft.errors import UsageError


def refuse(base: Path, adapters: Sequence[Path], planned: Any) -> None:
    """Raise UsageError where the last tokenizer.json that is brought has ids beyond the embedding's rows.

    `planned`: what `merge.plan` says. A folder without tokenizer.json is left to the converters.
    """
    file = brought(base, adapters)
    outputs = {output.name: output for listed in planned.files.values() for output in listed}
    embedding = ends_of(outputs)[0]
    if file is None or embedding is None:
        return
    rows, largest = outputs[embedding].shape[0], largest_id(file)
    if largest >= rows:
        raise UsageError(
            f"{file} has the token id {largest}, and the embedding has {rows} rows.",
            "save the adapter with its grown embedding (modules_to_save or trainable_token_indices), or its own base's tokenizer",
        )


def brought(base: Path, adapters: Sequence[Path]) -> Path | None:
    """The tokenizer.json that the merged model will have: the last adapter's that brings one, else the base's."""
    places = (folder / "tokenizer.json" for folder in [*reversed(adapters), base])
    return next((file for file in places if file.is_file()), None)


def largest_id(file: Path) -> int:
    """The largest token id of a tokenizer.json, added tokens included; -1 where it lists none."""
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = held["model"].get("vocab", {})
        # Unigram lists its tokens in the order of their ids.
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        return max([*ids, *(token["id"] for token in held.get("added_tokens", []))], default=-1)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{file} is no tokenizer as transformers saves it.", f"head -c 300 {file}") from None
