"""Everything that `edgeft serve` can be told. Secrets never stand in it: it names environment variables or files that hold them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeft.errors import UsageError
from edgeft.serve.cluster.settings import Cluster


@dataclass(frozen=True)
class Listen:
    """Where the proxy listens."""

    host: str = "127.0.0.1"
    port: int = 8080  # 0: a free one
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    drain_s: float = 60.0  # after SIGTERM, until running answers are cut


@dataclass(frozen=True)
class Keys:
    """Who may ask. Without `required` everybody on this machine may."""

    required: bool = False
    database: Path | None = None  # None: the user's, as `edgeft keys` uses it


@dataclass(frozen=True)
class Limits:
    """What is refused before it waits."""

    body_bytes: int = 1 << 20
    prompt_tokens: int | None = None  # estimated as characters/4
    waiting: int = 32  # requests in the queue of one model
    ttft_s: float | None = None  # promised: what is expected to take longer goes elsewhere or is told 429


@dataclass(frozen=True)
class Cache:
    """Answers kept, on disk or in Redis; nothing is kept where not `enabled`."""

    enabled: bool = True
    folder: Path | None = None  # None: the user's cache folder
    redis_env: str | None = None  # the variable that holds redis://…; the disk is then not used
    semantic: Path | None = (
        None  # a file of `edgeft route cache-calibrate`: answers to questions that mean the same; None: off
    )
    ttl_s: float = 3600.0
    size_bytes: int = 256 << 20
    sampled: Mapping[str, bool] = field(
        default_factory=dict
    )  # "tenant/route" ("*" is any): may sampled answers be given again?


@dataclass(frozen=True)
class Engines:
    """The local models' processes."""

    memory_bytes: int | None = None  # of all together; None: no limit
    idle_s: float | None = None  # unloaded when nobody asked for so long; None: never
    threads: int | None = None  # None: the run profile's, else physical cores
    context: int = 2048  # tokens a slot
    slots: int = 1
    preload: bool = True  # load when the proxy starts; else when first asked for
    load_wait_s: float = 120.0  # how long a request waits for its model to load
    llama_server: Path | None = None  # a llama-server binary, in xllamacpp's place


@dataclass(frozen=True)
class Model:
    """What is particular to one candidate of the policy, by its id. None: as `engines` says."""

    path: Path | None = None
    context: int | None = None
    slots: int | None = None
    threads: int | None = None
    preload: bool | None = None
    adapters: Mapping[str, Path] = field(
        default_factory=dict
    )  # name -> folder or GGUF file, beside this base
    embeddings: bool = False  # a GGUF model makes embeddings beside answers (the last token's state)
    ttft_s: float | None = None
    # of servers and API models
    key_env: str | None = None
    key_file: Path | None = None
    connect_s: float = 5.0
    silence_s: float = 600.0  # the longest wait for the next byte
    retries: int = 1
    stream: str = "as_asked"  # or "always"
    ca_file: Path | None = None


NOTHING_SAID = Model()


@dataclass(frozen=True)
class Logs:
    """What is written down. Never the text of a request."""

    requests: str | None = (
        None  # a file (from the folder where serve runs), or "stderr"; a line of JSON a request
    )
    decisions: Path | None = None  # for `edgeft route replay`
    decision_texts: bool = False  # with the requests' texts: only where the users agreed; private ones never


@dataclass(frozen=True)
class Config:
    """All of it."""

    policy: Path
    artifacts: Path | None = None  # where the artefacts lie, if not where the policy says
    listen: Listen = field(default_factory=Listen)
    keys: Keys = field(default_factory=Keys)
    limits: Limits = field(default_factory=Limits)
    cache: Cache = field(default_factory=Cache)
    engines: Engines = field(default_factory=Engines)
    models: Mapping[str, Model] = field(default_factory=dict)
    logs: Logs = field(default_factory=Logs)
    page: bool = True
    cluster: Cluster | None = None  # for --ray: docs/cluster.md

    def model(self, candidate_id: str) -> Model:
        """What is said of one candidate."""
        return self.models.get(candidate_id, NOTHING_SAID)


def shown(config: Config) -> dict[str, Any]:
    """The configuration in force, as JSON: paths and names of variables, and no secret, since none is in it."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {key: plain(entry) for key, entry in value.items()}
        return str(value) if isinstance(value, Path) else value

    result: dict[str, Any] = plain(config)
    return result


def secret(env: str | None, file: Path | None, what: str) -> str | None:
    """A secret out of an environment variable or a file; None where neither is named. Raises UsageError where it is not there."""
    if env:
        if not (value := os.environ.get(env)):
            raise UsageError(f"the variable {env}, which holds {what}, is not set.", f"export {env}=…")
        return value
    if file:
        try:
            return file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise UsageError(
                f"{file}, which holds {what}, can't be read: {error.strerror}.", f"ls -l {file}"
            ) from None
    return None
