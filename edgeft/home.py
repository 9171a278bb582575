"""Where edgeft keeps what belongs to the user: downloads, converters, own profiles, the index of runs.

`EDGEFT_HOME` if set, else the XDG folders.
"""

from __future__ import annotations

import os
from pathlib import Path


def _base(variable: str, fallback: str) -> Path:
    if home := os.environ.get("EDGEFT_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get(variable) or Path.home() / fallback) / "edgeft"


def cache_dir(*parts: str) -> Path:
    """A folder for what can be fetched or made again."""
    return _base("XDG_CACHE_HOME", ".cache").joinpath(*parts)


def config_dir(*parts: str) -> Path:
    """A folder for what the user wrote."""
    return _base("XDG_CONFIG_HOME", ".config").joinpath(*parts)


def state_dir(*parts: str) -> Path:
    """A folder for what edgeft remembers of its runs: neither written by hand nor to be made again."""
    return _base("XDG_STATE_HOME", ".local/state").joinpath(*parts)
