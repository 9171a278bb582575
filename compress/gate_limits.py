"""The gate's limits by width, and what a figure's interval says against one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeft.errors import UsageError, unknown

DEFAULTS = Path(__file__).parent / "gate.yaml"
ALL = "all"
TASK_ROWS = 64  # asked of every artefact
AT_LEAST = ("same_top1", "same_top1_other", "retention")
PASS, FAIL, INCONCLUSIVE, NOT_RUN = "PASS", "FAIL", "INCONCLUSIVE", "NOT RUN"

Limits = dict[int, dict[str, float | None]]


def load(own: Path | Mapping[Any, Any] | None = None) -> Limits:
    """Width -> limit -> number or None, the defaults changed by a file or a mapping of the same form.

    The key `all` changes every width. Raises UsageError for an unknown width or limit with the nearest right one.
    """
    limits: Limits = _read(DEFAULTS)
    names = sorted(limits[8])
    if own is None:
        return limits
    where = str(own) if isinstance(own, Path) else "the recipe's gate"
    given = _read(own) if isinstance(own, Path) else own
    if not isinstance(given, Mapping):
        raise UsageError(f"{where} holds no map of widths.", f"less {DEFAULTS}")
    for width, changes in sorted(
        given.items(), key=lambda item: str(item[0]) != ALL
    ):  # one width's word comes last
        if str(width) not in (ALL, *map(str, limits)):
            raise unknown(f"{where}: the width", str(width), [ALL, *map(str, limits)], f"less {DEFAULTS}")
        if not isinstance(changes, Mapping):
            raise UsageError(
                f"{where}: {width} holds {changes!r} and not a map of limits.", f"less {DEFAULTS}"
            )
        for name, value in changes.items():
            if name not in names:
                raise unknown(f"{where}: {width}: the limit", str(name), names, f"less {DEFAULTS}")
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf
            ):
                raise UsageError(
                    f"{where}: {width}: {name} is {value!r}; a number from 0 up or null is wanted.",
                    f"edit {where}",
                )
            for each in limits if str(width) == ALL else [int(width)]:
                limits[each][name] = value
    return limits


def _read(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}.", f"less {DEFAULTS}") from None
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}.", f"ls -ld {path}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        said = str(error).splitlines()[0]
        raise UsageError(f"{path} is not valid YAML: {said}", f"less {DEFAULTS}") from None


def bits_of(variant: str) -> int:
    """The nominal bits in a variant's name: q4_k_m and int4 -> 4, bf16 -> 16; 16 where there is none."""
    found = re.search(r"\d+", variant)
    return int(found[0]) if found else 16


def of_width(limits: Limits, bits: int) -> dict[str, float | None]:
    """The limits for a width: its own, else those of the next narrower one."""
    return limits[max((width for width in limits if width <= bits), default=min(limits))]


def judge(
    name: str, limit: float | None, seen: float, ci95: Sequence[float] | None, n: int, **more: Any
) -> dict[str, Any]:
    """One line of the gate: what was seen against a limit.

    PASS and FAIL where the whole interval lies on one side; INCONCLUSIVE where it holds the limit or there is none,
    with the n that would decide if the figure stays and the interval narrows by the root of n.
    """
    least = name in AT_LEAST
    line: dict[str, Any] = {
        "limit": limit,
        "rule": "at least" if least else "at most",
        "seen": seen,
        "ci95": ci95,
        "n": n,
        **more,
    }
    if limit is None:
        return {**line, "verdict": NOT_RUN, "why": "no limit is set"}
    if ci95 is None:
        return {**line, "verdict": INCONCLUSIVE}
    low, high = ci95
    right, wrong = (low >= limit, high < limit) if least else (high <= limit, low > limit)
    line["verdict"] = PASS if right else FAIL if wrong else INCONCLUSIVE
    if line["verdict"] == INCONCLUSIVE and seen != limit:
        line["n_to_decide"] = math.ceil(n * max(1.0, ((high - low) / 2 / abs(seen - limit)) ** 2))
    return line
