"""What measuring costs beside making: the gate, the scores of merge bases, the scores of `--fit`.

Each loads a whole model in float32 through transformers: 4 bytes a parameter whatever the model is stored in, with what
`costs` saw of the same loading there (4.0 to 4.3). What comparing takes a logit was counted (tracemalloc on
`bench.fidelity`: 8 and 32 bytes, beside the logits); the fixed part was read off runs of a model of 14M parameters. Seconds
are reckoned from the operations and not yet held against a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgeft.compress import costs, gate_reference, merge_base, sensitivity
from edgeft.compress.costs import Box, Shape, Step
from edgeft.rows import Row, load_rows, spread

REFERENCE, COMPARE, ANSWERS = (
    "the merged model's log-probabilities",
    "distances from the merged model",
    "answers of merged and base",
)
SCORES, MERGE_BASE = "sensitivity of the tensors", "scoring the merge base"
CHECKS = (costs.PROOF, REFERENCE, COMPARE, ANSWERS)  # no part of what an artefact costs to make
GATE_TEXTS_TOKENS, LONGEST_GATE_TEXT = 552, 77  # of gate_texts.DOMAIN_TEXTS, as SmolLM2 reads them
WORK = ".work"

# As in `costs.MEMORY`. `logits`: tokens of the longest row times the vocabulary, which comparing holds several times over
# in float64.
MEMORY: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    REFERENCE: ({"one": 3.2e8, "parameters": 4.1, "logits": 12.0}, {"one": 0.8e8, "stored": 0.7}),
    COMPARE: ({"one": 2.4e8, "compared": 4.1, "logits": 36.0}, {"one": 0.8e8, "stored": 0.7}),
    ANSWERS: ({"one": 3.2e8, "parameters": 4.1}, {"one": 0.8e8, "stored": 0.7}),
    MERGE_BASE: ({"one": 3.2e8, "parameters": 4.1}, {"one": 0.8e8, "stored": 0.7}),
    SCORES: ({"one": 1.0e9, "parameters": 8.0, "changes": 1.4}, {"one": 0.8e8, "stored": 2.0}),
}
SECONDS: dict[str, dict[str, float]] = {
    REFERENCE: {"one": 6.0, "read": 2e-11},
    COMPARE: {"one": 6.0, "read": 2e-11},
    ANSWERS: {"one": 12.0, "asked": 4e-11},
    MERGE_BASE: {"one": 6.0, "scored": 2e-11},
    SCORES: {"one": 7.0, "parameters": 2e-6},
}


def gate_steps(shape: Shape, rows: Sequence[Row], limit: int, box: Box) -> list[Step]:
    """The gate's own steps, beside running each artefact; `rows` are those it asks, `limit` how many at most."""
    from edgeft.compress.gate import KLD_ROWS
    from edgeft.compress.gate_quality import scored

    lengths = [costs.tokens_of(row) for row in spread(list(rows), min(KLD_ROWS, limit))]
    compared = [n for n in lengths if n <= gate_reference.MAX_TOKENS]
    asked = sum(costs.tokens_of(row) for row in spread(scored(list(rows)), limit))
    known = {
        **costs.quantities(shape),
        "logits": max([LONGEST_GATE_TEXT, *compared]) * shape.vocabulary,
        "read": (GATE_TEXTS_TOKENS + sum(compared)) * shape.parameters,
        "asked": asked * shape.parameters * (2 if shape.has_adapter else 1),
        # The base in float32; without one, artefacts alone, which lie in fewer bits.
        "compared": shape.parameters * (1.0 if shape.has_adapter and compared else 0.3),
    }
    names = [REFERENCE, COMPARE, *([ANSWERS] if asked else [])]
    return [_step(WORK, "the gate", name, known, box, "--no-gate") for name in names]


def gate_bytes(shape: Shape, rows: Sequence[Row], limit: int) -> int:
    """Of the merged model's log-probabilities in `.work`."""
    from edgeft.bench.fidelity import MAX_REFERENCE_BYTES
    from edgeft.compress.gate import KLD_ROWS

    tokens = sum(map(costs.tokens_of, spread(list(rows), min(KLD_ROWS, limit))))
    return min(MAX_REFERENCE_BYTES, 4 * shape.vocabulary * (GATE_TEXTS_TOKENS + tokens))


def merge_base_steps(shape: Shape, rows_file: Path, box: Box) -> list[Step]:
    """`--merge-base auto`: a whole merge and its scoring for each candidate."""
    lengths = map(costs.tokens_of, spread(load_rows(rows_file), merge_base.MAX_ROWS))
    tokens = sum(n for n in lengths if n <= merge_base.MAX_TOKENS)
    known = {**costs.quantities(shape), "scored": tokens * shape.parameters}
    steps = []
    for kind in merge_base.CANDIDATES:
        scoring = _step("merged", f"--merge-base {kind}", MERGE_BASE, known, box, "--merge-base 16bit")
        merging = costs.step("merged", f"--merge-base {kind}", costs.MERGE, shape, box)
        steps += [merging, replace(scoring, name=f"{MERGE_BASE} {kind}")]
    return steps


def scores_step(shape: Shape, box: Box) -> Step:
    """`--fit`: weights, their gradients, and what each type changes of a group of tensors."""
    changes = min(sensitivity.bytes_of_changes(shape.parameters), sensitivity.HELD_BYTES)
    known = {**costs.quantities(shape), "changes": float(changes)}
    return _step(WORK, "--fit", SCORES, known, box, "--to gguf:q4_k_m")


def _step(artifact: str, asked: str, name: str, known: dict[str, float], box: Box, without: str) -> Step:
    priced = costs.priced(artifact, asked, name, known, MEMORY[name], SECONDS[name], box)
    return replace(priced, without=without)
