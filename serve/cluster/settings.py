"""What `edgeft serve --ray` needs to know beside what a single proxy does. Knows nothing of Ray but its words."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeft.errors import UsageError, unknown

DOCS = "docs/cluster.md"
PROXY, ENGINE = "Proxy", "Engine"  # names of the deployments, each in an application of its own
ENGINES = "edgeft-engine-"  # how the names of their applications begin
PORTION = 0.001  # of a node's label that one engine takes: the label says where, not how many


@dataclass(frozen=True)
class Place:
    """How often something runs, and where."""

    replicas: int = 1  # at least
    most: int | None = None  # replicas at most, by load; None: always `replicas`
    profile: str | None = None  # only on nodes that carry this label
    cpus: float = 1.0  # of a node, counted by Ray, not enforced

    def options(self, slots: int) -> dict[str, Any]:
        """Ray Serve's options of a deployment whose replicas take `slots` requests at a time."""
        resources = {"resources": {label(self.profile): PORTION}} if self.profile else {}
        number: dict[str, Any] = {"num_replicas": self.replicas}
        if self.most is not None:
            scaling = {
                "min_replicas": self.replicas,
                "max_replicas": self.most,
                "target_ongoing_requests": slots,
            }
            number = {"autoscaling_config": scaling}
        return {
            **number,
            "max_ongoing_requests": slots,
            "ray_actor_options": {"num_cpus": self.cpus, **resources},
        }

    @property
    def largest(self) -> int:
        """Replicas at most."""
        return self.most or self.replicas


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster to deploy to, beside what edgeft.yaml says of a single proxy."""

    address: str = (
        "auto"  # host:6379 from one of its nodes, ray://host:10001 from elsewhere; auto: this node's
    )
    engines: Mapping[str, Place] = field(default_factory=dict)  # by candidate's id; others get one replica
    proxy: Place = field(default_factory=lambda: Place(cpus=0.5))
    proxy_requests: int = 256  # at a time, of each replica of the proxy
    redis: str | None = None  # redis://host:6379/0 of the shared cache, without a password; None: no cache
    redis_password_file: Path | None = None
    every_node: bool = True  # listen on all nodes that run a replica, else on the head alone
    drain_s: float = 30.0  # how long a replica that is taken away may finish its answers

    def place(self, candidate_id: str) -> Place:
        """Where an engine runs."""
        return self.engines.get(candidate_id, Place())

    def check(self, candidates: Iterable[str]) -> None:
        """Raises UsageError for an engine that the policy does not have, and for numbers out of range."""
        known = list(candidates)
        for name in self.engines:
            if name not in known:
                raise unknown("cluster.engines has an id that the policy has not:", name, known, DOCS)
        for name, place in (("proxy", self.proxy), *self.engines.items()):
            if (
                place.replicas < 1
                or place.cpus < 0
                or (place.most is not None and place.most < place.replicas)
            ):
                raise UsageError(f"cluster: replicas, most or cpus of '{name}' are out of range.", DOCS)
        if self.redis and "@" in self.redis:
            raise UsageError(
                "cluster.redis holds a user or a password; it is sent to every node.",
                "cluster.redis_password_file",
            )
        if self.drain_s < 0 or self.proxy_requests < 1:
            raise UsageError("cluster: drain_s or proxy_requests is out of range.", DOCS)


def label(profile: str) -> str:
    """The custom resource by which a node says what it is: `ray start --resources '{"edgeft:intel-n100": 1}'`."""
    return f"edgeft:{profile}"


def app_name(candidate_id: str) -> str:
    """The application of an engine: its id in letters, digits, dash and dot, and a piece of a hash where that is not the id itself."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-.") else "-" for c in candidate_id)
    tail = "" if plain == candidate_id else f"-{hashlib.sha256(candidate_id.encode()).hexdigest()[:6]}"
    return f"{ENGINES}{plain}{tail}"
