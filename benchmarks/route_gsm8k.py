"""APGR on RouteLLM's GSM8K rows: prompt only, and prompt with the weak model's draft. Five folds, several seeds. Prints JSON.

Each head is tuned by leave-one-out on the fitting rows, and so are the weights of the blends. Of the draft judges the one that
`edgeft route fit --cascade` fits. Published best, prompt only: .622 (arXiv 2406.18665).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import route_data

from edgeft.router import blend, ridge, surface
from edgeft.router.cascade import fit_gain, gains, read_drafts
from edgeft.router.drafts import Draft
from edgeft.router.embedding import parts_of, vector_heads


def main() -> None:
    parser = route_data.parser(__doc__ or "")
    parser.add_argument("--encoder", type=Path, required=True, help="folder of `edgeft route encoder`")
    options = parser.parse_args()
    rows = route_data.rows(options.data, "gsm8k")
    weak, strong = route_data.scores(rows)
    gain, targets = strong - weak, np.column_stack([weak, strong - weak])
    prompts, drafts = [r["prompt"] for r in rows], [r["weak_response"] for r in rows]
    read = read_drafts([(p, Draft(d)) for p, d in zip(prompts, drafts, strict=True)])
    numbers = surface.of(prompts)
    vectors = route_data.embeddings(options.data, "gsm8k-prompt", prompts, options.encoder)

    def predict(fitting: np.ndarray, test: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        y = gain[fitting]
        # What `edgeft route fit --encoder` fits: levels and gains, hashed words, kernel and neighbours on MiniLM, the prompt's surface.
        words = ridge.fit_all(read.prompts[fitting], targets[fitting])
        tensors, _, spec, left_out = vector_heads(vectors[fitting], targets[fitting])
        parts = [
            read.prompts[test] @ np.array([h.weights for h in words]).T + np.array([h.bias for h in words])
        ]
        parts += parts_of(tensors, spec, vectors[test])
        own = {"hashed": np.column_stack([h.left_out for h in words]), **left_out}
        more, block, seen = surface.fit(numbers[fitting], targets[fitting])
        looks = surface.outputs(more, block, numbers[test])
        found = {name: part[:, 1] for name, part in zip(own, parts, strict=True)} | {"surface": looks[:, 1]}
        if blend.pays(list(own.values()), seen, targets[fitting]):
            own, parts = {**own, "surface": seen}, [*parts, looks]
        found["prompt: route fit"] = blend.mix(blend.fit(list(own.values()), targets[fitting]), parts)[:, 1]
        # Without a download: hashed words and the surface.
        both = blend.fit([own["hashed"], seen], targets[fitting])
        found["prompt: route fit without an encoder"] = blend.mix(both, [parts[0], looks])[:, 1]
        judge, _ = fit_gain(read.rows(fitting), y)
        found["prompt + draft: the judge"] = gains(judge, read.rows(test))
        return found

    shown = {
        "rows": len(rows), "weak": float(weak.mean()), "strong": float(strong.mean()), "folds": route_data.FOLDS, "seeds": options.seeds,
        "heads": route_data.cross_validated(weak, strong, options.seeds, predict, options.first_seed),
    }  # fmt: skip
    print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
