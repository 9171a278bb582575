"""TTFT of a tenant's second request behind the same long system prompt, beside its first and beside another tenant's.

    python benchmarks/serve_prefix.py MODEL.gguf|ARTEFACT [--rounds 10] [--tokens 1000] [--slots 2]

`edgeft serve` over one GGUF file, or an artefact of another engine (`--slots 1` for ONNX), with two keys. A round has a system prompt of its
own: first and second question of tenant a, then the same of tenant b, who must not profit from a's; cached tokens as the engine tells
them. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from serving.proxy import EDGEFT, edgeft
from serving.stage import WORDS, environment, show


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path, metavar="MODEL.gguf|ARTEFACT")
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    chance, found = random.Random(2), []
    with tempfile.TemporaryDirectory() as name:
        scratch, names = Path(name), ["openai:http://127.0.0.1:9#local", "openai:http://127.0.0.1:9#other"]
        with edgeft(
            names,
            scratch,
            model=names[0],
            gguf=options.gguf.resolve(),
            threads=options.threads,
            slots=options.slots,
        ) as server:
            home = next(scratch.glob("edgeft-*")) / "home"
            made = subprocess.run(
                [*EDGEFT, "keys", "create", "other", "--json"], check=True, env=environment(EDGEFT_HOME=str(home)),
                stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            keys = {"a": server.key, "b": json.loads(made.stdout)["key"]}
            time.sleep(1.5)  # the proxy looks for new keys
            with httpx.Client(base_url=server.url, timeout=300, trust_env=False) as client:
                for round_ in range(options.rounds):
                    system = f"{round_} " + " ".join(chance.choices(WORDS, k=options.tokens))
                    for tenant in ("a", "b"):
                        for turn in (1, 2):
                            found.append(
                                {
                                    "tenant": tenant,
                                    "turn": turn,
                                    **ask(client, keys[tenant], server.model, system, f"question {turn}"),
                                }
                            )
    table = [["request", "TTFT ms (median)", "cached tokens", "of"]]
    medians: dict[str, float] = {}
    for tenant in ("a", "b"):
        for turn in (1, 2):
            rows = [r for r in found if r["tenant"] == tenant and r["turn"] == turn]
            medians[f"{tenant}{turn}"] = statistics.median(r["ttft_s"] for r in rows)
            cached = statistics.median(r["cached"] or 0 for r in rows)
            table.append(
                [
                    f"tenant {tenant}, {'first' if turn == 1 else 'second'}",
                    f"{1e3 * medians[f'{tenant}{turn}']:.0f}",
                    f"{cached:.0f}",
                    f"{rows[0]['prompt']}",
                ]
            )
    result = {
        "second_over_first": medians["a2"] / medians["a1"],
        "other_tenant_over_first": medians["b1"] / medians["a1"],
        "other_tenant_cached_tokens": max(
            r["cached"] or 0 for r in found if r["tenant"] == "b" and r["turn"] == 1
        ),
    }
    show(table, {**result, "options": {k: str(v) for k, v in vars(options).items()}})


def ask(client: httpx.Client, key: str | None, model: str, system: str, question: str) -> dict[str, Any]:
    """One streamed request: time to its first text, tokens of the prompt, those that were not computed again."""
    body = {
        "model": model, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 4, "temperature": 1.0,
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": question}],
    }  # fmt: skip
    began, ttft_s, usage = time.perf_counter(), None, {}
    with client.stream(
        "POST", "/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"}
    ) as reply:
        if reply.status_code != 200:
            raise SystemExit(reply.read().decode())
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                if ttft_s is None and any(c["delta"].get("content") for c in chunk["choices"]):
                    ttft_s = time.perf_counter() - began
                usage = chunk.get("usage") or usage
    details = usage.get("prompt_tokens_details") or {}
    return {
        "ttft_s": ttft_s or time.perf_counter() - began,
        "prompt": usage.get("prompt_tokens"),
        "cached": details.get("cached_tokens"),
    }


if __name__ == "__main__":
    main()
