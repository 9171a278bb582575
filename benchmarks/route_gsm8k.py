"""APGR on RouteLLM's GSM8K rows: prompt only, and prompt with the weak model's draft. Five folds, several seeds. Prints JSON.

Each head is tuned by leave-one-out on the fitting rows, and so are the weights of the blends. Of the draft judges the one that
`edgeft route fit --cascade` fits. Published best, prompt only: .622 (arXiv 2406.18665).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import route_data

from edgeft.router import kernel, ridge
from edgeft.router.cascade import fit_gain, gains, read_drafts, standardised
from edgeft.router.draft_features import FEATURES
from edgeft.router.drafts import Draft
from edgeft.router.embedding import fit_vectors, mix, nonnegative

OTHERS = ("log_prompt", "fractions", "percent", "max_number", "sum_of_numbers", "different_numbers")
QUESTION = [place for place, name in enumerate(FEATURES) if name.startswith("question") or name in OTHERS]
WIDTHS = (0.3, 0.8)


def main() -> None:
    parser = route_data.parser(__doc__ or "")
    parser.add_argument("--encoder", type=Path, required=True, help="folder of `edgeft route encoder`")
    options = parser.parse_args()
    rows = route_data.rows(options.data, "gsm8k")
    weak, strong = route_data.scores(rows)
    gain, targets = strong - weak, np.column_stack([weak, strong - weak])
    prompts, drafts = [r["prompt"] for r in rows], [r["weak_response"] for r in rows]
    read = read_drafts([(p, Draft(d)) for p, d in zip(prompts, drafts, strict=True)])
    vectors = route_data.embeddings(options.data, "gsm8k-prompt", prompts, options.encoder)

    def predict(fitting: np.ndarray, test: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        y = gain[fitting]
        text = ridge.fit(read.prompts[fitting], y)
        x, mean, scale = standardised(read.numbers[fitting][:, QUESTION])
        later = np.clip((read.numbers[test][:, QUESTION] - mean) / scale, -4, 4)
        heads = {"hashed": (text.left_out, read.prompts[test] @ text.weights + text.bias)}
        for name, own, other, widths in (
            ("MiniLM", vectors[fitting], vectors[test], WIDTHS),
            ("surface of the prompt", x, later, (10.0, 30.0, 100.0)),
        ):
            head = kernel.fit(own, y[:, None], widths)
            heads[name] = (head.left_out[:, 0], kernel.predict(head, other)[:, 0])
        found = {name: out for name, (_, out) in heads.items()}
        weights = nonnegative([left_out - y.mean() for left_out, _ in heads.values()], y - y.mean())
        blend = sum(w * out for w, (_, out) in zip(weights, heads.values(), strict=True))
        found["prompt: blend"] = blend + 1e-9 * heads["hashed"][1]
        # What `edgeft route fit --encoder` fits: levels and gains, hashed words, kernel and neighbours on MiniLM.
        words = ridge.fit_all(read.prompts[fitting], targets[fitting])
        tensors, _, spec = fit_vectors(
            vectors[fitting], targets[fitting], np.column_stack([h.left_out for h in words])
        )
        said = np.column_stack([read.prompts[test] @ h.weights + h.bias for h in words])
        found["prompt: route fit"] = mix(tensors, spec, vectors[test], said)[:, 1]
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
