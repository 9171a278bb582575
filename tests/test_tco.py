"""TCO: draws, counters and policies, the shipped scenarios, the page and the command."""

import copy
import csv
import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from edgeft.cli import run
from edgeft.console import output
from edgeft.errors import EnvironmentFault, UsageError
from edgeft.tco import cashflow, tabulate
from edgeft.tco.counters import read_counters, shares, ttft_quantile_s
from edgeft.tco.figures import Figure
from edgeft.tco.html import page
from edgeft.tco.inputs import INPUTS, inputs_of
from edgeft.tco.render import markdown, to_csv, to_json
from edgeft.tco.scenario import build, read_scenario
from edgeft.tco.shipped import names, shipped
from edgeft.tco.table import world_of
from edgeft.tco.uncertainty import draw, simulate
from edgeft.types import Policy
from tests.tco_stage import (  # noqa: F401
    BOX,
    HAND,
    SMALLEST,
    api,
    box,
    cents,
    entry,
    from_file,
    own_home,
    report,
    scenario,
    sheet,
)


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


def test_the_mixs_first_token_is_read_from_the_histogram():
    def buckets(route, *counts):
        bounds = ("0.1", "0.5", "1.0", "+Inf")
        return [
            ("edgeft_ttft_seconds_bucket", {"route": route, "le": b}, c)
            for b, c in zip(bounds, counts, strict=True)
        ]

    samples = [*buckets("weak", 60, 80, 80, 80), *buckets("strong", 0, 4, 20, 20)]
    # 95 of 100: 84 came within 0.5 s and 100 within 1.
    assert ttft_quantile_s(samples) == (pytest.approx(0.5 + 0.5 * 11 / 16), 0.5, 1.0)
    assert ttft_quantile_s(samples, 0.3) == (pytest.approx(0.05), 0.0, 0.1)
    assert ttft_quantile_s(buckets("weak", 0, 0, 90, 100)) is None, "beyond the last bound"
    assert ttft_quantile_s([]) is None and ttft_quantile_s(buckets("weak", 0, 0, 0, 0)) is None


def test_counters_of_a_running_proxy(tmp_path):
    stage_module = pytest.importorskip("tests.serve_stage", reason="edgeft[serve] is not installed")
    engines = {name: stage_module.Engine(name) for name in ("weak", "strong")}
    from edgeft.serve.app import create_app

    upstreams = {n: stage_module.upstream_of(e) for n, e in engines.items()}
    cache = stage_module.cache_in(tmp_path / "cache")
    app = create_app(stage_module.policy_of(), upstreams, cache, config=stage_module.config_of())
    with stage_module.running(app) as client:
        for text in ("hello", "hello", "refund me", "good day"):
            body = {"model": "auto", "messages": [{"role": "user", "content": text}], "temperature": 0}
            assert client.post("/v1/chat/completions", json=body).status_code == 200
        found = shares(read_counters(str(client.base_url)), "weak")
        assert (found["answer_cache_share"], found["local_share"], found["escalated_share"]) == (
            0.25,
            0.75,
            0.0,
        )
        app.proxy.metrics.escalated(
            "weak", "strong", "judge"
        )  # "refund me" as if it had been tried locally first
        found = shares(read_counters(str(client.base_url)), "weak")
    assert (found["local_share"], found["escalated_share"]) == (1.0, 0.25)


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
    bounds = (("0.5", 90.0), ("1.0", 100.0), ("+Inf", 100.0))
    lines = [
        f'edgeft_ttft_seconds_bucket{{le="{bound}",route="gguf-q4_k_m"}} {count}' for bound, count in bounds
    ]
    (tmp_path / "metrics.txt").write_text(METRICS + "\n".join(lines) + "\n")
    made = build(value, "file", tmp_path, {}).columns["routed"].figures
    assert (made["local_share"].value, made["answer_cache_share"].value) == (0.7, 0.2)
    assert made["ttft_p95_s"].value == pytest.approx(0.75) and made["ttft_p95_s"].tag == "measured"


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
