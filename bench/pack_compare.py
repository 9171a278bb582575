"""KLD of artefacts against a reference pack, through whatever gives their distributions on this box."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.bench.pack import CHUNK, Pack, load_pack, tokenizer_hash
from edgeft.bench.pack_estimate import against, summarize
from edgeft.bench.targets import Target
from edgeft.engines import GGUF
from edgeft.errors import EnvironmentFault

KEYS = ("kld", "bound", "variance", "same_top1", "right_delta", "nll", "nll_reference")


class PackYardstick:
    """Compares targets with a pack; stands where `run.Yardstick` compares them with a merged model."""

    def __init__(self, pack: Path, threads: int) -> None:
        self.pack, self.threads = load_pack(pack), threads

    def compare(self, target: Target, log: Path) -> dict[str, Any] | None:
        """The target's fidelity figures, or None where the pack was made of it."""
        facts = self.pack.facts
        if target.sha256 == facts["reference"]["sha256"]:
            return None
        assert target.path is not None
        figures = compare_with_pack(target.engine, target.path, self.pack, self.threads, log)
        other = target.facts.get("merged_sha256") not in (None, facts["reference"]["sha256"])
        return {**figures, "of_another_model": other}


def compare_with_pack(engine: str, folder: Path, pack: Pack, threads: int, log: Path) -> dict[str, Any]:
    """Fidelity figures of an artefact by a pack: every position through the engine's logits, or answer positions alone
    through the running server where only that is installed.

    Raises EnvironmentFault where the artefact's tokens are not the pack's, or its vocabulary is smaller.
    """
    here = tokenizer_hash(folder) if folder.is_dir() else None
    if here not in (None, pack.facts["tokenizer_sha256"]):
        raise EnvironmentFault(
            f"{folder.name} has another tokenizer than the pack {pack.folder}: its token ids mean other words.",
            "edgeft bench pack of the merged model that it was made of",
        )
    answer_only = not gives_logits(engine)
    arguments: dict[str, Any] = {
        "engine": engine,
        "folder": str(folder.resolve()),
        "pack": str(pack.folder.resolve()),
        "threads": threads,
    }
    function = "compare_all"
    if answer_only:
        function = "compare_answers"
        arguments["server_log"] = str(log.with_suffix(".server.log").resolve())
    title = f"the logits of {folder.name}"
    found = child.call(f"edgeft.bench.pack_compare:{function}", log=log, title=title, **arguments)
    made = {k: pack.facts[k] for k in ("top_k", "tail_samples")}
    return {
        **summarize(
            {k: v for k, v in found.items() if k not in child.COST}, pack.facts["tail_samples"], answer_only
        ),
        "pack": {
            **made,
            "sha256": pack.facts["file"]["sha256"],
            "reference_sha256": pack.facts["reference"]["sha256"],
            "rows_file": pack.facts["rows_file"]["name"],
        },
    }


def gives_logits(engine: str) -> bool:
    """Has the engine logits of every position here? GGUF's come from a package that the run-only extra leaves out."""
    return engine not in GGUF or importlib.util.find_spec("llama_cpp") is not None


def compare_all(engine: str, folder: str, pack: str, threads: int) -> dict[str, Any]:
    """Lists over rows of lists over all positions: KEYS, `answer`; and `build`. Runs in a child process."""
    from edgeft.engines import engine as module_of

    module, read = module_of(engine), load_pack(Path(pack))
    rows = [read.row(index) for index in range(len(read.facts["rows"]))]
    scores = module.logits(Path(folder), [ids for ids, _ in rows], {"threads": threads, "context": 1 << 12})
    result: dict[str, Any] = {key: [] for key in (*KEYS, "answer")}
    for facts, (ids, kept), values in zip(read.facts["rows"], rows, scores, strict=True):
        skip = facts["skip"]
        append(result, figures(read, kept, values[skip - 1 : -1], ids[skip:]))
        result["answer"].append([int(i >= facts["answer_start"]) for i in range(skip, len(ids))])
    return {**result, "build": module.logits_build()}


def compare_answers(engine: str, folder: str, pack: str, threads: int, server_log: str) -> dict[str, Any]:
    """As `compare_all` over the answer's positions alone, one request each to the server. Runs in a child process."""
    import httpx

    from edgeft.engines.llama_server import next_logprobs
    from edgeft.engines.local import LocalModel

    read = load_pack(Path(pack))
    rows = read.facts["rows"]
    context = max(row["tokens"] for row in rows) + 8
    result: dict[str, Any] = {key: [] for key in (*KEYS, "answer")}
    with (
        LocalModel(Path(folder), engine, log=Path(server_log), threads=threads, context=context) as model,
        httpx.Client(headers={"Authorization": f"Bearer {model.key}"}) as client,
    ):

        def one(ids: list[int], kept: dict[str, Any], at: int, index: int) -> Iterator[dict[str, Any]]:
            scores = next_logprobs(client, model.url, ids[:at], read.facts["vocabulary"])
            here = {name: values[index : index + 1] for name, values in kept.items()}
            return figures(read, here, scores[None], ids[at : at + 1])

        for number, row in enumerate(rows, 1):
            ids, kept = read.row(number - 1)
            places = range(row["answer_start"], len(ids))
            append(result, (piece for at in places for piece in one(ids, kept, at, at - row["skip"])))
            result["answer"].append([1] * len(places))
            print(f"progress: {number}/{len(rows)} rows")
        return {**result, "build": f"{model.build} (server)"}


def figures(pack: Pack, kept: dict[str, Any], scores: Any, right: list[int]) -> Iterator[dict[str, Any]]:
    """`against` of a row, some positions at a time. Raises EnvironmentFault where the artefact's vocabulary is smaller."""
    vocabulary = pack.facts["vocabulary"]
    if scores.shape[1] < vocabulary:
        raise EnvironmentFault(
            f"the artefact knows {scores.shape[1]} tokens and the pack's reference {vocabulary}.",
            "edgeft bench pack of the merged model that it was made of",
        )
    for at in range(0, len(right), CHUNK):
        part = {name: values[at : at + CHUNK] for name, values in kept.items()}
        yield against(part, scores[at : at + CHUNK], right[at : at + CHUNK], vocabulary)


def append(result: dict[str, Any], parts: Iterator[dict[str, Any]]) -> None:
    """Add a row's figures, given in pieces."""
    pieces = list(parts)
    for key in KEYS:
        result[key].append([value for piece in pieces for value in piece[key].tolist()])
