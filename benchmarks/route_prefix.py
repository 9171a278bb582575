"""Judging a draft after its first k tokens: APGR over k on RouteLLM's GSM8K drafts, tokens taken as characters / 4. Prints JSON.

Five folds, several seeds; a judge is fitted for each k and judges rows that it has not seen. The rival is the judge of whole drafts.
"""

from __future__ import annotations

import json

import numpy as np
import route_data

from edgeft.router.drafts import Draft
from edgeft.router.prefix import TOKENS, by_first_tokens

MOST = (*TOKENS, 192)


def main() -> None:
    parser = route_data.parser(__doc__ or "")
    options = parser.parse_args()
    rows = route_data.rows(options.data, "gsm8k")
    weak, strong = route_data.scores(rows)
    pairs = [(r["prompt"], Draft(r["weak_response"])) for r in rows]
    runs = [by_first_tokens(pairs, weak, strong, tokens=MOST, seed=seed) for seed in range(options.seeds)]
    shown = {
        "rows": len(rows), "seeds": options.seeds, "tokens": "characters / 4",
        "draft_tokens_p50": float(np.median([len(r["weak_response"]) for r in rows]) / 4),
        "curve": [
            {
                "tokens": entry["tokens"],
                "ended_share": round(entry["ended_share"], 3),
                "apgr": round(float(np.mean([run[i]["apgr"] for run in runs])), 4),
                "apgr_ci95_items": [round(v, 4) for v in entry["apgr_ci95"]],
            }
            for i, entry in enumerate(runs[0])
        ],
    }  # fmt: skip
    print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
