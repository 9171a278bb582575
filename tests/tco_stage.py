"""A box, a report and scenarios for the tests of tco; each test has a home of its own."""

from datetime import date
from pathlib import Path

import pytest
import yaml

from edgeft.console import output
from edgeft.tco import tabulate
from edgeft.tco.from_report import from_report
from edgeft.tco.scenario import build
from edgeft.types import BenchReport

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
        "date": date(2026, 11, 25),
    }
    return build({**value, "figures": figures, "columns": columns}, "the test", Path(), changed or {})


SMALLEST = {"schema": "edgeft/scenario@1", "columns": {"a": {"kind": "api", "figures": {}}}}


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
