"""What a cell rests on, what it says when a figure is missing, and which inputs are refused."""

import copy
import json
import sys
from pathlib import Path

import pytest

from edgeft.cli import run
from edgeft.errors import EnvironmentFault, UsageError
from edgeft.tco import tabulate
from edgeft.tco.from_report import from_report
from edgeft.tco.measured import concurrency_gain
from edgeft.tco.prices import FRONTIER, SMALL, list_price, price_table
from edgeft.tco.render import markdown, to_json
from edgeft.tco.scenario import build
from tests.tco_stage import BOX, HAND, SMALLEST, api, box, cents, entry, from_file, own_home, report, scenario  # noqa: F401


def test_zero_price_is_zero_api_cost(tmp_path):
    table = from_file(
        tmp_path, entry(), entry("openai:http://localhost#free", "api", api(0, 0)), apis=("free",)
    )
    assert table.cells["free"]["total_usd"].value == 0
    assert table.verdict[0].startswith("The API is cheaper: free costs $0.00")


def test_the_cheaper_api_is_named_first(tmp_path):
    table = from_file(
        tmp_path, entry(), entry("litellm:low", "api", api(0.01, 0.01)), entry("litellm:high", "api", api(900, 900)), apis=("high", "low")
    )  # fmt: skip
    assert table.rival == "low" and table.verdict[0].startswith("The API is cheaper: low costs ")
    text = markdown(table)
    assert text.index("The API is cheaper") < text.index("|  |")
    assert table.cells["own"]["break_even_month"].text.startswith("never")
    assert "rise to" in table.must["own"]


def test_every_cell_is_tagged_and_measured_ones_lead_to_their_run(tmp_path):
    table = from_file(tmp_path)
    value = to_json(table)
    for column in value["columns"].values():
        for key, cell in column["cells"].items():
            assert cell["tag"] in ("measured", "list price", "assumed", "not known"), key
            for figure in cell["evidence"]:
                assert figure in value["evidence"]
    run_of = "report 2026-11-23T10:00:00+00:00, gguf-q4_k_m (abababababab)"
    assert (
        run_of in value["evidence"]["own.request_s"]["text"]
        and run_of in value["evidence"]["tokens_in"]["text"]
    )
    own = value["columns"]["own"]["cells"]
    assert own["correct_share"]["tag"] == "measured" and own["total_usd"]["tag"] == "assumed"
    assert value["evidence"][f"{SMALL}.usd_per_mtok_in"]["tag"] == "list price"
    assert value["columns"][SMALL]["cells"]["correct_share"]["text"] == "not known: no correct_share"
    assert own["break_even_month"]["text"].endswith("on assumptions")
    json.dumps(value, allow_nan=False)


def test_api_models_of_the_report_are_costed_by_their_own_tokens_and_paired(tmp_path):
    results = report(entry(), entry("litellm:rival", "api", api(), share=0.9, tokens=(66_000, 9_000)))
    pair = {"a": "gguf-q4_k_m", "b": "litellm:rival", "n": 200, "lost": 5, "gained": 25, "points": 10.0, "points_ci95": [5.0, 15.0],
            "mcnemar_p": 0.001, "p_holm": 0.001, "different": True}  # fmt: skip
    results.pairs.append(pair)
    results.save(tmp_path / "report.json")
    table = tabulate(from_report(tmp_path, "box", apis=("rival",)), draws=100)
    figures = table.scenario.columns["rival"].figures
    assert (figures["tokens_in"].value, figures["tokens_out"].value, figures["verbosity_factor"].tag) == (
        330,
        45,
        "measured",
    )
    cell = table.cells["own"]["quality_change"]
    assert (
        cell.value == -10
        and cell.text == "-10.0 (-15.0 to -5.0, 95 %, 200 rows in pairs)"
        and cell.tag == "measured"
    )


@pytest.mark.parametrize("missing", ["power_idle_w", "power_load_w", "price_usd"])
def test_what_the_profile_lacks_is_not_known_and_not_zero(missing, tmp_path):
    box(tmp_path, **{missing: None})
    table = from_file(tmp_path)
    own = table.cells["own"]
    for key in ("total_usd", "usd_per_1k_requests", "usd_per_1k_solved", "break_even_month"):
        assert own[key].value is None and own[key].text == f"not known: profile 'box' has no {missing}", key
    assert table.verdict[0] == f"The cost of gguf-q4_k_m on box is not known: profile 'box' has no {missing}."


def test_speed_from_another_box_is_assumed_and_says_so(tmp_path):
    figure = from_file(tmp_path, profile={"id": "desk"}).scenario.columns["own"].figures["request_s"]
    assert (
        figure.tag == "assumed"
        and figure.value == pytest.approx(1.46)
        and "measured on desk, not on box" in figure.text
    )


def test_speed_from_another_box_is_scaled_by_usable_bandwidth(tmp_path):
    """20 tokens at 10 tok/s are more than the 1.46 s: all of it is decoding, and half the bandwidth doubles it."""
    profile = {"id": "desk", "bandwidth_gb_per_s": 100}
    assert from_file(tmp_path, profile=profile).scenario.columns["own"].figures[
        "request_s"
    ].value == pytest.approx(2.92)
    box(tmp_path, bandwidth_measured_gb_per_s=25)
    assert from_file(tmp_path, profile=profile).scenario.columns["own"].figures[
        "request_s"
    ].value == pytest.approx(5.84)


def test_a_price_range_counts_by_its_middle_and_is_assumed(tmp_path):
    box(tmp_path, price_usd=[1000, 1500])
    figure = from_file(tmp_path).scenario.columns["own"].figures["price_usd"]
    assert (figure.value, figure.range, figure.tag) == (1250, (1000, 1500), "assumed")


def test_a_card_needs_a_computer_and_a_published_price_is_a_list_price(tmp_path):
    assert from_file(tmp_path).scenario.columns["own"].figures["price_usd"].tag == "list price"
    box(tmp_path, kind="gpu", vram_gb=24)
    figures = from_file(tmp_path).scenario.columns["own"].figures
    assert (
        figures["host_usd"].value == 360
        and figures["host_w"].value == 80
        and "the card alone" in figures["host_usd"].text
    )


def test_a_sweep_sizes_the_boxes():
    level = {"clients": 1, "requests_per_s": 2.0, "good_share": 1.0}
    load = {"closed": [level, {"clients": 8, "requests_per_s": 9.0, "good_share": 0.99},
                       {"clients": 32, "requests_per_s": 11.0, "good_share": 0.4}],
            "open": [{"asked_per_s": 7.7, "requests_per_s": 7.6, "good_share": 1.0}], "limits": {"ttft_s": 1.0}}  # fmt: skip
    assert concurrency_gain(load)[0] == 4.5
    load["closed"][1]["good_share"] = load["open"][0]["good_share"] = level["good_share"] = 0.5
    gain, text = concurrency_gain(load)
    assert gain is None and "held the limits (ttft_s 1)" in text
    assert concurrency_gain(None) == (None, "")


def test_no_level_that_holds_the_limits_is_not_known(tmp_path):
    level = {"clients": 1, "requests_per_s": 2.0, "good_share": 0.1}
    load = {"closed": [level], "open": [], "limits": {"ttft_s": 0.01}}
    own = from_file(tmp_path, {**entry(), "load_test": load}).cells["own"]
    assert own["units"].text.startswith("not known: no level of its load test held the limits")


def test_the_best_artefact_is_taken_and_tokens_count_every_request(tmp_path):
    low, high = entry("low", share=0.5), entry("high", share=0.9)
    high["accuracy"]["n"] = 100  # only half of the requests could be scored; the totals are over all 200
    table = from_file(tmp_path, low, high)
    assert table.scenario.columns["own"].title == "high on box"
    assert table.scenario.columns["own"].figures["tokens_in"].value == 300
    assert from_file(tmp_path, low, high, model="low").scenario.columns["own"].title == "low on box"


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"requests_per_month": -1}, "--set requests_per_month in the command is -1"),
        ({"usd_per_kwh": float("nan")}, "--set usd_per_kwh in the command is nan"),
        ({"changed": {"pue": -1}}, "--set pue in the command is -1"),
        ({"changed": {"headroom": 1}}, "--set headroom in the command is 1"),
        ({"changed": {"spares": 1.5}}, "a whole number"),
        ({"changed": {"lifetime": 1}}, "Did you mean 'lifetime_years'?"),
        ({"model": "gguf-q4"}, "Did you mean 'gguf-q4_k_m'?"),
        ({"apis": ("gpt-4o-mni",)}, "Did you mean 'gpt-4o-mini'?"),
    ],
)
def test_wrong_input_is_refused(options, seen, tmp_path):
    with pytest.raises(UsageError) as caught:
        from_file(tmp_path, **options)
    assert seen in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda v: v.pop("schema"), "its schema is None"),
        (lambda v: v.pop("columns"), "has no columns"),
        (lambda v: v.update(figurs={}), "Did you mean 'figures'?"),
        (lambda v: v.update(figures={"token_in": 5}), "Did you mean 'tokens_in'?"),
        (lambda v: v.update(figures={"tokens_in": -5}), "'tokens_in' in the file is -5"),
        (lambda v: v.update(figures={"tokens_in": "many"}), "is 'many', and a number"),
        (lambda v: v.update(figures={"tokens_in": {"range": [1, 2]}}), "'tokens_in' in the file is None"),
        (
            lambda v: v.update(figures={"tokens_in": {"value": 3, "range": [4, 5]}}),
            "does not hold its value 3",
        ),
        (lambda v: v.update(figures={"tokens_in": {"value": 3, "source": "x"}}), "a source and no date"),
        (lambda v: v.update(figures={"training_usd": 3}), "belongs to a column"),
        (lambda v: v["columns"]["a"].update(kind="apy"), "Did you mean 'api'?"),
        (lambda v: v["columns"]["a"].update(model="gpt-4o-mni"), "Did you mean 'gpt-4o-mini'?"),
        (lambda v: v["columns"]["a"]["figures"].update(price_usd=3), "the figure 'price_usd' is not known"),
        (
            lambda v: v["columns"].update(r={"kind": "routed", "local": "a", "remote": "a"}),
            "a column of kind api",
        ),
        (lambda v: v["columns"].update(r={"like": "b"}), "the column 'b' is not known"),
        (lambda v: v.update(compare={"rival": "z"}), "compare.rival"),
    ],
)
def test_a_wrong_scenario_is_refused(change, seen):
    value = copy.deepcopy(SMALLEST)
    change(value)
    with pytest.raises(UsageError) as caught:
        build(value, "the file", Path(), {})
    assert seen in caught.value.message and caught.value.hint


def test_expired_prices_are_not_known_and_a_withdrawn_model_is_refused():
    old = {"value": 2, "source": "https://prices", "as_of": __import__("datetime").date(2025, 1, 1)}
    table = tabulate(
        scenario({"api": {"kind": "api", "figures": {"usd_per_mtok_in": old, "usd_per_mtok_out": 8}}},
                 requests_per_month=5, tokens_in=1, tokens_out=1),
        draws=100,
    )  # fmt: skip
    assert (
        table.cells["api"]["total_usd"].text
        == "not known: api.usd_per_mtok_in has expired: https://prices, as of 2025-01-01"
    )
    gone = {
        "gone": {
            "input_cost_per_token": 1e-6,
            "output_cost_per_token": 1e-6,
            "deprecation_date": "2025-06-06",
        }
    }
    with pytest.raises(UsageError, match="was withdrawn on 2025-06-06"):
        list_price("gone", gone, "today")


def test_a_report_without_tasks_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no time and tokens of a request") as caught:
        from_file(tmp_path, {**entry(), "accuracy": None})
    assert "--tasks" in caught.value.hint


def test_a_broken_report_is_refused_in_two_lines(tmp_path, capfd):
    (tmp_path / "report.json").write_text('{"schema": "edgeft/report@1", "results": 3}')
    assert run(["tco", "--report", str(tmp_path), "--profile", "l4"]) == 2
    assert run(["tco", "support-desk", "--report", str(tmp_path)]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 4 and "is no bench report" in lines[0]


def test_litellm_is_read_and_not_imported():
    pytest.importorskip("importlib.metadata").version("litellm")
    before = "litellm" in sys.modules
    table, as_of = price_table()
    for name in (FRONTIER, SMALL):
        assert list_price(name, table, as_of)["usd_per_mtok_out"] > 0
        half = list_price(name, table, as_of, batch=True)["usd_per_mtok_out"]
        assert half == pytest.approx(list_price(name, table, as_of)["usd_per_mtok_out"] / 2)
    assert list_price(FRONTIER, table, as_of)["long_context_tokens"] == 272_000
    assert ("litellm" in sys.modules) == before


def test_without_litellm_the_extra_is_named(monkeypatch):
    price_table.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault) as caught:
        price_table()
    assert caught.value.hint == "pip install 'edgeft[api]'"


def test_a_model_without_a_price_per_token():
    with pytest.raises(UsageError, match="no price per token for 'images'"):
        list_price("images", {"images": {"output_cost_per_image": 1}}, "today")
