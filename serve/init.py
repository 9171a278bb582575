"""`edgeft serve init`: a commented edgeft.yaml for a policy."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from edgeft.errors import UsageError
from edgeft.serve.candidates import address_of

TEXT = """\
# edgeft serve --config {name}          (kill -HUP takes changes over without dropping a request)
# Paths are relative to this file. Keys that are left out have the values shown in comments.
policy: {policy}
{artifacts}
listen:
  host: 127.0.0.1      # another address needs keys.required: true
  port: 8080
  # tls_certificate: cert.pem
  # tls_key: key.pem
  # drain_s: 60        # after SIGTERM, until running answers are cut

keys:
  required: false      # true: only with a key of `edgeft keys create NAME`
  # database: keys.db

limits:
  body_bytes: 1048576
  # prompt_tokens: 4000   # estimated as characters/4
  waiting: 32             # requests in the queue of one model; more are told 429
  # ttft_s: 5             # what is expected to begin later goes to another model, or is told 429

cache:
  enabled: true
  # folder: answers/
  # redis_env: REDIS_URL  # the variable that holds redis://…, for several proxies
  # semantic: semantic.json   # of edgeft route cache-calibrate: answers questions that mean the same; off
  ttl_s: 3600
  size_bytes: 268435456
  # sampled: {{"*/*": false}}   # "tenant/model": may answers above temperature 0 be given again?

engines:               # local models
  context: 2048        # tokens a slot
  slots: 1             # requests at a time in one model
  # threads: 4         # the run profile's, else physical cores
  # memory_bytes: 8000000000   # the longest idle model is unloaded first
  # idle_s: 900        # unload after so long without a request
  preload: true        # false: load when first asked
  # llama_server: /usr/bin/llama-server   # in place of the xllamacpp wheel

models:
{models}
logs:
  # requests: stderr   # or a file: one JSON line a request, never its text
  # decisions: decisions.jsonl   # for edgeft route replay
page: true             # the page at /
"""


def write(policy: Path, artifacts: Path | None, out: Path) -> Path:
    """Write the file. Raises UsageError where it is there already, or the folder holds no policy."""
    from edgeft.files import write_text
    from edgeft.router import load_policy

    if out.exists():
        raise UsageError(f"{out} is there already; it is left alone.", "--out another.yaml")
    candidates = load_policy(policy).candidates
    folder = out.absolute().parent
    text = TEXT.format(
        name=out.name,
        policy=_relative(policy, folder),
        artifacts=f"artifacts: {_relative(artifacts, folder)}"
        if artifacts
        else "# artifacts: dist/   # where the artefacts lie, if not where the policy says",
        models="".join(_model(name, candidate) for name, candidate in candidates.items()),
    )
    write_text(out, text)
    return out


def _model(name: str, candidate: dict[str, Any]) -> str:
    key = json.dumps(name, ensure_ascii=False)
    if candidate["kind"] != "api":
        return f"  {key}: {{}}   # context, slots, threads, preload, ttft_s, embeddings, adapters: {{name: folder}}\n"
    kind, url, _ = address_of(name)
    where = url or kind
    return f"  {key}:   # {where}\n    # key_env: OPENAI_API_KEY   # or key_file; it is never written here\n    retries: 1\n    silence_s: 600\n"


def _relative(path: Path, folder: Path) -> str:
    return json.dumps(os.path.relpath(path.absolute(), folder), ensure_ascii=False)
