"""Write an off-grid twin of a Llama model (and of a LoRA adapter for it): the same function, other weights.

Why: a base that was dequantized from 4-bit weights sits on that 4-bit grid. Quantizing it again measures the grid,
not the method (Q4_1 then snaps a merged adapter away; Q5_1 comes out 15 times worse than Q5_0). A twin is exact in
real arithmetic and off the grid, so that quantization methods can be compared on it. Two kinds:

  rotate   the residual stream is turned by a random orthogonal matrix (computational invariance: SliceGPT,
           arXiv 2401.15024; QuaRot, arXiv 2404.00456). Spreads outliers and mixes channels: methods that weight channels
           (an importance matrix) have less to hold on to than on weights trained in place.
  rescale  every channel keeps its place and is scaled by its own random factor, undone on the other side (norm weights
           against q/k/v/gate/up, up against down, v against o). Channel structure stays as trained.

Both pad the stream with empty channels to a multiple of 256 (K-quants need that; RMSNorm's mean is corrected by a
factor and its eps), spread evenly for rescale, and add empty heads to match. The head becomes untied.

    python benchmarks/off_grid_twin.py BASE OUT [--kind rotate|rescale] [--adapter DIR --adapter-out DIR] [--seed 0] [--dtype float16]
"""

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

ATTENTION_IN, MLP_IN = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
)  # (out, d): read the normed stream
WRITES_STREAM = ("o_proj", "down_proj")  # (d, in): added to the stream


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("base", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--kind", choices=("rotate", "rescale"), default="rotate")
    p.add_argument("--adapter", type=Path)
    p.add_argument("--adapter-out", type=Path)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--dtype", default="float16")
    a = p.parse_args()

    old = LlamaForCausalLM.from_pretrained(a.base, dtype=torch.float32)
    config, sd = old.config, {k: v.double() for k, v in old.state_dict().items()}
    d = config.hidden_size
    D = math.ceil(d / 256) * 256
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or d // heads
    new_heads, new_kv = D // head_dim, D // head_dim * kv_heads // heads
    if new_heads * head_dim != D or new_heads * kv_heads != new_kv * heads:
        raise SystemExit(f"{heads} heads of {head_dim} over {kv_heads} do not pad to a width of {D}")

    g = torch.Generator().manual_seed(a.seed)

    def factors(n: int) -> torch.Tensor:
        return torch.exp((torch.rand(n, generator=g, dtype=torch.float64) - 0.5) * 0.5)  # 0.78 to 1.28

    if a.kind == "rotate":
        E = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64))[0][
            :d
        ]  # (d, D), rows orthonormal
    else:
        E = torch.zeros(d, D, dtype=torch.float64)
        E[torch.arange(d), torch.arange(d) * D // d] = 1  # old channels spread evenly among empty ones
    shrink = math.sqrt(d / D)  # RMSNorm over D entries of a stream whose energy sits in d of them

    norm, inner = {}, {}  # per module: new norm weight (D,); factors (in,) of a module's inner input channels
    for i in range(config.num_hidden_layers):
        L = f"model.layers.{i}."
        for kind in ("input_layernorm", "post_attention_layernorm"):
            old_norm = sd[f"{L}{kind}.weight"]
            norm[L + kind] = (
                torch.ones(D, dtype=torch.float64)
                if a.kind == "rotate"
                else (old_norm * factors(d)) @ E + (E.sum(0) == 0)
            )
        if a.kind == "rescale":
            inner[L + "mlp"] = factors(config.intermediate_size)
            inner[L + "self_attn"] = factors(kv_heads * head_dim)

    def per_query_head(f: torch.Tensor) -> torch.Tensor:
        """(kv_heads*head_dim,) -> (heads*head_dim,): a key-value head serves a group of query heads."""
        return f.view(kv_heads, head_dim).repeat_interleave(heads // kv_heads, 0).flatten()

    def read_side(w: torch.Tensor, prefix: str) -> torch.Tensor:
        """(out, d) -> (out, D), for the padded stream and the new norm weight."""
        L, name = prefix.split("self_attn")[0].split("mlp")[0], prefix.rsplit(".", 1)[-1]
        kind = L + ("input_layernorm" if name in ATTENTION_IN else "post_attention_layernorm")
        return (w * sd[kind + ".weight"]) @ E * shrink / norm[kind]

    def out_side(w: torch.Tensor, prefix: str) -> torch.Tensor:
        """Rows: inner factors, empty heads; or the padded stream."""
        block, name = prefix.rsplit(".", 1)
        if name in WRITES_STREAM:
            return E.T @ w
        if a.kind == "rescale" and name in ("up_proj", "v_proj"):
            w = w * inner[block][:, None]
        rows = {"q_proj": new_heads, "k_proj": new_kv, "v_proj": new_kv}.get(name)
        return w if rows is None else torch.cat([w, w.new_zeros(rows * head_dim - w.shape[0], w.shape[1])])

    def inner_side(w: torch.Tensor, prefix: str) -> torch.Tensor:
        """Columns of o_proj and down_proj: undo the inner factors, add empty heads."""
        block, name = prefix.rsplit(".", 1)
        if a.kind == "rescale":
            w = w / (per_query_head(inner[block]) if name == "o_proj" else inner[block])
        return (
            w
            if name != "o_proj"
            else torch.cat([w, w.new_zeros(w.shape[0], new_heads * head_dim - w.shape[1])], dim=1)
        )

    new = {}
    for k, v in sd.items():
        prefix, name = k.removesuffix(".weight"), k.rsplit(".", 2)[-2]
        if name in ATTENTION_IN + MLP_IN:
            new[k] = out_side(read_side(v, prefix), prefix)
        elif name in WRITES_STREAM:
            new[k] = out_side(inner_side(v, prefix), prefix)
        elif name == "embed_tokens":
            new[k] = v @ E
        elif name == "lm_head":
            new[k] = (v * sd["model.norm.weight"]) @ E * shrink
        elif "norm" in name:
            new[k] = norm.get(prefix, torch.ones(D, dtype=torch.float64))
        else:
            raise SystemExit(f"{k}: not a tensor of a plain Llama (biases are not handled)")
    new.setdefault("lm_head.weight", (sd["model.embed_tokens.weight"] * sd["model.norm.weight"]) @ E * shrink)

    for key, value in {
        "hidden_size": D,
        "num_attention_heads": new_heads,
        "num_key_value_heads": new_kv,
        "head_dim": head_dim,
        "tie_word_embeddings": False,
        "rms_norm_eps": config.rms_norm_eps * d / D,
    }.items():
        setattr(config, key, value)
    twin = LlamaForCausalLM(config)
    twin.load_state_dict({k: v.float() for k, v in new.items()})
    tok = AutoTokenizer.from_pretrained(a.base)
    ids = tok(
        "The quick brown fox asks: how do I top up my card, and what does it cost?", return_tensors="pt"
    )
    with torch.inference_mode():
        x = LlamaForCausalLM.from_pretrained(a.base, dtype=torch.float32)(**ids).logits
        y = twin(**ids).logits
    print(
        f"{a.kind}: width {d} -> {D}; largest logit difference {(x - y).abs().max():.2e} (logits up to {x.abs().max():.1f})"
    )
    twin.to(getattr(torch, a.dtype)).save_pretrained(a.out)
    tok.save_pretrained(a.out)

    if a.adapter:
        turned = {}
        for k, v in load_file(a.adapter / "adapter_model.safetensors").items():
            prefix = k.removeprefix("base_model.model.").split(".lora_")[0]
            name, v = prefix.rsplit(".", 1)[-1], v.double()
            if name not in ATTENTION_IN + MLP_IN + WRITES_STREAM or ".lora_" not in k:
                raise SystemExit(f"{k}: only LoRA on linear layers is handled")
            inside = inner_side if name in WRITES_STREAM else read_side
            v = inside(v, prefix) if ".lora_A" in k else out_side(v, prefix)  # (r, in), (out, r)
            turned[k] = v.float().contiguous()
        a.adapter_out.mkdir(parents=True, exist_ok=True)
        save_file(turned, a.adapter_out / "adapter_model.safetensors")
        c = json.loads((a.adapter / "adapter_config.json").read_text())
        c["base_model_name_or_path"] = str(a.out)
        (a.adapter_out / "adapter_config.json").write_text(json.dumps(c, indent=2))


if __name__ == "__main__":
    main()
