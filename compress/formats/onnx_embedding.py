"""The input embedding of a blockwise ONNX model, quantized: the builder leaves it in float32 but for tied int4.

Where the head is tied to the embedding, the head's own blocks serve both ends (as the builder does
for int4); else the table is quantized by blocks, symmetric, round to nearest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeft.errors import UsageError

TABLE = "model.embed_tokens.weight"
BLOCK = 32


def quantize_embedding(folder: str, tied: bool, block: int = BLOCK) -> dict[str, Any]:
    """Rewrite `model.onnx` and its data in `folder`. Runs in a child process.

    `tied`: the head's blocks serve the embedding; else it gets 8-bit blocks of `block` values of its own.
    Returns {"embedding": "shared with the head" | "own blocks" | "not found"}.
    """
    import onnx
    from onnx import helper, numpy_helper

    path = Path(folder, "model.onnx")
    model = onnx.load(str(path))
    graph = model.graph
    gather = next((n for n in graph.node if n.op_type == "Gather" and n.input[0] == TABLE), None)
    if gather is None:
        return {"embedding": "not found"}
    head = next((n for n in graph.node if n.op_type == "MatMulNBits" and "lm_head" in n.name), None)
    table = next(t for t in graph.initializer if t.name == TABLE)
    rows, width = table.dims
    if tied and head is not None:
        blocks = {a.name: helper.get_attribute_value(a) for a in head.attribute}
        inputs, bits, block = list(head.input[1:]), int(blocks["bits"]), int(blocks["block_size"])
        how = "shared with the head"
    else:
        inputs, bits = _own_blocks(graph, numpy_helper.to_array(table), block), 8
        how = "own blocks"
    shape = numpy_helper.from_array(_shape(rows, width, bits), "model.embed_tokens.packed_shape")
    graph.initializer.append(shape)
    reshape = helper.make_node(
        "Reshape", [inputs[0], shape.name], ["model.embed_tokens.packed"], name="/model/embed_tokens/Reshape"
    )
    lookup = helper.make_node(
        "GatherBlockQuantized",
        ["model.embed_tokens.packed", gather.input[1], *inputs[1:]],
        list(gather.output),
        name="/model/embed_tokens/GatherBlockQuantized",
        domain="com.microsoft",
        bits=bits,
        block_size=block,
        gather_axis=0,
        quantize_axis=1,
    )
    place = list(graph.node).index(gather)
    graph.node.remove(gather)
    graph.node.insert(place, lookup)
    graph.node.insert(place, reshape)
    graph.initializer.remove(table)
    path.unlink()
    path.with_name("model.onnx.data").unlink()
    onnx.save(model, str(path), save_as_external_data=True, location="model.onnx.data", size_threshold=1024)
    return {"embedding": how}


def _shape(rows: int, width: int, bits: int) -> Any:
    import numpy as np

    return np.array([rows, width * bits // 8], dtype=np.int64)


def _own_blocks(graph: Any, table: Any, block: int) -> list[str]:
    """Add the table as uint8 around 128 with a float32 scale a block; returns the two names."""
    import numpy as np
    from onnx import numpy_helper

    rows, width = table.shape
    if width % block:
        raise UsageError(
            f"the embedding's width {width} is no multiple of {block}.", "block_size=16, or embedding=shared"
        )
    grouped = table.astype(np.float32).reshape(rows, width // block, block)
    scales = np.maximum(np.abs(grouped).max(-1), 1e-12) / 127
    packed = (np.rint(grouped / scales[..., None]) + 128).astype(np.uint8).reshape(rows, width)
    names = ["model.embed_tokens.weight_Q8", "model.embed_tokens.weight_scales"]
    graph.initializer.append(numpy_helper.from_array(packed, names[0]))
    graph.initializer.append(numpy_helper.from_array(scales.astype(np.float32), names[1]))
    return names
