"""AutoRound (arXiv 2309.05516) as another way to the same files: `gguf:…,method=auto-round`, `gptq:…,method=auto-round`.

`iters=0` rounds to nearest with scales fitted on the calibration rows, quickly; `iters=200` tunes the rounding by signed
gradient descent, layer by layer, which takes long on a CPU. It works on the user's own rows alone; nothing is fetched.
AutoRound computes in bfloat16, whatever the merged model's precision. An optional extra: `pip install 'edgeft[auto-round]'`.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.compress.formats import Spec, one_of
from edgeft.device import torch_device
from edgeft.errors import EnvironmentFault, UsageError, missing_extra, nearest

METHOD = "auto-round"
GGUF_VARIANTS = (
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m", "q5_0", "q5_1", "q5_k_s", "q5_k_m", "q6_k",
    "q8_0",
)  # fmt: skip
SCHEMES = {"q2_k": "q2_k_s"}  # where its name for a type is another
CHUNK_TOKENS, MAX_CHUNKS = 512, 128


def read_iters(text: str) -> int:
    """A number of steps. Raises ValueError for what is none."""
    count = int(text)
    if count < 0:
        raise ValueError(text)
    return count


OPTIONS: dict[str, Any] = {"method": one_of(METHOD), "iters": (read_iters, "a number of steps, 0 or 200")}


def refuse(spec: Spec) -> None:
    """Raise what is wrong with asking for auto-round, or for its options without it."""
    if spec.options.get("method") != METHOD:
        if "iters" in spec.options:
            raise UsageError(
                f"{spec}: iters is auto-round's.", f"{spec.format}:{spec.variant},method=auto-round,iters=200"
            )
        return
    if importlib.util.find_spec("auto_round") is None:
        raise missing_extra("auto-round", "auto-round")
    if spec.format == "gguf" and spec.variant not in GGUF_VARIANTS:
        best = nearest(spec.variant, GGUF_VARIANTS) or "q4_k_m"
        raise UsageError(f"auto-round makes no {spec.variant}.", f"gguf:{best},method=auto-round")
    if spec.options.get("act_order"):
        raise UsageError(f"{spec}: auto-round keeps the order of columns.", "act_order=false")


def settings(options: dict[str, Any]) -> dict[str, Any]:
    """What decides the result besides the format's own settings; empty for another method."""
    from importlib.metadata import version

    if options.get("method") != METHOD:
        return {}
    return {"method": f"auto-round {version('auto-round')}", "iters": options.get("iters", 0)}


def build(job: Any, scheme: dict[str, Any], export: str) -> dict[str, Any]:
    """Quantize the merged model into job.out; returns wall_s and peak_rss_bytes.

    `scheme`: what AutoRound takes to say bits, group and symmetry; `export`: its name of the file format.
    """
    place = job.work / f"{job.spec.id}-auto-round"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    # The name in a GGUF's metadata is the folder's.
    named = place / job.model_name
    named.symlink_to(job.merged.resolve(), target_is_directory=True)
    try:
        spent = child.call(
            "edgeft.compress.autoround:quantize",
            log=job.log,
            title="auto-round",
            env={"HF_HUB_OFFLINE": "1"},
            model=str(named),
            rows_file=str(job.calibration),
            out=str(place / "out"),
            scheme=scheme,
            export=export,
            iters=job.options.get("iters", 0),
            threads=job.threads,
        )
        made = [path for path in (place / "out").rglob("*") if path.is_file()]
        if not made:
            raise EnvironmentFault("auto-round wrote nothing.", f"less {job.log}")
        for path in made:
            shutil.move(path, job.out / path.name)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return spent


def quantize(
    model: str, rows_file: str, out: str, scheme: dict[str, Any], export: str, iters: int, threads: int
) -> dict[str, Any]:
    """Run AutoRound on a model folder and chat-templated rows. Runs in a child process."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM

    from edgeft.tokenizer import go_by_the_file, load_tokenizer

    torch.set_num_threads(threads)
    tokenizer = load_tokenizer(Path(model))
    chunks = packed(tokenizer, rows_file)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    rounding = AutoRound(
        loaded, tokenizer, **scheme, iters=iters, seed=0, device_map=torch_device(), trust_remote_code=False,
        dataset=[torch.tensor([chunk]) for chunk in chunks], seqlen=len(chunks[0]), nsamples=len(chunks),
        batch_size=min(8, len(chunks)),
    )  # fmt: skip
    with go_by_the_file():  # its converter asks transformers for the tokenizer again, with trust_remote_code
        rounding.quantize_and_save(out, format=export)
    return {"chunks": len(chunks), "tokens": sum(map(len, chunks))}


def packed(tokenizer: Any, rows_file: str) -> list[list[int]]:
    """The rows as chats, one after the other, cut into pieces of one length: AutoRound skips what is shorter.

    Raises UsageError for rows that make no piece.
    """
    from edgeft.rows import load_rows, spread

    ids: list[int] = []
    for row in spread(load_rows(Path(rows_file)), 512):
        ids += tokenizer.apply_chat_template(row["messages"], return_dict=False)
    length = min(CHUNK_TOKENS, len(ids))
    pieces = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:MAX_CHUNKS]
    if not pieces or length < 16:
        raise UsageError(f"{rows_file} has {len(ids)} tokens, too few to calibrate on.", "add rows")
    return pieces
