"""What `edgeft bench run --autotune` gains over the engine's own defaults on this box.

    python benchmarks/autotune_gain.py ROWS WORK ARTEFACT [ARTEFACT …] [--seconds 300]

ROWS are questions and answers (JSON lines) that the artefacts' training did not see. Each artefact is copied into WORK first, since the
choice is kept beside it. The search is given `--speculate`, with the other artefacts as drafts. The rates are the confirmation's: the
choice and the defaults in two processes, asked in turns on rows that the search did not use; "own" is the time of real answers to those rows.
1.10 in prefill or decode is asked of one artefact, and of none anything slower.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgeft.files import read_json


def main() -> None:
    """Print a JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("artefacts", type=Path, nargs="+")
    parser.add_argument("--seconds", type=float, default=300.0)
    options = parser.parse_args()
    copies = []
    for artefact in options.artefacts:
        copies.append(options.work / artefact.name)
        shutil.copytree(artefact, copies[-1], dirs_exist_ok=True)
        (copies[-1] / "run-profile.json").unlink(missing_ok=True)
    out = options.work / "report"
    subprocess.run(
        [sys.executable, "-m", "edgeft", "bench", "run", *copies, "--tasks", options.rows, "--limit", "24", "--autotune",
         "--autotune-seconds", str(options.seconds), "--speculate", "--no-fidelity", "--no-speed", "--allow-seen-rows", "--out", out],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    found: dict[str, Any] = {r["id"]: r["autotune"] for r in read_json(out / "report.json")["results"]}
    rates = {
        name: {k: v["ratio"] for k, v in (t["gain"] or {}).items() if k != "kept"}
        for name, t in found.items()
    }
    print(json.dumps({
        "rates_over_defaults": rates,
        "kept": {name: t["options"] for name, t in found.items()},
        "best_of_prefill_and_decode": max(
            (max(rates[n]["prefill"], rates[n]["decode"]) for n, t in found.items() if t["options"]), default=1.0
        ),
        "found": found,
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
