"""What a box is: memory, bandwidth, power, price, and the limits that work on it is held to.

One YAML file a box. The packaged ones lie in `boxes/`, the user's own in `config_dir("profiles")`;
an own file with a packaged id takes its place. Knows nothing of how a box is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from edgeft.errors import UsageError, unknown
from edgeft.home import config_dir

KINDS = ("cpu", "gpu", "soc")
BASES = ("published", "estimate", "measured")
GEMM = {
    "gemm_f32_gflop_per_s": "float32",
    "gemm_bf16_gflop_per_s": "bfloat16",
    "gemm_f16_gflop_per_s": "float16",
    "gemm_int8_gop_per_s": "int8",
}
FIGURES = (
    "ram_gb",
    "vram_gb",
    "bandwidth_gb_per_s",
    "bandwidth_measured_gb_per_s",
    *GEMM,
    "power_idle_w",
    "power_load_w",
)
LIMITS = ("memory_budget_gb", "ttft_s", "tpot_s", "decode_tok_per_s", "watts", "kld_nats")
TEXTS = ("id", "name", "kind", "as_of", "source", "notes")
KEYS = (*TEXTS, *FIGURES, "price_usd", "basis", "limits")
REQUIRED = ("id", "name", "kind", "as_of", "source")


@dataclass(frozen=True)
class Profile:
    """A box. None is a figure that nobody gave; it is never zero.

    `basis` says of each figure given whether it is published, an estimate or measured.
    """

    id: str
    name: str
    kind: str  # cpu, gpu, soc (memory shared by CPU and GPU)
    as_of: str  # YYYY, YYYY-MM or YYYY-MM-DD
    source: str
    ram_gb: float | None = None  # 10**9 bytes
    vram_gb: float | None = None
    bandwidth_gb_per_s: float | None = None  # reading the memory that the model lies in
    bandwidth_measured_gb_per_s: float | None = (
        None  # what somebody measured of it, beside a published figure
    )
    gemm_f32_gflop_per_s: float | None = None  # dense matrix multiplication by the whole box, 10**9 a second
    gemm_bf16_gflop_per_s: float | None = None
    gemm_f16_gflop_per_s: float | None = None  # accumulated in float32
    gemm_int8_gop_per_s: float | None = None  # accumulated in int32
    power_idle_w: float | None = None
    power_load_w: float | None = None
    price_usd: tuple[float, float] | None = None  # low, high
    basis: dict[str, str] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    notes: str = ""
    origin: str = "packaged"  # or the file it was read from, or "detected"

    @property
    def usable_bandwidth_gb_per_s(self) -> float | None:
        """The bandwidth that a prediction should count on: the measured one where there is one."""
        if self.bandwidth_measured_gb_per_s is not None:
            return self.bandwidth_measured_gb_per_s
        return self.bandwidth_gb_per_s

    def to_dict(self) -> dict[str, Any]:
        """The profile as plain JSON types."""
        value = asdict(self)
        value["price_usd"] = list(self.price_usd) if self.price_usd else None
        return value


def load_profiles() -> dict[str, Profile]:
    """Every profile by its id: the packaged ones, then the user's own. Raises UsageError on a bad file."""
    found = {p.id: p for p in _read_folder(Path(__file__).parent / "boxes", "packaged")}
    own: dict[str, Profile] = {}
    for profile in _read_folder(config_dir("profiles"), None):
        if profile.id in own:
            raise UsageError(
                f"the profile '{profile.id}' stands in {own[profile.id].origin} and in {profile.origin}.",
                f"give one of them another id, or remove it: rm {profile.origin}",
            )
        own[profile.id] = profile
    return {**found, **own}


def get_profile(profile_id: str) -> Profile:
    """The profile of an id. Raises UsageError with the nearest id where there is none."""
    profiles = load_profiles()
    if profile_id not in profiles:
        raise unknown("the profile", profile_id, profiles, "edgeft profiles list")
    return profiles[profile_id]


def from_detected(box: Mapping[str, Any]) -> Profile:
    """A profile out of what `detect` found: figures it measured, no power, no price."""
    keys = {k: box[k] for k in ("id", "name", "kind", "as_of", "source", *FIGURES) if box.get(k) is not None}
    return Profile(
        **keys, basis=dict(box.get("basis", {})), limits=dict(box.get("limits", {})), origin="detected"
    )


def _read_folder(folder: Path, origin: str | None) -> list[Profile]:
    if not folder.is_dir():
        return []
    return [read_profile(path, origin or str(path)) for path in sorted(folder.glob("*.yaml"))]


def read_profile(path: Path, origin: str) -> Profile:
    """Read and check one file. Raises UsageError naming the file, the value seen and what is allowed."""
    import yaml

    try:
        value = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}", f"edit {path}") from None
    return check(value, str(path), origin)


def check(value: Any, where: str, origin: str = "packaged") -> Profile:
    """Turn parsed YAML into a Profile. Raises UsageError; `where` names the file in it."""
    if not isinstance(value, dict):
        raise UsageError(f"{where} holds {_seen(value)} and not a map of keys.", f"edit {where}")
    _known_keys(value, KEYS, "the key", where)
    for key in REQUIRED:
        if value.get(key) is None:
            raise UsageError(f"{where} has no '{key}'.", f"add '{key}: ...' to {where}")
    texts = {key: _text(value[key], key, where) for key in TEXTS if value.get(key) is not None}
    if texts["kind"] not in KINDS:
        raise unknown("the kind", texts["kind"], KINDS, f"edit 'kind' in {where}: {', '.join(KINDS)}")
    figures = {key: _number(value[key], key, where) for key in FIGURES if value.get(key) is not None}
    price = None if value.get("price_usd") is None else _range(value["price_usd"], "price_usd", where)
    given = [*figures, *(["price_usd"] if price else [])]
    return Profile(
        **texts,  # type: ignore[arg-type]
        **figures,  # type: ignore[arg-type]
        price_usd=price,
        basis=_basis(value.get("basis"), given, where),
        limits=_limits(value.get("limits"), where),
        origin=origin,
    )


def _known_keys(value: Mapping[Any, Any], known: tuple[str, ...], kind: str, where: str) -> None:
    for key in value:
        if key not in known:
            raise unknown(kind, str(key), known, f"edit {where}; its keys are in docs/profiles.md")


def _text(value: Any, key: str, where: str) -> str:
    if key == "as_of" and isinstance(value, date | int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise UsageError(
            f"'{key}' in {where} is {_seen(value)}, and a text is needed.", f"edit '{key}' in {where}"
        )
    return value.strip()


def _number(value: Any, key: str, where: str) -> float:
    """A finite number, zero or more."""
    good = (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    )
    if not good:
        raise UsageError(
            f"'{key}' in {where} is {_seen(value)}, and a number of zero or more is needed.",
            f"edit '{key}' in {where}, as '{key}: 16'",
        )
    return float(value)


def _range(value: Any, key: str, where: str) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise UsageError(
            f"'{key}' in {where} is {_seen(value)}, and a range [low, high] is needed.",
            f"edit '{key}' in {where}, as '{key}: [200, 250]'",
        )
    low, high = (_number(v, key, where) for v in value)
    if low > high:
        raise UsageError(
            f"'{key}' in {where} is [{low:g}, {high:g}], whose low end is above its high end.",
            f"edit '{key}' in {where}, as '{key}: [{high:g}, {low:g}]'",
        )
    return low, high


def _basis(value: Any, given: list[str], where: str) -> dict[str, str]:
    """The basis of every figure given; what the file leaves out is an estimate, but for what its key calls measured."""
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise UsageError(f"'basis' in {where} is {_seen(value)}, not a map.", f"edit 'basis' in {where}")
    _known_keys(value, (*FIGURES, "price_usd"), "the figure in 'basis'", where)
    for figure, word in value.items():
        if word not in BASES:
            raise unknown(
                f"the basis of {figure}", str(word), BASES, f"edit 'basis' in {where}: {', '.join(BASES)}"
            )
        if figure not in given:
            raise UsageError(
                f"{where} has a basis for '{figure}' and no '{figure}'.", f"add '{figure}: ...' to {where}"
            )
    implied = {"bandwidth_measured_gb_per_s": "measured"}
    return {figure: value.get(figure, implied.get(figure, "estimate")) for figure in given}


def _limits(value: Any, where: str) -> dict[str, float]:
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise UsageError(f"'limits' in {where} is {_seen(value)}, not a map.", f"edit 'limits' in {where}")
    _known_keys(value, LIMITS, "the limit", where)
    return {key: _number(v, f"limits.{key}", where) for key, v in value.items() if v is not None}


def _seen(value: Any) -> str:
    return f"the {type(value).__name__} {value!r}"[:120]
