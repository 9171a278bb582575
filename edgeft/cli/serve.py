"""`edgeft serve`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from edgeft.cli import Group, options

FOLDER = click.Path(path_type=Path)


@click.group("serve", cls=Group, default="run")
def command() -> None:
    """Serve a policy as an OpenAI-compatible proxy."""


@command.command("run")
@click.option("--config", type=FOLDER, metavar="FILE", help="edgeft.yaml (edgeft serve init writes one).")
@click.option("--policy", type=FOLDER, help="Folder of `edgeft route fit`, where there is no --config.")
@click.option("--host", help="Address to listen on; another than loopback needs keys. [127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="0 takes a free one. [8080]")
@click.option(
    "--cache", type=FOLDER, metavar="DIR", help="Folder of the answer cache (the user's cache if left out)."
)
@click.option("--no-cache", is_flag=True, help="Keep no answers.")
@click.option(
    "--threads", type=click.IntRange(1), help="Threads of each local model (physical cores if left out)."
)
@click.option("--context", type=click.IntRange(16), help="Tokens of context a slot. [2048]")
@click.option("--slots", type=click.IntRange(1), help="Requests at a time in each local model. [1]")
@click.option(
    "--artifacts", type=FOLDER, metavar="DIR", help="Where the artefacts lie, if not where they were."
)
@click.option("--require-keys", is_flag=True, help="Answer only with a key of `edgeft keys create`.")
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="Deploy to a Ray cluster (HOST:6379, ray://HOST:10001 or auto): docs/cluster.md.",
)
@click.option("--show-config", is_flag=True, help="Print the configuration in force as JSON and end.")
@options
def run(
    config: Path | None,
    policy: Path | None,
    host: str | None,
    port: int | None,
    cache: Path | None,
    no_cache: bool,
    threads: int | None,
    context: int | None,
    slots: int | None,
    artifacts: Path | None,
    require_keys: bool,
    ray: str | None,
    show_config: bool,
) -> int:
    """Serve until SIGTERM or Ctrl-C; accepted requests are answered first.

    POST /v1/chat/completions with the model "auto" is routed; a candidate's id pins it. With --json prints one line when ready. Options
    win over the file; SIGHUP reads the file again.
    """
    from edgeft.errors import UsageError
    from edgeft.serve import Config, load, serve, shown

    if config is None and policy is None:
        raise UsageError(
            "neither --config nor --policy is given.",
            "edgeft serve --policy policy/, or edgeft serve init --policy policy/",
        )

    def read() -> Config:
        found = load(config) if config else Config(Path(policy or "").absolute())
        if config and policy:
            found = replace(found, policy=policy.absolute())
        listen = replace(
            found.listen,
            host=found.listen.host if host is None else host,
            port=found.listen.port if port is None else port,
        )
        kept = found.cache
        if no_cache:
            kept = replace(kept, enabled=False)
        elif cache:
            kept = replace(kept, enabled=True, folder=cache, redis_env=None)
        given: dict[str, Any] = {
            k: v for k, v in (("threads", threads), ("context", context), ("slots", slots)) if v is not None
        }
        return replace(
            found, listen=listen, cache=kept, engines=replace(found.engines, **given), artifacts=artifacts or found.artifacts,
            keys=replace(found.keys, required=found.keys.required or require_keys),
        )  # fmt: skip

    settings = read()
    if show_config:
        import json

        click.echo(json.dumps(shown(settings), indent=1, ensure_ascii=False))
        return 0
    if ray:
        from edgeft.serve.cluster.deploy import serve_on_ray
        from edgeft.serve.cluster.settings import Cluster

        return serve_on_ray(settings, replace(settings.cluster or Cluster(), address=ray))
    return serve(settings, read)


@command.command("init")
@click.option("--policy", required=True, type=FOLDER, help="Folder of `edgeft route fit`.")
@click.option("--artifacts", type=FOLDER, metavar="DIR", help="Where the artefacts lie, as dist/.")
@click.option("--out", type=FOLDER, default="edgeft.yaml", show_default=True, help="The file to write.")
@options
def init(policy: Path, artifacts: Path | None, out: Path) -> None:
    """Write a commented edgeft.yaml for a policy."""
    from edgeft import console
    from edgeft.serve.init import write

    made = write(policy, artifacts, out)
    console.result({"config": str(made)}, f"{made}: edgeft serve --config {made}")
