"""The page with a real Live behind it and made-up traffic: for tests and for looking at; nothing here is measured.

python -m tests.page_stage [empty|busy|keys] serves it on a free port until interrupted.
"""

from __future__ import annotations

import asyncio
import random
import threading
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edgeft.serve.live import Live
from edgeft.serve.page import STATE_PATH, page

LONG = "openai:https://api.example.org#a-model-with-a-long-name-2026-11-25"
ROUTES = (("gguf-q4_k_m", True, 0.12, 0.9), ("onnx-int4", True, 0.3, 2.4), (LONG, False, 0.45, 3.0))
HOSTILE = "<img src=x onerror=alert(1)>"


class Clock:
    """Seconds that pass when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def busy(minutes: int = 75, seed: int = 1) -> tuple[Live, list[dict[str, Any]], dict[str, Any]]:
    """A Live after made-up traffic, with requests that still run; its engines and certificate."""
    chance, clock = random.Random(seed), Clock()
    shown = Live(clock)
    for i in range(minutes * 40):
        clock.now += chance.expovariate(1.5 if (i // 400) % 2 else 0.6)
        arrived, key = clock.now, f"{chance.getrandbits(128):032x}"
        shown.begin(key, chance.random() < 0.7, "tenant")
        route, local, ttft_s, rest_s = chance.choices(ROUTES, (6, 2, 2))[0]
        cached, fate = chance.random() < 0.2, chance.random()
        status = 429 if fate < 0.04 else 502 if fate < 0.045 else 499 if fate < 0.06 else 200
        tokens = chance.randint(5, 400)
        if status != 429:
            shown.routed(key, route, local)
            if not cached:
                clock.now += ttft_s * chance.lognormvariate(0, 0.4)
                shown.first(key)
                clock.now += rest_s * tokens / 200
        price = tokens * 1.5e-5 if status == 200 else None
        shown.end(
            key, status, cache=cached, prompt_tokens=tokens * 3, output_tokens=tokens,
            cost_usd=None if price is None else 0.0 if cached or local else price, always_api_usd=price,
        )  # fmt: skip
        clock.now = arrived
    for i in range(6):
        key = f"{chance.getrandbits(128):032x}"
        shown.begin(key, i % 2 == 0, "tenant")
        if i:
            shown.routed(key, *ROUTES[i % 3][:2])
        if i > 2:
            shown.first(key)
        clock.now += 0.7
    engines = [
        {"route": "gguf-q4_k_m", "local": True, "state": "ready", "in_flight": 4, "slots": 4, "waiting": 7, "waiting_limit": 32},
        {"route": "onnx-int4", "local": True, "state": "loading", "in_flight": 0, "slots": 1, "waiting": 0, "waiting_limit": 32},
        {"route": LONG, "local": False, "state": "ready", "in_flight": 2, "slots": 64, "waiting": 0, "waiting_limit": 32},
        {"route": HOSTILE, "local": False, "state": "ended", "in_flight": 0, "slots": 64, "waiting": 0, "waiting_limit": None},
    ]  # fmt: skip
    certificate = {
        "state": "holds",
        "detail": "at most 1 % lose by staying local, with 95 % confidence (1,204 rows)",
    }
    return shown, engines, certificate


def create_app(
    shown: Live,
    engines: list[dict[str, Any]],
    certificate: dict[str, Any] | None,
    key: str | None = None,
    gate: threading.Event | None = None,
) -> Starlette:
    """The page and its figures; with `key` only for who has it, with `gate` only when it is open."""

    async def root(_: Request) -> Response:
        body, headers = page()
        return Response(body, headers=headers)

    async def state(request: Request) -> Response:
        if key and request.headers.get("authorization") != f"Bearer {key}":
            return JSONResponse({"error": {"message": "no such key"}}, 401)
        while gate and not gate.is_set():
            await asyncio.sleep(0.01)
        return JSONResponse(shown.snapshot(engines, certificate))

    return Starlette(routes=[Route("/", root), Route(STATE_PATH, state)])


if __name__ == "__main__":
    import sys

    import uvicorn

    kind = sys.argv[1] if len(sys.argv) > 1 else "busy"
    stage = (Live(), [], None) if kind == "empty" else busy()
    uvicorn.run(create_app(*stage, key="ek-stage" if kind == "keys" else None), port=0)
