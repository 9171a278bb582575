"""Every figure that a scenario can give: what it is, what it may be, and what is assumed where nobody says.

A default of None: the cell that needs it says that it is missing. Defaults are assumptions, with a range (P10, P90) where
they are uncertain, and stand in the list of what the table rests on like every other.
"""

from __future__ import annotations

from dataclasses import dataclass

INF = float("inf")
API, OWN, FLEET, CLOUD, ROUTED = "api", "own", "fleet", "cloud", "routed"
KINDS = (API, OWN, FLEET, CLOUD, ROUTED)
BOXES = (OWN, FLEET)
MACHINES = (OWN, FLEET, CLOUD)


@dataclass(frozen=True)
class Input:
    """One figure: its meaning, the kinds of column that have it, its default and range, its bounds."""

    about: str
    kinds: tuple[str, ...]  # () for one that belongs to the whole scenario
    default: float | None = None
    range: tuple[float, float] | None = None
    bounds: tuple[float, float] = (0.0, INF)
    whole: bool = False  # a whole number
    own_only: bool = False  # a column has it only where the column itself gives it


EVERY = KINDS
INPUTS: dict[str, Input] = {
    # what is asked of it
    "requests_per_month": Input("requests a month", ()),
    "growth_per_month": Input("growth of the requests from each month to the next", (), 0, bounds=(0, 1)),
    "tokens_in": Input("prompt tokens a request, by the artefact's tokenizer", EVERY),
    "tokens_out": Input("answer tokens a request", EVERY),
    "peak_factor": Input("requests at the peak over the mean of the month", (), 4, bounds=(1, INF)),
    "prompt_cached_share": Input("share of the prompt that an API reads from its prompt cache", EVERY, 0, bounds=(0, 1)),
    "prompt_written_share": Input("share of the prompt that is written to that cache", EVERY, 0, bounds=(0, 1)),
    "answer_cache_share": Input("share of requests answered from edgeft's own cache", EVERY, 0, bounds=(0, 1)),
    "wrong_answer_usd": Input("what a wrong answer costs", ()),
    # money and time
    "months": Input("months that are looked at", (), 36, bounds=(1, 120), whole=True),
    "interest_per_year": Input("cost of capital", (), 0.08, bounds=(0, 1)),
    "usd_per_kwh": Input("price of electricity", (), 0.15),
    "kgco2_per_kwh": Input("carbon of the grid", (), 0.4, (0.1, 0.7)),
    "usd_per_staff_hour": Input("an hour of staff, all told", (), 60),
    # a version of the model
    "data_usd": Input("preparing data, once", EVERY, 0, own_only=True),
    "training_usd": Input("training a version", EVERY, 0, own_only=True),
    "requantize_usd": Input("quantizing and evaluating a version again", EVERY, 0, own_only=True),
    "version_months": Input("months until a new version is made", EVERY, 12, bounds=(1, INF)),
    # every column's running
    "staff_hours_per_month": Input("hours of staff a month", EVERY, 0),
    "storage_gb": Input("storage: models, logs, kept answers", EVERY, 0),
    "usd_per_gb_month": Input("a GB of storage a month", EVERY, 0.1),
    "other_usd_per_month": Input("licences, hosting, whatever else, a month", EVERY, 0),
    # APIs
    "usd_per_mtok_in": Input("1M prompt tokens", (API,)),
    "usd_per_mtok_read": Input("1M prompt tokens from its prompt cache", (API,)),
    "usd_per_mtok_write": Input("1M prompt tokens written to it", (API,)),
    "usd_per_mtok_out": Input("1M answer tokens", (API,)),
    "long_context_tokens": Input("prompt tokens above which the long-context price holds", (API,), INF),
    "usd_per_mtok_in_long": Input("1M prompt tokens above it", (API,)),
    "usd_per_mtok_out_long": Input("1M answer tokens above it", (API,)),
    "retry_share": Input("requests sent twice", (API,), 0),
    "tokenizer_factor": Input("its prompt tokens over the artefact's", (API,), 1, (0.85, 1.15), (0.1, 10)),
    "verbosity_factor": Input("its answer tokens over the artefact's", (API,), 1, (0.8, 1.5), (0.01, 100)),
    "reasoning_tokens": Input("tokens a request that it thinks with, billed as answer", (API,), 0),
    "price_fall_per_year": Input("fall of its prices a year", (API,), 0, (0, 0.4), (0, 0.95)),
    # machines
    "request_s": Input("seconds of a request, one at a time", MACHINES, bounds=(1e-6, INF)),
    "concurrency_gain": Input("requests a second within the limits over those of one at a time", MACHINES, 1, bounds=(1e-3, INF)),
    "prefill_share": Input("share of a request's time before its first token", MACHINES, bounds=(0, 1)),
    "headroom": Input("share of a box kept free at the peak", MACHINES, 0.3, bounds=(0, 0.99)),
    "spares": Input("boxes standing by, switched on", MACHINES, 0, whole=True),
    "power_load_w": Input("watts of a box at work", MACHINES),
    "power_idle_w": Input("watts of an idle box", MACHINES),
    "host_w": Input("watts of the computer that a card sits in, a card", MACHINES, 0),
    "pue": Input("energy at the wall over energy of the box; a server room has 1.2 to 1.6", MACHINES, 1, bounds=(1, 5)),
    # bought ones
    "price_usd": Input("a box, or a card", BOXES),
    "host_usd": Input("the computer that a card sits in, a card", BOXES, 0),
    "residual_share": Input("share of the price that the box brings at the end", BOXES, 0, bounds=(0, 1)),
    "lifetime_years": Input("years until the box is replaced", BOXES, 3, bounds=(0.1, 30)),
    "maintenance_per_year": Input("share of the price a year", BOXES, 0.05, bounds=(0, 1)),
    "hosting_usd_per_unit_month": Input("room, rack and network of a box a month", BOXES, 0),
    "sites": Input("places that need a box of their own", (FLEET,), 1, bounds=(1, INF), whole=True),
    "visits_per_unit_year": Input("site visits a box and year: repair, update by hand", BOXES, 0),
    "usd_per_visit": Input("a site visit", BOXES, 150),
    # rented ones
    "usd_per_unit_hour": Input("an hour of a rented GPU with its computer", (CLOUD,)),
    "hours_per_month": Input("hours a month that it is rented", (CLOUD,), 730, bounds=(0, 744)),
    "rework_share": Input("hours paid again because it was taken away (spot)", (CLOUD,), 0, bounds=(0, 10)),
    # the routed mix
    "local_share": Input("share of what the cache leaves that is tried locally", (ROUTED,), bounds=(0, 1)),
    "escalated_share": Input("share of those that go on to the API, paid twice", (ROUTED,), 0, bounds=(0, 1)),
    # what comes out
    "correct_share": Input("share of tasks solved correctly", EVERY, bounds=(0, 1)),
    "ttft_p95_s": Input("first token, 95th percentile", EVERY),
}  # fmt: skip


def inputs_of(kind: str) -> dict[str, Input]:
    """The figures that a kind of column reads, the scenario's own included."""
    return {name: i for name, i in INPUTS.items() if not i.kinds or kind in i.kinds}
