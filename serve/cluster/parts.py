"""The two places where a cluster touches what a single proxy is made of: an engine as it starts on a node, the ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from edgeft.serve.cluster.settings import ENGINE, Cluster, app_name
from edgeft.serve.config import Config


def start_engine(candidate: dict[str, Any], config: Config) -> tuple[Any, Any, dict[str, Any]]:
    """(process, HTTP upstream to it, fields that every call of it gets) of a local candidate on this node; blocks until it is loaded.

    Raises UsageError where the artefact is missing or is not what the policy was fitted on, EnvironmentFault where it does not load.
    """
    from edgeft.serve.candidates import check, spec_of
    from edgeft.serve.pool import start
    from edgeft.serve.upstream import HttpUpstream

    own = config.model(candidate["id"]).path
    given = {**candidate, "path": str(own)} if own else candidate
    local = start(spec_of(check(given, None if own else config.artifacts), config), lambda _: None)
    http = HttpUpstream(
        local.url, candidate["id"], local.key, slots=local.slots, always_stream=True, trust_env=False
    )
    return local, http, {"cache_prompt": False} if local.features.get("id_slot") else {}


def create_proxy(config: Config, cluster: Cluster) -> Any:
    """The proxy's application in a replica: `edgeft serve`'s own, its local candidates behind handles, its cache in Redis."""
    from edgeft.router import load_policy
    from edgeft.serve.app import App
    from edgeft.serve.candidates import remote
    from edgeft.serve.cluster.upstream import RayUpstream
    from edgeft.serve.local import guess
    from edgeft.serve.proxy import Proxy
    from edgeft.serve.run import open_keys
    from edgeft.serve.running import open_decisions, open_log, watch_of
    from edgeft.serve.upstream import Features

    policy = load_policy(config.policy)
    upstreams: dict[str, Any] = {}
    for name, candidate in policy.candidates.items():
        if candidate["kind"] == "api":
            upstreams[name] = remote(candidate, config)
            continue
        adapters = tuple(config.model(name).adapters)
        features = Features(n=False, adapters=adapters, **{**guess(candidate["engine"]), "id_slot": False})
        slots = cluster.place(name).largest * slots_of(config, name)
        upstreams[name] = RayUpstream(name, handle(name), slots, features, running(name))
    proxy = Proxy(
        policy,
        upstreams,
        config,
        shared_cache(config, cluster),
        keys=open_keys(config),
        log=open_log(config),
        decisions=open_decisions(config),
        watch=watch_of(policy),
    )
    proxy.metrics.registry.register(Losses(upstreams))
    return Started(App(proxy), [u.look for u in upstreams.values() if isinstance(u, RayUpstream)])


def slots_of(config: Config, candidate_id: str) -> int:
    """Requests at a time of one replica of an engine."""
    return config.model(candidate_id).slots or config.engines.slots


def shared_cache(config: Config, cluster: Cluster) -> Any:
    """The answers that all proxies share, or None."""
    from edgeft.router.cache.shared import InLoop, RedisCache
    from edgeft.serve.cache import AnswerCache

    if not (cluster.redis and config.cache.enabled):
        return None
    return AnswerCache(
        InLoop(RedisCache(cluster.redis, password_file=cluster.redis_password_file)), config.cache
    )


def handle(candidate_id: str) -> Any:
    """Ray's handle of an engine."""
    from ray import serve

    return serve.get_deployment_handle(ENGINE, app_name(candidate_id))


def running(candidate_id: str) -> Callable[[], int]:
    """A function that asks the cluster how many replicas of an engine run."""
    name = app_name(candidate_id)

    def count() -> int:
        from ray import serve

        app = serve.status().applications.get(name)
        engine = app and app.deployments.get(ENGINE)
        return int(engine.replica_states.get("RUNNING", 0)) if engine else 0

    return count


class Started:
    """The application, which looks for its engines before it says that it has started."""

    def __init__(self, app: Any, first: list[Callable[[], Awaitable[None]]]) -> None:
        self.app, self.first = app, first

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await asyncio.gather(*(look() for look in self.first))
        await self.app(scope, receive, send)


class Losses:
    """Prometheus' counters of what RayUpstream counts."""

    def __init__(self, upstreams: dict[str, Any]) -> None:
        self.upstreams = upstreams

    def collect(self) -> Iterator[Any]:
        """Asked by the registry."""
        from prometheus_client.core import CounterMetricFamily

        lost = CounterMetricFamily(
            "edgeft_replica_lost", "Requests whose engine went away.", labels=["route"]
        )
        again = CounterMetricFamily(
            "edgeft_replica_again", "Of those, asked anew elsewhere.", labels=["route"]
        )
        for name, upstream in self.upstreams.items():
            if hasattr(upstream, "lost"):
                lost.add_metric([name], upstream.lost)
                again.add_metric([name], upstream.again)
        yield lost
        yield again
