"""Does an artefact hold to a profile's limits? PASS, FAIL or INCONCLUSIVE, from the interval of what was measured."""

from __future__ import annotations

import math
from typing import Any

from edgeft.bench.energy import WALL
from edgeft.bench.pack_estimate import ESTIMATE
from edgeft.bench.roofline import held_bytes, on_cpu
from edgeft.bench.targets import BASE
from edgeft.errors import GateError, Inconclusive

PASS, FAIL, INCONCLUSIVE = "PASS", "FAIL", "INCONCLUSIVE"
# limit of a profile -> (what is held to it, must stay below?)
JUDGED = {
    "memory_budget_gb": ("peak memory of the process tree, GB", True),
    "ttft_s": ("median TTFT, s", True),
    "tpot_s": ("median TPOT, s", True),
    "decode_tok_per_s": ("median decode rate, tok/s", False),
    "watts": ("mean power, W", True),
    "kld_nats": ("mean KLD to the reference, nats", True),
}


def verdicts(
    result: dict[str, Any], limits: dict[str, float], kind: str | None = None
) -> list[dict[str, Any]]:
    """For each limit of a profile of this kind: the figure, its interval, the verdict, and the samples or processes that would decide."""
    found = []
    for limit, bound in limits.items():
        what, below = JUDGED[limit]
        value, interval, n = figure(result, limit, kind)
        by_gpu = limit == "memory_budget_gb" and not on_cpu(result)
        if by_gpu and kind == "gpu":
            what = "memory held on the GPU, GB"
        over = "processes" if ((result.get("speed") or {}).get(limit) or {}).get("processes") else "samples"
        entry: dict[str, Any] = {
            "limit": limit,
            "what": what,
            "bound": bound,
            "value": value,
            "ci95": interval,
            "n": n,
            "n_of": over,
        }
        if value is None:
            unknown = (
                "it ran on a GPU, which the profile has not" if by_gpu and kind == "cpu" else "not measured"
            )
            entry |= {"verdict": INCONCLUSIVE, "why": unknown, "n_needed": None}
        else:
            low, high = interval or (value, value)
            verdict = judge(low, high, bound, below)
            entry |= {"verdict": verdict, "why": None, "n_needed": n_needed(value, low, high, bound, n)}
            if verdict == PASS and (why := only_a_part(result, limit)):
                entry |= {"verdict": INCONCLUSIVE, "why": why, "n_needed": None}
            elif verdict != INCONCLUSIVE:
                entry["n_needed"] = None
            elif entry["n_needed"] is None:
                entry["why"] = "the figure lies on the limit"
        found.append(entry)
    return found


def only_a_part(result: dict[str, Any], limit: str) -> str | None:
    """Why the figure of a limit can show that it is broken but not that it is kept; None where it can show both."""
    if limit == "watts" and (method := (result.get("energy") or {}).get("method")) != WALL:
        return f"{method} leaves out the rest of the box"
    if limit == "kld_nats" and "kld_lower_bound" in kld_figures(result):
        estimated = result["fidelity"]["basis"].startswith(ESTIMATE)
        return None if estimated else "a pack without sampled tail tokens gives a lower bound alone"
    return None


def kld_figures(result: dict[str, Any]) -> dict[str, Any]:
    """The KLD figures over all positions, or over the answer's where those alone were measured."""
    found = result.get("fidelity") or {}
    return found.get("all") or found.get("answer") or {}


def judge(low: float, high: float, bound: float, below: bool) -> str:
    """Is the whole interval on the right side of the bound, on the wrong one, or across it?"""
    if below:
        low, high, bound = -high, -low, -bound
    return PASS if low >= bound else FAIL if high < bound else INCONCLUSIVE


def n_needed(value: float, low: float, high: float, bound: float, n: int | None) -> int | None:
    """Samples at which the interval would no longer reach the bound, if the figure stays: its width goes by 1/sqrt(n)."""
    distance = abs(value - bound)
    if not n or not distance:
        return None
    reach = value - low if bound < value else high - value
    return max(n + 1, math.ceil(n * (reach / distance) ** 2))


def figure(
    result: dict[str, Any], limit: str, kind: str | None = None
) -> tuple[float | None, tuple[float, float] | None, int | None]:
    """(value, interval, n) of what a limit is about; None where it was not measured."""
    if limit == "memory_budget_gb":
        peak = held_bytes(result, kind)
        return (peak / 1e9 if peak else None), None, None
    if limit == "watts":
        energy = result.get("energy") or {}
        return energy.get("mean_w"), energy.get("mean_w_ci95"), energy.get("n")
    if limit == "kld_nats":
        kld = kld_figures(result)
        if kld.get("kld_mean") is None:
            return None, None, None
        low, high = kld["kld_ci95"]
        if bound := kld.get(
            "kld_lower_bound_ci95"
        ):  # by a pack: what its bound reaches is reached for certain
            low = max(low, bound[0])
        return kld["kld_mean"], (low, max(low, high)), kld.get("rows")
    found = (result.get("speed") or {}).get(limit)
    if not found:
        return None, None, None
    return found["p50"], tuple(found["p50_ci95"]), found.get("processes") or found["n"]


def gated(report: Any) -> None:
    """Raise GateError where an artefact fails a limit, Inconclusive where one is not decided or no limit was set.

    The reference and the base are judged only where nothing else was measured: they are there to be compared with.
    """
    others = [r for r in report.results if r["id"] not in (report.reference, BASE)] or report.results
    found = [(r["id"], v) for r in others for v in r.get("verdict") or []]
    broken = [r for r in others if r.get("error")]
    failed = [
        f"{name}: {v['limit']} {v['value']:.3g} against {v['bound']:g}"
        for name, v in found
        if v["verdict"] == FAIL
    ]
    if failed or broken:
        words = failed + [f"{r['id']} broke off: {r['error']}" for r in broken]
        raise GateError(
            f"{len(words)} limit(s) do not hold; {words[0]}",
            "a smaller artefact: edgeft compress … --fit SIZE, or a larger box",
        )
    if not found:
        raise Inconclusive(
            f"the profile {report.profile['id']} sets no limits.", "edgeft profiles list; --profile ID"
        )
    if open_ := [(name, v) for name, v in found if v["verdict"] == INCONCLUSIVE]:
        name, v = open_[0]
        why = (
            v["why"]
            or f"{v['value']:.3g} against {v['bound']:g}; about {v['n_needed']} {v.get('n_of', 'samples')} would decide"
        )
        raise Inconclusive(
            f"{len(open_)} limit(s) are not decided; {name}: {v['limit']}, {why}",
            "--power-csv for watts; a profile of your own may leave the limit out"
            if v["value"] is None
            else "--restarts gives more processes, --repetitions and --speed-seconds more samples of each",
        )
