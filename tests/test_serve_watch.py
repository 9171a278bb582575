"""Drift suspends the certificate while serving; a budget moves requests to cheaper candidates."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("starlette", reason="edgeft[serve] is not installed")
pytest.importorskip("uvicorn", reason="edgeft[serve] is not installed")
pytest.importorskip("aiohttp", reason="edgeft[serve] is not installed")

from edgeft.router import drift
from edgeft.router.policy import CERTIFICATE, load_policy, save_policy
from edgeft.serve.app import create_app
from edgeft.serve.running import watch_of
from tests.serve_stage import Engine, Stage, config_of, policy_of, running, tensors_of, until, upstream_of


def stage_app(policy: Any, watch: Any) -> Any:
    engines = {name: Engine(name) for name in ("weak", "strong")}
    return create_app(
        policy, {n: upstream_of(e) for n, e in engines.items()}, config=config_of(), watch=watch
    )


def test_drift_suspends_the_certificate_by_its_one_field(tmp_path, monkeypatch):
    monkeypatch.setattr(drift, "WINDOW", 60)
    monkeypatch.setattr("edgeft.router.watching.LOOK_EVERY", 60)
    policy = policy_of()
    save_policy(policy.policy, tensors_of(policy), tmp_path / "policy")
    folder = tmp_path / "policy"
    loaded = load_policy(folder)
    seen = [drift.observe(-0.2, 30 + n % 10, 1.0) for n in range(400)]
    held = {
        "schema": "edgeft/certificate@1", "policy_sha256": loaded.sha256, "alpha": 0.05, "delta": 0.1, "n": 400, "suspended": False,
        "drift_reference": drift.reference(seen), "artifacts": {c["id"]: c["artifact_sha256"] for c in loaded.policy.candidates},
    }  # fmt: skip
    (folder / CERTIFICATE).write_text(json.dumps(held))
    loaded = replace(load_policy(folder), certificate={**held, "void": None})
    app = stage_app(loaded, watch_of(loaded, folder))
    with running(app) as client:
        stage = Stage(client, {}, None)
        assert stage.chat("hello").headers["x-edgeft-certificate"] == "valid"
        for n in range(60):
            stage.chat(f"hello {'long ' * 200}{n}", temperature=0)
        until(lambda: json.loads((folder / CERTIFICATE).read_text())["suspended"])
        after = stage.chat("hello")
        assert (
            after.headers["x-edgeft-certificate"] == "not-applied"
            and after.headers["x-edgeft-route"] == "strong"
        )
        assert "suspended" in after.headers["x-edgeft-reason"]
        assert "drift in" in json.loads((folder / CERTIFICATE).read_text())["suspended_because"]
        assert "edgeft_certificate_suspended 1.0" in client.get("/metrics").text


def test_a_budget_that_is_nearly_spent_goes_to_the_cheap_one():
    price = {"usd_per_mtok_in": 1e5, "usd_per_mtok_out": 1e5}
    policy = policy_of(cost={"unit": "usd", "notes": []})
    policy.policy.candidates[1] |= {"price": price, "remote": True, "mean_output_tokens": 3.0}
    policy.policy.rule["budget"] = {"usd": 5.0, "per": "day"}
    watch = watch_of(policy)
    assert watch.budget is not None
    watch.budget.look_every = 20
    app = stage_app(policy, watch)
    with running(app) as client:
        stage = Stage(client, {}, None)
        first = stage.chat("a refund")
        assert first.headers["x-edgeft-route"] == "strong" and float(
            first.headers["x-edgeft-cost-usd"]
        ) == pytest.approx(0.5)
        for _ in range(40):
            last = stage.chat("a refund")
        assert last.headers["x-edgeft-route"] == "weak" and "price of cost" in last.headers["x-edgeft-reason"]
        metrics = client.get("/metrics").text
        spent = float(
            next(
                x for x in metrics.splitlines() if x.startswith('edgeft_cost_usd_total{route="strong"}')
            ).split()[-1]
        )
        assert 0.5 <= spent <= 11 and "edgeft_always_api_usd_total" in metrics
