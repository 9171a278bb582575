"""Channels evened out before quantizing: the same function, in weights and inputs that lose less when they are rounded.

A factor s a channel is taken out of what writes it and put into what reads it: a norm's weight against the columns of q, k and v,
of gate and up; the rows of up against the columns of down, those of v against o's. What leaves the last norm stays: embeddings are
read there. s = x^a / w^(1-a) with x, w the root mean squares of the channel's inputs and of its column, which is SmoothQuant (arXiv
2211.10438) with mean squares for its maxima. llama.cpp's CPU kernels round a layer's inputs to 8 bits with a scale for 32 or 256
channels, so that a loud channel costs its neighbours their precision; what an importance matrix or error feedback chooses among the
weights' levels does not see that.

Weights are rounded once or twice more to the file's own float, by less than a thousandth (bfloat16: a 200th) where 4 bits lose a
tenth. Powers of two would round nothing, and left half of what is gained here undone. The file is marked (KEY): a LoRA made for the
plain model does not fit it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGUFValueType

from edgeft import child, console
from edgeft.compress.rounding import BATCH_ROWS
from edgeft.engines.memory import SMOOTHED as KEY
from edgeft.errors import EnvironmentFault

STRENGTH = 0.5  # a: 0 evens out the weights alone, 1 the inputs alone
MOST = 64.0  # factors are between 1/MOST and MOST
# Where these are all that reads a norm's output, and gates are multiplied in between up and down.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
PARTS = (
    ("attn_norm", ("attn_q", "attn_k", "attn_v")),
    ("ffn_norm", ("ffn_gate", "ffn_up")),
    ("ffn_up", ("ffn_down",)),
    ("attn_v", ("attn_output",)),
)


def smoothed(job: Any, source: Path, moments: Path) -> tuple[Path, Path | None, dict[str, Any]]:
    """(the source with evened channels, their factors, cost) in a job's `work`; the source itself where its architecture is not known for it."""
    from edgeft.compress.card import front_matter_sha256
    from edgeft.compress.moments import made_of
    from edgeft.files import publish, sha256_json

    if not applies(source):
        console.note("  channels are not evened out: how this architecture reads them is not known")
        return source, None, {}
    card = front_matter_sha256(job.merged)
    key = sha256_json([made_of(moments), source.name, card, job.model_name, STRENGTH, MOST, PARTS])[:16]
    file, factors = job.work / f"smooth-{key}.gguf", job.work / f"smooth-{key}.npz"
    if file.exists() and factors.exists():
        return file, factors, {}
    partial, partial_factors = file.with_suffix(".gguf.part"), factors.with_suffix(".npz.part")
    spent = child.call(
        "edgeft.compress.smoothing:smooth", log=job.log, title="evening out channels", source=str(source),
        moments=str(moments), target=str(partial), factors=str(partial_factors),
    )  # fmt: skip
    publish(partial_factors, factors)
    publish(partial, file)
    return file, factors, spent


def smooth(source: str, moments: str, target: str, factors: str) -> dict[str, Any]:
    """Write the GGUF file `source` with evened channels as `target`, and the factors as `factors`. Runs in a child process.

    `moments`: a folder of `edgeft.compress.moments`; `factors`: an .npz of float32 [columns] by the name of the tensor that reads them.
    Returns what `Factors.counts` says. Raises EnvironmentFault where a weight would leave its float's range.
    """
    import numpy as np

    from edgeft.compress.moments import Moments
    from edgeft.gguf_file import Tensors

    marked_copy(Path(source), Path(target))
    reader = Tensors(target, "r+")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    second, known, found = Moments(Path(moments)), _known(reader), {}
    for writer, readers in pairs(tensors, known):
        if not all(f"{name}.weight" in second for name in readers):
            continue
        weights, heads = [tensors[f"{name}.weight"] for name in readers], heads_of(writer, known)
        s = factors_of(second.diagonal(weights[0].name), weights, heads)
        for tensor in weights:
            _scale(tensor, s)
            found[tensor.name] = s
        written = 1 / written_by(s, heads)
        for name in (f"{writer}.weight", f"{writer}.bias"):
            if name in tensors:
                rows = written[:, None] if tensors[name].data.ndim > 1 else written
                _scale(tensors[name], rows)
    reader.data.flush()
    with Path(factors).open("wb") as file:
        np.savez(file, **found)
    return Factors(Path(factors)).counts()


def marked_copy(source: Path, target: Path) -> None:
    """The file with KEY in its header, which a quantizer copies; all else byte for byte."""
    import shutil

    from edgeft.gguf_file import Tensors

    reader = Tensors(source)
    last = reader.tensors[-1].field
    told = last.offset + sum(int(part.nbytes) for part in last.parts)  # where the header ends
    mark = KEY.encode()
    entry = struct.pack("<Q", len(mark)) + mark + struct.pack("<IB", GGUFValueType.BOOL, 1)
    with source.open("rb") as old, target.open("wb") as new:
        magic, version, tensors, entries = struct.unpack("<4sIQQ", old.read(24))
        new.write(struct.pack("<4sIQQ", magic, version, tensors, entries + 1) + entry + old.read(told - 24))
        new.write(bytes(-new.tell() % reader.alignment))
        old.seek(reader.data_offset)
        shutil.copyfileobj(old, new, 1 << 24)


def applies(source: Path) -> bool:
    """Is the file's architecture one whose channels are known to be read and written by PARTS alone?"""
    from edgeft.gguf_file import Tensors

    return Tensors(source).fields["general.architecture"].contents() in ARCHITECTURES


def pairs(tensors: dict[str, Any], known: dict[str, int]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(what writes channels, what reads them) of every block that has them, without `.weight`."""
    for block in range(known["block_count"]):
        for part, parts in PARTS:
            writer, readers = f"blk.{block}.{part}", tuple(f"blk.{block}.{name}" for name in parts)
            if all(f"{name}.weight" in tensors for name in (writer, *readers)):
                yield writer, readers


def heads_of(writer: str, known: dict[str, int]) -> tuple[int, int]:
    """(heads that are written, how many readers each has): keys' and values' heads serve several queries' ones."""
    if not writer.endswith("attn_v"):
        return 1, 1
    return known["attention.head_count_kv"], known["attention.head_count"] // known["attention.head_count_kv"]


def factors_of(squares: Any, weights: list[Any], heads: tuple[int, int]) -> Any:
    """s, float32 [columns], of geometric mean 1 before it is cut; one for all the readers of a written channel. `squares`: mean of x²."""
    import numpy as np
    from gguf import dequantize

    columns = np.zeros(squares.shape)
    for tensor in weights:
        for part in _parts(tensor):
            values = dequantize(tensor.data[part], tensor.tensor_type)
            columns += np.square(values).sum(0, dtype=np.float64) / len(tensor.data)
    x, w = (
        np.sqrt(np.maximum(values, 0).astype(np.float64).reshape(*heads, -1).mean(1))
        for values in (squares, columns)
    )
    seen = (x > 0) & (w > 0)
    logs = np.zeros(x.shape)
    logs[seen] = STRENGTH * np.log2(x[seen]) - (1 - STRENGTH) * np.log2(w[seen])
    if seen.any():
        logs[seen] -= logs[seen].mean()
    s = np.exp2(logs).clip(1 / MOST, MOST).astype(np.float32)
    return np.repeat(s[:, None], heads[1], 1).reshape(-1)


def written_by(s: Any, heads: tuple[int, int]) -> Any:
    """The factors of the channels as they are written: one for all that read it."""
    return s.reshape(*heads, -1)[:, 0].reshape(-1)


def _scale(tensor: Any, by: Any) -> None:
    """Multiply a float tensor in place."""
    import numpy as np
    from gguf import dequantize, quantize

    for part in _parts(tensor):
        factors = by if by.ndim == 1 < tensor.data.ndim else by[part]
        data = quantize(dequantize(tensor.data[part], tensor.tensor_type) * factors, tensor.tensor_type)
        if not np.isfinite(dequantize(data, tensor.tensor_type)).all():
            raise EnvironmentFault(
                f"{tensor.name} leaves the range of {tensor.tensor_type.name} when its channels are evened out.",
                "edgeft compress … without smooth=true",
            )
        tensor.data[part] = data


def _parts(tensor: Any) -> Iterator[slice]:
    """Rows that are worked on at once."""
    for start in range(0, len(tensor.data), BATCH_ROWS):
        yield slice(start, start + BATCH_ROWS)


def _known(reader: Any) -> dict[str, int]:
    """The numbers of the file's header, without the architecture's name before them."""
    arch = reader.fields["general.architecture"].contents()
    return {
        name.removeprefix(f"{arch}."): field.contents()
        for name, field in reader.fields.items()
        if name.startswith(f"{arch}.")
    }


class Factors:
    """The factors of a file, read once; what was collected of the plain model is turned into the smoothed one's."""

    def __init__(self, file: Path | None) -> None:
        import numpy as np

        self.known: dict[str, Any] = {}
        if file:
            with np.load(file) as found:
                self.known = {name: found[name] for name in found.files}

    def counts(self) -> dict[str, int]:
        """How many channels have a factor, and how many tensors read them."""
        return {"channels": sum(map(len, self.known.values())), "tensors": len(self.known)}

    def squares(self, name: str, values: Any) -> Any:
        """Mean squared inputs [columns] of the smoothed model, from the plain one's."""
        return values / self.known[name] ** 2 if name in self.known else values

    def moments(self, name: str, values: Any) -> Any:
        """The same of second moments [columns, columns], in place."""
        if name in self.known:
            values /= self.known[name][:, None]
            values /= self.known[name]
        return values
