"""What vLLM reads of a GPTQ checkpoint, from headers alone, and GPTQ options that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeft.compress.formats import parse
from edgeft.errors import UsageError

torch = pytest.importorskip("torch", reason="needs the extra: compress")


def checkpoint(folder: Path, shapes: dict | None = None, dtype: str = "float16", **config) -> Path:
    """A folder with one quantized layer of 64 inputs and 32 outputs, 4 bits in groups of 32, as far as headers go."""
    from safetensors.torch import save_file

    rules = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "lm_head": False,
             "checkpoint_format": "gptq", **config}  # fmt: skip
    sizes = {"qweight": (8, 32), "qzeros": (2, 4), "scales": (2, 32), "g_idx": (64,), **(shapes or {})}
    folder.mkdir()
    tensors = {f"model.layers.0.q_proj.{k}": torch.zeros(v, dtype=torch.int32) for k, v in sizes.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"dtype": dtype, "quantization_config": rules}))
    return folder


@pytest.mark.parametrize(
    ("case", "complaint"),
    [
        ({"quant_method": "awq"}, "quant_method is 'awq'"),
        ({"bits": 3}, "bits is 3; vLLM 0.26.0 takes 4 and 8"),
        ({"sym": False}, "sym is false"),
        ({"group_size": 48}, "group_size is 48; .* takes -1, 32, 64, 128"),
        ({"group_size": "32"}, "group_size is '32', and a int"),
        ({"desc_act": None}, "desc_act is None"),
        ({"checkpoint_format": "gptq_p"}, "checkpoint_format is 'gptq_p'"),
        ({"shapes": {"scales": (1, 32)}}, r"scales is \[1, 32\], and \[2, 32\]"),
        ({"group_size": 128}, "the width 64 is no multiple of the group 128"),
    ],
)
def test_what_vllm_would_refuse_is_seen(tmp_path, case, complaint):
    from edgeft.compress.formats.gptq_vllm import check

    found = check(checkpoint(tmp_path / "c", **case))
    assert found["kernel"] is None and __import__("re").search(complaint, "; ".join(found["problems"]))


def test_what_vllm_takes_has_a_kernel_and_is_not_called_loaded(tmp_path):
    from edgeft.compress.formats.gptq_vllm import check

    plain = check(checkpoint(tmp_path / "a", dtype="bfloat16"))
    assert plain == {"vllm": "0.26.0", "kernel": "marlin", "problems": [], "loaded": False}
    narrow = {"qweight": (16, 32), "qzeros": (2, 8)}
    ordered = check(checkpoint(tmp_path / "b", narrow, dtype="bfloat16", bits=8, desc_act=True))
    assert (ordered["kernel"], ordered["needs_dtype"]) == ("exllama", "--dtype float16")
    wide = {"qweight": (16, 64), "qzeros": (4, 8), "scales": (4, 64), "g_idx": (128,)}
    assert check(checkpoint(tmp_path / "c", wide, desc_act=True))["kernel"] == "marlin"


def test_gptq_options_that_do_not_fit(tiny_models, tmp_path):
    from edgeft.compress.formats.gptq import group_size

    pytest.importorskip("optimum", reason="needs the extra: gptq")
    assert group_size(tiny_models["llama"]) == 128 and group_size(tiny_models["llama"], -1) == -1
    for spec, complaint in (("gptq:4,rows=0", "rows takes a number"), ("gptq:4,group_size=100", "group_size takes"),
                            ("gptq:4,act_order=maybe", "act_order takes true, false")):  # fmt: skip
        with pytest.raises(UsageError, match=complaint):
            parse(spec)
    odd = checkpoint(tmp_path / "odd")
    from safetensors.torch import save_file

    save_file({"model.layers.0.q_proj.weight": torch.zeros(8, 96)}, odd / "model.safetensors")
    with pytest.raises(UsageError, match=r"group_size of 64 does not divide the widths \[96\]") as error:
        group_size(odd, 64)
    assert error.value.hint == "group_size=32 or -1"
