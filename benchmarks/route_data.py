"""The public routing rows that the route_* benchmarks read (RouteLLM's and ZeroEval's, see docs/routing.md), and their folds.

Not in the repository: `--data` names the folder that holds mmlu.csv, gsm8k.csv, zeroeval_gsm8k_six_models.csv and the lists of
contaminated prompts (lm-sys/RouteLLM @0b64fda, WildEval/ZeroEval @8c1485e, Apache-2.0).
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeft.files import sha256_json
from edgeft.home import cache_dir
from edgeft.router import surface
from edgeft.router.curves import routing_figures
from edgeft.router.embedding import load_encoder, read_spec
from edgeft.router.fit_heads import blended, heads_on, parts_on
from edgeft.router.minilm_export import GRAPH

FOLDS = 5
DEFAULT = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "routing"


def parser(text: str) -> argparse.ArgumentParser:
    """The options that all have."""
    made = argparse.ArgumentParser(description=text)
    made.add_argument("--data", type=Path, default=DEFAULT, help="folder of the rows")
    made.add_argument("--seeds", type=int, default=10)
    made.add_argument("--first-seed", type=int, default=0, help="to share the seeds between processes")
    return made


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    """The rows of a file less the contaminated prompts that the published tables leave out."""
    if not (folder / f"{name}.csv").is_file():
        sys.exit(f"there is no {folder / f'{name}.csv'}: --data names the folder of the rows")
    left_out: set[str] = set()
    listed = folder / f"{name}_contaminated_prompts.jsonl"
    if listed.is_file():
        left_out = {json.loads(line)["eval_prompt"] for line in listed.read_text().splitlines()}
    with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row.get("prompt") not in left_out]


def scores(found: list[dict[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """(weak, strong) correctness, float64 [n]."""
    return tuple(np.array([float(r[f"{side}_correct"]) for r in found]) for side in ("weak", "strong"))  # type: ignore[return-value]


@dataclass(frozen=True)
class Read:
    """What the heads read of all rows, and what they learn."""

    words: np.ndarray  # float64 [n, D], `features.matrix`
    looks: dict[str, np.ndarray]  # `surface.of`
    vectors: np.ndarray  # float32 [n, E], the encoder's middle layer
    targets: np.ndarray  # float64 [n, 2]: weak's score, the gain


def route_fit(
    read: Read, fitting: np.ndarray, test: np.ndarray, without_encoder: bool = False
) -> dict[str, np.ndarray]:
    """Expected gains of the test rows as `edgeft route fit --encoder` (and without it) blends them, and by head."""
    found: dict[str, np.ndarray] = {}
    for name, vectors in [("route fit", None)] * without_encoder + [("route fit --encoder", read.vectors)]:
        of_fitting, of_test = (
            (
                read.words[at],
                None if vectors is None else vectors[at],
                {k: v[at] for k, v in read.looks.items()},
            )
            for at in (fitting, test)
        )
        tensors, _, block = heads_on(*of_fitting, read.targets[fitting])
        parts = parts_on(tensors, block, *of_test)
        found |= {head: part[:, 1] for head, part in parts.items() if head not in surface.KINDS}
        print("heads:", name, *parts, file=sys.stderr)
        found[name] = blended(tensors, parts)[:, 1]
    return found


def folds(n: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(fitting rows, test rows) of five folds at random."""
    order = np.random.default_rng(seed).permutation(n)
    for place in range(FOLDS):
        yield (
            np.sort(np.concatenate([order[i::FOLDS] for i in range(FOLDS) if i != place])),
            np.sort(order[place::FOLDS]),
        )


def cross_validated(
    weak: np.ndarray,
    strong: np.ndarray,
    seeds: int,
    predict: Callable[[np.ndarray, np.ndarray, int], dict[str, np.ndarray]],
    first_seed: int = 0,
) -> dict[str, Any]:
    """Figures of each head over seeds and folds: mean of the folds' figures, spread over seeds, and an item-bootstrap interval of
    the mean APGR (rows resampled within each fold, the fits kept)."""
    kept: dict[str, list[list[tuple[np.ndarray, np.ndarray]]]] = {}
    for seed in range(seeds):
        for fitting, test in folds(len(weak), first_seed + seed):
            for name, predicted in predict(fitting, test, first_seed + seed).items():
                runs = kept.setdefault(name, [])
                while len(runs) <= seed:
                    runs.append([])
                runs[seed].append((test, predicted))
        print(f"progress: seed {seed + 1} of {seeds}", file=sys.stderr, flush=True)
    return {name: _summary(weak, strong, runs) for name, runs in kept.items()}


def _summary(
    weak: np.ndarray, strong: np.ndarray, runs: list[list[tuple[np.ndarray, np.ndarray]]]
) -> dict[str, Any]:
    def figures(test: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
        return routing_figures(predicted, weak[test], strong[test])

    by_fold = [[figures(test, predicted) for test, predicted in run] for run in runs]
    every = [f for run in by_fold for f in run]
    found: dict[str, Any] = {name: round(float(np.mean([f[name] for f in every])), 4) for name in every[0]}
    found["apgr_by_seed"] = [round(float(np.mean([f["apgr"] for f in run])), 4) for run in by_fold]
    chance, means = np.random.default_rng(0), []
    for _ in range(400):
        counts = chance.multinomial(len(weak), np.full(len(weak), 1 / len(weak)))
        sample = []
        for test, predicted in runs[0]:
            picks = np.repeat(np.arange(len(test)), counts[test])
            try:
                sample.append(figures(test[picks], predicted[picks])["apgr"])
            except ValueError:
                continue
        means.append(np.mean(sample))
    found["apgr_ci95_items"] = [round(float(v), 4) for v in np.percentile(means, [2.5, 97.5])]
    return found


def embeddings(folder: Path, name: str, texts: list[str], encoder: Path, graph: str = GRAPH) -> np.ndarray:
    """An encoder's vectors of texts, float32 [n, E]; kept in the user's cache by content, since they take minutes."""
    spec = read_spec(encoder, graph)
    place = cache_dir(
        "bench-embeddings",
        f"{name}-{sha256_json([spec['graph_sha256'], spec['max_tokens'], texts])[:16]}.npy",
    )
    if place.is_file():
        return np.load(place, allow_pickle=False)
    encode = load_encoder(spec)
    found = np.array([encode(text) for text in texts], np.float32)
    place.parent.mkdir(parents=True, exist_ok=True)
    np.save(place, found, allow_pickle=False)
    return found
