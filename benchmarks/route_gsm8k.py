"""APGR on RouteLLM's GSM8K rows: prompt only, and prompt with the weak model's draft. Five folds, several seeds. Prints JSON.

Each head is tuned by leave-one-out on the fitting rows, and so are the weights of the blends. Of the draft judges the one that
`edgeft route fit --cascade` fits. Published best, prompt only: .622 (arXiv 2406.18665).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import route_data

from edgeft.router import surface
from edgeft.router.cascade import fit_gain, gains, read_drafts
from edgeft.router.drafts import Draft
from edgeft.router.minilm_export import ROUTING


def main() -> None:
    parser = route_data.parser(__doc__ or "")
    parser.add_argument("--encoder", type=Path, required=True, help="folder of `edgeft route encoder`")
    options = parser.parse_args()
    rows = route_data.rows(options.data, "gsm8k")
    weak, strong = route_data.scores(rows)
    gain = strong - weak
    prompts, drafts = [r["prompt"] for r in rows], [r["weak_response"] for r in rows]
    read = read_drafts([(p, Draft(d)) for p, d in zip(prompts, drafts, strict=True)])
    vectors = route_data.embeddings(options.data, "gsm8k-prompt", prompts, options.encoder, ROUTING)
    asked = route_data.Read(read.prompts, surface.of(prompts), vectors, np.column_stack([weak, gain]))

    def predict(fitting: np.ndarray, test: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        found = {f"prompt: {k}": v for k, v in route_data.route_fit(asked, fitting, test, True).items()}
        judge, _ = fit_gain(read.rows(fitting), gain[fitting])
        return {**found, "prompt + draft: the judge": gains(judge, read.rows(test))}

    shown = {
        "rows": len(rows), "weak": float(weak.mean()), "strong": float(strong.mean()), "folds": route_data.FOLDS, "seeds": options.seeds,
        "heads": route_data.cross_validated(weak, strong, options.seeds, predict, options.first_seed),
    }  # fmt: skip
    print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
