"""How a running engine reads and continues plain text: its own tokens, its own chat template, raw completion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx

from edgeft.engines import GGUF
from edgeft.engines.local import LocalModel
from edgeft.errors import EnvironmentFault

TIMEOUT_S = 600.0


class EngineText:
    """Asks a LocalModel on llama.cpp's own paths, which every engine of ours answers.

    Raises EnvironmentFault where the engine does not have a path or refuses what it was given.
    """

    def __init__(self, local: LocalModel, client: httpx.Client) -> None:
        self.local, self.client = local, client

    def tokens(self, text: str, add_special: bool = False) -> list[int]:
        """A text's ids, names of special tokens read as such; with `add_special` as llama.cpp begins a prompt."""
        body = {"content": text, "add_special": add_special, "parse_special": True}
        return list(self._ask("/tokenize", body)["tokens"])

    def render(self, messages: list[dict[str, Any]]) -> str:
        """A chat as the artefact's template writes it, the answer's turn opened."""
        return str(self._ask("/apply-template", {"messages": messages})["prompt"])

    def complete(self, ids: list[int], max_tokens: int, stop: list[str]) -> str:
        """What greedy decoding puts behind `ids`, up to a stop string, which is left out."""
        body = {"prompt": ids, "n_predict": max_tokens, "temperature": 0, "stop": stop, "cache_prompt": False}
        return str(self._ask("/completion", body)["content"])

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        head = {"Authorization": f"Bearer {self.local.key}"}
        try:
            reply = self.client.post(f"{self.local.url}{path}", json=body, headers=head, timeout=TIMEOUT_S)
        except httpx.HTTPError as error:
            raise EnvironmentFault(
                f"{self.local.folder.name} broke off at {path}: {type(error).__name__} {error}",
                f"less {self.local.log}",
            ) from error
        if reply.status_code != 200:
            raise EnvironmentFault(
                f"the engine '{self.local.engine}' answered {path} with {reply.status_code}: {reply.text[:200]}",
                "see docs/engines.md",
            )
        return dict(reply.json())


def begins_with(text: EngineText) -> list[int]:
    """The ids that the tokenizer puts before a plain text by itself: often a beginning-of-text, often none."""
    file = text.local.folder / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        plain, whole = (tokenizer.encode("a", add_special_tokens=add).ids for add in (False, True))
    else:
        plain, whole = text.tokens("a"), text.tokens("a", add_special=True)
    return list(whole[: whole.index(plain[0])])


def prefix_token(folder: Path, engine: str) -> int:
    """The id that a text without anything before it stands on: beginning-of-text, else end-of-text, as lm-eval has it."""
    if engine in GGUF:
        return _gguf_prefix(folder)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    for name in ("bos_token", "eos_token"):
        token = settings.get(name)
        token = token["content"] if isinstance(token, dict) else token
        if token and (found := tokenizer.token_to_id(token)) is not None:
            return int(found)
    raise EnvironmentFault(
        f"{folder}: the tokenizer has neither a beginning nor an end of text.",
        f"less {folder}/tokenizer_config.json",
    )


def _gguf_prefix(folder: Path) -> int:
    """The same out of a GGUF file's header."""
    from edgeft.engines.gguf import model_and_adapter
    from edgeft.gguf_file import Tensors

    fields = Tensors(model_and_adapter(folder)[0]).fields
    for name in ("bos", "eos"):
        if field := fields.get(f"tokenizer.ggml.{name}_token_id"):
            return int(field.contents())
    raise EnvironmentFault(
        f"{folder}: the file names neither a beginning nor an end of text.", "gguf-dump FILE"
    )
