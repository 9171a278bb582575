"""Time of a decision on one core, hashed head alone and with MiniLM, on real requests of all lengths. Prints JSON; times in ms.

The rival in the same run is the same policy's arithmetic in numpy (a dense row of 4,096 times the weights): what the tuple of floats saves.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import route_data

from edgeft.router import Options, decide, fit, load_policy
from edgeft.router.features import matrix


def main() -> None:
    parser: argparse.ArgumentParser = route_data.parser(__doc__ or "")
    parser.add_argument("--encoder", type=Path, help="folder of `edgeft route encoder`")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--fit-rows", type=int, default=1000)
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rows = route_data.rows(options.data, "mmlu")
    chosen = np.random.default_rng(0).permutation(len(rows))
    fitting, asked = (
        chosen[: options.fit_rows],
        [rows[i]["prompt"] for i in chosen[options.fit_rows : options.fit_rows + options.requests]],
    )
    with tempfile.TemporaryDirectory() as scratch:
        table = Path(scratch, "rows.jsonl")
        lines = [
            {
                "request": rows[i]["prompt"],
                "weak:score": rows[i]["weak_correct"],
                "strong:score": rows[i]["strong_correct"],
            }
            for i in fitting
        ]
        table.write_text("".join(json.dumps(line) + "\n" for line in lines))
        shown: dict[str, Any] = {
            "requests": len(asked),
            "fit_rows": options.fit_rows,
            "characters_p50": float(np.median([len(t) for t in asked])),
        }
        for name, encoder, looks in (
            ("hashed", None, False),
            ("hashed and what pays of the looks", None, True),
            ("with MiniLM", options.encoder, True),
        ):
            if name != "with MiniLM" or encoder:
                chosen_options = Options(encoder=encoder, looks=looks)
                fit([table], ["weak", "strong"], Path(scratch, "policy"), chosen_options)
                policy = load_policy(Path(scratch, "policy"))
                shown[f"heads: {name}"] = list(policy.policy.fitted["heads"].get("blend", ["hashed"]))
                shown[name] = _times(asked, lambda text, p=policy: decide(p, text))  # type: ignore[misc]
        weights = np.array(policy.weights)
        shown["rival: dense numpy row"] = _times(asked, lambda text: matrix([text]) @ weights.T)
        shown["ratio p50 hashed / rival"] = round(
            shown["hashed"]["p50_ms"] / shown["rival: dense numpy row"]["p50_ms"], 3
        )
    print(json.dumps(shown, indent=1))


def _times(texts: list[str], call: Any) -> dict[str, float]:
    for text in texts[:50]:
        call(text)
    found = []
    for text in texts:
        began = time.perf_counter()
        call(text)
        found.append(1e3 * (time.perf_counter() - began))
    return {f"p{q}_ms": round(float(np.percentile(found, q)), 4) for q in (50, 95, 99)}


if __name__ == "__main__":
    main()
