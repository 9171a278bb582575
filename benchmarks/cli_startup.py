"""`edgeft --help` against `python -c "import click"`: at most twice is the claim.

    python benchmarks/cli_startup.py

Both are run in turns, A B A B, as whole processes; medians and their ratio are printed.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

RUNS = 25
COMMANDS = {
    "edgeft --help": [sys.executable, "-m", "edgeft", "--help"],
    "import click": [sys.executable, "-c", "import click"],
}


def seconds(command: list[str]) -> float:
    """Wall time of one process."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    for command in COMMANDS.values():
        seconds(command)
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(RUNS):
        for name, command in COMMANDS.items():
            taken[name].append(seconds(command))
    medians = {name: statistics.median(values) for name, values in taken.items()}
    ratio = medians["edgeft --help"] / medians["import click"]
    print(json.dumps({"median_s": medians, "ratio": round(ratio, 2), "claim": "<= 2.0", "runs": RUNS}))


if __name__ == "__main__":
    main()
