"""Requests/s and added latency of edgeft's proxy, LiteLLM's and a bare ASGI pass-through before the same stand-in upstream that answers at once.

    python benchmarks/serve_proxies.py [--rounds 5] [--seconds 8] [--litellm-python PYTHON | --no-litellm]

`wrk -t1`, not streamed, prompts of about 200 tokens, answers of 16, everything on the same cores, in rotating rounds; medians over
rounds. Added latency is the proxy's percentile less the upstream's own in the same round. A failed request ends the run.
Must reach: 25 x LiteLLM's requests/s and 0.4 x the pass-through's; 1.0 / 5 ms added at one client; a hit of the exact cache in 1.0 ms (p50)
at the client, 3,000/s. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from serving import rivals, stage
from serving.proxy import edgeft
from serving.stage import Server

REQUESTS = 4096  # different texts: more than the proxy keeps features of
REPEATED = 64  # of the cache's hits
GREEDY = {"temperature": 0, "max_tokens": 16}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--litellm-python", type=Path, help="an interpreter that has litellm[proxy]")
    parser.add_argument("--no-litellm", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        scratch = Path(name)
        upstream = stack.enter_context(stage.module("upstream", scratch=scratch))
        candidates = [f"openai:{upstream.url}#{name}" for name in ("small", "large")]
        servers = {
            "upstream": upstream,
            "pass-through": stack.enter_context(stage.module("passthrough", upstream.url, scratch=scratch)),
            "edgeft": stack.enter_context(edgeft(candidates, scratch)),
            "edgeft, hits": stack.enter_context(edgeft(candidates, scratch, cache=True)),
        }
        if not options.no_litellm:
            python = options.litellm_python or rivals.litellm_python()
            servers["litellm"] = stack.enter_context(rivals.litellm(upstream.url, python, scratch))
        runs = measure(servers, options.rounds, options.seconds, scratch)
    report(runs, vars(options))


def measure(
    servers: dict[str, Server], rounds: int, seconds: float, scratch: Path
) -> dict[str, list[dict[str, dict[str, float]]]]:
    """name -> for each round {"c16": …, "c1": …}; the order turns by one place a round."""
    asked = {
        name: stage.bodies(REPEATED, server.model, **GREEDY)
        if "hits" in name
        else stage.bodies(REQUESTS, server.model)
        for name, server in servers.items()
    }
    for name, server in servers.items():
        stage.answers(server, asked[name][0])
        stage.wrk(
            server, asked[name], 4, max(2, seconds / 2), scratch
        )  # warm: caches filled, connections made
    names = list(servers)
    runs: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            runs[name].append(
                {
                    f"c{count}": stage.wrk(servers[name], asked[name], count, seconds, scratch)
                    for count in (16, 1)
                }
            )
    return runs


def report(runs: dict[str, list[dict[str, dict[str, float]]]], options: dict[str, Any]) -> None:
    """Medians over rounds, and ratios of the same round."""

    def median(figure: Callable[[int], float]) -> float:
        return statistics.median(figure(i) for i in range(len(runs["edgeft"])))

    def of(name: str, load: str, what: str) -> float:
        return median(lambda i: runs[name][i][load][what])

    def added(name: str, what: str) -> float:
        return median(lambda i: runs[name][i]["c1"][what] - runs["upstream"][i]["c1"][what])

    def ratio(other: str) -> float:
        return median(
            lambda i: runs["edgeft"][i]["c16"]["requests_per_s"] / runs[other][i]["c16"]["requests_per_s"]
        )

    table = [
        [
            "",
            "requests/s at 16",
            "p50 ms at 16",
            "p99 ms at 16",
            "p50 ms at 1",
            "p99 ms at 1",
            "added p50",
            "added p99",
        ]
    ]
    found: dict[str, Any] = {
        "rounds": options["rounds"],
        "seconds": options["seconds"],
        "upstream": "stand-in, instant",
    }
    for name in runs:
        figures = {
            "requests_per_s_c16": of(name, "c16", "requests_per_s"),
            "p50_ms_c16": of(name, "c16", "p50_ms"),
            "p99_ms_c16": of(name, "c16", "p99_ms"),
            "p50_ms_c1": of(name, "c1", "p50_ms"),
            "p99_ms_c1": of(name, "c1", "p99_ms"),
            "added_p50_ms": added(name, "p50_ms"),
            "added_p99_ms": added(name, "p99_ms"),
        }
        found[name] = {key: round(value, 3) for key, value in figures.items()}
        table.append([name, *(f"{value:.2f}" for value in figures.values())])
    found["ratio_to_pass_through"] = round(ratio("pass-through"), 3)
    table.append(["edgeft / pass-through", f"{found['ratio_to_pass_through']:.3f} (0.4 asked)", *[""] * 6])
    if "litellm" in runs:
        found["ratio_to_litellm"] = round(ratio("litellm"), 2)
        table.append(["edgeft / litellm", f"{found['ratio_to_litellm']:.1f} (25 asked)", *[""] * 6])
    stage.show(table, found)


if __name__ == "__main__":
    main()
