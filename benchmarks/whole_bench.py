"""How long a whole bench takes: speed, memory, answers and KLD of six artefacts, 300 rows each.

    python benchmarks/whole_bench.py ROWS WORK ARTEFACT [ARTEFACT …] [--limit 300]

Runs `edgeft bench run` as a user does, with everything that it does unasked, new each time. Under ten minutes are asked for six
SmolLM2-135M artefacts on two cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from edgeft.files import read_json


def main() -> None:
    """Print a JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("artefacts", type=Path, nargs="+")
    parser.add_argument("--limit", type=int, default=300)
    options = parser.parse_args()
    shutil.rmtree(options.work, ignore_errors=True)
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "edgeft", "bench", "run", *options.artefacts, "--tasks", options.rows, "--limit", str(options.limit),
         "--allow-seen-rows", "--out", options.work],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    wall = time.monotonic() - started
    report = read_json(options.work / "report.json")
    print(json.dumps({
        "artefacts": len(report["results"]), "rows": report["workload"]["rows"], "wall_s": wall, "share_of_600_s": wall / 600,
        "right": {r["id"]: r["accuracy"]["share"] for r in report["results"]},
        "disturbed": {r["id"]: len(r["flags"] or []) for r in report["results"]},
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
