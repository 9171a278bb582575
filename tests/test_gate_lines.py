"""The gate's lines from figures alone: intervals, limits, few rows."""

from __future__ import annotations

import random

import numpy as np
import pytest

from edgeft.bench import stats
from edgeft.compress import gate_limits, gate_quality
from edgeft.errors import UsageError
from tests.conftest import ROOT
from tests.test_cli import assert_two_lines, edgeft


def retention_of(artefact: list[float], merged: list[float], base: list[float], bits: int = 4) -> dict:
    return gate_quality.task_lines(artefact, merged, base, gate_limits.of_width(gate_limits.load(), bits))[0]


def test_retention_is_judged_by_its_interval():
    merged, base = [1.0] * 40 + [0.0] * 20, [0.0] * 60
    erased = retention_of([0.0] * 60, merged, base)
    assert erased["verdict"] == "FAIL" and erased["seen"] == 0.0 and erased["limit"] == 0.65
    kept = retention_of(merged, merged, base)
    assert kept["verdict"] == "PASS" and kept["ci95"] == [1.0, 1.0]
    near = retention_of([1.0] * 25 + [0.0] * 35, merged, base)
    assert (
        near["seen"] == pytest.approx(25 / 40)
        and near["verdict"] == "INCONCLUSIVE"
        and near["n_to_decide"] > 60
    )
    few = retention_of([0.0] * 4, [1.0] * 4, [0.0] * 4)
    assert few["verdict"] == "INCONCLUSIVE" and "fewer" in few["why"]
    assert retention_of(base, base, merged)["verdict"] == "NOT RUN"


def test_the_interval_of_retention_against_a_slow_bootstrap():
    chance = np.random.default_rng(1)
    base = chance.integers(0, 2, 50) * chance.integers(0, 2, 50)
    merged = np.maximum(base, chance.integers(0, 2, 50))
    quantized = merged * chance.integers(0, 2, 50)
    value, ci95 = stats.retention(quantized, merged, base)
    assert value == pytest.approx((quantized.sum() - base.sum()) / (merged.sum() - base.sum()))
    found = []
    for _ in range(4000):
        pick = chance.integers(0, 50, 50)
        found.append((quantized[pick].sum() - base[pick].sum()) / (merged[pick].sum() - base[pick].sum()))
    assert ci95 == pytest.approx(np.percentile(found, [2.5, 97.5]), abs=0.08)
    assert stats.retention([0, 0, 1], [1, 0, 1], [0, 0, 1])[1] is None, "three rows show no gain for sure"


def test_an_answer_is_left_only_where_it_can_not_be_right_any_more():
    from edgeft.bench.score import hopeless, score

    pieces = ("card", " lost", "Card", ".", "  ", " card lost", "lost", "x")
    chance = random.Random(0)
    left = 0
    for task in ("exact", "choice", "numeric"):
        row = {"task": task, "messages": [{}, {"role": "assistant", "content": "card lost"}]}
        for _ in range(2000):
            begun, rest = ("".join(chance.choices(pieces, k=chance.randint(0, 3))) for _ in range(2))
            if hopeless(row, begun):
                left += 1
                assert score(row, begun + rest) == 0.0, (task, begun, rest)
    assert left > 1000


def test_limits_are_read_strictly(tmp_path):
    assert gate_limits.load({4: {"retention": 0.9}, "all": {"retention": 0.5}})[4]["retention"] == 0.9
    assert gate_limits.load({"all": {"kld": None}})[2]["kld"] is None
    for own, said in (
        ({4: {"retenton": 1}}, "'retention'"), ({7: {}}, "'7'"), ({4: {"kld": "x"}}, "'x'"), ({4: 1}, "not a map"), ([], "no map"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            gate_limits.load(own)
    bad = tmp_path / "gate.yaml"
    bad.write_text("4: {kdl: 1}\n")
    assert_two_lines(edgeft("compress", "nowhere", "--to", "gguf:f16", "--gate", bad), 2, "nowhere")
    with pytest.raises(UsageError, match="'kld'"):
        gate_limits.load(bad)
    widths = {"q4_k_m": 4, "bf16": 16, "f32": 32, "int8": 8, "8": 8, "iq3_xxs": 3}
    assert {v: gate_limits.bits_of(v) for v in widths} == widths
    limits = gate_limits.load()
    assert gate_limits.of_width(limits, 32) == limits[16] and gate_limits.of_width(limits, 7) == limits[6]


def test_the_pages_table_is_the_limits_file():
    limits = gate_limits.load()
    names = list(limits[16])
    table = ["| bits | " + " | ".join(names) + " |", "|---:|" + "---:|" * len(names)]
    for bits, values in limits.items():
        table.append(
            f"| {bits} | " + " | ".join("–" if v is None else f"{v:g}" for v in values.values()) + " |"
        )
    assert "\n".join(table) in (ROOT / "docs" / "gate.md").read_text(), "\n".join(table)


def test_few_rows_are_judged_by_their_positions():
    """One row drawn again and again would look certain: 22 of 23 tokens alike do not break a limit of .97."""
    from edgeft.compress import gate_quality as quality

    def found(rows, alike, positions):
        return {
            "own": {
                "build": "test",
                **{
                    key: [[0.001] * positions] * rows
                    for key in ("kld", "right_delta", "nll", "nll_reference")
                },
                "answer": [[1] * positions] * rows,
                "same_top1": [[1] * alike + [0] * (positions - alike)] * rows,
            }
        }

    limits = {"kld": 0.01, "same_top1": 0.97}

    def verdict(*words):
        (line,) = (x for x in quality.kld_lines(found(*words), limits) if x["check"] == "same top-1 own")
        return line["verdict"], "interval" in line

    assert verdict(1, 22, 23) == ("INCONCLUSIVE", True)
    assert verdict(1, 2, 23) == ("FAIL", True), "what is broken is caught on one row as well"
    assert verdict(20, 22, 23) == ("FAIL", False)
