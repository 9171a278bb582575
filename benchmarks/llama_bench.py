"""Does the harness see what llama-bench sees? Prefill of 512 tokens and decode of 128, on the very same libllama.

    python benchmarks/llama_bench.py MODEL.gguf LLAMA_BENCH [--pairs 10] [--threads N]

LLAMA_BENCH is llama-bench built from the source that llama-cpp-python was built from:

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 && tar xzf llama_cpp_python-0.3.36.tar.gz
    cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B b -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF
    cmake --build b --target llama-bench -j2          # b/bin/llama-bench, about five minutes

It runs here with the package's own libllama and libggml before its own in LD_LIBRARY_PATH, so both sides compute with the same
file. Each pair runs both, in alternating order: llama-bench (engine side: no HTTP, no sampling, no text) and edgeft's
harness over HTTP (client side: TTFT, (n-1)/(e2e - TTFT)) on the engine `llama_cpp`. xllamacpp, another build of
llama.cpp, is asked in the same turns. Medians over pairs; 3 % is asked of the first two.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from edgeft.bench import speed
from edgeft.bench.pool import Pool
from edgeft.bench.speed import Point
from edgeft.bench.targets import Target
from edgeft.engines.local import default_threads

PREFILL, DECODE = Point(512, 2), Point(16, 128)
WORDS = "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one"


def rival(model: Path, binary: Path, threads: int) -> dict[str, float]:
    """Tokens a second by llama-bench, one repetition of each test after its own warm-up."""
    package = importlib.util.find_spec("llama_cpp")
    assert package and package.origin
    libraries = Path(package.origin).parent / "lib"
    done = subprocess.run(
        [binary, "-m", model, "-p", "512", "-n", "128", "-r", "1", "-t", str(threads), "-ngl", "0", "-o", "json"],
        env={**os.environ, "LD_LIBRARY_PATH": f"{libraries}:{binary.resolve().parent}"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    tests = json.loads(done.stdout)
    return {
        "prefill" if t["n_prompt"] else "decode": (t["n_prompt"] or t["n_gen"]) / (t["samples_ns"][0] / 1e9)
        for t in tests
    }


def rows() -> list[dict[str, Any]]:
    """Common words in turned orders, so that no two prompts begin alike."""
    words = WORDS.split()
    texts = [" ".join(words[i:] + words[:i]) for i in range(len(words))]
    return [
        {"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": "-"}]} for t in texts
    ]


def exact(ask: Any, asked: list[dict[str, Any]], point: Point) -> int:
    """How many characters make a rendered prompt of the point's tokens."""
    chars = speed.warm_up(ask, asked, (point,))["chars"][0]
    for _ in range(8):
        seen = ask(speed.body_of(asked, 0, chars, 2)).prompt_tokens
        if seen == point.prompt_tokens:
            break
        chars += round((point.prompt_tokens - seen) * 3.5) or (1 if seen < point.prompt_tokens else -1)
    return chars


def harness(ask: Any, asked: list[dict[str, Any]], chars: int, number: int) -> dict[str, float]:
    """Tokens a second as edgeft bench takes them, one request of each shape."""
    ask(speed.body_of(asked, number, 40, 4))
    long = ask(speed.body_of(asked, number, chars, PREFILL.output_tokens))
    short = ask(speed.body_of(asked, number, 10, DECODE.output_tokens))
    return {
        "prefill": long.prompt_tokens / long.ttft_s,
        "decode": short.decode_tok_per_s,
        "prompt_tokens": long.prompt_tokens,
    }


def main() -> None:
    """Print a JSON object: medians and ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("llama_bench", type=Path)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=default_threads())
    options = parser.parse_args()
    asked, seen = rows(), {name: [] for name in ("llama-bench", "llama_cpp", "gguf")}  # type: dict[str, list[dict[str, float]]]
    targets = {
        name: Target(name, "folder", name, options.model, None, None) for name in ("llama_cpp", "gguf")
    }
    with (
        tempfile.TemporaryDirectory() as scratch,
        Pool(options.threads, 2048, lambda t: Path(scratch) / f"{t.id}.log") as pool,
    ):
        chars = {}
        for name, target in targets.items():
            with pool.use(target) as running:
                chars[name] = exact(running.ask, asked, PREFILL)
        for number in range(options.pairs):
            sides = list(seen) if number % 2 == 0 else list(reversed(seen))
            for name in sides:
                if name == "llama-bench":
                    seen[name].append(rival(options.model, options.llama_bench, options.threads))
                    continue
                with pool.use(targets[name]) as running:
                    seen[name].append(harness(running.ask, asked, chars[name], number))
    medians = {
        name: {key: statistics.median(s[key] for s in many) for key in ("prefill", "decode")}
        for name, many in seen.items()
    }
    ratios = {
        name: {key: statistics.median(s[key] / r[key] for s, r in zip(seen[name], seen["llama-bench"], strict=True))
               for key in ("prefill", "decode")}
        for name in ("llama_cpp", "gguf")
    }  # fmt: skip
    print(json.dumps({
        "threads": options.threads, "pairs": options.pairs, "tok_per_s": medians, "ratio_to_llama_bench": ratios,
        "prompt_tokens": sorted({int(s["prompt_tokens"]) for s in seen["llama_cpp"] + seen["gguf"]}), "samples": seen,
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
