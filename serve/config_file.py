"""edgeft.yaml, checked before anything starts. Paths are relative to the file's folder."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeft.errors import UsageError, unknown
from edgeft.serve.config import Config

DOCS = "docs/serving.md lists every key; edgeft serve init writes a commented file"


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
