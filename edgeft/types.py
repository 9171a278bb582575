"""What the stages hand to each other, as files and as dataclasses, frozen but for Decision.

Import-light on purpose. Every type names its schema and version; units stand in the names.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from edgeft.errors import UsageError
from edgeft.files import read_json, write_json


class Stored:
    """A dataclass kept as a JSON file with its schema in it."""

    SCHEMA: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """The value as plain JSON types, schema first."""
        return {"schema": self.SCHEMA, **asdict(self)}  # type: ignore[call-overload]

    def save(self, path: Path) -> None:
        """Write the value atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a value. Raises UsageError where the schema is another or a field is missing."""
        value = read_json(path)
        found = value.get("schema") if isinstance(value, dict) else None
        if found != cls.SCHEMA:
            raise UsageError(
                f"{path} has the schema {found!r}, and {cls.SCHEMA!r} is needed.",
                "make it again with this edgeft",
            )
        names = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        try:
            return cls(**{k: v for k, v in value.items() if k in names})
        except TypeError as error:
            raise UsageError(f"{path} is not whole: {error}.", "make it again with this edgeft") from None


@dataclass(frozen=True)
class Artifact(Stored):
    """One folder that can be served, and how it came to be: `artifact.json`."""

    SCHEMA: ClassVar[str] = "edgeft/artifact@1"

    id: str  # the folder's name, as gguf-q4_k_m
    format: str  # safetensors, gguf, onnx, gptq
    variant: str  # q4_k_m, int8, 4, …
    engine: str  # the name of the engine that runs it
    model_name: str
    created_at: str  # UTC, ISO 8601
    made_from: dict[str, Any]  # base, adapter, merged: names, origins, hashes
    recipe: dict[str, Any]  # what to type to make it again
    recipe_sha256: str  # over everything that decides the result; the key for reuse
    versions: dict[str, str]
    files: dict[str, dict[str, Any]]  # relative path -> {bytes, sha256}
    size_bytes: int
    parameters: int
    bits_per_weight: float  # measured: 8 * bytes of the tensors / parameters of the model
    tensor_types: dict[str, dict[str, int]]  # type -> {tensors, parameters}
    fallback_share: float | None  # share of the parameters whose width the asked type can't hold
    seen_rows: dict[str, list[str]]  # kind of step -> hashes of the rows it saw
    cost: dict[
        str, Any
    ]  # wall_s and peak_rss_bytes of making it; predicted: what the pre-flight said of them
    checks: dict[str, Any] = field(default_factory=dict)  # what was proven of it before it got its name
    asked: dict[str, Any] = field(
        default_factory=dict
    )  # the words that make it again; inputs by name and hash
    steps: list[dict[str, Any]] = field(
        default_factory=list
    )  # name, wall_s, peaks, predicted, kept from a run before
    made_on: dict[str, Any] = field(
        default_factory=dict
    )  # cpu, cores, python, packages, both llama.cpp builds

    @property
    def sha256(self) -> str:
        """One hash over names and contents of all files."""
        from edgeft.files import sha256_json

        return sha256_json({name: f["sha256"] for name, f in self.files.items()})


@dataclass(frozen=True)
class BenchReport(Stored):
    """What was measured of a set of artefacts on one box: `report.json`. Per-item results are in `items.jsonl`."""

    SCHEMA: ClassVar[str] = "edgeft/report@1"

    created_at: str
    environment: dict[str, Any]
    profile: dict[str, Any]
    workload: dict[str, Any]
    results: list[dict[str, Any]]  # one a model under test
    reference: str | None  # the id that KLD and retention are measured against
    seen_rows: dict[str, list[str]] = field(default_factory=dict)
    pairs: list[dict[str, Any]] = field(default_factory=list)  # every two models on the same rows


@dataclass(frozen=True)
class Policy(Stored):
    """A fitted router: `policy/policy.json`; its weights lie beside it as safetensors. See docs/routing.md."""

    SCHEMA: ClassVar[str] = "edgeft/policy@2"

    created_at: str
    candidates: list[
        dict[str, Any]
    ]  # cheapest first, the last one the strongest; a single one gets everything
    features: dict[str, Any]  # what a head reads: spec of the hashed text, the encoder, hash of the weights
    rule: dict[str, Any]  # how scores and costs become a choice: router.rule.DEFAULTS
    fitted: dict[str, Any]  # n, how the rule was chosen, what it gives on rows that fitting did not see
    privacy: dict[str, Any] = field(default_factory=dict)  # router.privacy.DEFAULTS
    cost: dict[str, Any] = field(default_factory=dict)  # unit, energy, a price for the queue: router.costs
    seen_rows: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Decision:
    """Where one request goes, and why. Pure data; nothing of the request's text stands in it.

    Like all that is made anew for each request it is not frozen: that would make it three times as slow to make.
    """

    choice: str  # the candidate's id
    reason: str
    scores: dict[str, float]  # expected score (0..1) of every candidate that was allowed
    costs: dict[str, float]  # predicted marginal cost of each, in the policy's unit (usd, or steps)
    propensity: float  # chance that this choice was taken, given the request; 1 without exploration
    removed: dict[str, str] = field(default_factory=dict)  # candidate -> the rule that removed it
    fallbacks: tuple[str, ...] = ()  # who may answer instead, in this order; never one that was removed
    private: bool = False  # no remote model, no shared cache, no text in a log
    certified: bool = False  # the rule that chose is the certified one, unsuspended
    explored: bool = False  # chosen by the random number, not by the scores

    @property
    def cost(self) -> float:
        """Predicted marginal cost of the choice."""
        return self.costs[self.choice]

    @property
    def predicted_gain(self) -> float:
        """Expected score of the strongest allowed candidate minus that of the cheapest allowed one."""
        scores = list(self.scores.values())
        return scores[-1] - scores[0]
