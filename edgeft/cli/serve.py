"""`edgeft serve`."""

from pathlib import Path

import click

from edgeft.cli import options

FOLDER = click.Path(path_type=Path)


@click.command("serve")
@click.option("--policy", required=True, type=FOLDER, help="Folder of `edgeft route fit`.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; loopback only.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one."
)
@click.option(
    "--cache", type=FOLDER, metavar="DIR", help="Folder of the answer cache (the user's cache if left out)."
)
@click.option("--no-cache", is_flag=True, help="Keep no answers.")
@click.option(
    "--threads", type=click.IntRange(1), help="Threads of each local model (physical cores if left out)."
)
@click.option(
    "--context", type=click.IntRange(16), default=2048, show_default=True, help="Tokens of context."
)
@click.option(
    "--artifacts", type=FOLDER, metavar="DIR", help="Where the artefacts lie, if not where they were."
)
@options
def command(
    policy: Path,
    host: str,
    port: int,
    cache: Path | None,
    no_cache: bool,
    threads: int | None,
    context: int,
    artifacts: Path | None,
) -> int:
    """Serve a policy as an OpenAI-compatible proxy.

    POST /v1/chat/completions with the model "auto" is routed; a candidate's id pins it. Ends on
    SIGTERM or Ctrl-C when the requests that run are answered. With --json prints one line when ready.
    """
    from edgeft.home import cache_dir
    from edgeft.serve import Config, serve

    kept = None if no_cache else cache or cache_dir("answers")
    return serve(Config(policy, host, port, kept, threads, context, artifacts))
