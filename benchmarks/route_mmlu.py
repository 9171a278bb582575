"""APGR on RouteLLM's MMLU rows, request text only: five folds, several seeds, learning curve. Prints JSON.

Heads: the hashed ridge (one seed unless --hashed-seeds says more: it takes minutes a fold), Gaussian kernel ridge and neighbours on
MiniLM, and their blend, all tuned by leave-one-out on the fitting rows. `subject mean` sees the subject column, which no request has: what
knowing the domain alone would give. Published best: .603 (arXiv 2406.18665).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import route_data

from edgeft.router import ridge
from edgeft.router.embedding import fit_vectors, mix
from edgeft.router.features import matrix

CURVE = (300, 1000)


def main() -> None:
    parser = route_data.parser(__doc__ or "")
    parser.add_argument("--encoder", type=Path, required=True, help="folder of `edgeft route encoder`")
    parser.add_argument("--hashed-seeds", type=int, default=0)
    parser.add_argument("--curve-seeds", type=int, default=3)
    options = parser.parse_args()
    rows = route_data.rows(options.data, "mmlu")
    texts = [r["prompt"] for r in rows]
    weak, strong = route_data.scores(rows)
    targets = np.column_stack([weak, strong - weak])
    vectors = route_data.embeddings(options.data, "mmlu", texts, options.encoder)
    subjects = np.array([r["subject"] for r in rows])

    def embedded(fitting: np.ndarray, test: np.ndarray, with_text: bool) -> dict[str, np.ndarray]:
        found, text, text_test = {}, None, None
        if with_text:
            heads = ridge.fit_all(matrix([texts[i] for i in fitting]), targets[fitting])
            text = np.column_stack([h.left_out for h in heads])
            x = matrix([texts[i] for i in test])
            text_test = np.column_stack([x @ h.weights + h.bias for h in heads])
            found["hashed"] = text_test[:, 1]
        tensors, _, spec = fit_vectors(vectors[fitting], targets[fitting], text)
        found["blend" if with_text else "MiniLM"] = mix(tensors, spec, vectors[test], text_test)[:, 1]
        return found

    def whole(fitting: np.ndarray, test: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        found = embedded(fitting, test, seed < options.hashed_seeds)
        if "MiniLM" not in found:
            found |= embedded(fitting, test, False)
        mean = {
            s: (strong - weak)[fitting][subjects[fitting] == s].sum() / ((subjects[fitting] == s).sum() + 5)
            for s in set(subjects)
        }
        return {**found, "subject mean (not a router)": np.array([mean[s] for s in subjects[test]])}

    shown = {
        "rows": len(rows), "weak": float(weak.mean()), "strong": float(strong.mean()), "folds": route_data.FOLDS, "seeds": options.seeds,
        "all fitting rows": route_data.cross_validated(weak, strong, options.seeds, whole, options.first_seed),
    }  # fmt: skip
    for count in CURVE:

        def few(
            fitting: np.ndarray, test: np.ndarray, seed: int, count: int = count
        ) -> dict[str, np.ndarray]:
            chosen = np.random.default_rng(seed).choice(fitting, count, replace=False)
            return embedded(chosen, test, True)

        shown[f"{count} fitting rows"] = route_data.cross_validated(weak, strong, options.curve_seeds, few)
    print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
