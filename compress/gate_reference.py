"""What the gate compares with, computed once per merged model and set of rows and kept in `dist/.work/gate/`.

How the merged folder reads texts and chats, its log-probabilities, and how the merged model and its base answer the rows.
"""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.compress.gate_texts import CHATS, DOMAIN_TEXTS, TOKEN_TEXTS
from edgeft.files import read_json, sha256_json, staged_folder, write_json
from edgeft.rows import Row, row_hash

OWN = "own"
MAX_TOKENS = 2048  # of a row or text; longer rows are left out
MEASURES = "edgeft/gate@1"  # a new one makes standing artefacts be checked again
CORPUS_SHA256 = sha256_json([MEASURES, TOKEN_TEXTS, CHATS, DOMAIN_TEXTS])


def reference(merged: Path, merged_sha256: str, rows: list[Row], work: Path, threads: int) -> dict[str, Any]:
    """`reading`, `plan` (what `bench.fidelity.compare` takes) and `logprobs` (a file) of the merged model.

    Made where it does not stand in `work` yet; one made of other inputs is removed. Raises EnvironmentFault where
    transformers or memory is missing.
    """
    key = sha256_json([merged_sha256, CORPUS_SHA256, [row_hash(row) for row in rows], MAX_TOKENS])[:16]
    folder = work / f"reference-{key}"
    if not _stands(folder):
        for other in work.glob("reference-*"):
            shutil.rmtree(other)
        with staged_folder(folder) as out:
            write_json(out / "rows.json", rows)
            found = child.call(
                "edgeft.compress.gate_reference:prepare",
                log=work / "reference.log",
                title="the merged model's log-probabilities",
                merged=str(merged),
                rows_file=str(out / "rows.json"),
                out=str(out),
                threads=threads,
            )
            write_json(out / "reference.json", {k: v for k, v in found.items() if k not in child.COST})
    return {**read_json(folder / "reference.json"), "logprobs": folder / "reference.npy"}


def _stands(folder: Path) -> bool:
    """Was the reference made already, and if a template writes the date, today?"""
    if not (folder / "reference.json").is_file():
        return False
    return read_json(folder / "reference.json")["reading"]["today"] in (None, today())


def today() -> str:
    """The day, as templates know it."""
    return date.today().isoformat()


def prepare(merged: str, rows_file: str, out: str, threads: int) -> dict[str, Any]:
    """The reference of a merged folder. Runs in a child process."""
    from edgeft.bench.fidelity import encode_rows, write_reference
    from edgeft.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Path(merged))
    rows = []
    for domain, texts in DOMAIN_TEXTS.items():
        for ids in (tokenizer.encode(text)[:MAX_TOKENS] for text in texts):
            rows.append({"ids": ids, "skip": 1, "answer_start": 1, "domain": domain})
    own = encode_rows(tokenizer, read_json(Path(rows_file)), MAX_TOKENS)
    rows += [{**row, "domain": OWN} for row in own]
    return {"reading": reading(tokenizer), "plan": write_reference(merged, rows, out, threads)}


def reading(tokenizer: Any) -> dict[str, Any]:
    """How a transformers tokenizer reads the gate's texts and chats.

    `texts`: a hash of the ids each; `normalized`: texts that its normalizer may have changed first;
    `chats`: name -> {prompt, tokens} or None for a shape that the template refuses; `bos`: the text of its
    first token, if it has one; `today`: the day, where the template writes it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    normalizes = backend is not None and backend.normalizer is not None
    return {
        "corpus_sha256": CORPUS_SHA256,
        "texts": [ids_hash(tokenizer.encode(text, add_special_tokens=False)) for text in TOKEN_TEXTS],
        "normalized": [
            index
            for index, text in enumerate(TOKEN_TEXTS)
            if normalizes and any(unicodedata.normalize(form, text) != text for form in ("NFC", "NFKC"))
        ],
        "chats": {name: _rendered(tokenizer, chat) for name, chat in CHATS.items()},
        "bos": tokenizer.bos_token or "",
        "today": today() if "strftime_now" in str(tokenizer.chat_template) else None,
    }


def ids_hash(ids: list[int]) -> str:
    """What a manifest keeps of a text's token ids."""
    return sha256_json([int(i) for i in ids])[:16]


def _rendered(tokenizer: Any, chat: list[dict[str, Any]]) -> dict[str, Any] | None:
    from jinja2.exceptions import TemplateError

    try:
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    except (TemplateError, ValueError):  # no template at all, or one that refuses the shape
        return None
    return {"prompt": prompt, "tokens": len(ids)}


def kept(work: Path, kind: str, inputs: Any, make: Callable[[], Any]) -> Any:
    """`make()`, or what it gave for the same inputs before."""
    file = work / f"{kind}-{sha256_json(inputs)[:16]}.json"
    if not file.is_file():
        write_json(file, make())
    return read_json(file)
