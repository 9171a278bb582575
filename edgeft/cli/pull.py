"""`edgeft pull`."""

import click

from edgeft import console
from edgeft.cli import options


@click.command("pull")
@click.argument("name")
@options
def command(name: str) -> None:
    """Fetch a base model and print its folder.

    NAME is a hub id, a local folder, a GGUF file, or the built-in smollm2-135m-instruct.
    Safetensors only; hashes are checked; an interrupted download goes on.
    """
    from edgeft.pull import pull

    path = pull(name)
    console.result({"path": str(path)}, str(path))
