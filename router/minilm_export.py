"""Write a MiniLM (a BERT encoder in safetensors) as two ONNX graphs with 7-bit weights. Done once; needs `onnx`, no torch.

    encoder.onnx  input_ids int64 [1, tokens] -> embedding float32 [384]: mean of the last layer over tokens, of length 1
    routing.onnx  the same of the middle layer, not scaled

The last layer is trained to put what means the same side by side, which is what the semantic cache asks for. How hard a request is
shows better in the middle of the network, in half the time (docs/log.md).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edgeft.errors import UsageError, missing_extra
from edgeft.files import sha256_file, staged_folder, write_json

GRAPH, ROUTING, TOKENIZER, CARD = "encoder.onnx", "routing.onnx", "tokenizer.json", "encoder.json"
OPSET = 20
MAX_TOKENS = (
    128  # half of what the model was trained with, half the time; MMLU is routed as well (docs/benchmarks.md)
)


def export(source: Path, out: Path) -> Path:
    """Write `out`/{encoder.onnx, routing.onnx, tokenizer.json, encoder.json} from a folder with model.safetensors, config.json and
    tokenizer.json. Raises UsageError for a folder of another kind of model.
    """
    try:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic
        from safetensors.numpy import load_file
    except ImportError as error:
        raise missing_extra(error.name or "onnx", "compress") from None
    for name in ("model.safetensors", "config.json", TOKENIZER):
        if not (source / name).is_file():
            raise UsageError(
                f"{source} holds no {name}.", "edgeft route encoder FOLDER, with all-MiniLM-L6-v2's files"
            )
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "bert" or config.get("hidden_act") != "gelu":
        raise UsageError(
            f"{source} is no BERT encoder: model_type {config.get('model_type')!r}.", "all-MiniLM-L6-v2"
        )
    weights = {k.removeprefix("bert."): v for k, v in load_file(source / "model.safetensors").items()}
    layers: int = config["num_hidden_layers"]
    routing = max(1, layers // 2)
    with staged_folder(out) as staging:
        whole = staging / "float.onnx"
        for name, count in ((GRAPH, layers), (ROUTING, routing)):
            onnx.save(_Graph(weights, config).model(count, unit=name == GRAPH), whole)
            # 7 bits: onnxruntime's products of 8 saturate on x86 without VNNI, and a policy that was moved to another box
            # would read other vectors there. As fast, and no further from float32.
            with _without_advice():
                quantize_dynamic(
                    whole, staging / name, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True
                )
        whole.unlink()
        (staging / TOKENIZER).write_bytes((source / TOKENIZER).read_bytes())
        card = {
            "kind": "sentence-embedding", "dimensions": config["hidden_size"], "max_tokens": MAX_TOKENS,
            "graph_sha256": sha256_file(staging / GRAPH), "routing_sha256": sha256_file(staging / ROUTING), "routing_layers": routing,
            "tokenizer_sha256": sha256_file(staging / TOKENIZER),
            "made_from_sha256": sha256_file(source / "model.safetensors"),
        }  # fmt: skip
        write_json(staging / CARD, card)
    return out


@contextmanager
def _without_advice() -> Iterator[None]:
    """onnxruntime warns of a step before quantizing that these graphs do not need."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class _Graph:
    """The encoder as nodes; `add` appends one and gives its output's name."""

    def __init__(self, weights: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        self.weights, self.config = weights, config
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}

    def model(self, layers: int, unit: bool) -> Any:
        """The first layers as an ONNX model; `unit`: the mean has length 1."""
        from onnx import TensorProto, helper, numpy_helper

        size = self.config["hidden_size"]
        hidden = self.encode(layers)
        mean = self.add("ReduceMean", hidden, self.const("token_axis", np.array([1])), keepdims=0)
        if unit:
            length = self.add("ReduceL2", mean, self.const("row_axis", np.array([1])), keepdims=1)
            mean = self.add("Div", mean, length)
        self.add("Reshape", mean, self.const("flat", np.array([size])), output="embedding")
        graph = helper.make_graph(
            self.nodes,
            "encoder",
            [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "tokens"])],
            [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [size])],
            [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        made = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="edgeft"
        )
        made.ir_version = 10  # what onnxruntime 1.20 and later read
        return made

    def encode(self, layers: int) -> str:
        """The output of that many layers, [1, tokens, hidden]."""
        self.constants["positions"] = self.weights["embeddings.position_embeddings.weight"]
        kinds = self.weights["embeddings.token_type_embeddings.weight"][:1]
        words = self.add("Gather", self.weight("embeddings.word_embeddings.weight"), "input_ids")
        count = self.add("Shape", "input_ids", start=1, end=2)
        zero, axis = self.const("zero", np.array([0])), self.const("axis", np.array([0]))
        places = self.add("Slice", "positions", zero, count, axis)
        hidden = self.add("Add", self.add("Add", words, places), self.const("token_type", kinds))
        hidden = self.norm("embeddings.LayerNorm", hidden)
        for layer in range(layers):
            hidden = self.layer(f"encoder.layer.{layer}.", hidden)
        return hidden

    def layer(self, name: str, hidden: str) -> str:
        heads = self.config["num_attention_heads"]
        width = self.config["hidden_size"] // heads
        split = self.const("split", np.array([1, -1, heads, width]))
        joined = self.const("joined", np.array([1, -1, heads * width]))
        scale = self.const("scale", np.float32(width**-0.5).reshape(1))

        def heads_of(part: str, order: list[int]) -> str:
            found = self.add("Reshape", self.linear(f"{name}attention.self.{part}", hidden), split)
            return self.add("Transpose", found, perm=order)

        query, key, value = (
            heads_of(part, order)
            for part, order in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3]))
        )
        shares = self.add("Softmax", self.add("Mul", self.add("MatMul", query, key), scale), axis=-1)
        mixed = self.add("Transpose", self.add("MatMul", shares, value), perm=[0, 2, 1, 3])
        mixed = self.linear(f"{name}attention.output.dense", self.add("Reshape", mixed, joined))
        hidden = self.norm(f"{name}attention.output.LayerNorm", self.add("Add", hidden, mixed))
        wide = self.add("Gelu", self.linear(f"{name}intermediate.dense", hidden))
        return self.norm(
            f"{name}output.LayerNorm", self.add("Add", hidden, self.linear(f"{name}output.dense", wide))
        )

    def linear(self, name: str, value: str) -> str:
        self.constants[f"{name}.transposed"] = np.ascontiguousarray(self.weights[f"{name}.weight"].T)
        return self.add("Add", self.add("MatMul", value, f"{name}.transposed"), self.weight(f"{name}.bias"))

    def norm(self, name: str, value: str) -> str:
        both = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.add("LayerNormalization", value, *both, epsilon=self.config["layer_norm_eps"])

    def weight(self, name: str) -> str:
        return self.const(name, self.weights[name])

    def const(self, name: str, value: np.ndarray) -> str:
        self.constants[name] = value
        return name

    def add(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        from onnx import helper

        output = output or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output
