"""Adapter to Q4_K_M: edgeft against the same steps by hand with upstream's tools.

    python benchmarks/compress_q4_k_m.py [ADAPTER]

By hand: peft's merge_and_unload and save_pretrained, llama.cpp's convert_hf_to_gguf.py, llama_model_quantize. Both
start from the same base and run in turns; wall time and peak memory of the process tree, as ratios. Without ADAPTER a
random one of rank 16 is made. The gate is left out, and the proof of the merge is counted apart: by hand neither is done.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.compress.converter import SCRIPT, converter
from edgeft.console import output
from edgeft.pull import pull

RUNS = 3
FIGURES = ("wall_s", "wall_without_proof_s", "peak_rss_bytes")
BASE = "smollm2-135m-instruct"


def random_adapter(base: str, out: str) -> dict[str, Any]:
    """An adapter of rank 16 over all linear layers, with small random weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.random_lora import save_random_lora

    torch.manual_seed(0)
    save_random_lora(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), out, 0.002)
    return {}


def merge_by_hand(base: str, adapter: str, out: str) -> dict[str, Any]:
    """peft's own way."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(base)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return {}


def by_hand(base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """The three steps, each a process, as a user without edgeft would run them."""
    log, folder = out / "log", converter()
    merged, f16, q4 = out / "merged", out / "f16.gguf", out / "q4.gguf"
    merged.mkdir()
    steps = [
        child.call("benchmarks.compress_q4_k_m:merge_by_hand", log=log, title="peft", base=str(base), adapter=str(adapter),
                   out=str(merged), env={"PYTHONPATH": str(Path(__file__).parent.parent)}),
        child.run(
            [sys.executable, str(folder / SCRIPT), str(merged), "--outtype", "f16", "--outfile", str(f16)],
            log=log, title="convert", env={"PYTHONPATH": str(folder / "gguf-py")},
        ),
        child.call("edgeft.compress.formats.gguf:quantize", log=log, title="quantize", source=str(f16), target=str(q4),
                   variant="q4_k_m", threads=2),
    ]  # fmt: skip
    return {
        "wall_s": sum(s["wall_s"] for s in steps),
        "wall_without_proof_s": sum(s["wall_s"] for s in steps),
        "peak_rss_bytes": max(s["peak_rss_bytes"] for s in steps),
    }


def ours(base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """One command."""
    command = [
        sys.executable,
        "-m",
        "edgeft",
        "compress",
        str(base),
        "--adapter",
        str(adapter),
        "--to",
        "gguf:q4_k_m",
    ]
    spent = child.run(
        [*command, "--out", str(out / "dist"), "--no-gate", "--quiet"],
        log=out / "log",
        title="edgeft compress",
    )
    steps = json.loads((out / "dist" / "merged" / "artifact.json").read_text())["steps"]
    proof_s = sum(step["wall_s"] for step in steps if step["name"] == "proving the merge")
    return {**spent, "proof_s": proof_s, "wall_without_proof_s": spent["wall_s"] - proof_s}


def main() -> None:
    """Measure in turns and print one JSON line."""
    output.quiet = True
    base = pull(BASE)
    converter()
    with tempfile.TemporaryDirectory() as scratch:
        if len(sys.argv) > 1:
            adapter = Path(sys.argv[1])
        else:
            adapter = Path(scratch, "adapter")
            child.call("benchmarks.compress_q4_k_m:random_adapter", log=Path(scratch, "log"), title="adapter", base=str(base),
                       out=str(adapter), env={"PYTHONPATH": str(Path(__file__).parent.parent)})  # fmt: skip
        taken: dict[str, list[dict[str, float]]] = {"edgeft": [], "by hand": []}
        for _ in range(RUNS):
            for name, way in (("edgeft", ours), ("by hand", by_hand)):
                folder = Path(tempfile.mkdtemp(dir=scratch))
                taken[name].append(way(base, adapter, folder))
                shutil.rmtree(folder)
    middle = {
        name: {key: statistics.median(run[key] for run in runs) for key in FIGURES}
        for name, runs in taken.items()
    }
    ratio = {key: round(middle["edgeft"][key] / middle["by hand"][key], 2) for key in FIGURES}
    print(
        json.dumps({"median": middle, "ratio": ratio, "claim": "wall_without_proof_s <= 1.15", "runs": RUNS})
    )


if __name__ == "__main__":
    main()
