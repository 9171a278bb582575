"""What is asked of every model of a bench."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeft.bench import pack
from edgeft.bench.speed import Point
from edgeft.files import sha256_file


@dataclass(frozen=True)
class Workload:
    """What is asked of every model."""

    tasks: Path  # rows
    limit: int | None = None  # rows to answer, spread over the file
    points: tuple[Point, ...] = (Point(128, 64), Point(512, 16))  # shapes of request that are timed
    repetitions: int = 5  # timed rounds at least
    speed_seconds: float = 10.0  # of each model's rounds at most
    restarts: int = 3  # processes that a model is timed in, one after another
    max_tokens: int | None = None  # of an answer; from the longest expected answer if None
    fidelity_rows: int = 48
    context: int = 2048
    threads: int | None = None
    speed: bool = True
    fidelity: bool = True
    allow_seen_rows: bool = False
    choosing: bool = (
        False  # rows that the gate or --fit chose by are taken: what is measured is for choosing too
    )
    base: Path | None = None  # the model before tuning, for retention
    load_levels: tuple[int, ...] = ()  # clients at once; none: the load test is left out
    load_seconds: float = 10.0  # of each level
    power_csv: Path | None = None  # of a wall meter
    autotune_seconds: float = 0.0  # of each artefact's search; 0: none
    speculate: bool = False  # let the search try drafts
    memory_limit: bool = False  # find the smallest limit that keeps the speed
    sustained_seconds: float = 0.0  # of one stream without a pause; 0: none
    pack: Path | None = None  # a reference pack, which KLD is taken against instead of the merged model
    context_lengths: tuple[int, ...] = ()  # prompts of the synthetic task, in tokens; none: it is left out
    context_repetitions: int = 4  # of each length and depth
    gguf_engine: str = "gguf"  # of those that run GGUF files

    def key(self) -> dict[str, Any]:
        """What the facts of a run depend on, as JSON."""
        found = {**asdict(self), "tasks": sha256_file(self.tasks), "points": [str(p) for p in self.points]}
        found["pack"] = sha256_file(self.pack / pack.FACTS) if self.pack else None
        # The meter is read when the report is written; the base is a target, known by its hash.
        return found | {"power_csv": None, "base": None}
