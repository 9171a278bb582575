"""The page of a report, on a synthetic report of seven models; nothing in it was measured."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from edgeft.bench import plot_data, plots
from edgeft.bench.answers import figures
from edgeft.bench.context import DEPTHS, FORMULA, at_length, effective
from edgeft.bench.drawing import style
from edgeft.bench.entries import compare_with_reference
from edgeft.bench.html import flags_of, page
from edgeft.bench.importers import import_file
from edgeft.bench.paired import pairs
from edgeft.bench.speed import Point, point_figures
from edgeft.bench.stats import bootstrap
from edgeft.bench.verdict import verdicts
from edgeft.types import BenchReport

ROWS = 120
# name, format, MB, share right, decode tok/s, ms to the first token, GB in memory, KLD
MODELS = (
    ("synthetic-merged", "safetensors", 272, 0.72, 15, 320, 1.19, None),
    ("synthetic-gguf-q3_k_m", "gguf", 94, 0.62, 125, 300, 0.26, 0.063),
    ("synthetic-gguf-q4_k_m", "gguf", 105, 0.70, 104, 415, 0.23, 0.025),
    ("synthetic-gguf-q8_0", "gguf", 145, 0.72, 99, 380, 0.26, 0.005),
    ("synthetic-gptq-4", "gptq", 118, 0.68, 35, 395, 1.09, 0.177),
    ("synthetic-onnx-int4", "onnx", 90, 0.40, 98, 310, 0.33, 0.446),
    ("synthetic-onnx-int8", "onnx", 157, 0.71, 6, 700, 0.48, 0.002),
)
LIMITS = {"memory_budget_gb": 1.0, "decode_tok_per_s": 98.0, "ttft_s": 0.65}


def synthetic() -> BenchReport:
    """A copy of the synthetic report, which a test may change."""
    return copy.deepcopy(made_once())


@functools.cache
def made_once() -> BenchReport:
    """A report as `bench` makes it, of models that do not exist and numbers from a seeded generator."""
    chance = np.random.default_rng(7)
    hardness = chance.uniform(size=ROWS)
    items, results = [], []
    for name, kind, mb, share, rate, ttft_ms, gb, kld in MODELS:
        answers = [
            {"model_id": name, "item_id": str(i), "task": "exact", "correct": bool(h < share), "score": float(h < share),
             "ttft_s": 0.1, "e2e_s": 0.2, "prompt_tokens": 40, "output_tokens": 5}
            for i, h in enumerate(np.clip(hardness + chance.normal(0, 0.06, ROWS), 0, 1))
        ]  # fmt: skip
        items += answers
        speed = speed_of(chance, rate, ttft_ms / 1e3)
        bound = 33.9e9 / (mb * 1e6 + 3.7e6)
        result = {
            "id": name, "kind": "artifact", "engine": kind, "format": kind, "path": name, "size_bytes": mb * 10**6,
            "bits_per_weight": mb / 17, "speed": speed, "accuracy": figures(answers), "price": None,
            "load": {"cold_start_s": 0.4, "load_s": 0.3, "load_mode": "mmap"},
            "memory": {"peak_rss_bytes": int(gb * 1e9), "peak_anon_bytes": int(gb * 6e8), "peak_file_bytes": int(gb * 4e8)},
            "fidelity": fidelity_of(kld), "load_test": load_of(rate), "error": None,
            "energy": {"method": "wall meter", "joules_per_output_token": 20 / rate, "mean_w": 20.0, "mean_w_ci95": [19, 21], "n": 12},
            "flags": [{"what": "busy", "detail": "other processes used 0.5 cores", "round": i} for i in range(3)] if kind == "gptq" else [],
            "context": context_of(share) if kind == "gguf" else None,
            "roofline": {"bandwidth_gb_per_s": 33.9, "decode_bound_tok_per_s": bound, "bandwidth_share": rate / bound, "over_100": None},
        }  # fmt: skip
        result["verdict"] = verdicts(result, LIMITS)
        results.append(result)
    compare_with_reference(results, items, MODELS[0][0])
    return BenchReport(
        created_at="2026-01-01T00:00:00+00:00", environment={}, results=results, reference=MODELS[0][0],
        profile={"id": "synthetic-box", "name": "Synthetic box", "limits": LIMITS},
        workload={"rows": ROWS, "tasks": "synthetic.jsonl", "max_tokens": 16, "threads": 2},
        pairs=pairs(items, [m[0] for m in MODELS]),
    )  # fmt: skip


def speed_of(chance, rate: float, ttft_s: float) -> dict:
    points = []
    for point, longer in ((Point(128, 64), 1.0), (Point(512, 16), 3.6)):
        requests = []
        for _ in range(12):
            gaps = chance.gamma(9, 1 / rate / 9, point.output_tokens - 1)
            first = ttft_s * longer * chance.normal(1, 0.04)
            requests.append({
                "prompt_tokens": point.prompt_tokens + 3, "output_tokens": point.output_tokens, "ttft_s": first,
                "e2e_s": first + gaps.sum(), "itl_s": gaps.tolist(), "decode_tok_per_s": len(gaps) / gaps.sum(),
            })  # fmt: skip
        points.append(point_figures(point, requests))
    more = {"points": points, "rounds": 12, "settled": True, "shortened_to_tokens": None, "side": "client"}
    return {**{k: v for k, v in points[0].items() if k not in ("asked", "round")}, **more}


def fidelity_of(kld: float | None) -> dict | None:
    if kld is None:
        return None
    found = {
        "kld_mean": kld,
        "kld_ci95": [0.9 * kld, 1.1 * kld],
        "same_top1": 1 - kld / 2,
        "same_top1_ci95": [1 - kld, 1.0],
    }
    return {
        "all": {**found, "positions": 400, "rows": 16},
        "answer": {**found, "positions": 70, "rows": 16},
        "logits_build": "none",
    }


def context_of(share: float) -> dict:
    """Three lengths, the longest at half of what is right at the shortest."""
    asked = [
        {"tokens": tokens, "depth": depth, "repetition": i, "right": i < 10 * share * (0.5 if tokens == 1024 else 1),
         "prompt_tokens": tokens - 3, "ttft_s": tokens / 2000 + i / 1000}
        for tokens in (256, 512, 1024) for depth in DEPTHS for i in range(10)
    ]  # fmt: skip
    lengths = [at_length(tokens, asked) for tokens in (256, 512, 1024)]
    return {
        "label": "synthetic", "lengths": lengths, "effective_tokens": effective(lengths), "formula": FORMULA, "rows": [],
        "side": "client",
    }  # fmt: skip


def load_of(rate: float) -> dict:
    closed = [
        {
            "clients": n,
            "requests_per_s": t,
            "output_tok_per_s": 32 * t,
            "goodput_per_s": t if n < 8 else 0.4 * t,
        }
        for n in (1, 2, 4, 8)
        if (t := rate / 50 * min(n, 3.5) ** 0.6)
    ]
    return {"closed": closed, "open": [], "knee_clients": 4, "limits": {"ttft_s": 0.65, "tpot_s": 0.1}}


def pictures(text: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", text, re.DOTALL)


@pytest.fixture(scope="module")
def text() -> str:
    return page(synthetic())


# --- the page


def test_all_plots_are_there_and_are_whole_pictures(text):
    titles = re.findall(r"<figure><h2>(.*?)</h2>", text)
    assert titles == [
        "Pareto front: quality over decode", "Accuracy over size", "Latency, 128 tokens in, 64 out",
        "Latency, 512 tokens in, 16 out", "Roofline (memory bandwidth)", "Memory",
        "Paired differences", "Load", "Effective context", "Energy",
    ]  # fmt: skip
    found = pictures(text)
    assert len(found) == len(titles)
    for picture in found:
        ElementTree.fromstring(picture)
        assert "synthetic-gguf-q8_0" in picture, "text must stay text, and every model be named"
    assert "Energy: not measured." not in text


def test_the_page_is_small_and_loads_nothing(text):
    assert len(text) < 1_000_000
    assert not re.search(r"<script|<link|<img|<iframe|@import|url\((?!#)|\ssrc=|<a\s", text)
    assert set(re.findall(r'(?:xlink:)?href="(.)', text)) <= {"#"}
    assert set(re.findall(r"https?://[^\"\s<]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_the_same_report_gives_the_same_bytes(text):
    assert page(synthetic()) == text


def test_what_was_not_measured_is_said_and_not_drawn():
    made = synthetic()
    for r in made.results:
        r |= dict.fromkeys(
            (
                "speed",
                "memory",
                "energy",
                "roofline",
                "load_test",
                "context",
                "fidelity",
                "accuracy",
                "against_reference",
            )
        )
        r |= {"verdict": [], "flags": None}
    text = page(BenchReport(**{**vars(made), "pairs": []}))
    assert not pictures(text)
    for words in (
        "Energy: not measured.", "Memory: not measured.", "Latency: not measured.", "Load (several clients at once): not measured.",
        "Pareto front: quality not measured.", "Accuracy over size: not measured", "Roofline: ", "Paired differences: ",
        "Effective context: not measured.",
    ):  # fmt: skip
        assert text.count(f"<li>{words}") == 1, words


def test_a_model_that_a_plot_lacks_is_named_under_it():
    made = synthetic()
    made.results[2]["energy"] = made.results[3]["speed"] = None
    with style():
        energy, (latency, _) = plots.energy(made), plots.latencies(made)
    assert energy.caption.endswith("Not measured, so not drawn: synthetic-gguf-q4_k_m.")
    assert "synthetic-gguf-q4_k_m" not in energy.svg
    assert latency.caption.endswith("not drawn: synthetic-gguf-q8_0.")


def test_names_are_escaped_and_no_formula_is_read_from_them():
    made = synthetic()
    made.results[1]["id"] = 'a<b>&"$x_1$'
    text = page(made)
    assert "<b>&" not in text and "a&lt;b&gt;&amp;" in text
    for picture in pictures(text):
        ElementTree.fromstring(picture)
    assert any("$x_1$" in "".join(ElementTree.fromstring(p).itertext()) for p in pictures(text))


def test_verdicts_and_flags_stand_in_words(text):
    assert '<b class="pass">PASS</b>' in text
    assert '<b class="fail">FAIL memory_budget_gb</b>' in text
    assert '<b class="open">INCONCLUSIVE decode_tok_per_s</b>' in text
    assert '<td class="words">busy in 3 of 12</td>' in text and '<td class="words">none</td>' in text
    assert flags_of({"flags": None, "speed": {"rounds": 3}}) == flags_of({"flags": [], "speed": None}) == "–"


def test_an_older_report_is_drawn_as_far_as_it_goes():
    """It has one shape of request without its name, no ITL, no flags, no pairs."""
    made = synthetic()
    for r in made.results:
        r["speed"] = {k: r["speed"][k] for k in ("ttft_s", "decode_tok_per_s", "prefill_tok_per_s", "side")}
        for key in ("flags", "verdict", "roofline", "energy", "load_test", "error", "context"):
            del r[key]
    text = page(BenchReport(**{**vars(made), "pairs": []}))
    assert "<h2>Latency</h2>" in text and "Gaps between tokens (ITL): not kept." in text
    assert "Energy: not measured." in text and "right %: answers of" in text


@pytest.mark.parametrize(("name", "pictured"), [("llama-bench", 0), ("guidellm", 1)])
def test_a_report_of_another_tool_is_drawn_as_far_as_it_goes(name, pictured):
    """GuideLLM may keep percentiles without samples: ticks without dots."""
    text = page(import_file(Path(__file__).parent / "imports" / f"{name}.json"))
    assert len(pictures(text)) == pictured == text.count("Without dots: percentiles alone were kept.")


def test_the_memory_budget_is_drawn_or_said_to_be_far_off():
    made = synthetic()
    assert "1 GB: the dashed line" in plots.memory(made).caption
    made.profile["limits"] = {"memory_budget_gb": 64}
    assert "64 GB, far right of this axis" in plots.memory(made).caption
    made.profile["limits"] = {}
    assert "budget" not in plots.memory(made).caption


# --- the numbers under the plots


@pytest.mark.parametrize(
    ("points", "less", "expected"),
    [
        ([(1, 5), (2, 4), (3, 1), (2, 3), (1, 1)], False, [0, 1, 2]),
        ([(3, 5), (2, 4), (1, 1), (2, 3), (3, 4)], True, [2, 1, 0]),
        ([(1, 1), (1, 1)], False, [0, 1]),
        ([(1, 2), (1, 3)], False, [1]),
        ([(2, 2)], True, [0]),
    ],
)
def test_the_front_holds_what_no_other_beats(points, less, expected):
    assert plot_data.front(points, less) == expected


def test_the_staircase_goes_round_what_is_beaten():
    assert plot_data.staircase([(1, 5), (3, 2)], 0, 0) == [(0, 5), (0, 5), (1, 5), (1, 2), (3, 2), (3, 0)]
    assert plot_data.staircase([(1, 2), (3, 5)], 0, 9, True) == [
        (9, 5),
        (9, 5),
        (3, 5),
        (3, 2),
        (1, 2),
        (1, 0),
    ]


def test_quality_falls_back_to_what_is_known():
    made = synthetic()
    for r in made.results:
        r["accuracy"] = None
    assert plot_data.first_known(plot_data.QUALITY, made.results)[0].startswith("same top-1")
    for r in made.results:
        r["speed"] = None
        if r["fidelity"]:
            del r["fidelity"]["all"]["same_top1"]
    with style():
        drawn = plots.pareto(made)
    assert drawn.title == "Pareto front: quality over size" and "-KLD" in drawn.svg
    found = plot_data.minus_kld(made.results[1])
    assert found.low < found.middle == -0.063 < found.high


def test_dots_are_thinned_evenly_by_rank_and_that_is_said(text):
    samples = list(np.random.default_rng(0).permutation(1000).astype(float))
    kept = plot_data.thinned(samples)
    assert len(kept) == 300 and (kept[0], kept[-1]) == (0, 999) and np.diff(kept).max() <= 4
    assert plot_data.thinned([3, 1, 2]) == [1, 2, 3]
    assert text.count("Of more than 300 samples 300 are drawn") == 1, (
        "of the first shape alone: 756 gaps a model"
    )


def test_differences_are_turned_towards_the_reference():
    made = synthetic()
    base, found = plot_data.differences(made)
    assert base == "synthetic-merged" and [d.id for d in found] == [m[0] for m in MODELS[1:]]
    turned = copy.deepcopy(made.pairs)
    for p in turned:
        p |= {
            "a": p["b"],
            "b": p["a"],
            "points": -p["points"],
            "points_ci95": [-p["points_ci95"][1], -p["points_ci95"][0]],
        }
    assert plot_data.differences(BenchReport(**{**vars(made), "pairs": turned})) == (base, found)
    other, _ = plot_data.differences(BenchReport(**{**vars(made), "reference": None}))
    assert other == "synthetic-merged", "without a reference the first model"
    assert bootstrap([1.0] * 5, np.mean) == [1.0, 1.0]
