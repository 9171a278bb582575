"""TCO against sheets worked by hand, to the cent, and what holds of every scenario."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeft.tco import cashflow, columns, formulas, tabulate
from edgeft.tco.table import world_of
from tests.tco_stage import BOX, HAND, api, box, cents, entry, from_file, own_home, report, scenario, sheet  # noqa: F401


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


def test_growth_worked_by_hand():
    """400,000 requests, half as many again each month: 400, 600, 900, 1,350 thousand. A box 1/1 s * 0.7 = 0.7 rps; peaks of 0.609, 0.913,
    1.370 and 2.055 rps: 1, 2, 2 and 3 boxes of 1,000 USD, which live two months and bring 20 % then.
    A box 1,000*0.05/12 + 10 W idle 7.3 kWh * 0.15 a month; 1,000 requests 1,000 s * 90 W * 0.15 USD/kWh = 0.00375 USD.
    """
    found = scenario(
        {"api": {"kind": "api", "figures": {"usd_per_mtok_in": 2, "usd_per_mtok_out": 8, "price_fall_per_year": 0.2,
                                             "tokenizer_factor": 1, "verbosity_factor": 1}},
         "own": {"kind": "own", "figures": {"price_usd": 1000, "request_s": 1, "power_load_w": 100, "power_idle_w": 10,
                                             "lifetime_years": 1 / 6, "residual_share": 0.2}},
         "cloud": {"kind": "cloud", "figures": {"request_s": 1, "power_load_w": 1, "power_idle_w": 1, "usd_per_unit_hour": 1}}},
        requests_per_month=400_000, tokens_in=800, tokens_out=200, months=4, growth_per_month=0.5,
    )  # fmt: skip
    world = world_of(found)

    def paid(name):
        return cashflow.payments(found.columns[name].kind, world.values(found.columns[name]))

    each_box, requests = 1000 * 0.05 / 12 + 7.3 * 0.15, [400_000, 600_000, 900_000, 1_350_000]
    cash = [n * each_box + q * 0.00375e-3 for n, q in zip((1, 2, 2, 3), requests, strict=True)]
    bought = [1000, 800, 800 + 1000, 0]  # the second box; the first again; the second again and the third
    assert paid("own").tolist() == pytest.approx([1000, *(c + b for c, b in zip(cash, bought, strict=True))])
    left = 200 + 600 + 600  # two months old, and one month old twice
    v = world.values(found.columns["own"])
    by_hand = sum(row * 1.08 ** (-m / 12) for m, row in enumerate(paid("own"))) - left * 1.08 ** (-4 / 12)
    assert cashflow.net_present_cost("own", v) == pytest.approx(by_hand)
    each = (800 * 2 + 200 * 8) / 1e6
    assert paid("api").tolist() == pytest.approx(
        [0, *(q * each * 0.8 ** (m / 12) for m, q in enumerate(requests))]
    )
    assert paid("cloud").tolist() == pytest.approx([0, *(730 * n for n in (1, 2, 2, 3))])


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
    for name in ("own", "api", "routed"):  # growth makes no month cheaper
        kind = s.columns[name].kind
        flat, grown = (
            cashflow.payments(kind, world_of(x).values(x.columns[name]))
            for x in (s, made(growth_per_month=0.03))
        )
        assert flat[0] == grown[0] and (grown >= flat * (1 - 1e-9)).all()
