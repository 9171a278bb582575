"""A report as CSV: one line a result, units in the names, empty where nothing was measured."""

from __future__ import annotations

import csv
import io
from typing import Any

from edgeft.types import BenchReport

# column -> the keys that lead to it in a result; a number picks from a list
COLUMNS: dict[str, tuple[str | int, ...]] = {
    "id": ("id",),
    "kind": ("kind",),
    "engine": ("engine",),
    "engine_build": ("engine_build",),
    "model_name": ("model_name",),
    "format": ("format",),
    "variant": ("variant",),
    "artifact_sha256": ("artifact_sha256",),
    "size_bytes": ("size_bytes",),
    "bits_per_weight": ("bits_per_weight",),
    "parameters": ("parameters",),
    "right_share": ("accuracy", "share"),
    "right_share_ci95_low": ("accuracy", "ci95", 0),
    "right_share_ci95_high": ("accuracy", "ci95", 1),
    "right_n": ("accuracy", "n"),
    "kld_answer_mean_nats": ("fidelity", "answer", "kld_mean"),
    "kld_all_mean_nats": ("fidelity", "all", "kld_mean"),
    "same_top1_all_share": ("fidelity", "all", "same_top1"),
    **{
        f"{key}_{part}": ("speed", key, *where)
        for key in ("ttft_s", "prefill_tok_per_s", "decode_tok_per_s", "tpot_s")
        for part, where in {
            "p50": ("p50",),
            "p50_ci95_low": ("p50_ci95", 0),
            "p50_ci95_high": ("p50_ci95", 1),
            "p95": ("p95",),
            "n": ("n",),
        }.items()
    },
    "speed_processes": ("speed", "processes"),
    "kept_gain": ("retention", "value"),
    "kept_gain_ci95_low": ("retention", "ci95", 0),
    "kept_gain_ci95_high": ("retention", "ci95", 1),
    "bandwidth_share": ("roofline", "bandwidth_share"),
    "gemm_share": ("roofline", "gemm_share"),
    "joules_per_output_token": ("energy", "joules_per_output_token"),
    "energy_method": ("energy", "method"),
    "peak_rss_bytes": ("memory", "peak_rss_bytes"),
    "peak_anon_bytes": ("memory", "peak_anon_bytes"),
    "peak_file_bytes": ("memory", "peak_file_bytes"),
    "vram_bytes": ("memory", "vram_bytes"),
    "cold_start_s": ("load", "cold_start_s"),
    "load_s": ("load", "load_s"),
    "load_mode": ("load", "load_mode"),
    "device": ("load", "device"),
    "error": ("error",),
}


def csv_text(report: BenchReport) -> str:
    """The report as CSV (RFC 4180, a header line first). The report's time and box stand on every line."""
    written = io.StringIO()
    writer = csv.writer(written)
    writer.writerow(["created_at", "profile_id", *COLUMNS, "flags"])
    for result in report.results:
        flags = " ".join(sorted({flag["what"] for flag in result.get("flags") or []}))
        cells = [_at(result, keys) for keys in COLUMNS.values()]
        writer.writerow([report.created_at, report.profile.get("id"), *cells, flags])
    return written.getvalue()


def _at(value: Any, keys: tuple[str | int, ...]) -> Any:
    """The value that the keys lead to; None (an empty cell) where the way ends."""
    for key in keys:
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list) and isinstance(key, int) and key < len(value):
            value = value[key]
        else:
            return None
    return value
