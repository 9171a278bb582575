"""The two places where a cluster touches what a single proxy is made of: an engine as it starts on a node, the ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from edgeft.serve.cluster.settings import ENGINE, app_name


def start_engine(candidate: dict[str, Any], options: dict[str, Any]) -> Any:
    """A local candidate's upstream on this node, loaded; blocks until it is. Raises UsageError where the artefact is missing or is not
    what the policy was fitted on, EnvironmentFault where it does not load."""
    from edgeft.home import cache_dir
    from edgeft.serve.candidates import check, start

    artifacts = options["artifacts"]
    checked = check(candidate, Path(artifacts) if artifacts else None)
    return start(checked, cache_dir("logs"), options["threads"], options["context"])


def create_proxy(spec: dict[str, Any]) -> Any:
    """The proxy's application in a replica: `edgeft serve`'s own, its local candidates behind handles, its cache in Redis."""
    from edgeft.home import cache_dir
    from edgeft.router import load_policy
    from edgeft.serve.app import create_app
    from edgeft.serve.candidates import start
    from edgeft.serve.cluster.upstream import RayUpstream

    policy = load_policy(Path(spec["policy"]))
    upstreams: dict[str, Any] = {}
    for name, candidate in policy.candidates.items():
        if candidate["kind"] == "api":
            upstreams[name] = start(candidate, cache_dir("logs"), None, 0)
        else:
            upstreams[name] = RayUpstream(handle(name), spec["slots"][name], running(name))
    cache = SharedAnswers(spec["redis"], spec["redis_password_file"]) if spec["redis"] else None
    app = create_app(policy, upstreams, cache, waiting=spec["waiting"])  # type: ignore[arg-type]
    app.state.proxy.metrics.registry.register(Losses(upstreams))
    return Started(app, [u.look for u in upstreams.values() if isinstance(u, RayUpstream)])


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


class SharedAnswers:
    """The proxy's answer cache over Redis."""

    TTL_S = 3600.0

    def __init__(self, url: str, password_file: str | None) -> None:
        from edgeft.router.cache.shared import RedisCache

        self.redis = RedisCache(url, password_file=Path(password_file) if password_file else None)

    def get(self, key: str) -> Any:
        """The kept answer, or None."""
        from edgeft.serve.sse import Answer

        value = self.redis.get(key)
        try:
            return None if value is None else Answer(**value)
        except TypeError:
            return None

    def put(self, key: str, answer: Any) -> None:
        """Keep an answer that ended by itself or at its token limit."""
        from edgeft.serve.cache import KEPT_REASONS

        if answer.finish_reason in KEPT_REASONS:
            self.redis.put(key, answer.to_dict(), self.TTL_S)

    def close(self) -> None:
        """Close the connections."""
        self.redis.close()
