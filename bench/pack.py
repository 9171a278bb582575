"""A reference pack: what a board needs of the merged model to measure KLD without ever loading it.

    PACK/pack.json          what was packed: reference, tokenizer, rows, k, sizes
    PACK/pack.safetensors   arrays over rows and positions

Positions are those of `edgeft.bench.fidelity`: all tokens of the rendered chat after what all rows share. A row of
`pack.json` has tokens, skip, answer_start, and offsets into `token_ids` (its tokens) and the other arrays (its positions,
tokens - skip of them). About 0.5 kB a position with the defaults. `edgeft.bench.pack_estimate` says what is made of it.

Rows are in there as token ids: a pack is as private as the rows. Reading needs numpy alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from edgeft import child, console
from edgeft.bench.targets import Target, find
from edgeft.errors import UsageError
from edgeft.files import read_json, sha256_file, sha256_json, staged_folder, write_json
from edgeft.pull import safetensors_header

SCHEMA = "edgeft/pack@1"
FACTS, ARRAYS = "pack.json", "pack.safetensors"
TYPES = {"F32": np.float32, "U16": np.uint16, "U32": np.uint32}
CHUNK = 32  # positions at a time: some five float64 copies of them over the vocabulary are held
FORMULA = (
    "top_logprobs, tail_logprobs, right_logprobs: ln p over the full vocabulary, float32; tail_mass: sum of p outside the top k; "
    "tail_ids: drawn from the tail by p, with replacement"
)


@dataclass(frozen=True)
class Pack:
    """A pack that was read: `facts` is pack.json; arrays by name, float32 and unsigned."""

    folder: Path
    facts: dict[str, Any]
    arrays: dict[str, Any]

    def row(self, index: int) -> tuple[list[int], dict[str, Any]]:
        """(token ids of a row, its part of the arrays over positions)."""
        row = self.facts["rows"][index]
        ids = self.arrays["token_ids"][row["token_offset"] : row["token_offset"] + row["tokens"]]
        here = slice(row["offset"], row["offset"] + row["tokens"] - row["skip"])
        return ids.tolist(), {name: v[here] for name, v in self.arrays.items() if name != "token_ids"}


def write_pack(
    reference: Path,
    rows_file: Path,
    out: Path,
    limits: list[int | None],
    top_k: int = 64,
    tail_samples: int = 16,
    seed: int = 0,
    threads: int | None = None,
) -> dict[str, Any]:
    """Pack a merged model for rows of a file into the folder `out`; returns pack.json with `bytes` of the whole folder.

    `reference` is a merged model's folder, or the one that it lies in. `limits` choose rows as `fidelity.prepare` does.
    Raises UsageError for a reference that is quantized and for an `out` that holds something else.
    """
    from edgeft.engines.local import default_threads
    from edgeft.files import tree_bytes

    target = reference_in(reference)
    if tail_samples == 1:
        raise UsageError("1 tail sample a position says nothing of its error.", "--tail-samples 16, or 0")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / FACTS).is_file())):
        raise UsageError(f"{out} is there already and is no pack.", "--out ANOTHER-FOLDER")
    log = out.parent / f"{out.name}.log"
    with staged_folder(out) as staging:
        with console.step(f"packing {target.id}", log):
            facts = child.call(
                "edgeft.bench.pack:fill",
                log=log,
                title="packing the reference",
                reference=str(target.path),
                rows_file=str(rows_file),
                out=str(staging),
                limits=limits,
                top_k=top_k,
                tail_samples=tail_samples,
                seed=seed,
                threads=threads or default_threads(),
            )
        facts = {
            "schema": SCHEMA,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "reference": {"id": target.id, "sha256": target.sha256},
            "rows_file": {"name": rows_file.name, "sha256": sha256_file(rows_file)},
            **{k: v for k, v in facts.items() if k not in child.COST},
            "cost": {k: facts[k] for k in child.COST},
            "file": {
                "bytes": (staging / ARRAYS).stat().st_size,
                "sha256": sha256_file(staging / ARRAYS),
            },
        }
        write_json(staging / FACTS, facts)
    log.unlink(missing_ok=True)
    return {**facts, "bytes": tree_bytes(out)}


def reference_in(place: Path) -> Target:
    """The merged model in a folder: `merged` of what compress wrote, or the folder itself."""
    inner = place / "merged"
    target = find([inner if (inner / "artifact.json").is_file() else place], [])[0]
    if target.facts.get("format") != "safetensors":
        raise UsageError(
            f"{target.path} is {target.facts.get('format')}, and a reference is a merged model in safetensors.",
            "edgeft bench pack dist/merged --tasks rows.jsonl --out pack/",
        )
    return target


def fill(
    reference: str,
    rows_file: str,
    out: str,
    limits: list[int | None],
    top_k: int,
    tail_samples: int,
    seed: int,
    threads: int,
) -> dict[str, Any]:
    """Write `out/pack.safetensors`; returns what pack.json says of rows and sizes. Runs in a child process."""
    from safetensors.numpy import save_file

    from edgeft.bench.fidelity import encode_rows
    from edgeft.bench.pack_estimate import of_reference
    from edgeft.engines.transformers import logits, logits_build
    from edgeft.rows import load_rows, row_hash, spread
    from edgeft.tokenizer import load_tokenizer

    chosen = load_rows(Path(rows_file))
    for limit in limits:
        chosen = spread(chosen, limit)
    encoded = encode_rows(load_tokenizer(Path(reference)), chosen, 1 << 20)
    parts: dict[str, list[Any]] = {}
    rows: list[dict[str, Any]] = []
    offset = token_offset = vocabulary = 0
    found = logits(Path(reference), [row["ids"] for row in encoded], {"threads": threads})
    for index, (source, row, scores) in enumerate(zip(chosen, encoded, found, strict=True)):
        ids, skip, vocabulary = row["ids"], row["skip"], scores.shape[1]
        # Seeded by the row, so that a row's samples are the same whatever else is packed.
        chance = np.random.default_rng([seed, int(row_hash(source), 16)])
        for start in range(skip, len(ids), CHUNK):
            end = min(start + CHUNK, len(ids))
            kept = of_reference(scores[start - 1 : end - 1], ids[start:end], top_k, tail_samples, chance)
            for name, values in kept.items():
                parts.setdefault(name, []).append(narrow(name, values, vocabulary))
        parts.setdefault("token_ids", []).append(narrow("token_ids", np.array(ids), vocabulary))
        rows.append(
            {
                "id": source["id"], "row_hash": row_hash(source), "tokens": len(ids), "skip": skip,
                "answer_start": row["answer_start"], "token_offset": token_offset, "offset": offset,
            }
        )  # fmt: skip
        offset, token_offset = offset + len(ids) - skip, token_offset + len(ids)
        print(f"progress: {index + 1}/{len(encoded)} rows")
    file = Path(out, ARRAYS)
    save_file({name: np.concatenate(v) for name, v in parts.items()}, file)
    return {
        "tokenizer_sha256": tokenizer_hash(Path(reference)),
        "vocabulary": vocabulary,
        "top_k": int(parts["top_ids"][0].shape[1]),
        "tail_samples": tail_samples,
        "seed": seed,
        "positions": offset,
        "answer_positions": sum(row["tokens"] - row["answer_start"] for row in rows),
        "formula": FORMULA,
        "logits_build": logits_build(),
        "rows": rows,
    }


def narrow(name: str, values: Any, vocabulary: int) -> Any:
    """An array as it is stored: ids in two bytes where the vocabulary fits, the rest as float32."""
    if name.endswith("_ids"):
        return values.astype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)
    return values.astype(np.float32)


def tokenizer_hash(folder: Path) -> str | None:
    """Which token has which id, as one hash; None where the folder has no tokenizer.json (a GGUF file holds its own)."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    value = read_json(file)
    added = sorted((t["id"], t["content"]) for t in value.get("added_tokens") or [])
    return sha256_json({"vocabulary": value["model"].get("vocab"), "added": added})


def load_pack(folder: Path) -> Pack:
    """Read a pack. Raises UsageError where it is none, of another schema, cut or changed."""
    again = "edgeft bench pack MERGED --tasks rows.jsonl --out PACK, then copy the folder whole"
    if not (folder / FACTS).is_file():
        raise UsageError(f"{folder} is no pack: it has no {FACTS}.", again)
    facts = read_json(folder / FACTS)
    if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
        raise UsageError(f"{folder / FACTS} is not of the schema {SCHEMA}.", again)
    file = folder / ARRAYS
    if not file.is_file() or sha256_file(file) != facts["file"]["sha256"]:
        raise UsageError(f"{file} is not as {FACTS} says: missing, cut or changed.", again)
    return Pack(folder, facts, read_arrays(file))


def read_arrays(file: Path) -> dict[str, Any]:
    """The arrays of a safetensors file of ours, by name. A board that only runs models has no safetensors package."""
    header = safetensors_header(file)
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (start + offset for offset in entry["data_offsets"])
            values = np.frombuffer(data[begin:end], dtype=np.dtype(TYPES[entry["dtype"]]).newbyteorder("<"))
            found[name] = values.reshape(entry["shape"])
    return found


def check(folder: Path, targets: list[Target], allow_seen_rows: bool) -> list[str]:
    """Read a pack before anything is measured; returns the hashes of its rows.

    Raises UsageError where it is none, or where a target's making has seen its rows: KLD on them would flatter.
    """
    hashes = {row["row_hash"]: row["id"] for row in load_pack(folder).facts["rows"]}
    for target in targets if not allow_seen_rows else ():
        for kind, seen in target.seen_rows.items():
            clashes = [digest for digest in seen if digest in hashes]
            if clashes:
                raise UsageError(
                    f"{folder}: {len(clashes)} row(s) were used to {kind} already (first: '{hashes[clashes[0]]}') "
                    f"and cannot be used to measure {target.id}.",
                    "pack another part of the data, or --allow-seen-rows and a figure that flatters",
                )
    return list(hashes)


def note(fidelity: dict[str, Any] | None) -> str | None:
    """What must be said wherever a KLD by a pack is shown; None for one over the full vocabulary."""
    made = (fidelity or {}).get("pack")
    if not fidelity or not made:
        return None
    figures = fidelity["all"] or fidelity["answer"]
    counts = [f"{fidelity['answer']['positions']} answer positions"]
    if fidelity["all"]:
        counts.append(f"{fidelity['all']['positions']} positions")
    if made["tail_samples"]:
        bound, error = figures["kld_lower_bound"], figures["kld_sampling_error"]
        doubt = f"at least {bound:.4f} nats (lower bound), sampling error {error:.4f}"
    else:
        doubt = "no artefact can pass by it, only fail"
    return (
        f"KLD: {fidelity['basis']}, {doubt}; k {made['top_k']}, {made['tail_samples']} tail samples a position, "
        f"{' and '.join(counts)} of {figures['rows']} rows of {made['rows_file']}; logits through {fidelity['logits_build']}."
    )
