"""First paint and size of the page at `/` of a running proxy, in headless Chromium (PerformancePaintTiming, nothing cached).

Asked: first paint within 0.3 s, under 150 KB. The rival in the same run, in turns with it, is a page of one word from Python's
own http.server: what the browser takes in any case. Prints JSON. Without --url the tests' stage serves the page, which is
said; its traffic is made up, and the first paint does not wait for it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any

import chromium
import httpx

PAINTS = "JSON.stringify(Object.fromEntries(performance.getEntriesByType('paint').map(e => [e.name, e.startTime])))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="a running proxy")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--width", type=int, default=1280)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        url = options.url or stack.enter_context(_stage())
        rival = stack.enter_context(_one_word())
        response = httpx.get(url)
        response.raise_for_status()
        found: dict[str, list[dict[str, float]]] = {url: [], rival: []}
        browser = stack.enter_context(chromium.Chromium())
        for _ in range(options.times + 1):
            for address, paints in found.items():
                browser.tab(options.width)
                browser.call("Network.setCacheDisabled", cacheDisabled=True)
                browser.open(address)
                browser.until("performance.getEntriesByType('paint').length === 2")
                paints.append(json.loads(browser.ask(PAINTS)))
        version = browser.call("Browser.getVersion")["product"]
    ours, theirs = (_told(paints[1:]) for paints in found.values())  # the first warms the browser up
    print(
        json.dumps(
            {
                "page": "a running proxy's" if options.url else "the tests' stage, made-up traffic",
                "bytes": len(response.content),
                "under_150_kb": len(response.content) < 150_000,
                "first_paint": ours,
                "rival: a page of one word": theirs,
                "ratio p50": round(ours["p50_ms"] / theirs["p50_ms"], 2),
                "p95_within_300_ms": ours["p95_ms"] <= 300,
                "browser": version,
                "load_average_1m": round(os.getloadavg()[0], 1),
            },
            indent=1,
        )
    )


def _told(paints: list[dict[str, float]]) -> dict[str, Any]:
    first = sorted(p["first-paint"] for p in paints)
    whole = sorted(p["first-contentful-paint"] for p in paints)
    return {
        "n": len(first),
        "p50_ms": median(first),
        "p95_ms": first[-(-95 * len(first) // 100) - 1],
        "max_ms": first[-1],
        "contentful_p50_ms": median(whole),
    }


@contextlib.contextmanager
def _stage() -> Iterator[str]:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from tests.page_stage import busy, create_app
    from tests.serve_stage import running

    with running(create_app(*busy(10))) as client:
        yield str(client.base_url)


@contextlib.contextmanager
def _one_word() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            body = b"<!doctype html><title>x</title><link rel=icon href=data:,><p>word"
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    main()
