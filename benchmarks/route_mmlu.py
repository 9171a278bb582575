"""APGR on RouteLLM's MMLU rows, request text only: five folds, several seeds, learning curve. Prints JSON.

Heads: what `edgeft route fit` fits, with `--encoder` and without, and each of its parts, tuned by leave-one-out on the fitting rows.
`subject mean` sees the subject column, which no request has: what knowing the domain alone would give. Published best: .603 (arXiv
2406.18665). A fold takes a minute or two on one core; --first-seed shares the seeds between processes.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import route_data

from edgeft.router import surface
from edgeft.router.features import matrix
from edgeft.router.minilm_export import ROUTING

CURVE = (300, 1000)


def main() -> None:
    parser = route_data.parser(__doc__ or "")
    parser.add_argument("--encoder", type=Path, required=True, help="folder of `edgeft route encoder`")
    parser.add_argument("--curve-seeds", type=int, default=3)
    options = parser.parse_args()
    rows = route_data.rows(options.data, "mmlu")
    texts = [r["prompt"] for r in rows]
    weak, strong = route_data.scores(rows)
    read = route_data.Read(
        matrix(texts),
        surface.of(texts),
        route_data.embeddings(options.data, "mmlu", texts, options.encoder, ROUTING),
        np.column_stack([weak, strong - weak]),
    )
    subjects = np.array([r["subject"] for r in rows])

    def whole(fitting: np.ndarray, test: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        mean = {
            s: (strong - weak)[fitting][subjects[fitting] == s].sum() / ((subjects[fitting] == s).sum() + 5)
            for s in set(subjects)
        }
        found = route_data.route_fit(read, fitting, test)
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
            return route_data.route_fit(read, chosen, test)

        if options.curve_seeds:
            shown[f"{count} fitting rows"] = route_data.cross_validated(
                weak, strong, options.curve_seeds, few, options.first_seed
            )
    print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
