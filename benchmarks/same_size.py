"""KLD at the same size: edgeft's GGUF files against llama.cpp's own and auto-round's, on off-grid twins of SmolLM2-135M.

    python benchmarks/same_size.py BANKING77 ADAPTER WORK [--kind rescale|rotate] [--fit] [--auto-round 0 200] [--answers N]

BANKING77 holds train.csv and dev.csv (text,category), ADAPTER is a LoRA adapter for the built-in SmolLM2. A twin
computes the same function with other weights (off_grid_twin.py says why). Calibrated and chosen on train.csv, reported
on every 15th row of dev.csv: KL(merged in float32 || artefact), all positions after the system prompt; general text is
CPython's own language reference and its library source, none of which calibration saw. What stands in
WORK is kept, so an interrupted run goes on; half an hour a kind on two cores, `--auto-round 200` (which needs the extra)
far longer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.bench import answers as bench_answers
from edgeft.bench import fidelity
from edgeft.bench.callers import caller
from edgeft.bench.stats import wilson
from edgeft.bench.targets import find
from edgeft.files import read_json, write_json
from edgeft.pull import pull
from edgeft.rows import load_rows, spread

SYSTEM = "Classify the banking query. Answer with the intent label only."
VARIANTS = ("q4_k_m", "q5_k_m")
EVERY, PASSAGES, PASSAGE_TOKENS = 15, 12, 128
HERE = {"PYTHONPATH": str(Path(__file__).parent.parent)}


def run(*words: Any) -> None:
    """A command of edgeft's."""
    subprocess.run([sys.executable, "-m", "edgeft", *map(str, words)], check=True)


def rows_of(csv: Path, out: Path) -> Path:
    """The rows of a CSV in parts (`edgeft tune rows`)."""
    if not out.is_dir():
        run("tune", "rows", csv, "--label", "category", "--system", SYSTEM, "--out", out)
    return out


def report_rows(csv: Path, file: Path) -> Path:
    """Every 15th row of dev.csv."""
    from edgeft.files import write_jsonl
    from edgeft.tune.rows import rows_from_csv

    write_jsonl(file, rows_from_csv(csv, "text", "category", SYSTEM)[::EVERY])
    return file


def general_texts() -> list[str]:
    """English prose about Python, and Python's own source: on every machine, and seen by no step."""
    import argparse as one
    import json.decoder as two
    import pydoc_data.topics as topics
    import textwrap as three

    prose = [topics.topics[name] for name in sorted(topics.topics) if len(topics.topics[name]) > 3000]
    code = [Path(module.__file__).read_text()[4000:] for module in (one, two, three)]  # type: ignore[arg-type]
    return [*spread(prose, PASSAGES - len(code)), *code]  # type: ignore[type-var]


def prepare(merged: str, rows_file: str, own: str, general: str, threads: int) -> dict[str, Any]:
    """The reference's log-probabilities of both texts. Runs in a child process."""
    from edgeft.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Path(merged))
    rows = fidelity.encode_rows(tokenizer, load_rows(Path(rows_file)), 1 << 12)
    texts = [
        {"ids": tokenizer.encode(t)[:PASSAGE_TOKENS], "skip": 1, "answer_start": 1} for t in general_texts()
    ]
    plans = {}
    for name, folder, part in (("own", own, rows), ("general", general, texts)):
        Path(folder).mkdir(parents=True, exist_ok=True)
        plans[name] = {**fidelity.write_reference(merged, part, folder, threads), "folder": folder}
    return plans


def kld(folder: Path, plans: dict[str, Any], log: Path) -> dict[str, Any]:
    """Mean KLD with its interval, and same top-1, on both texts."""
    found = {}
    for name in ("own", "general"):
        plan = {k: v for k, v in plans[name].items() if k != "folder"}
        values = child.call("edgeft.bench.fidelity:compare", log=log, title=f"logits of {folder.name}", engine="gguf",
                            folder=str(folder), plan=plan, reference=f"{plans[name]['folder']}/reference.npy", threads=2)  # fmt: skip
        figures = fidelity.summarize({k: v for k, v in values.items() if k not in child.COST})["all"]
        found[name] = {k: figures[k] for k in ("kld_mean", "kld_ci95", "kld_p50", "same_top1", "positions")}
    return found


def answers(folder: Path, rows: list[dict[str, Any]], log: Path) -> dict[str, Any]:
    """Share of exact answers with its interval."""
    (target,) = find([folder], [])
    with caller(target, log, 2, 1024) as (ask, _):
        found = bench_answers.figures(bench_answers.ask_all(target, ask, rows, 24, lambda _: None))
    return {"right": found["correct"], "n": found["n"], "ci95": wilson(found["correct"], found["n"])}


def made(work: Path, base: Path, adapter: Path, rows: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Name -> artefact folder."""
    common = [base, "--adapter", adapter, "--name", "m", "--no-gate", "--quiet"]
    calibrated = ["--calibration", rows / "calibrate.jsonl"]
    plain, ours = work / "plain", work / "ours"
    run(
        "compress",
        *common,
        *(w for v in VARIANTS for w in ("--to", f"gguf:{v}")),
        "--to",
        "gguf:f16",
        "--out",
        plain,
    )
    ways = ("", ",smooth=true", ",rounding=nearest")
    asked = [w for v in VARIANTS for way in ways for w in ("--to", f"gguf:{v}{way}")]
    run("compress", *common, *calibrated, *asked, "--out", ours)
    found = {"f16": plain / "gguf-f16"}
    for v in VARIANTS:
        nearest = ours / f"gguf-{v}+rounding=nearest"
        found |= {
            f"{v} plain": plain / f"gguf-{v}",
            f"{v} imatrix": nearest,
            f"{v} edgeft": ours / f"gguf-{v}",
            f"{v} edgeft smooth": ours / f"gguf-{v}+smooth=True",
        }
    for iters in options.auto_round:
        spec = f"gguf:q4_k_m,method=auto-round,iters={iters}"
        run("compress", *common, *calibrated, "--to", spec, "--out", ours)
        found[f"q4_k_m auto-round iters={iters}"] = ours / f"gguf-q4_k_m+iters={iters}+method=auto-round"
    for v in VARIANTS if options.fit else ():
        out = work / "fit"  # one folder: the tensors are scored once
        size = read_json(plain / f"gguf-{v}" / "artifact.json")["size_bytes"]
        run("compress", base, "--adapter", adapter, "--name", "m", "--quiet", *calibrated, "--eval", rows / "select.jsonl",
            "--fit", size, "--out", out)  # fmt: skip
        found[f"{v} --fit"] = out / read_json(out / "fit.json")["chosen"]
    return found


def ratios(figures: dict[str, Any]) -> dict[str, float]:
    """Mean KLD over the rival's: what is claimed."""
    pairs = {}
    for v in VARIANTS:
        pairs[f"{v}: edgeft / plain"] = (f"{v} edgeft", f"{v} plain")
        pairs[f"{v}: --fit / imatrix"] = (f"{v} --fit", f"{v} imatrix")
    for iters in (0, 200):
        for ours in ("edgeft", "edgeft smooth"):
            pairs[f"q4_k_m: {ours} / auto-round iters={iters}"] = (
                f"q4_k_m {ours}",
                f"q4_k_m auto-round iters={iters}",
            )
    return {
        f"{name}, {text}": round(figures[a][text]["kld_mean"] / figures[b][text]["kld_mean"], 3)
        for name, (a, b) in pairs.items()
        if a in figures and b in figures
        for text in ("own", "general")
    }


def main() -> None:
    """Make, measure, print one JSON line; figures stay in WORK/KIND/same_size.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--kind", choices=("rescale", "rotate"), default="rescale")
    parser.add_argument("--auto-round", type=int, nargs="+", default=[], metavar="ITERS")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--answers", type=int, default=0)
    options = parser.parse_args()
    work = options.work / options.kind
    work.mkdir(parents=True, exist_ok=True)
    base, adapter, log = work / "base", work / "adapter", work / "log"
    if not (adapter / "adapter_config.json").is_file():
        subprocess.run([sys.executable, str(Path(__file__).with_name("off_grid_twin.py")), str(pull("smollm2-135m-instruct")),
                        str(base), "--kind", options.kind, "--adapter", str(options.adapter), "--adapter-out", str(adapter)],
                       check=True)  # fmt: skip
    rows = rows_of(options.data / "train.csv", options.work / "rows")
    asked = report_rows(options.data / "dev.csv", options.work / "report.jsonl")
    folders = made(work, base, adapter, rows, options)
    if not (work / "plans.json").is_file():
        found = child.call("benchmarks.same_size:prepare", log=log, title="reference", env=HERE, merged=str(work / "plain" / "merged"),
                           rows_file=str(asked), own=str(work / "own"), general=str(work / "general"), threads=2)  # fmt: skip
        write_json(work / "plans.json", {k: v for k, v in found.items() if k not in child.COST})
    plans = read_json(work / "plans.json")
    figures: dict[str, Any] = {}
    for name, folder in folders.items():
        digest = read_json(folder / "artifact.json")["files"]
        kept = work / f"measured-{name.replace(' ', '_')}.json"
        if not kept.is_file() or read_json(kept)["files"] != digest:
            write_json(kept, {"files": digest, **kld(folder, plans, log)})
        figures[name] = {
            **{k: v for k, v in read_json(kept).items() if k != "files"},
            "bytes": sum(f["bytes"] for f in digest.values()),
        }
        if options.answers:
            figures[name]["exact"] = answers(folder, spread(load_rows(asked), options.answers), log)
    result = {"kind": options.kind, "figures": figures, "ratios": ratios(figures)}
    write_json(work / "same_size.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
