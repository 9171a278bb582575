"""Every GGUF type that is offered, out of llama.cpp's own quantizer, on a model of one small layer."""

from __future__ import annotations

import numpy as np
import pytest

from edgeft.compress.formats import gguf as gguf_format

gguf = pytest.importorskip("gguf", reason="needs the extra: compress")
pytest.importorskip("llama_cpp", reason="needs the extra: compress")

WIDTH, ROWS, INNER = 256, 512, 512
# Of the numbers' own spread: what a type of so many bits may lose.
MOST_LOST = {1: 0.8, 2: 0.6, 3: 0.35, 4: 0.2, 5: 0.1, 6: 0.06}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Llama of one layer without a vocabulary, in float32, and an importance matrix for it."""
    from edgeft.compress import imatrix

    chance = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("one-layer") / "f32.gguf"
    shapes = {
        "attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH, WIDTH), "attn_v": (WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH),
        "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER),
    }  # fmt: skip
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(ROWS)
    tensors = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    tensors |= {"token_embd.weight": (ROWS, WIDTH), "output.weight": (ROWS, WIDTH)}
    for name, shape in tensors.items():
        writer.add_tensor(name, chance.standard_normal(shape, dtype=np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    matrix = file.with_name("imatrix.gguf")
    sums = {name: chance.random(shape[1], dtype=np.float32) for name, shape in tensors.items()}
    imatrix.write(matrix, sums, dict.fromkeys(sums, 1), {"datasets": ["made"], "chunks": 1, "key": "k"})
    return file, matrix


@pytest.mark.parametrize("variant", (*gguf_format.QUANTIZED, *gguf_format.NEED_IMATRIX))
def test_a_type_is_written_and_near_its_source(source, tmp_path, variant):
    file, matrix = source
    target = tmp_path / "q.gguf"
    needs = variant in gguf_format.NEED_IMATRIX
    gguf_format.quantize(str(file), str(target), variant, 1, str(matrix) if needs else None)
    before = {t.name: t for t in gguf.GGUFReader(file).tensors}
    made = {t.name: t for t in gguf.GGUFReader(target).tensors}
    assert made.keys() == before.keys()
    asked = variant.removesuffix("_s").removesuffix("_m").removesuffix("_l").upper()
    kinds = {t.tensor_type.name for t in made.values()}
    assert any(kind.startswith(asked.rstrip("_XS")) or kind == asked for kind in kinds), kinds
    name = "blk.0.ffn_up.weight"
    values = gguf.dequantize(made[name].data, made[name].tensor_type)
    lost = float(
        np.sqrt(np.mean((values - gguf.dequantize(before[name].data, before[name].tensor_type)) ** 2))
    )
    assert 0 < lost < MOST_LOST[int(next(c for c in variant if c.isdigit()))]


def test_no_type_of_llama_cpp_is_left_out():
    """K and IQ types and the older blocks; ternary and float blocks are for models trained in them."""
    import llama_cpp

    known = {
        n.removeprefix("LLAMA_FTYPE_MOSTLY_").lower()
        for n in dir(llama_cpp)
        if n.startswith("LLAMA_FTYPE_MOSTLY_")
    }
    other = {"f16", "bf16", "q8_0", "mxfp4_moe", "nvfp4", "tq1_0", "tq2_0", "q1_0", "q2_0"}
    offered = {*gguf_format.QUANTIZED, *gguf_format.NEED_IMATRIX}
    assert {name for name in known - other if name.startswith(("q", "iq"))} == offered
