"""Deploy proxy and engines to a Ray cluster: an application an engine, then the proxy; taken away in the other order.

Policy, artefacts and password files are read on the nodes, at the paths given: an image, or a shared folder.
"""

from __future__ import annotations

import importlib.util
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from edgeft import console
from edgeft.errors import EnvironmentFault, UsageError, missing_extra
from edgeft.serve.cluster.parts import slots_of
from edgeft.serve.cluster.settings import ENGINE, ENGINES, PROXY, Cluster, app_name, label
from edgeft.serve.config import Config
from edgeft.serve.run import refuse_public

PROXY_APP = "edgeft"
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 5.0, 20.0
START_S = 900.0  # until all engines are loaded
LOOK_S = 1.0


def serve_on_ray(config: Config, cluster: Cluster) -> int:
    """Deploy, tell the address, stay until SIGTERM (returns 0) or SIGINT (130), then take all away; answers that run are finished.

    Raises EnvironmentFault where Ray is missing, the cluster can't be reached or an engine does not start; UsageError for a policy
    or a setting that can't be used.
    """
    refuse_public(config)
    told = threading.Event()
    sign = 0

    def stop(number: int, _: Any) -> None:
        nonlocal sign
        sign = sign or number
        told.set()

    with connected(cluster.address), _signals(stop):
        try:
            with _faults_of_ray():
                deploy(config, cluster, told)
            if not told.is_set():
                scheme = "https" if config.listen.tls_certificate else "http"
                url = f"{scheme}://{config.listen.host}:{config.listen.port}"
                console.note(f"ready: {url}/v1 on the cluster at {cluster.address}")
                console.result({"url": url, "ready": True})
            while not told.wait(LOOK_S):
                pass
        finally:
            take_away()
    return 130 if sign == signal.SIGINT else 0


@contextmanager
def _faults_of_ray() -> Iterator[None]:
    """Ray's own failures (an actor that died or never came up, as on a box too busy to start one) as two lines."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise EnvironmentFault(
            f"Ray could not start it ({first[0][:200]}).",
            "ray status; less /tmp/ray/session_latest/logs/serve/*",
        ) from None


@contextmanager
def connected(address: str) -> Iterator[None]:
    """A connection to the cluster for the length of the block."""
    if importlib.util.find_spec("ray") is None:
        raise missing_extra("ray", "cluster")
    import ray

    try:
        ray.init(address=address, namespace="edgeft", log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise EnvironmentFault(
            f"the Ray cluster at {address} can't be reached ({str(error).splitlines()[0][:200]}).",
            "ray status --address ADDRESS",
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def deploy(config: Config, cluster: Cluster, told: threading.Event | None = None) -> None:
    """Deploy to the cluster that is connected, engines first; returns when all can answer, or when `told` is set."""
    from ray import serve

    from edgeft.router import load_policy

    policy = load_policy(config.policy)
    cluster.check(policy.candidates)
    local = [c for c in policy.candidates.values() if c["kind"] != "api"]
    refuse_missing_labels(cluster, [c["id"] for c in local])
    serve.start(
        proxy_location="EveryNode" if cluster.every_node else "HeadOnly",
        http_options=listening(config),
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    _run({app_name(c["id"]): engine(c, config, cluster) for c in local}, None)
    for candidate in local:
        with console.step(f"loading {candidate['id']}"):
            _wait(app_name(candidate["id"]), told)
    if not (told and told.is_set()):
        _run({PROXY_APP: proxy(config, cluster)}, "/")
        _wait(PROXY_APP, told)


def listening(config: Config) -> dict[str, Any]:
    """Options of Ray's HTTP proxies."""
    found: dict[str, Any] = {
        "host": config.listen.host,
        "port": config.listen.port,
        "keep_alive_timeout_s": 75,
    }
    if config.listen.tls_certificate:
        found |= {
            "ssl_certfile": str(config.listen.tls_certificate),
            "ssl_keyfile": str(config.listen.tls_key),
        }
    return found


def engine(candidate: dict[str, Any], config: Config, cluster: Cluster) -> Any:
    """The application of one local candidate."""
    from ray import serve

    from edgeft.serve.cluster.engine import Engine

    place, slots = cluster.place(candidate["id"]), slots_of(config, candidate["id"])
    deployment = serve.deployment(
        Engine,
        name=ENGINE,
        **place.options(slots),
        max_queued_requests=config.limits.waiting + place.largest * slots,
        **_health(cluster),
    )
    return deployment.bind(candidate, config)


def proxy(config: Config, cluster: Cluster) -> Any:
    """The application of the proxy: `edgeft serve`'s own ASGI application in each replica."""
    from ray import serve

    def build() -> Any:
        from edgeft.serve.cluster.parts import create_proxy

        return create_proxy(config, cluster)

    deployment = serve.deployment(
        serve.ingress(build)(),
        name=PROXY,
        **cluster.proxy.options(cluster.proxy_requests),
        **_health(cluster),
    )
    return deployment.bind()


def take_away() -> None:
    """Take proxy and engines away: no new requests, answers that run are finished, then the engines end."""
    from ray import serve

    ours = [name for name in serve.status().applications if name == PROXY_APP or name.startswith(ENGINES)]
    for name in sorted(ours, key=lambda name: name != PROXY_APP):
        serve.delete(name)


def refuse_missing_labels(cluster: Cluster, local: list[str]) -> None:
    """Raise UsageError for a profile label that no node carries: Ray would wait for one without a word."""
    import ray

    known = {name for node in ray.nodes() if node["Alive"] for name in node["Resources"]}
    for name, place in [("proxy", cluster.proxy), *((n, cluster.place(n)) for n in local)]:
        if place.profile and label(place.profile) not in known:
            raise UsageError(
                f"no node of the cluster carries the label '{label(place.profile)}' that '{name}' is to run on.",
                f"""ray start --address … --resources '{{"{label(place.profile)}": 1}}' on such a node""",
            )


def _health(cluster: Cluster) -> dict[str, Any]:
    return {
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": cluster.drain_s,
    }


def _run(apps: dict[str, Any], route: str | None) -> None:
    """Hand applications to Ray Serve, without waiting for them."""
    from ray import serve

    targets = [serve.RunTarget(target=app, name=name, route_prefix=route) for name, app in apps.items()]
    serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def _wait(name: str, told: threading.Event | None) -> None:
    """Until the application runs, or `told` is set. Raises EnvironmentFault where it does not."""
    from ray import serve

    deadline = time.monotonic() + START_S
    while not (told and told.is_set()):
        app = serve.status().applications.get(name)
        state = str(app.status.value) if app else "NOT_STARTED"
        if state == "RUNNING":
            return
        if state in ("DEPLOY_FAILED", "UNHEALTHY") or time.monotonic() > deadline:
            said = " ".join(d.message for d in app.deployments.values()) if app else ""
            raise EnvironmentFault(
                f"'{name}' does not run on the cluster ({state}): {_last_error(said)}",
                "serve status, and the logs of the replica under /tmp/ray/session_latest/logs/serve",
            )
        time.sleep(LOOK_S)


def _last_error(said: str) -> str:
    """The line of a traceback that names the error."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line.split(":")[0] or "Fault" in line.split(":")[0]]
    return (named or lines or ["no reason told"])[-1][:300]


@contextmanager
def _signals(stop: Any) -> Iterator[None]:
    """SIGINT and SIGTERM call `stop` for the length of the block, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
