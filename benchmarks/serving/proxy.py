"""The edgeft that is measured. The one place that knows its command line and its configuration."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgeft.files import sha256_file, sha256_json
from edgeft.types import Artifact
from serving.stage import WORDS, Server, environment, first_line, process

EDGEFT = (sys.executable, "-m", "edgeft")


@contextmanager
def edgeft(
    candidates: Sequence[str],
    scratch: Path,
    *,
    cache: bool = False,
    model: str = "auto",
    upstream_key: str | None = None,
    gguf: Path | None = None,
    threads: int | None = None,
    slots: int | None = None,
    promised_ttft_s: float | None = None,
) -> Iterator[Server]:
    """`edgeft serve` over candidates (openai:URL#NAME), with a policy fitted on a table of random texts. `gguf`, a file or an
    artefact's folder of whatever engine, stands in the first one's place where it is given. `slots` are of the first one;
    `promised_ttft_s` is what admission promises.
    """
    place = Path(tempfile.mkdtemp(dir=scratch, prefix="edgeft-"))
    own = {"EDGEFT_HOME": str(place / "home")} | ({"OPENAI_API_KEY": upstream_key} if upstream_key else {})
    table = place / "table.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows(candidates)))
    names = [part for name in candidates for part in ("--candidate", name)]
    wanted = ["--no-looks", "--out", str(place / "policy"), "--quiet"]
    fit = [*EDGEFT, "route", "fit", str(table), *names, *wanted]
    subprocess.run(fit, check=True, env=environment(**own), stdout=subprocess.DEVNULL)
    if gguf:
        make_local(place / "policy" / "policy.json", candidates[0], gguf)
    key = new_key(own) if find_spec("edgeft.cli.keys") else None
    first = {"slots": slots, "ttft_s": promised_ttft_s, "threads": threads}
    settings = {
        "policy": "policy",
        "listen": {"port": 0},
        "keys": {"required": key is not None},
        "cache": {"enabled": cache, "folder": "answers"},
        "models": {candidates[0]: {k: v for k, v in first.items() if v is not None}},
    }
    config = place / "edgeft.yaml"
    config.write_text(json.dumps(settings))  # JSON is YAML
    with process(
        [*EDGEFT, "serve", "--config", str(config), "--json"], place / "log", environment(**own)
    ) as child:
        url = first_line(child, place / "log")["url"]
        yield Server(url, key, model=model, pid=child.pid)


def new_key(own: dict[str, str]) -> str:
    """A client's key, in the database of this run's home."""
    command = [*EDGEFT, "keys", "create", "bench", "--json"]
    made = subprocess.run(command, check=True, env=environment(**own), stdout=subprocess.PIPE, text=True)
    return json.loads(made.stdout)["key"]


def make_local(policy: Path, name: str, gguf: Path) -> None:
    """Put a GGUF file or an artefact in a candidate's place: a table names nothing that could be served."""
    value = json.loads(policy.read_text())
    if gguf.is_dir():
        made = Artifact.load(gguf / "artifact.json")
        kind, engine, digest = "artifact", made.engine, made.sha256
    else:
        kind, engine, digest = "folder", "gguf", sha256_json({gguf.name: sha256_file(gguf)})
    local = {"kind": kind, "engine": engine, "path": str(gguf), "artifact_sha256": digest, "remote": False}
    value["candidates"] = [{**c, **local} if c["id"] == name else c for c in value["candidates"]]
    policy.write_text(json.dumps(value))


def rows(candidates: Sequence[str]) -> Iterator[dict[str, Any]]:
    """400 graded requests of common words in which the dearer candidates gain where 'because' is said: enough for a hashed head."""
    chance = random.Random(0)
    for _ in range(400):
        hard = chance.random() < 0.5
        text = " ".join(chance.choices(WORDS, k=30)) + (" because" if hard else "")
        scores = {f"{name}:score": float(place > 0 or not hard) for place, name in enumerate(candidates)}
        yield {"request": text, **scores}
