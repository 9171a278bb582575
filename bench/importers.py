"""Reports of other tools as a BenchReport: llama-bench (`-o json`) and GuideLLM (benchmarks.json).

What the other tool did not measure is None. Rates are worked out again from raw times: llama-bench's `avg_ts` averages
rates, and GuideLLM's `time_per_output_token_ms` and `output_tokens_per_second` hold the first token.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from edgeft.bench.stats import summary
from edgeft.errors import UsageError
from edgeft.files import read_json, sha256_file
from edgeft.types import BenchReport

SETTINGS = (
    "n_threads", "n_batch", "n_ubatch", "type_k", "type_v", "n_gpu_layers", "flash_attn", "load_mode", "use_mmap", "devices",
)  # fmt: skip
NOTHING: dict[str, Any] = {
    "path": None, "artifact_sha256": None, "size_bytes": None, "load": None, "speed": None, "accuracy": None,
    "memory": None, "fidelity": None, "price": None, "against_reference": None,
}  # fmt: skip


def import_file(file: Path) -> BenchReport:
    """Read another tool's JSON. Raises UsageError where it is of no known tool or lacks what the figures need."""
    value = read_json(file)
    make: Callable[[Any, dict[str, Any]], BenchReport]
    if isinstance(value, list) and value and all(isinstance(v, dict) and "samples_ns" in v for v in value):
        tool, make = "llama-bench", _llama_bench
    elif isinstance(value, dict) and isinstance(value.get("benchmarks"), list) and value["benchmarks"]:
        tool, make = "guidellm", _guidellm
    else:
        raise UsageError(
            f"{file} is neither llama-bench's JSON nor a GuideLLM report.",
            "llama-bench … -o json > FILE, or guidellm's benchmarks.json",
        )
    origin = {"tool": tool, "file": file.name, "sha256": sha256_file(file)}
    try:
        return make(value, origin)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UsageError(
            f"{file} is not as {tool} writes it: {type(error).__name__} {error}.",
            f"python3 -m json.tool {file}",
        ) from None


def _report(
    origin: dict[str, Any],
    created_at: str,
    name: str | None,
    workload: dict[str, Any],
    results: list[dict[str, Any]],
) -> BenchReport:
    return BenchReport(
        created_at=created_at,
        environment={"imported_from": origin, "imported_at": datetime.now(UTC).isoformat(timespec="seconds")},
        profile={"id": "imported", "name": name, "source": origin["tool"]},
        workload={
            "tasks": None,
            "tasks_sha256": None,
            "rows": 0,
            "threads": None,
            "max_tokens": None,
            **workload,
        },
        results=results,
        reference=None,
    )


def _llama_bench(entries: list[dict[str, Any]], origin: dict[str, Any]) -> BenchReport:
    """A result for each model file with one set of settings; each of its tests is a point.

    pp tests (n_gen 0) give prefill, tg tests (n_prompt 0) decode; a test with both (-pg) has one time for the two, so it
    is kept as it is. The clock is the engine's: no tokenizing, sampling, HTTP, and random tokens.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for entry in entries:
        key = (entry["model_filename"], entry.get("build_commit"), *(str(entry.get(k)) for k in SETTINGS))
        groups.setdefault(key, []).append(entry)
    names = _unique([_stem(group[0]["model_filename"]) for group in groups.values()])
    results = [_llama_result(name, group) for name, group in zip(names, groups.values(), strict=True)]
    threads = {entry.get("n_threads") for entry in entries}
    times = sorted(entry["test_time"] for entry in entries if entry.get("test_time"))
    boxes = {" ".join(filter(None, (e.get("cpu_info"), e.get("gpu_info")))) for e in entries}
    return _report(
        origin,
        _utc(times[0]) if times else datetime.now(UTC).isoformat(timespec="seconds"),
        ", ".join(sorted(boxes - {""})) or None,
        {"threads": threads.pop() if len(threads) == 1 else None},
        results,
    )


def _llama_result(name: str, group: list[dict[str, Any]]) -> dict[str, Any]:
    first = group[0]
    points, other = [], []
    for test in group:
        prompt, output = test["n_prompt"], test["n_gen"]
        if bool(prompt) == bool(output):
            other.append({**test, "model_filename": _last(test["model_filename"])})
            continue
        key = "prefill_tok_per_s" if prompt else "decode_tok_per_s"
        rates = [(prompt or output) * 1e9 / ns for ns in test["samples_ns"]]
        asked = {"prompt_tokens": prompt, "output_tokens": output}
        if test.get("n_depth"):
            asked["depth_tokens"] = test["n_depth"]
        points.append({"asked": asked, "prompt_tokens": [prompt] * len(rates), "output_tokens": [output] * len(rates),
                       **_figures({key: rates})})  # fmt: skip
    # The figure of the whole is the first test of its kind, as llama-bench's own table begins with pp512 and tg128.
    whole = {
        key: next((p[key] for p in points if p[key]), None)
        for key in ("prefill_tok_per_s", "decode_tok_per_s")
    }
    size, parameters = first.get("model_size"), first.get("model_n_params")
    build = f"llama.cpp {first.get('build_commit')} ({first.get('build_number')})"
    mode = first.get("load_mode") or {True: "mmap", False: "read"}.get(first.get("use_mmap", ""))
    return {
        **NOTHING,
        "id": name,
        "kind": "imported",
        "engine": "gguf",
        "engine_build": build,
        "format": "gguf",
        "variant": None,
        "model_name": _stem(first["model_filename"]),
        "model_type": first.get("model_type"),
        "parameters": parameters,
        "tensor_bytes": size,
        "bits_per_weight": 8 * size / parameters if size and parameters else None,
        "load": {"cold_start_s": None, "load_s": None, "load_mode": mode},
        "speed": {
            **_figures({}),
            **whole,
            "prompt_tokens": [],
            "output_tokens": [],
            "side": "engine",
            "points": points,
            "formula": "tokens of the test / its time, from samples_ns; random tokens, tokenizing and sampling untimed",
        },
        "settings": {k: first[k] for k in SETTINGS if k in first},
        "other_tests": other,
    }


def _guidellm(value: dict[str, Any], origin: dict[str, Any]) -> BenchReport:
    """A result for each benchmark (one strategy of load) over its successful requests.

    decode tok/s = (n-1)/(last token - first token), the reciprocal of GuideLLM's inter-token latency. Prefill is given
    only for one request at a time whose server said that none of the prompt came from its cache.
    """
    origin = origin | {"version": (value.get("metadata") or {}).get("guidellm_version")}
    benchmarks = value["benchmarks"]
    names = _unique([_guidellm_name(value, benchmark) for benchmark in benchmarks])
    results = [_guidellm_result(name, value, b) for name, b in zip(names, benchmarks, strict=True)]
    start = next(
        (t for b in benchmarks if (t := b.get("start_time") or (b.get("run_stats") or {}).get("start_time"))),
        None,
    )
    created = datetime.fromtimestamp(start, UTC) if start else datetime.now(UTC)
    return _report(origin, created.isoformat(timespec="seconds"), None, {}, results)


def _guidellm_name(value: dict[str, Any], benchmark: dict[str, Any]) -> str:
    return f"{_guidellm_model(value, benchmark) or 'server'}@{_strategy_name(_strategy(benchmark))}"


def _guidellm_model(value: dict[str, Any], benchmark: dict[str, Any]) -> str | None:
    """The model's name, which has stood in several places; a local path is cut to its last part."""
    config, whole = benchmark.get("config") or {}, value.get("config") or {}
    places = (
        config.get("backend"), (whole.get("spec") or {}).get("backend"), value.get("args"), benchmark.get("worker"),
    )  # fmt: skip
    for place in places:
        name = (
            (place or {}).get("model") or (place or {}).get("backend_model")
            if isinstance(place, dict)
            else None
        )
        if name:
            return _last(name) if str(name).startswith(("/", ".", "~")) else str(name)
    return None


def _strategy(benchmark: dict[str, Any]) -> dict[str, Any]:
    return (benchmark.get("config") or benchmark.get("args") or {}).get("strategy") or {}


def _strategy_name(strategy: dict[str, Any]) -> str:
    kind = strategy.get("type_") or "load"
    size = strategy.get("streams") or strategy.get("rate") or strategy.get("max_concurrency")
    return f"{kind}-{size:g}" if size else str(kind)


def _guidellm_result(name: str, value: dict[str, Any], benchmark: dict[str, Any]) -> dict[str, Any]:
    strategy, metrics = _strategy(benchmark), benchmark.get("metrics") or {}
    requests = benchmark.get("requests") or {}
    done = requests.get("successful") or []
    alone = strategy.get("type_") == "synchronous" or strategy.get("streams") == 1

    def each(key: str, to: Callable[[float], float]) -> list[float]:
        return [to(r[key]) for r in done if r.get(key)]

    samples = {
        "ttft_s": each("time_to_first_token_ms", lambda ms: ms / 1e3),
        "tpot_s": each("inter_token_latency_ms", lambda ms: ms / 1e3),
        "decode_tok_per_s": each("inter_token_latency_ms", lambda ms: 1e3 / ms),
        "prefill_tok_per_s": [
            1e3 * r["prompt_tokens"] / r["time_to_first_token_ms"]
            for r in done
            if alone
            and r.get("cached_tokens") == 0
            and r.get("prompt_tokens")
            and r.get("time_to_first_token_ms")
        ],
    }
    figures = _figures(samples)
    if not done:  # GuideLLM can leave the requests out (sample_size 0): its own percentiles are what is left
        figures["ttft_s"] = _distribution(metrics, "time_to_first_token_ms")
        figures["tpot_s"] = _distribution(metrics, "inter_token_latency_ms")
    totals = metrics.get("request_totals") or {}
    rates = {
        f"{key}_mean": ((metrics.get(theirs) or {}).get("successful") or {}).get("mean")
        for key, theirs in (
            ("requests_per_s", "requests_per_second"),
            ("output_tok_per_s", "output_tokens_per_second"),
        )
    }
    return {
        **NOTHING,
        "id": name,
        "kind": "imported",
        "engine": "openai",
        "engine_build": None,
        "model_name": _guidellm_model(value, benchmark),
        "speed": {
            **figures,
            "prompt_tokens": [r["prompt_tokens"] for r in done if r.get("prompt_tokens") is not None],
            "output_tokens": [r["output_tokens"] for r in done if r.get("output_tokens") is not None],
            "side": "client",
            "formula": "decode tok/s = (n-1)/(last token - first token)",
        },
        "load_test": {
            "strategy": strategy.get("type_"),
            "streams": strategy.get("streams") or strategy.get("max_concurrency"),
            "asked_requests_per_s": strategy.get("rate"),
            **rates,
            "requests": {k: totals.get(k) for k in ("successful", "incomplete", "errored")},
            "duration_s": benchmark.get("duration"),
        },
    }


def _distribution(metrics: dict[str, Any], key: str) -> dict[str, Any] | None:
    """GuideLLM's summary of successful requests, from milliseconds to seconds; no samples, so no interval."""
    found = (metrics.get(key) or {}).get("successful")
    if not found or not found.get("count"):
        return None
    percentiles = {p: found.get("percentiles", {}).get(p) for p in ("p90", "p95", "p99")}
    in_s = {p: v / 1e3 if v is not None else None for p, v in percentiles.items()}
    return {"p50": found["median"] / 1e3, **in_s, "p50_ci95": None, "n": found["count"], "samples": []}


def _figures(samples: dict[str, list[float]]) -> dict[str, Any]:
    keys = ("ttft_s", "prefill_tok_per_s", "decode_tok_per_s", "tpot_s")
    return {key: summary(samples[key]) if samples.get(key) else None for key in keys}


def _last(path: str) -> str:
    return PureWindowsPath(path).name if "\\" in path else PurePosixPath(path).name


def _stem(path: str) -> str:
    return _last(path).removesuffix(".gguf")


def _unique(names: list[str]) -> list[str]:
    return [f"{n}-{names[:i].count(n) + 1}" if names.count(n) > 1 else n for i, n in enumerate(names)]


def _utc(text: str) -> str:
    return datetime.fromisoformat(text).astimezone(UTC).isoformat(timespec="seconds")
