"""Quality of B against A on the rows that both answered: right answers and scores; KLD and sizes, which are not tested."""

from __future__ import annotations

from typing import Any

from edgeft.bench.significance import ALPHA, mcnemar_could_show, paired_mean
from edgeft.bench.stats import mcnemar

Lines = list[dict[str, Any]]  # of items.jsonl, one model's

SIZES = {"peak memory bytes": ("memory", "peak_rss_bytes"), "size bytes": (None, "size_bytes")}


def common(a: Lines, b: Lines, key: str) -> list[tuple[Any, Any]]:
    """Pairs of values of the rows that both answered; a row whose text changed is another row."""
    left, right = ({line["item_id"]: line for line in lines} for lines in (a, b))
    return [
        (left[i][key], right[i][key])
        for i in left
        if i in right
        and left[i].get("row_hash") == right[i].get("row_hash")
        and left[i].get(key) is not None
        and right[i].get(key) is not None
    ]


def accuracy_figure(a: Lines, b: Lines) -> dict[str, Any] | None:
    """Share right in points, exact McNemar; None without common scored rows."""
    pairs = common(a, b, "correct")
    if not pairs:
        return None
    lost, gained = sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)
    difference, interval, _ = paired_mean([float(y) - float(x) for x, y in pairs])
    return {
        "figure": "right %",
        "a": 100 * sum(bool(x) for x, _ in pairs) / len(pairs),
        "b": 100 * sum(bool(y) for _, y in pairs) / len(pairs),
        "difference": 100 * difference,
        "ci95": [100 * x for x in interval],
        "p": mcnemar(lost, gained),
        "measurement": "right",
        "n": len(pairs),
        "lost": lost,
        "gained": gained,
        "test": "exact McNemar on common rows; interval: paired bootstrap",
    }


def score_figure(a: Lines, b: Lines) -> dict[str, Any] | None:
    """Mean score; None where every score is 0 or 1, which the share right says already."""
    pairs = common(a, b, "score")
    if not pairs or all(value in (0, 1) for pair in pairs for value in pair):
        return None
    difference, interval, p = paired_mean([y - x for x, y in pairs])
    return {
        "figure": "mean score",
        "a": sum(x for x, _ in pairs) / len(pairs),
        "b": sum(y for _, y in pairs) / len(pairs),
        "difference": difference,
        "ci95": interval,
        "p": p,
        "measurement": "score",
        "n": len(pairs),
        "test": "signs flipped at random on common rows; interval: paired bootstrap",
    }


def judge(figure: dict[str, Any], tests: int) -> None:
    """Add the verdict by the corrected p and, for right answers, the points that this n could have shown."""
    if figure["figure"] == "right %":
        reach = mcnemar_could_show(figure["n"], figure["lost"] + figure["gained"], ALPHA / tests)
        figure["could_show"] = None if reach is None else 100 * reach
    told = figure["p_holm"] < ALPHA
    figure["verdict"] = "not told apart" if not told else "better" if figure["difference"] > 0 else "worse"
    if not told:
        figure["why"] = "within chance"


def kld_figure(part: str, a: dict[str, Any], b: dict[str, Any], same_rows: bool) -> dict[str, Any] | None:
    """KLD of the `answer` or `all` positions. A report keeps means and intervals alone: do the intervals overlap?"""
    left, right = (((r.get("fidelity") or {}).get(part) or {}) for r in (a, b))
    if left.get("kld_mean") is None or right.get("kld_mean") is None:
        return None
    figure = {
        "figure": f"KLD {part} nats",
        "a": left["kld_mean"],
        "b": right["kld_mean"],
        "difference": right["kld_mean"] - left["kld_mean"],
        "ci95_a": left.get("kld_ci95"),
        "ci95_b": right.get("kld_ci95"),
        "p": None,
    }
    if not same_rows or left.get("positions") != right.get("positions"):
        return {**figure, "verdict": "not comparable", "why": "taken on other rows"}
    bases = [(r.get("fidelity") or {}).get("basis", "full vocabulary") for r in (a, b)]
    if bases[0] != bases[1]:
        return {**figure, "verdict": "not comparable", "why": f"{bases[0]}, and {bases[1]}"}
    if not figure["ci95_a"] or not figure["ci95_b"]:
        return {**figure, "verdict": "not tested", "why": "no interval was kept"}
    (low_a, high_a), (low_b, high_b) = figure["ci95_a"], figure["ci95_b"]
    if high_b < low_a or low_b > high_a:
        return {
            **figure,
            "verdict": "nearer" if high_b < low_a else "farther",
            "why": "intervals do not overlap",
        }
    return {**figure, "verdict": "not told apart", "why": "intervals overlap"}


def size_figure(name: str, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any] | None:
    """Memory or size as a ratio, without a test."""
    part, key = SIZES[name]
    left, right = (((r.get(part) or {}) if part else r).get(key) for r in (a, b))
    if not left or not right:
        return None
    verdict = "smaller" if right < left else "larger" if right > left else "equal"
    return {
        "figure": name,
        "a": left,
        "b": right,
        "ratio": right / left,
        "p": None,
        "verdict": verdict,
        "why": "not tested",
    }
