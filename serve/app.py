"""The proxy as an ASGI application.

The paths that generate are raw ASGI, found in a table before anything else looks at the request; Starlette has the rest.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edgeft.router import LoadedPolicy
from edgeft.serve import counting, other_endpoints
from edgeft.serve.cache import AnswerCache
from edgeft.serve.config import Config
from edgeft.serve.endpoints import Endpoint, generating, tenant_of
from edgeft.serve.http import Receive, Scope, Send
from edgeft.serve.openapi import document
from edgeft.serve.protocol import CHAT, COMPLETION, Refusal
from edgeft.serve.proxy import AUTO, Proxy, default_config
from edgeft.serve.responses import responses
from edgeft.serve.state import certificate_of, engines_of
from edgeft.serve.upstream import Upstream

HOME = ("localhost", "127.0.0.1", "::1")


class App:
    """The application; `state.proxy` is what it holds."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.state = type("State", (), {"proxy": proxy})
        self.posts = {
            CHAT.path: Endpoint(proxy, generating(CHAT)),
            COMPLETION.path: Endpoint(proxy, generating(COMPLETION)),
            "/v1/embeddings": Endpoint(proxy, other_endpoints.embeddings),
            "/v1/responses": Endpoint(proxy, responses),
            "/generate": Endpoint(proxy, other_endpoints.generate),
        }
        self.rest = _rest(proxy, self.posts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and (found := self.posts.get(scope["path"])):
            if origin_refused(self.proxy, scope):
                response = _refused(
                    Refusal(403, "Requests of web pages from elsewhere are refused.", code="origin")
                )
                await response(scope, receive, send)
                return
            await found(scope, receive, send)
            return
        await self.rest(scope, receive, send)


def create_app(
    policy: LoadedPolicy,
    upstreams: dict[str, Upstream],
    cache: AnswerCache | None = None,
    *,
    config: Config | None = None,
    **parts: Any,
) -> App:
    """The application. `upstreams` maps candidates' ids to what answers for them; it may be filled later, and until then requests get
    503. `parts` are Proxy's other fields (keys, live, log, watch). Closes what it holds when it ends.
    """
    return App(Proxy(policy, upstreams, config or default_config(), cache, **parts))


def origin_refused(proxy: Proxy, scope: Scope) -> bool:
    """True for a browser's request from another site: DNS rebinding and forms must not reach a proxy that asks for no key."""
    if proxy.config.keys.required:
        return False  # a key is more than a page from elsewhere has
    origin = next((value for name, value in scope["headers"] if name == b"origin"), None)
    return origin is not None and host_of(origin.decode("latin-1")) not in HOME


def host_of(address: str) -> str | None:
    """The name in an address; None where it is none."""
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def _refused(refusal: Refusal) -> Response:
    return JSONResponse(refusal.body, refusal.status)


def _rest(proxy: Proxy, posts: dict[str, Endpoint]) -> Starlette:
    def keyed(scope: Scope) -> Response | None:
        """A refusal where no key is presented, or where none is needed and a page under another name (DNS rebinding) asks."""
        try:
            tenant_of(proxy, scope)
        except Refusal as refusal:
            return JSONResponse(refusal.body, refusal.status, headers={"www-authenticate": "Bearer"})
        host = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
        if not proxy.config.keys.required and host_of(f"//{host}") not in HOME:
            return _refused(
                Refusal(403, "Without keys only this machine's own names are answered.", code="host")
            )
        return None

    async def models(request: Request) -> Response:
        if no := keyed(request.scope):
            return no
        created = (
            int(datetime.fromisoformat(proxy.policy.policy.created_at).timestamp()) if _dated(proxy) else 0
        )
        names = (AUTO, *proxy.policy.candidates)
        data = [{"id": n, "object": "model", "created": created, "owned_by": "edgeft"} for n in names]
        if wanted := request.path_params.get("name"):
            one = next((entry for entry in data if entry["id"] == wanted), None)
            if one is None:
                return _refused(
                    Refusal(
                        404,
                        f"The model '{wanted[:100]}' is not served.",
                        param="model",
                        code="model_not_found",
                    )
                )
            return JSONResponse(one)
        return JSONResponse({"object": "list", "data": data})

    async def live(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(_: Request) -> Response:
        able, states = proxy.ready()
        healthy = proxy.keys is None or proxy.keys.healthy
        body: dict[str, Any] = {
            "status": "ready" if able else "draining" if proxy.draining else "not ready",
            "models": states,
        }
        body["reloads"] = {"done": proxy.reloads, "error": proxy.reload_error}
        if proxy.log and proxy.log.lines:
            body["log"] = proxy.log.lines.trouble or "ok"
        if proxy.keys is not None:
            body["keys"] = "ok" if healthy else "the database can't be read; known keys are still served"
        return JSONResponse(body, 200 if able else 503)

    async def metrics(request: Request) -> Response:
        if no := keyed(request.scope):
            return no
        counting.moment(proxy)
        return Response(proxy.metrics.text(), media_type="text/plain; version=0.0.4")

    async def openapi(_: Request) -> Response:
        return JSONResponse(document(list(posts)))

    async def state(request: Request) -> Response:
        if no := keyed(request.scope):
            return no
        return JSONResponse(proxy.live.snapshot(engines_of(proxy), certificate_of(proxy)))

    async def front(_: Request) -> Response:
        from edgeft.serve.page import page

        body, headers = page()
        return Response(body, headers=headers)

    async def no_such_path(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        refusal = Refusal(error.status_code, f"{error.detail}: see docs/serving.md for the paths.")
        return JSONResponse(refusal.body, error.status_code, headers=error.headers)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await proxy.aclose()

    shown = [Route("/", front), Route("/edgeft/state", state)] if proxy.live and proxy.config.page else []
    return Starlette(
        routes=[
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", models),
            Route("/health", live),
            Route("/health/live", live),
            Route("/health/ready", ready),
            Route("/metrics", metrics),
            Route("/openapi.json", openapi),
            *shown,
        ],
        lifespan=lifespan,
        exception_handlers={HTTPException: no_such_path},
    )


def _dated(proxy: Proxy) -> bool:
    try:
        datetime.fromisoformat(proxy.policy.policy.created_at)
    except ValueError:
        return False  # a bundle's policy of one carries no date
    return True
