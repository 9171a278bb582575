"""TCO against sheets worked by hand, to the cent; what it says when something is missing; what holds of every scenario."""

import copy
import csv
import io
import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeft.cli import run
from edgeft.console import output
from edgeft.errors import EnvironmentFault, UsageError
from edgeft.tco import cashflow, columns, formulas, tabulate
from edgeft.tco.counters import read_counters, shares
from edgeft.tco.figures import Figure
from edgeft.tco.from_report import from_report
from edgeft.tco.html import page
from edgeft.tco.inputs import INPUTS, inputs_of
from edgeft.tco.measured import concurrency_gain
from edgeft.tco.prices import FRONTIER, SMALL, list_price, price_table
from edgeft.tco.render import markdown, to_csv, to_json
from edgeft.tco.scenario import build, read_scenario
from edgeft.tco.shipped import names, shipped
from edgeft.tco.table import world_of
from edgeft.tco.uncertainty import draw, simulate
from edgeft.types import BenchReport, Policy

BOX = {
    "id": "box", "name": "Box", "kind": "cpu", "as_of": "2026-11", "source": "the invoice", "ram_gb": 16, "bandwidth_gb_per_s": 50,
    "power_idle_w": 10, "power_load_w": 40, "price_usd": [1200, 1200],
    "basis": {"power_idle_w": "estimate", "power_load_w": "estimate", "price_usd": "published"},
}  # fmt: skip
HAND = {  # the sheet's assumptions
    "lifetime_years": 3, "interest_per_year": 0.10, "residual_share": 0.10, "maintenance_per_year": 0.06,
    "peak_factor": 4, "headroom": 0.25, "spares": 1, "pue": 1.2, "retry_share": 0.02, "own.other_usd_per_month": 7,
    "requests_per_month": 1_800_000, "usd_per_kwh": 0.2, "own.staff_hours_per_month": 0,
}  # fmt: skip


def box(tmp_path, **changes):
    """Keep BOX, some changed, among the user's own profiles; None takes a figure out."""
    value = {**BOX, **changes}
    value = {k: v for k, v in value.items() if v is not None}
    value["basis"] = {k: v for k, v in value["basis"].items() if k in value}
    (tmp_path / "profiles").mkdir(exist_ok=True)
    (tmp_path / "profiles" / "box.yaml").write_text(yaml.safe_dump(value))


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFT_HOME", str(tmp_path))
    box(tmp_path)
    monkeypatch.setattr(output, "json", False)


def entry(name="gguf-q4_k_m", kind="artifact", price=None, share=0.8, tokens=(60_000, 4_000), e2e=1.46):
    return {
        "id": name, "kind": kind, "size_bytes": 1, "artifact_sha256": "ab" * 32 if kind == "artifact" else None,
        "engine": "gguf", "speed": {"decode_tok_per_s": {"p50": 10.0, "n": 5}}, "memory": None, "price": price,
        "accuracy": {
            "correct": round(share * 200), "n": 200, "share": share, "ci95": [share - 0.05, share + 0.05],
            "prompt_tokens": tokens[0], "output_tokens": tokens[1], "e2e_s": {"p50": 9.0, "n": 200, "samples": [e2e] * 200},
        },
    }  # fmt: skip


def report(*results, profile=None):
    box = profile or {"id": "box", "detected_at": "2026-11-23"}
    return BenchReport("2026-11-23T10:00:00+00:00", {}, box, {}, list(results or [entry()]), None)


def api(usd_in=2.0, usd_out=8.0):
    return {"usd_per_mtok_in": usd_in, "usd_per_mtok_out": usd_out, "source": "a sheet", "as_of": "2026-11"}


def from_file(tmp_path, *results, profile=None, changed=None, **options):
    report(*results, profile=profile).save(tmp_path / "report.json")
    return tabulate(from_report(tmp_path, "box", changed=changed, **options), draws=200)


def cents(cell):
    return round(cell.value, 2)


def scenario(columns, changed=None, **figures):
    """A scenario from Python, its figures plain numbers unless maps."""
    value = {
        "schema": "edgeft/scenario@1",
        "name": "by hand",
        "date": __import__("datetime").date(2026, 11, 25),
    }
    return build({**value, "figures": figures, "columns": columns}, "the test", Path(), changed or {})


def test_a_month_worked_by_hand(tmp_path):
    """1,800,000 requests of 300 in and 20 out, 1.46 s each, at 0.20 USD a kWh.

    mean rps 1.8e6/2,628,000 = 0.684932; peak 2.739726; a box 1/1.46 = 0.684932 * 0.75 = 0.513699;
    5.3333 -> 6 boxes + 1 spare = 7; busy 1.8e6*1.46/(2,628,000*7) = 1/7.
    CRF(10 %, 3) = 0.1*1.331/0.331 = 0.402114804; residual 120/1.331 = 90.157776.
    (1200 - 90.157776) * 0.402114804/12 = 37.190332; maintenance 1200*0.06/12 = 6; a box 43.190332; seven 302.33.
    energy 7 * (40/7 + 10*6/7) W = 100 W -> 0.1 * 730 * 1.2 = 87.6 kWh -> 17.52; total 302.33 + 17.52 + 7 = 326.85.
    API 1.8e6 * 1.02 * (300*2 + 20*8)/1e6 = 1,395.36.
    Break-even: 8400 + m*(42 + 17.52 + 7) < m*1395.36 -> m > 6.32 -> month 7.
    """
    table = from_file(
        tmp_path, entry(), entry("litellm:rival", "api", api(), share=0.9), changed=HAND, apis=("rival",)
    )
    own, rival = table.cells["own"], table.cells["rival"]
    assert own["units"].value == 7
    assert own["capacity_used"].value == pytest.approx(1 / 7)
    assert cents(own["upfront_usd"]) == 8400.00
    assert own["kwh"].value == pytest.approx(87.6)
    assert own["kgco2"].value == pytest.approx(87.6 * 0.4)
    assert cents(own["total_usd"]) == 326.85
    assert own["usd_per_1k_requests"].value == pytest.approx(0.181585, abs=1e-6)
    assert own["usd_per_1k_solved"].value == pytest.approx(326.8523 / 1800 / 0.8, abs=1e-5)
    assert cents(rival["total_usd"]) == 1395.36
    assert rival["usd_per_1k_solved"].value == pytest.approx(1395.36 / 1800 / 0.9)
    world = world_of(table.scenario)
    paid = {n: cashflow.payments(c.kind, world.values(c)) for n, c in table.scenario.columns.items()}
    assert cashflow.break_even_month(paid["own"], paid["rival"]) == 7
    assert table.verdict[0].startswith("gguf-q4_k_m on box is cheaper: ")


def sheet():
    """Every input that others forget, in a scenario small enough for a sheet."""
    return scenario(
        {
            "api": {"kind": "api", "figures": {
                "usd_per_mtok_in": 2, "usd_per_mtok_read": 0.2, "usd_per_mtok_write": 2.5, "usd_per_mtok_out": 10, "retry_share": 0.05,
                "tokenizer_factor": 1.1, "verbosity_factor": 1.5, "reasoning_tokens": 40, "price_fall_per_year": 0.2, "correct_share": 0.9,
                "staff_hours_per_month": 1}},
            "long": {"kind": "api", "figures": {
                "usd_per_mtok_in": 1, "usd_per_mtok_read": 1, "usd_per_mtok_write": 1, "usd_per_mtok_out": 4, "long_context_tokens": 900,
                "usd_per_mtok_in_long": 2, "usd_per_mtok_out_long": 6, "tokenizer_factor": 1, "verbosity_factor": 1,
                "price_fall_per_year": 0}},
            "fleet": {"kind": "fleet", "figures": {
                "price_usd": 300, "host_usd": 20, "residual_share": 0.1, "lifetime_years": 2, "maintenance_per_year": 0.05, "sites": 50,
                "spares": 3, "request_s": 4, "concurrency_gain": 2, "power_load_w": 12, "power_idle_w": 4, "pue": 1, "prefill_share": 0.25,
                "visits_per_unit_year": 0.5, "usd_per_visit": 120, "hosting_usd_per_unit_month": 2, "staff_hours_per_month": 10,
                "data_usd": 1000, "training_usd": 200, "requantize_usd": 100, "version_months": 6, "correct_share": 0.8}},
            "cloud": {"kind": "cloud", "figures": {
                "usd_per_unit_hour": 0.5, "rework_share": 0.1, "spares": 1, "request_s": 0.5, "concurrency_gain": 4,
                "power_load_w": 200, "power_idle_w": 50, "prefill_share": 0.5}},
            "routed": {"kind": "routed", "local": "fleet", "remote": "api", "figures": {
                "answer_cache_share": 0.2, "local_share": 0.75, "escalated_share": 0.1, "correct_share": 0.85}},
        },
        requests_per_month=600_000, tokens_in=1000, tokens_out=100, prompt_cached_share=0.6, prompt_written_share=0.1,
        peak_factor=5, usd_per_kwh=0.25, kgco2_per_kwh=0.3, usd_per_staff_hour=50, interest_per_year=0.08, wrong_answer_usd=0.1,
        storage_gb=100, usd_per_gb_month=0.02, months=36,
    )  # fmt: skip


def test_every_kind_of_column_worked_by_hand():
    """A sheet's figures, line by line.

    api: tokens 1,100 in: 330 fresh, 660 read, 110 written; 100*1.5 + 40 = 190 out. A request
      (330*2 + 660*0.2 + 110*2.5 + 190*10)/1e6 * 1.05 = (660 + 132 + 275 + 1,900)/1e6 * 1.05 = 0.00311535; a month 1,869.21.
      Staff 50, storage 2: total 1,921.21. Wrong answers 600,000 * 0.1 * 0.1 = 6,000.
    long: 1,000 > 900 tokens: (1000*2*0.3 + 600 + 100 + 100*6)/1e6 = 0.0019 (reads and writes at their own price); 1,140 + 2.
    fleet: peak 600,000/2,628,000*5 = 1.141553 rps; a box 0.5*0.7 = 0.35: 4 boxes, 50 sites, 3 spares: 53.
      Hardware 53*320 = 16,960; upfront 16,960 + 1,000 + 300 = 18,260.
      CRF(8 %, 2) = 0.08*1.1664/0.1664 = 0.560769; (320 - 32/1.1664)*0.560769/12 = 13.671795; 53 of them 724.605.
      Keeping: 53*(320*0.05/12 + 2 + 0.5/12*120) = 53*8.333333 = 441.667. Idle 53*4/1000*730*0.25 = 38.69.
      Working 600,000*2/3600 = 333.333 h * 8 W / 1000 * 0.25 = 0.666667. Staff 500, storage 2.
      Spread 1,000/36 + 300/6 = 77.777778. Total 724.605 + 441.667 + 38.69 + 0.667 + 502 + 77.778 = 1,785.41.
    cloud: a box 8*0.7 = 5.6 rps: 1 + 1 spare = 2; 2*0.5*730*1.1 = 803; storage 2: 805.
    routed: 480,000 reach; 360,000 tried locally; to the API 480,000*(0.25 + 0.075) = 156,000 * 0.00311535 = 485.9946.
      Local: 53 boxes still; working 360,000*2/3600*8/1000*0.25 = 0.4; so 1,785.41 - 0.266667 + 485.99 + its own storage 2 = 2,273.13.
    """
    table = tabulate(sheet(), draws=100)
    api, long, fleet, cloud, routed = (table.cells[n] for n in ("api", "long", "fleet", "cloud", "routed"))
    assert (cents(api["variable_usd"]), cents(api["total_usd"]), cents(api["wrong_usd"])) == (
        1869.21,
        1921.21,
        6000.00,
    )
    assert cents(long["total_usd"]) == 1142.00
    assert (fleet["units"].value, cents(fleet["upfront_usd"]), cents(fleet["total_usd"])) == (
        53,
        18260.00,
        1785.41,
    )
    assert fleet["kwh"].value == pytest.approx(53 * 4 / 1000 * 730 + 333.3333333 * 8 / 1000)
    assert (cloud["units"].value, cents(cloud["total_usd"])) == (2, 805.00)
    assert (routed["units"].value, cents(routed["total_usd"])) == (53, 2273.13)
    assert cents(fleet["usd_per_mtok_in"]) == round(1785.41 * 0.25 / 600, 2)
    assert fleet["usd_per_mtok_out"].value == pytest.approx(1785.407 * 0.75 / 60, rel=1e-5)
    each = (660 + 132 + 275) / (660 + 132 + 275 + 1900)
    assert api["usd_per_mtok_in"].value == pytest.approx(1921.21 * each / 600, rel=1e-5)


def test_payments_and_npv_worked_by_hand():
    """A sheet of 37 rows, in a loop of plain Python: prices fall, boxes are bought again in month 24, versions every 6 months."""
    found = sheet()
    world = world_of(found)
    fleet = world.values(found.columns["fleet"])
    paid, npc = cashflow.payments("fleet", fleet), cashflow.net_present_cost("fleet", fleet)
    cash = 441.6666667 + 38.69 + 0.6666667 + 502
    rows = [18260.0]
    for month in range(1, 37):
        bought = 16960 * 0.9 if month == 24 else 0
        rows.append(cash + bought + (300 if month % 6 == 0 and month < 36 else 0))
    assert paid.tolist() == pytest.approx(rows, abs=1e-4)
    left = 16960 * (1 - 0.9 * 12 / 24)
    by_hand = sum(row * 1.08 ** (-m / 12) for m, row in enumerate(rows)) - left * 1.08**-3
    assert npc == pytest.approx(by_hand, abs=0.005)
    api = cashflow.payments("api", world.values(found.columns["api"]))
    assert api.tolist() == pytest.approx(
        [0.0, *(52 + 1869.21 * 0.8 ** ((m - 1) / 12) for m in range(1, 37))], abs=1e-4
    )


def test_break_even_volume_is_where_the_sums_cross():
    """Against a search over volumes, with the units that each needs."""

    def build_at(requests):
        return scenario(
            {"api": {"kind": "api", "figures": {"usd_per_mtok_in": 2, "usd_per_mtok_out": 8, "tokenizer_factor": 1, "verbosity_factor": 1}},
             "own": {"kind": "own", "figures": {"price_usd": 3000, "request_s": 10, "power_load_w": 200, "power_idle_w": 50,
                                                 "staff_hours_per_month": 1, "spares": 1}}},
            requests_per_month=requests, tokens_in=800, tokens_out=200,
        )  # fmt: skip

    text = tabulate(build_at(5000), draws=100).cells["own"]["break_even_requests"]
    volume = text.value
    for requests, cheaper in ((0.98 * volume, "api"), (1.001 * volume, "own")):
        cells = tabulate(build_at(requests), draws=100).cells
        assert min(("api", "own"), key=lambda n: cells[n]["total_usd"].value) == cheaper
    assert "on assumptions" in text.text


def test_formulas_at_their_edges():
    assert formulas.capital_recovery(0, 4) == 0.25
    assert formulas.capital_recovery(0.1, 3) == pytest.approx(0.4021148)
    assert formulas.capital_recovery(np.array([0, 0.1]), 3).tolist() == pytest.approx([1 / 3, 0.4021148])
    assert formulas.units_needed(0, 1, 0.3, 0) == 1
    assert formulas.units_needed(3 * 0.7, 1, 0.3, 0) == 3  # not 4 by a rounding error
    assert formulas.busy_share(1e12, 1, 1) == 1
    assert formulas.per_thousand(5, 0) == np.inf
    assert formulas.break_even_volume(100, 50, 1000, 0.04) is None  # a unit costs more than it can ever save
    assert formulas.break_even_volume(100, 50, 1000, 0.2) == 750  # one unit: 150 / 0.2, which it can carry
    assert (
        formulas.break_even_volume(1000, 50, 1000, 0.2) == 6750
    )  # seven: 1,350 / 0.2, of 7,000; six would carry 6,000 of 6,500
    assert (
        cashflow.break_even_month(np.array([100.0, *[0] * 36]), np.array([0.0, *[10] * 36])) == 11
    )  # 10 months only reach 100
    assert cashflow.break_even_month(np.array([100.0, *[10] * 36]), np.array([0.0, *[10] * 36])) == np.inf
    assert formulas.scaled_seconds(3, 2, 2) == 2
    assert formulas.scaled_seconds(3, 5, 3) == 1


COSTS = st.floats(0.001, 50)


@settings(max_examples=60, deadline=None)
@given(
    requests=st.floats(1e3, 1e7), more=st.floats(1.0, 20), price=st.floats(10, 5e4), seconds=st.floats(0.01, 60), usd_in=COSTS,
    usd_out=COSTS, share=st.floats(0, 1), cache=st.floats(0, 1), escalated=st.floats(0, 1), rate=st.floats(0, 0.5),
)  # fmt: skip
def test_what_holds_of_every_scenario(
    requests, more, price, seconds, usd_in, usd_out, share, cache, escalated, rate
):
    def made(**changed):
        figures = {"usd_per_mtok_in": usd_in, "usd_per_mtok_out": usd_out}
        own = {
            "price_usd": price,
            "request_s": seconds,
            "power_load_w": 90,
            "power_idle_w": 20,
            "prefill_share": 0.3,
        }
        return scenario(
            {"api": {"kind": "api", "figures": figures}, "own": {"kind": "own", "figures": own},
             "routed": {"kind": "routed", "local": "own", "remote": "api",
                        "figures": {"local_share": share, "answer_cache_share": cache, "escalated_share": escalated}}},
            changed, requests_per_month=requests, tokens_in=500, tokens_out=50, interest_per_year=rate,
        )  # fmt: skip

    def total(name, **changed):
        s = made(**changed)
        return float(columns.monthly(s.columns[name].kind, world_of(s).values(s.columns[name])))

    def units(name, requests):
        s = made(requests_per_month=requests)
        return float(columns.KINDS[s.columns[name].kind].units(world_of(s).values(s.columns[name])))

    own, api = total("own"), total("api")
    assert own >= 0 and api == pytest.approx(requests * (500 * usd_in + 50 * usd_out) / 1e6)
    dear = requests * more
    if units("own", dear) == units(
        "own", requests
    ):  # at an equal number of units more volume never makes a token dearer
        assert total("own", requests_per_month=dear) / dear <= own / requests * (1 + 1e-9)
    assert units("own", dear) >= units("own", requests)
    free = {"api.usd_per_mtok_in": 0, "api.usd_per_mtok_out": 0}
    assert total("api", **free) == 0  # a price of zero gives zero
    nothing = {"own.price_usd": 0, "usd_per_kwh": 0}
    assert total("own", **nothing) == 0
    assert total("own", usd_per_kwh=0.5) >= own >= total("own", usd_per_kwh=0)
    routed = total("routed")
    assert (
        routed >= total("routed", **free) - 1e-9
        and routed >= total("routed", **{"routed.escalated_share": 0}) - 1e-9
    )
    assert (
        routed <= total("own") + (1 + share * escalated) * api * (1 - cache) + 1e-6
    )  # never more than both paid in full
    s = made()
    v = world_of(s).values(s.columns["own"])
    paid = cashflow.payments("own", v)
    assert (paid >= 0).all() and cashflow.net_present_cost("own", v, paid) <= paid.sum() + 1e-6
    assert cashflow.net_present_cost("own", v) >= 0


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


SMALLEST = {"schema": "edgeft/scenario@1", "columns": {"a": {"kind": "api", "figures": {}}}}


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


def test_draws_have_the_range_as_their_p10_and_p90():
    figure = Figure("x", 10, (8, 15))
    drawn = figure.draw(200_000, 1)
    assert np.percentile(drawn, [10, 50, 90]).tolist() == pytest.approx([8, 10, 15], rel=0.01)
    assert (figure.draw(50, 1) == figure.draw(50, 1)).all() and (
        figure.draw(50, 1) != figure.draw(50, 2)
    ).any()
    assert Figure("x", 0.9, (0.5, 1), bounds=(0, 1)).draw(1000, 1).max() <= 1
    assert Figure("x", 3).draw(10, 1) == 3


def test_the_simulation_agrees_with_the_formulas_draw_by_draw():
    found = read_scenario(shipped("support-desk"))
    world = draw(found, 50, seed=3)
    drawn = simulate(world, 50)
    assert set(drawn) == set(found.columns)
    for number in (0, 17, 49):
        one = world_of(found, {k: v[number] for k, v in world.numbers.items() if np.ndim(v)})
        for name, column in found.columns.items():
            v = one.values(column)
            assert drawn[name].npc[number] == pytest.approx(
                float(cashflow.net_present_cost(column.kind, v)), rel=1e-9
            ), name
            assert drawn[name].paid[:, number] == pytest.approx(
                cashflow.payments(column.kind, v), rel=1e-9
            ), name


def test_a_seed_gives_the_same_table_and_a_whole_number_stays_whole():
    found = read_scenario(shipped("edge-fleet"))
    assert to_json(tabulate(found, 300, 1)) == to_json(tabulate(found, 300, 1))
    assert tabulate(found, 300, 1).bands != tabulate(found, 300, 2).bands


METRICS = """# HELP edgeft_requests_total Chat requests
edgeft_requests_total{route="gguf-q4_k_m",status="200"} 70.0
edgeft_requests_total{route="openai:http://host#big",status="200"} 30.0
edgeft_requests_total{route="gguf-q4_k_m",status="429"} 9.0
edgeft_cache_total{result="hit"} 20.0
edgeft_cache_total{result="miss"} 60.0
"""


def test_counters_of_serve_are_read(tmp_path):
    (tmp_path / "metrics.txt").write_text(METRICS)
    found = shares(read_counters(str(tmp_path / "metrics.txt")), None)
    assert (found["answer_cache_share"], found["local_share"], found["n_served"]) == (0.2, 0.7, 100)
    (tmp_path / "other.txt").write_text("up 1\n")
    for name, seen in (("other.txt", "holds no counters"), ("none.txt", "there is no file")):
        with pytest.raises(UsageError, match=seen):
            read_counters(str(tmp_path / name))
    with pytest.raises(EnvironmentFault, match="gives no counters"):
        read_counters("http://127.0.0.1:9/")


def test_counters_of_a_running_proxy(tmp_path):
    stage_module = pytest.importorskip("tests.serve_stage", reason="edgeft[serve] is not installed")
    engines = {name: stage_module.Engine(name) for name in ("weak", "strong")}
    from edgeft.serve.app import create_app
    from edgeft.serve.cache import AnswerCache
    from edgeft.serve.upstream import HttpUpstream

    upstreams = {n: HttpUpstream(e.url, n, stage_module.KEY, slots=1) for n, e in engines.items()}
    app = create_app(stage_module.policy_of(), upstreams, AnswerCache(tmp_path / "cache"), waiting=1)
    with stage_module.running(app) as client:
        for text in ("hello", "hello", "refund me", "good day"):
            body = {"model": "auto", "messages": [{"role": "user", "content": text}], "temperature": 0}
            assert client.post("/v1/chat/completions", json=body).status_code == 200
        found = shares(read_counters(str(client.base_url)), "weak")
    assert (found["answer_cache_share"], found["local_share"]) == (0.25, 0.75)


def test_a_policy_and_counters_make_the_routed_column(tmp_path):
    figures = {"n": 200, "share_strong": 0.4, "policy": {"mean": 0.7, "ci95": [0.65, 0.75]}}
    Policy("2026-11-25", [], {}, {}, {"figures": figures, "figures_of": "threshold items"}).save(
        tmp_path / "policy" / "policy.json"
    )
    (tmp_path / "metrics.txt").write_text(METRICS)
    value = yaml.safe_load(shipped("support-desk").read_text())
    routed = value["columns"]["routed"]
    routed |= {"policy": "policy", "figures": {}}
    made = build(value, "file", tmp_path, {}).columns["routed"].figures
    assert (made["local_share"].value, made["correct_share"].value) == (0.6, 0.7) and made[
        "local_share"
    ].tag == "measured"
    routed["counters"] = "metrics.txt"
    made = build(value, "file", tmp_path, {}).columns["routed"].figures
    assert (made["local_share"].value, made["answer_cache_share"].value) == (0.7, 0.2)


@pytest.mark.parametrize("name", names())
def test_shipped_scenarios_have_all_columns_and_rows(name):
    table = tabulate(read_scenario(shipped(name)), draws=200)
    kinds = [c.kind for c in table.scenario.columns.values()]
    assert [kinds.count(k) for k in ("api", "cloud", "own", "fleet", "routed")] == [5, 3, 1, 1, 1]
    for column, row in table.cells.items():
        for key, cell in row.items():
            assert cell.value is not None or key in ("kwh", "kgco2", "ttft_p95_s", "break_even_requests"), (
                column,
                key,
                cell.text,
            )
            assert cell.tag != "not known" or key in ("kwh", "kgco2"), (column, key, cell.text)
    assert table.tornado and len(table.must) == 11
    assert "measured" not in {
        f.tag for f in table.evidence.values()
    }  # they ship no measurement and claim none
    assert table.verdict[0].startswith("The API is cheaper")


def test_the_page_is_whole_and_leads_from_cells_to_evidence():
    text = page(tabulate(read_scenario(shipped("support-desk")), draws=200))
    assert text == page(tabulate(read_scenario(shipped("support-desk")), draws=200))
    assert "<script" not in text and not re.search(
        r'(?:src|href)="(?!#)', text.replace("xlink:href", "xhref")
    )
    anchors = set(re.findall(r'id="(e-[^"]+)"', text))
    links = set(re.findall(r'href="#(e-[^"]+)"', text))
    assert links and links <= anchors
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    assert text.count("<svg") == 3


def test_what_a_person_wrote_is_escaped():
    value = {**copy.deepcopy(SMALLEST), "name": "<b>|x*</b>", "about": "<script>"}
    table = tabulate(build(value, "file", Path(), {}), draws=100)
    assert "<script>" not in page(table) and "&lt;b&gt;" in page(table) and "\\|x\\*" in markdown(table)


def test_csv_has_a_line_a_cell():
    table = tabulate(sheet(), draws=100)
    lines = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert len(lines) == sum(len(row) for row in table.cells.values())
    found = {(line["column"], line["row"]): line for line in lines}
    assert float(found["api", "total_usd"]["value"]) == pytest.approx(1921.21)
    assert found["api", "kwh"]["value"] == "" and found["api", "kwh"]["tag"] == "not known"


def test_the_command_writes_the_same_numbers_every_time(tmp_path, capfd):
    report(entry(), entry("litellm:rival", "api", api()), profile={"id": "l4"}).save(tmp_path / "report.json")
    words = ["tco", "--report", str(tmp_path), "--profile", "l4", "--api", "rival", "--draws", "200"]
    outs = [word for end in ("md", "html", "csv", "json") for word in ("--out", str(tmp_path / f"tco.{end}"))]
    assert run([*words, "--json"]) == 0
    value = json.loads(capfd.readouterr().out)
    output.json = False
    assert run([*words, *outs]) == 0
    shown, text = capfd.readouterr().out, (tmp_path / "tco.md").read_text()
    assert shown.startswith(value["verdict"][0])
    for key in ("total_usd", "usd_per_1k_requests"):
        cell = value["columns"]["own"]["cells"][key]["text"]
        assert (
            cell in shown and cell.replace("$", "\\$") in text and cell in (tmp_path / "tco.html").read_text()
        )
    assert json.loads((tmp_path / "tco.json").read_text()) == {
        k: v for k, v in value.items() if k != "written_to"
    }
    for wrong in (
        ["--requests-per-month", "-5"],
        ["--out", "tco.pdf"],
        ["--set", "spares=x"],
        ["--set", "own.sites=2"],
    ):
        assert run([*words, *wrong]) == 2
        assert len(capfd.readouterr().err.splitlines()) == 2


def test_init_writes_a_scenario_that_runs_and_leaves_files_alone(tmp_path, capfd):
    path = tmp_path / "mine.yaml"
    assert run(["tco", "init", str(path), "--like", "edge-fleet"]) == 0
    assert run(["tco", str(path), "--set", "fleet.price_usd=0", "--draws", "100"]) == 0
    assert "A fleet of 200 edge boxes" in capfd.readouterr().out
    for words in (["tco", "init", str(path)], ["tco", "init", "x", "--like", "edge-flet"], ["tco"], ["tco", "none.yaml"],
                  ["tco", "suport-desk"], ["tco", str(path), "--profile", "l4"]):  # fmt: skip
        assert run(words) == 2, words
        assert len(capfd.readouterr().err.splitlines()) == 2


def test_a_report_on_the_command_line_takes_the_place_of_guesses(tmp_path):
    report(profile={"id": "jetson-agx-orin", "detected_at": "x"}).save(tmp_path / "report.json")
    value = yaml.safe_load(shipped("support-desk").read_text())
    del value["columns"]["fleet"]["figures"]["request_s"]
    value["columns"]["fleet"]["figures"].pop("<<", None)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(value))
    made = read_scenario(tmp_path / "s.yaml", {}, (tmp_path, None)).columns["fleet"].figures
    assert made["request_s"].tag == "measured" and made["request_s"].value == pytest.approx(1.46)
    assert made["tokens_in"].value == 800  # what the scenario says by hand wins


def test_the_page_of_docs_lists_every_figure_with_its_default():
    text = (Path(__file__).parent.parent / "docs" / "tco.md").read_text()
    for name, i in INPUTS.items():
        shown = "–" if i.default is None else ("no limit" if i.default == float("inf") else f"{i.default:g}")
        assert f"| `{name}` | {shown} |" in text, name
    assert set(inputs_of("api")) <= set(INPUTS)
