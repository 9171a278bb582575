"""The proxy's metrics: names and labels that dashboards rely on, bounded whatever the labels."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("prometheus_client", reason="edgeft[serve] is not installed")

from edgeft.serve import metrics as module
from edgeft.serve.metrics import Metrics
from tests.conftest import ROOT

DASHBOARD = ROOT / "docs" / "grafana" / "edgeft.json"


def everything() -> Metrics:
    """Metrics after one of every event."""
    metrics = Metrics()
    metrics.finished("weak", 200, 0.3)
    metrics.first("weak", 0.1)
    metrics.looked_up("hit")
    metrics.tokens_used("weak", 100, 7, cached=64)
    metrics.usage_unresolved("strong")
    metrics.paid("strong", 0.25, 0.5)
    metrics.escalated("weak", "strong", "judge")
    metrics.fell_back()
    metrics.refused("queue_full")
    metrics.queued("weak", 1, 3)
    metrics.engine_state("weak", "ready")
    metrics.certificate_suspended(True)
    return metrics


def test_every_event_is_counted_under_its_documented_name():
    text = everything().text().decode()
    for line in (
        'edgeft_requests_total{route="weak",status="200"} 1.0',
        'edgeft_request_duration_seconds_sum{route="weak"} 0.3',
        'edgeft_ttft_seconds_bucket{le="0.1",route="weak"} 1.0',
        'edgeft_cache_total{result="hit"} 1.0',
        'edgeft_tokens_total{direction="in",route="weak"} 100.0',
        'edgeft_tokens_total{direction="out",route="weak"} 7.0',
        'edgeft_cached_tokens_total{route="weak"} 64.0',
        'edgeft_usage_unresolved_total{route="strong"} 1.0',
        'edgeft_cost_usd_total{route="strong"} 0.25',
        "edgeft_always_api_usd_total 0.5",
        'edgeft_escalations_total{from="weak",to="strong",why="judge"} 1.0',
        "edgeft_fallbacks_total 1.0",
        'edgeft_refused_total{code="queue_full"} 1.0',
        'edgeft_in_flight{route="weak"} 1.0',
        'edgeft_waiting{route="weak"} 3.0',
        'edgeft_engine_state{route="weak",state="ready"} 1.0',
        "edgeft_certificate_suspended 1.0",
    ):
        assert f"\n{line}\n" in text, line
    assert re.search(r'edgeft_build_info\{python="3[.\d]+",version="[\d.]+"\} 1\.0', text)


def test_prices_that_are_not_known_are_not_zero():
    metrics = Metrics()
    metrics.paid("weak", None, None)
    assert "edgeft_cost_usd_total{" not in metrics.text().decode()
    metrics.paid("weak", 0.0, None)
    assert 'edgeft_cost_usd_total{route="weak"} 0.0' in metrics.text().decode()


def test_an_engine_is_in_one_state():
    metrics = Metrics()
    for state in ("loading", "ready", "ready", "ended", "ready"):
        metrics.engine_state("weak", state)
    assert {s.labels["state"]: s.value for f in metrics.states.collect() for s in f.samples} == {
        "loading": 0.0, "ready": 1.0, "ended": 0.0,
    }  # fmt: skip


def test_labels_are_bounded_and_no_count_is_lost(monkeypatch):
    monkeypatch.setattr(module, "MOST_CHILDREN", 20)
    metrics = Metrics()
    for i in range(1000):
        metrics.refused(f"code-{i}")
        metrics.refused("known")
    metrics.refused('a"b\nc')
    samples = [s for f in metrics.refusals.collect() for s in f.samples if s.name == "edgeft_refused_total"]
    assert len(samples) <= 22 and sum(s.value for s in samples) == 2001
    assert next(s.value for s in samples if s.labels["code"] == "known") == 1000


def test_what_counted_before_counts_the_same_children():
    metrics = Metrics()
    metrics.requests.labels("weak", "200").inc()
    metrics.finished("weak", 200, 1.0)
    assert 'edgeft_requests_total{route="weak",status="200"} 2.0' in metrics.text().decode()


def test_the_dashboard_asks_for_what_there_is():
    labels: dict[str, set[str]] = {}
    for family in everything().registry.collect():
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    board = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked = set()
    for query in queries:
        names = set(re.findall(r"\bedgeft_\w+", query))
        assert names and names <= set(labels), query
        grouped = {w.strip() for group in re.findall(r"by \(([^)]*)\)", query) for w in group.split(",")}
        matched = set(re.findall(r"(\w+)=~?\"", query))
        assert all(grouped | matched <= labels[name] for name in names), query
        assert query.count("(") == query.count(")")
        asked |= {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in names}
    families = {f.name for f in everything().registry.collect()}
    assert families - {"edgeft_build"} <= asked, "a metric that no panel shows"
    boxes = [panel["gridPos"] for panel in board["panels"]]
    cells = [
        (x, y) for b in boxes for x in range(b["x"], b["x"] + b["w"]) for y in range(b["y"], b["y"] + b["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24, "panels lie on each other"
