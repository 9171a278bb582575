"""How often a certificate breaks its promise: random splits of MMLU into rows to calibrate on and rows to check, the head fitted on others.

The head is fitted once on a third of the rows, the rest is split at random so many times: n rows calibrate, the remainder stands for the
truth. Beside it the plain empirical threshold, and what the same scores keep with full knowledge. Prints JSON.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import route_data

from edgeft.router import surface
from edgeft.router.certificate import rcps_threshold
from edgeft.router.features import matrix
from edgeft.router.minilm_export import ROUTING


def main() -> None:
    parser = route_data.parser(__doc__ or "")
    parser.add_argument("--encoder", type=Path, required=True, help="folder of `edgeft route encoder`")
    parser.add_argument("--splits", type=int, default=1000)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument("--delta", type=float, default=0.1)
    options = parser.parse_args()
    rows = route_data.rows(options.data, "mmlu")
    weak, strong = route_data.scores(rows)
    texts = [r["prompt"] for r in rows]
    vectors = route_data.embeddings(options.data, "mmlu", texts, options.encoder, ROUTING)
    read = route_data.Read(matrix(texts), surface.of(texts), vectors, np.column_stack([weak, strong - weak]))
    order = np.random.default_rng(0).permutation(len(rows))
    fitting, rest = order[: len(rows) // 3], order[len(rows) // 3 :]
    gains = route_data.route_fit(read, fitting, rest)["route fit --encoder"]
    lost = (weak < strong)[rest]
    chance = np.random.default_rng(1)
    found: dict[str, list[tuple[float, float]]] = {
        "certificate": [],
        "plain empirical": [],
        "full knowledge": [],
    }
    for _ in range(options.splits):
        split = chance.permutation(len(rest))
        own, other = split[: options.n], split[options.n :]
        for name, threshold in (
            ("certificate", rcps_threshold(gains[own], lost[own], options.alpha, options.delta)),
            ("plain empirical", _empirical(gains[own], lost[own], options.alpha)),
            ("full knowledge", _empirical(gains[other], lost[other], options.alpha)),
        ):
            kept = gains[other] < threshold
            found[name].append((float((kept & lost[other]).mean()), float(kept.mean())))
    risks = {name: np.array([r for r, _ in runs]) for name, runs in found.items()}
    kept = {name: float(np.mean([k for _, k in runs])) for name, runs in found.items()}
    rate = float(lost.mean())
    broken = {name: float((r > options.alpha).mean()) for name, r in risks.items()}
    error = 1.96 * (options.delta * (1 - options.delta) / options.splits) ** 0.5
    shown = {
        "splits": options.splits, "n": options.n, "alpha": options.alpha, "delta": options.delta, "rows_to_check": len(rest) - options.n,
        "promises_broken": {k: round(v, 4) for k, v in broken.items() if k != "full knowledge"},
        "allowed": options.delta, "sampling_error_95": round(error, 4), "share_kept": {k: round(v, 4) for k, v in kept.items()},
        "share_kept_random": round(min(1.0, options.alpha / rate), 4),
        "of_full_knowledge": round(kept["certificate"] / kept["full knowledge"], 4),
        "mean_risk": {k: round(float(v.mean()), 4) for k, v in risks.items()},
    }  # fmt: skip
    print(json.dumps(shown, indent=1))


def _empirical(gains: np.ndarray, lost: np.ndarray, alpha: float) -> float:
    """The largest threshold whose plain rate of losses on these rows is at most alpha."""
    order = np.argsort(gains, kind="stable")
    over = np.flatnonzero(np.cumsum(lost[order]) > alpha * len(gains))
    return float(gains[order][over[0]]) if len(over) else float("inf")


if __name__ == "__main__":
    main()
