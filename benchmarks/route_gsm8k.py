"""APGR on RouteLLM's GSM8K rows: prompt only, and prompt with the weak model's draft. Five folds, several seeds. Prints JSON.

Each head is tuned by leave-one-out on the fitting rows, and so are the weights of the blends. Published best, prompt only: .622
(arXiv 2406.18665).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import route_data

from edgeft.router import kernel, ridge
from edgeft.router.cascade import WIDTHS, standardised
from edgeft.router.drafts import FEATURES, Draft, features
from edgeft.router.embedding import nonnegative
from edgeft.router.features import matrix

OF_PROMPT = [
    FEATURES.index(n)
    for n in (
        "log_prompt",
        "question_numbers",
        "question_sentences",
        "fractions",
        "percent",
        "question_asks_remaining",
        "max_number",
    )
]


def main() -> None:
    parser = route_data.parser(__doc__ or "")
    parser.add_argument("--encoder", type=Path, required=True, help="folder of `edgeft route encoder`")
    options = parser.parse_args()
    rows = route_data.rows(options.data, "gsm8k")
    weak, strong = route_data.scores(rows)
    gain = strong - weak
    prompts, drafts = [r["prompt"] for r in rows], [r["weak_response"] for r in rows]
    seen = np.array([features(p, Draft(d)) for p, d in zip(prompts, drafts, strict=True)])
    of_prompt, of_draft = (
        route_data.embeddings(options.data, f"gsm8k-{k}", t, options.encoder)
        for k, t in (("prompt", prompts), ("draft", drafts))
    )
    hashed = matrix(prompts)

    def predict(fitting: np.ndarray, test: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        y = gain[fitting]
        text = ridge.fit(hashed[fitting], y)
        x, mean, scale = standardised(seen[fitting])
        later = np.clip((seen[test] - mean) / scale, -4, 4)
        both = np.hstack([of_prompt, of_draft])
        heads = {"hashed": (text.left_out, hashed[test] @ text.weights + text.bias)}
        for name, own, other, widths in (
            ("MiniLM", of_prompt[fitting], of_prompt[test], (0.3, 0.5, 0.8, 1.5)),
            ("surface of the prompt", x[:, OF_PROMPT], later[:, OF_PROMPT], (3.0, 10.0, 30.0, 100.0)),
            ("judge", x, later, WIDTHS),
            ("MiniLM of prompt and draft", both[fitting], both[test], (0.5, 1.0, 2.0, 4.0)),
        ):
            head = kernel.fit(own, y[:, None], widths)
            heads[name] = (head.left_out[:, 0], kernel.predict(head, other)[:, 0])
        found = {name: out for name, (_, out) in heads.items()}
        for name, parts in (("prompt: blend", list(heads)[:3]), ("prompt + draft: blend", list(heads))):
            weights = nonnegative([heads[p][0] - y.mean() for p in parts], y - y.mean())
            found[name] = (
                sum(w * heads[p][1] for w, p in zip(weights, parts, strict=True)) + 1e-9 * heads["hashed"][1]
            )
        return found

    shown = {
        "rows": len(rows), "weak": float(weak.mean()), "strong": float(strong.mean()), "folds": route_data.FOLDS, "seeds": options.seeds,
        "heads": route_data.cross_validated(weak, strong, options.seeds, predict),
    }  # fmt: skip
    print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
