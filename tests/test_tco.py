"""TCO against a sheet worked by hand, and what it says when something is missing."""

import json
import sys
from pathlib import Path

import pytest

from edgeft.cli import run
from edgeft.console import output
from edgeft.errors import EnvironmentFault, UsageError
from edgeft.profiles.loader import Profile
from edgeft.tco import compare, formulas, markdown
from edgeft.tco.costs import DEFAULTS
from edgeft.tco.prices import FRONTIER, SMALL, list_price, price_table
from edgeft.tco.render import to_json
from edgeft.types import BenchReport

BOX = Profile(
    id="box", name="Box", kind="cpu", as_of="2026-11", source="the invoice", ram_gb=16, bandwidth_gb_per_s=50,
    power_idle_w=10, power_load_w=40, price_usd=(1200, 1200),
    basis={"power_idle_w": "estimate", "power_load_w": "estimate", "price_usd": "published"},
)  # fmt: skip
HAND = {  # the sheet's assumptions
    "lifetime_years": 3, "interest_per_year": 0.10, "residual_share": 0.10, "maintenance_per_year": 0.06,
    "peak_factor": 4, "headroom": 0.25, "spares": 1, "pue": 1.2, "retry_share": 0.02, "other_usd_per_month": 7,
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFT_HOME", str(tmp_path))
    monkeypatch.setattr(output, "json", False)


def entry(name="gguf-q4_k_m", kind="artifact", price=None, share=0.8, tokens=(60_000, 4_000), e2e=1.46):
    return {
        "id": name, "kind": kind, "size_bytes": 1, "artifact_sha256": "ab" * 32 if kind == "artifact" else None,
        "speed": {"decode_tok_per_s": {"p50": 10.0}}, "memory": None, "price": price,
        "accuracy": {
            "correct": round(share * 200), "n": 200, "share": share, "ci95": [share - 0.05, share + 0.05],
            "prompt_tokens": tokens[0], "output_tokens": tokens[1], "e2e_s": {"p50": 9.0, "samples": [e2e] * 200},
        },
    }  # fmt: skip


def report(*results, profile=None):
    box = profile or {"id": "box", "detected_at": "2026-11-23"}
    return BenchReport("2026-11-23T10:00:00+00:00", {}, box, {}, list(results or [entry()]), None)


def api(usd_in=2.0, usd_out=8.0):
    return {"usd_per_mtok_in": usd_in, "usd_per_mtok_out": usd_out, "source": "a sheet", "as_of": "2026-11"}


def cents(cell):
    return round(cell.value, 2)


def test_a_month_worked_by_hand():
    """1,800,000 requests of 300 in and 20 out, 1.46 s each, at 0.20 USD a kWh.

    mean rps 1.8e6/2,628,000 = 0.684932; peak 2.739726; a box 1/1.46 = 0.684932 * 0.75 = 0.513699;
    5.3333 -> 6 boxes + 1 spare = 7; busy 1.8e6*1.46/(2,628,000*7) = 1/7.
    CRF(10 %, 3) = 0.1*1.331/0.331 = 0.402114804; residual 120/1.331 = 90.157776.
    (1200 - 90.157776) * 0.402114804/12 = 37.190332; maintenance 1200*0.06/12 = 6; a box 43.190332; seven 302.33.
    energy 7 * (40/7 + 10*6/7) W = 100 W -> 0.1 * 730 * 1.2 = 87.6 kWh -> 17.52; total 302.33 + 17.52 + 7 = 326.85.
    API 1.8e6 * 1.02 * (300*2 + 20*8)/1e6 = 1,395.36.
    Break-even: 8400 + m*(42 + 17.52 + 7) < m*1395.36 -> m > 6.32 -> month 7.
    """
    found = compare(
        report(entry(), entry("litellm:rival", "api", api(), share=0.9)), BOX,
        requests_per_month=1_800_000, usd_per_kwh=0.2, assume=HAND, apis=("rival",),
    )  # fmt: skip
    own, rival = found["own"], found["apis"]["rival"]
    assert own["units"].value == 7
    assert own["busy_share"].value == pytest.approx(1 / 7)
    assert cents(own["upfront_usd"]) == 8400.00
    assert cents(own["hardware_usd"]) == 302.33
    assert own["energy_kwh"].value == pytest.approx(87.6)
    assert cents(own["energy_usd"]) == 17.52
    assert cents(own["total_usd"]) == 326.85
    assert cents(own["usd_per_1k_requests"]) == 0.18
    assert own["usd_per_1k_correct"].value == pytest.approx(326.8523 / 1800 / 0.8, abs=1e-5)
    assert cents(rival["total_usd"]) == 1395.36
    assert rival["usd_per_1k_correct"].value == pytest.approx(1395.36 / 1800 / 0.9)
    assert rival["break_even"].value == 7
    assert found["verdict"][0].startswith("The own box is cheaper: $326.85 a month")


def test_formulas_at_their_edges():
    assert formulas.capital_recovery(0, 4) == 0.25
    assert formulas.capital_recovery(0.1, 3) == pytest.approx(0.4021148)
    assert formulas.units_needed(0, 1, 0.3, 0) == 1
    assert formulas.units_needed(3 * 0.7, 1, 0.3, 0) == 3  # not 4 by a rounding error
    assert formulas.busy_share(1e12, 1, 1) == 1
    assert formulas.per_thousand(5, 0) is None
    assert formulas.break_even_month(100, 0, 10, 36) == 11  # 10 months only reach 100
    assert formulas.break_even_month(100, 10, 10, 36) is None
    assert formulas.scaled_seconds(3, 2, 2) == 2
    assert formulas.scaled_seconds(3, 5, 3) == 1


def test_zero_price_is_zero_api_cost():
    found = compare(
        report(entry(), entry("openai:http://localhost#free", "api", api(0, 0))), BOX, apis=("free",)
    )
    assert found["apis"]["free"]["total_usd"].value == 0
    assert found["verdict"][0].startswith("The API is cheaper: free at $0.00")


def test_the_cheaper_api_is_named_first():
    results = report(
        entry(), entry("litellm:low", "api", api(0.01, 0.01)), entry("litellm:high", "api", api(900, 900))
    )
    found = compare(results, BOX, apis=("high", "low"))
    assert found["verdict"][0].startswith("The API is cheaper: low at ")
    assert found["verdict"][1].startswith("Dearer than the own box: high at ")
    page = markdown(found)
    assert page.index("The API is cheaper") < page.index("| a month |")
    assert found["apis"]["low"]["break_even"].text == "never in its 36 months"


def test_every_cell_is_tagged_and_measured_ones_name_their_run():
    found = compare(report(), BOX)
    value = to_json(found)
    for column in (value["own"], *value["apis"].values()):
        for key, cell in column.items():
            assert cell["tag"] in ("measured", "list price", "assumed", "not known"), key
            assert key == "break_even" or (cell["value"] is None) == (cell["tag"] == "not known"), key
            if "measured" in cell["rests_on"]:
                assert cell["run"] == "report 2026-11-23T10:00:00+00:00, gguf-q4_k_m (abababababab)", key
    assert found["own"]["e2e_s"].tag == "measured"
    assert found["own"]["total_usd"].tag == "assumed"
    assert value["apis"][SMALL]["usd_per_mtok_in"]["tag"] == "list price"
    assert value["apis"][SMALL]["tokens_in"]["tag"] == "assumed"  # another tokenizer than the artefact's
    assert value["apis"][SMALL]["correct_share"]["text"] == "not measured"
    assert {a["name"] for a in value["assumptions"]} >= {
        "lifetime_years",
        "peak_factor",
        "spares",
        "pue",
        "price_usd",
    }


@pytest.mark.parametrize("missing", ["power_idle_w", "power_load_w", "price_usd"])
def test_what_the_profile_lacks_is_not_known_and_not_zero(missing):
    values = {**BOX.to_dict(), "price_usd": (1200, 1200), missing: None}
    found = compare(report(), Profile(**values))
    own = found["own"]
    touched = "upfront_usd" if missing == "price_usd" else "energy_usd"
    for key in (touched, "total_usd", "usd_per_1k_requests", "usd_per_1k_correct"):
        assert own[key].value is None and own[key].text == f"not known: profile 'box' has no {missing}", key
    assert found["apis"][SMALL]["break_even"].value is None
    assert found["verdict"][0] == f"The cost of the own box is not known: profile 'box' has no {missing}."


def test_speed_from_another_box_is_assumed_and_says_so():
    found = compare(report(profile={"id": "desk"}), BOX)
    cell = found["own"]["e2e_s"]
    assert cell.tag == "assumed" and cell.value == pytest.approx(1.46)
    assert "measured on desk, not on box" in cell.note
    assert found["own"]["units"].tag == "assumed"
    assert any("measured on desk, not on box" in line for line in found["verdict"])


def test_speed_from_another_box_is_scaled_by_bandwidth_where_both_are_known():
    """20 tokens at 10 tok/s are more than the 1.46 s: all of it is decoding, and half the bandwidth doubles it."""
    found = compare(report(profile={"id": "desk", "bandwidth_gb_per_s": 100}), BOX)
    assert found["own"]["e2e_s"].value == pytest.approx(2.92)
    assert found["own"]["e2e_s"].tag == "assumed"


def test_a_price_range_counts_by_its_middle_and_is_assumed():
    values = {**BOX.to_dict(), "price_usd": (1000, 1500)}
    cell = compare(report(), Profile(**values))["own"]["upfront_usd"]
    assert cell.value == 1250 and cell.tag == "assumed" and "middle of 1000 to 1500" in cell.note


def test_the_best_artefact_is_taken_and_tokens_count_every_request():
    low, high = entry("low", share=0.5), entry("high", share=0.9)
    high["accuracy"]["n"] = 100  # only half of the requests could be scored; the totals are over all 200
    found = compare(report(low, high), BOX)
    assert found["artifact"] == "high"
    assert found["own"]["tokens_in"].value == 300
    assert compare(report(low, high), BOX, model="low")["artifact"] == "low"


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"requests_per_month": -1}, "--requests-per-month is -1"),
        ({"usd_per_kwh": -0.1}, "--usd-per-kwh is -0.1"),
        ({"usd_per_kwh": float("nan")}, "--usd-per-kwh is nan"),
        ({"assume": {"pue": -1}}, "--assume pue is -1"),
        ({"assume": {"headroom": 1}}, "--assume headroom is 1"),
        ({"assume": {"lifetime": 1}}, "Did you mean 'lifetime_years'?"),
        ({"model": "gguf-q4"}, "Did you mean 'gguf-q4_k_m'?"),
        ({"apis": ("gpt-4o-mni",)}, "Did you mean 'gpt-4o-mini'?"),
    ],
)
def test_wrong_input_is_refused(options, seen):
    with pytest.raises(UsageError) as caught:
        compare(report(), BOX, **options)
    assert seen in caught.value.message and caught.value.hint


def test_a_report_without_tasks_is_refused():
    with pytest.raises(UsageError, match="no time and tokens of a request") as caught:
        compare(report({**entry(), "accuracy": None}), BOX)
    assert "--tasks" in caught.value.hint


def test_litellm_is_read_and_not_imported():
    pytest.importorskip("importlib.metadata").version("litellm")
    before = "litellm" in sys.modules
    table, as_of = price_table()
    for name in (FRONTIER, SMALL):
        assert list_price(name, table, as_of)["usd_per_mtok_out"] > 0
    assert ("litellm" in sys.modules) == before


def test_without_litellm_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault) as caught:
        price_table()
    assert caught.value.hint == "pip install 'edgeft[api]'"


def test_a_model_without_a_price_per_token():
    with pytest.raises(UsageError, match="no price per token for 'images'"):
        list_price("images", {"images": {"output_cost_per_image": 1}}, "today")


def test_the_command_writes_the_same_numbers_three_times(tmp_path, capfd):
    report(entry(), entry("litellm:rival", "api", api()), profile={"id": "l4"}).save(tmp_path / "report.json")
    words = [
        "tco",
        "--report",
        str(tmp_path),
        "--profile",
        "l4",
        "--api",
        "rival",
        "--out",
        str(tmp_path / "tco.md"),
    ]
    assert run([*words, "--json"]) == 0
    value = json.loads(capfd.readouterr().out)
    output.json = False
    assert run(words) == 0
    shown, page = capfd.readouterr().out, (tmp_path / "tco.md").read_text()
    assert shown.startswith(value["verdict"][0])
    for key in ("total_usd", "usd_per_1k_requests"):
        text = value["own"][key]["text"]
        assert text in shown and text.replace("$", "\\$") in page
    assert run(["tco", "--report", str(tmp_path), "--profile", "l4", "--requests-per-month", "-5"]) == 2
    assert len(capfd.readouterr().err.splitlines()) == 2


def test_the_page_lists_every_assumption_with_its_value():
    page = (Path(__file__).parent.parent / "docs" / "tco.md").read_text()
    for name, (value, _) in DEFAULTS.items():
        assert f"| `{name}` | {value:g} |" in page
