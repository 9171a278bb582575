"""edgeft.yaml: everything that `edgeft serve` can be told, checked before anything starts.

Paths are relative to the file's folder. Secrets never stand in the file: it names environment variables or files that hold them.
"""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeft.errors import UsageError, unknown
from edgeft.serve.cluster.settings import Cluster

DOCS = "docs/serving.md lists every key; edgeft serve init writes a commented file"


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
    """Exact answers kept. `folder` or `redis`, or neither: then nothing is kept."""

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


def load(path: Path) -> Config:
    """Read a file. Raises UsageError with the nearest right key."""
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"{path} can't be read: {error.strerror}.", "edgeft serve init --policy policy/"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise UsageError(f"{path} is no YAML: {first}.", DOCS) from None
    if not isinstance(value, dict) or "policy" not in value:
        raise UsageError(f"{path} names no policy.", "policy: policy/  (a folder of edgeft route fit)")
    config: Config = _build(Config, value, str(path), "", path.absolute().parent)
    check(config, str(path))
    return config


def check(config: Config, where: str) -> None:
    """What types alone don't say. Raises UsageError."""
    listen = config.listen
    if bool(listen.tls_certificate) != bool(listen.tls_key):
        raise UsageError(
            f"{where}: TLS needs a certificate and its key.", "listen: {tls_certificate: …, tls_key: …}"
        )
    for name, model in config.models.items():
        if model.stream not in ("as_asked", "always"):
            raise UsageError(
                f"{where}: models.{name}.stream is {model.stream!r}.", "stream: as_asked, or always"
            )
    least = {
        "listen.port": (listen.port if listen.port <= 65535 else -1, 0),
        "listen.drain_s": (listen.drain_s, 0),
        "limits.body_bytes": (config.limits.body_bytes, 1),
        "limits.waiting": (config.limits.waiting, 0),
        "engines.context": (config.engines.context, 16),
        "engines.slots": (config.engines.slots, 1),
        "cache.ttl_s": (config.cache.ttl_s, 0),
        "cache.size_bytes": (config.cache.size_bytes, 1),
    }
    for name, model in config.models.items():
        least[f"models.{name}.retries"] = (model.retries, 0)
        for key, low in (("context", 16), ("slots", 1), ("threads", 1)):
            if (given := getattr(model, key)) is not None:
                least[f"models.{name}.{key}"] = (given, low)
    for name, (number, low) in least.items():
        if number < low:
            raise UsageError(f"{where}: {name} is out of range.", DOCS)
    for pair in config.cache.sampled:
        if pair.count("/") != 1:
            raise UsageError(
                f"{where}: cache.sampled has '{pair}', which is not tenant/route.",
                "sampled: {'*/*': false, 'desk/*': true}",
            )


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


def _build(cls: type, value: Any, where: str, at: str, folder: Path) -> Any:
    if not isinstance(value, dict):
        raise UsageError(f"{where}: {at or 'the file'} must be a table of keys.", DOCS)
    kinds = typing.get_type_hints(cls)
    for key in value:
        if key not in kinds:
            raise unknown(
                f"{where}: the key", f"{at}.{key}".lstrip("."), [f"{at}.{k}".lstrip(".") for k in kinds], DOCS
            )
    given = {k: _value(kinds[k], v, where, f"{at}.{k}".lstrip("."), folder) for k, v in value.items()}
    return cls(**given)


def _value(kind: Any, value: Any, where: str, at: str, folder: Path) -> Any:
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None:
        if type(None) in options:
            return None
        if dataclasses.is_dataclass(options[0]) or typing.get_origin(options[0]) is Mapping:
            return _value(kind, {}, where, at, folder)  # a table whose keys are all comments
        raise UsageError(f"{where}: {at} is empty.", DOCS)
    wanted = next(o for o in options if o is not type(None))
    if dataclasses.is_dataclass(wanted):
        return _build(wanted, value, where, at, folder)  # type: ignore[arg-type]
    if typing.get_origin(wanted) is Mapping:
        inner = typing.get_args(wanted)[1]
        if not isinstance(value, dict):
            raise UsageError(f"{where}: {at} must be a table of keys.", DOCS)
        return {str(k): _value(inner, v, where, f"{at}.{k}", folder) for k, v in value.items()}
    if wanted is Path and isinstance(value, str) and value:
        return folder / Path(value).expanduser()
    if wanted is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if wanted is not Path and type(value) is wanted:
        return value
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}
    raise UsageError(f"{where}: {at} must be {names[wanted]}, not {value!r}.", DOCS)
