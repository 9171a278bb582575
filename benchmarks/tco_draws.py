"""10,000 draws of every shipped scenario: the whole table, and the draws alone, against the same formulas called draw by draw.

Prints one JSON line. The rival is a plain loop over 50 draws on the same figures, scaled to 10,000.
"""

from __future__ import annotations

import json
import time

import numpy as np

from edgeft.tco import cashflow, tabulate
from edgeft.tco.scenario import read_scenario
from edgeft.tco.shipped import names, shipped
from edgeft.tco.table import World
from edgeft.tco.uncertainty import DRAWS, SEED, draw, simulate

LOOP = 50


def main() -> None:
    """Measure and print."""
    found = {}
    for name in names():
        scenario = read_scenario(shipped(name))
        tabulate(scenario, 100)  # imports
        began = time.perf_counter()
        tabulate(scenario)
        whole = time.perf_counter() - began
        began = time.perf_counter()
        world = draw(scenario, DRAWS, SEED)
        drawn = simulate(world, DRAWS)
        fast = time.perf_counter() - began
        began = time.perf_counter()
        worst = 0.0
        for number in range(LOOP):
            one = World(scenario, {k: v[number] if np.ndim(v) else v for k, v in world.numbers.items()})
            for key, column in scenario.columns.items():
                npc = float(cashflow.net_present_cost(column.kind, one.values(column)))
                worst = max(worst, abs(npc / drawn[key].npc[number] - 1))
        slow = (time.perf_counter() - began) * DRAWS / LOOP
        found[name] = {
            "table_s": whole,
            "draws_s": fast,
            "loop_s": slow,
            "loop_over_draws": slow / fast,
            "largest_difference": worst,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
