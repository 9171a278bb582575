"""`edgeft bundle`."""

from pathlib import Path

import click

from edgeft import console
from edgeft.cli import options

PATH = click.Path(path_type=Path)


@click.command("bundle")
@click.argument("artifacts", nargs=-1, required=True, type=PATH)
@click.option(
    "--for", "profile_id", metavar="PROFILE", required=True, help="The box; auto for one like this."
)
@click.option(
    "--policy", type=PATH, help="Folder of `edgeft route fit`; without it one artefact answers all."
)
@click.option(
    "--pack", "packs", type=PATH, multiple=True, help="A reference pack to measure with there. Repeatable."
)
@click.option(
    "--context", type=click.IntRange(16), default=2048, show_default=True, help="Tokens of context."
)
@click.option(
    "--slots",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Requests at a time in each model.",
)
@click.option("--threads", type=click.IntRange(1), help="Threads of each model (physical cores if left out).")
@click.option("--port", type=click.IntRange(1, 65535), default=8080, show_default=True)
@click.option("--arch", type=click.Choice(["amd64", "arm64"]), help="The profile's, if left out.")
@click.option("--python", default="3.11", show_default=True, help="The box's Python.")
@click.option("--lock-only", is_flag=True, help="No wheels: the box fetches these versions itself.")
@click.option("--sign", "key", type=PATH, metavar="KEY", help="An SSH key that signs the checksums.")
@click.option(
    "--container", is_flag=True, help="Write a folder with a Dockerfile and a compose file instead."
)
@click.option("--k8s", is_flag=True, help="The same, with Kubernetes manifests.")
@click.option(
    "--image",
    default="edgeft-box:latest",
    show_default=True,
    help="Name of the image, with --container and --k8s.",
)
@click.option("--out", type=PATH, help="box.tar, or the folder box/, if left out.")
@options
def command(
    artifacts: tuple[Path, ...],
    profile_id: str,
    policy: Path | None,
    packs: tuple[Path, ...],
    context: int,
    slots: int,
    threads: int | None,
    port: int,
    arch: str | None,
    python: str,
    lock_only: bool,
    key: Path | None,
    container: bool,
    k8s: bool,
    image: str,
    out: Path | None,
) -> None:
    """Pack artefacts into one file that a box installs and serves.

    Refuses what would not fit the box's memory. The same inputs give the same bytes.
    """
    from edgeft.deploy import Wanted, bundle
    from edgeft.deploy.containers import write_folder
    from edgeft.tco.box import profile_of

    wanted = Wanted(
        artifacts,
        profile_of(profile_id),
        policy,
        packs,
        context,
        slots,
        threads,
        port,
        arch,
        python,
        lock_only,
        key,
    )
    if container or k8s:
        place = out or Path("box")
        manifest = write_folder(wanted, place, image, k8s)
    else:
        place = out or Path("box.tar")
        manifest = bundle(wanted, place)
    size = sum(f["bytes"] for f in manifest["files"].values())
    need = manifest["needs"]
    console.result(
        {"wrote": str(place), "id": manifest["id"], "bytes": size, "needs": need},
        f"wrote {place}: {manifest['id']}, {size / 1e6:.1f} MB, for {need['machine']} and Python {need['python']}, "
        f"about {need['memory_bytes'] / 1e9:.2f} GB of memory",
    )
