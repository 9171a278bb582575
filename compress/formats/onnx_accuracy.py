"""Which `accuracy_level` the CPU multiplies blockwise weights with: measured, not assumed.

Level 4 rounds activations to 8 bits and multiplies integers; 1 computes in float32; 0 leaves the attribute out, which
on a CPU computes as 1 does. Level 4 is usually the faster one, and on some models flips greedy tokens
(onnxruntime #29849). So both are run on this box, as graphs that differ in that attribute alone, against the merged
model's own greedy tokens. Another level than the builder's default is taken where it agrees better, beyond chance and
at no more than MAX_SLOWDOWN of the time, or as well and faster.

The margins make the choice stand still where nothing is to choose; what was chosen is kept by content in `dist/.work`
and named in `artifact.json`, where `pin` is what to ask for to have it again without measuring.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeft import child, console

MEASURED = (4, 1)  # the first is the builder's own default on a CPU
AGREEMENT_MARGIN = 0.01  # of the tokens: what counts as agreeing as well
SPEED_MARGIN = 0.10  # of the speed: what counts as fast as the default
SIGNIFICANT_P = 0.05  # exact McNemar on the same tokens
MAX_SLOWDOWN = 3.0  # leaving level 4 was seen to cost 2.3 times the time elsewhere, and 27 times on a Zen 3
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 12, 256, 24
SPEED_TOKENS = 16
BYTES_PER_PARAMETER, FIXED_BYTES = 4.5, 0.7e9  # of the merged model in float32


def choose(job: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """({"accuracy_level": what was chosen and why}, cost of each step) for the model that lies in job.out."""
    from edgeft.files import read_json, sha256_json, write_json
    from edgeft.types import Artifact

    merged = Artifact.load(job.merged / "artifact.json")
    if why := _too_large(merged.parameters):
        console.note(f"  accuracy_level={MEASURED[0]}, the builder's default, was not measured: {why}")
        return {"accuracy_level": {"chosen": MEASURED[0], "why": f"not measured: {why}"}}, []
    rows = str(job.calibration) if job.calibration else None
    steps: list[dict[str, Any]] = []
    plan_file = (
        job.work
        / f"greedy-{sha256_json([merged.sha256, _hash(job.calibration), PROMPTS, NEW_TOKENS])[:16]}.json"
    )
    if not plan_file.is_file():
        plan = child.call(
            "edgeft.compress.formats.onnx_accuracy:greedy", log=job.log, title="the merged model's greedy tokens",
            merged=str(job.merged), rows_file=rows, threads=job.threads,
        )  # fmt: skip
        steps.append({key: plan.pop(key) for key in child.COST})
        write_json(plan_file, plan)
    kept = job.work / f"accuracy-level-{_key(job, merged.sha256)}.json"
    if not kept.is_file():
        with _folders(job) as folders:
            found = child.call(
                "edgeft.compress.formats.onnx_accuracy:measure", log=job.log, title="measuring accuracy levels",
                folders=folders, plan=read_json(plan_file), threads=job.threads,
            )  # fmt: skip
        steps.append({key: found.pop(key) for key in child.COST})
        write_json(kept, found)
    chosen = judge({int(level): facts for level, facts in read_json(kept)["levels"].items()})
    pinned = replace(job.spec, options={**job.options, "accuracy_level": chosen["chosen"]})
    facts = {**chosen, "pin": str(pinned), "tokens": read_json(kept)["tokens"],
             "prompts": "calibration rows" if rows else "built-in texts"}  # fmt: skip
    console.note(f"  accuracy_level={chosen['chosen']}: {chosen['why']}")
    return {"accuracy_level": facts}, steps


def _too_large(parameters: int) -> str | None:
    import psutil

    needed, free = parameters * BYTES_PER_PARAMETER + FIXED_BYTES, psutil.virtual_memory().available
    if needed <= free:
        return None
    return f"the merged model needs about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"


def _hash(rows: Path | None) -> str | None:
    from edgeft.files import sha256_file

    return sha256_file(rows) if rows else None


def _key(job: Any, merged_sha256: str) -> str:
    """What the measurement depends on: the model, the graph's options, the rows, the versions, the CPU."""
    from edgeft.compress.formats.onnx import RUNTIME
    from edgeft.compress.provenance import installed
    from edgeft.files import sha256_json

    versions = list(installed(RUNTIME).values())
    options = {k: v for k, v in job.options.items() if k != "accuracy_level"}
    parts = [merged_sha256, job.variant, options, _hash(job.calibration), versions, _cpu(), job.threads]
    return sha256_json(parts)[:16]


def _cpu() -> str:
    """The processor's name and what it can do, as the kernel has it; else as Python has it."""
    import platform

    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    said = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return "\n".join(said) or platform.processor() or platform.machine()


@contextmanager
def _folders(job: Any) -> Iterator[dict[str, str]]:
    """Level -> folder with the model of job.out at that level; the weights are linked, not copied."""
    place = job.work / f"{job.spec.id}-levels"
    shutil.rmtree(place, ignore_errors=True)
    try:
        found = {}
        for level in MEASURED:
            folder = place / str(level)
            folder.mkdir(parents=True)
            for file in job.out.iterdir():
                if file.name == "model.onnx":
                    shutil.copy(file, folder)  # rewritten below
                    continue
                try:
                    os.link(file, folder / file.name)
                except OSError:
                    shutil.copy(file, folder)
            set_level(replace(job, out=folder), level)
            found[str(level)] = str(folder)
        yield found
    finally:
        shutil.rmtree(place, ignore_errors=True)


def set_level(job: Any, level: int) -> dict[str, Any]:
    """Set the level in job.out's graph, in a process of its own; returns its cost."""
    return child.call(
        "edgeft.compress.formats.onnx_accuracy:write_level", log=job.log, title="setting accuracy_level",
        folder=str(job.out), level=level,
    )  # fmt: skip


def write_level(folder: str, level: int) -> dict[str, Any]:
    """Write `accuracy_level` into every MatMulNBits of model.onnx; 0 leaves it out. Runs in a child process."""
    import onnx

    path = Path(folder, "model.onnx")
    model = onnx.load(str(path), load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    for node in nodes:
        kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
        del node.attribute[:]
        node.attribute.extend(kept)
        if level:
            node.attribute.append(onnx.helper.make_attribute("accuracy_level", level))
    path.write_bytes(model.SerializeToString(deterministic=True))
    return {"nodes": len(nodes)}


def greedy(merged: str, rows_file: str | None, threads: int) -> dict[str, Any]:
    """{"rows": [[token ids, tokens of the prompt], …], "ends"}: prompts with the merged model's greedy tokens in float32.

    NEW_TOKENS tokens each, the tokens `ends` that would end the turn left out. Runs in a child process.
    """
    import torch

    from edgeft.compress.proof import TEXTS
    from edgeft.engines.transformers import end_tokens, load
    from edgeft.rows import load_rows, prompt_of, spread

    model, tokenizer = load(Path(merged), threads)
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    if rows_file:
        chats = [prompt_of(row) for row in spread(load_rows(Path(rows_file)), PROMPTS)]
    rows = []
    for number, chat in enumerate(chats):
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)[
            -PROMPT_TOKENS:
        ]
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
                min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        rows.append([out[0].tolist(), len(ids)])
        print(f"progress: greedy tokens {number + 1}/{len(chats)} prompts")
    return {"rows": rows, "ends": sorted(end_tokens(model, tokenizer))}


def measure(folders: dict[str, str], plan: dict[str, Any], threads: int) -> dict[str, Any]:
    """{"levels": {level: {"agreement", "decode_tok_per_s"}}, "tokens"} of the same graph at several levels.

    The agreement of a level that can't win any more is not asked (None).

    Agreement: the share of the merged model's greedy tokens that are the most likely one here, given those before.
    Speed: from the median time of a token over two turns, there and back, so that a box that slows down favours none.
    Runs in a child process.
    """
    import numpy as np

    from edgeft.bench.stats import mcnemar
    from edgeft.engines.onnx import load, logits

    options = {"threads": threads}
    levels = list(folders)
    seconds: dict[str, list[float]] = {level: [] for level in levels}
    for level in [*levels, *reversed(levels)]:
        seconds[level] += _token_seconds(load(Path(folders[level]), options), plan["rows"][0])
        print(f"progress: speed of accuracy level {level}")
    facts: dict[str, dict[str, Any]] = {}
    same: dict[str, list[bool]] = {}
    for level in levels:
        facts[level] = {"agreement": None, "decode_tok_per_s": 1 / float(np.median(seconds[level]))}
        if level != levels[0] and not can_win(facts[level]["decode_tok_per_s"], facts[levels[0]]):
            continue
        same[level] = []
        found = logits(Path(folders[level]), [ids for ids, _ in plan["rows"]], options)
        for (ids, start), values in zip(plan["rows"], found, strict=True):
            values[:, plan["ends"]] = -np.inf
            best = values[start - 1 : len(ids) - 1].argmax(1)
            same[level] += [int(a) == b for a, b in zip(best, ids[start:], strict=True)]
        pairs = list(zip(same[levels[0]], same[level], strict=True))
        facts[level] |= {
            "agreement": float(np.mean(same[level])),
            "p_value": mcnemar(sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)),
        }
        print(f"progress: agreement of accuracy level {level}")
    return {"levels": facts, "tokens": sum(len(ids) - start for ids, start in plan["rows"])}


def can_win(tok_per_s: float, first: dict[str, Any]) -> bool:
    """Could another level still be taken, whatever it agrees with? `first`: what the first one was measured at."""
    bearable = tok_per_s * MAX_SLOWDOWN >= first["decode_tok_per_s"]
    better = first["agreement"] + AGREEMENT_MARGIN < 1 and bearable
    return better or tok_per_s > (1 + SPEED_MARGIN) * first["decode_tok_per_s"]


def _token_seconds(model: Any, row: list[Any]) -> list[float]:
    """Seconds of each token after the first."""
    import time

    import numpy as np
    import onnxruntime_genai as og

    ids, start = row
    parameters = og.GeneratorParams(model)
    length = start + SPEED_TOKENS
    parameters.set_search_options(max_length=length, min_length=length, batch_size=1, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array(ids[:start], dtype=np.int32))
    generator.generate_next_token()
    found = []
    while not generator.is_done():
        began = time.perf_counter()
        generator.generate_next_token()
        found.append(time.perf_counter() - began)
    return found


def judge(levels: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The level to take, and why; `p_value` says whether a level's agreement differs from the default's beyond chance."""
    default = MEASURED[0]
    chosen, first = default, levels[default]
    for level in MEASURED[1:]:
        facts = levels[level]
        if facts["agreement"] is None:
            continue
        gain = facts["agreement"] - first["agreement"]
        speed = facts["decode_tok_per_s"] / first["decode_tok_per_s"]
        beyond_chance = facts.get("p_value", 1.0) < SIGNIFICANT_P
        better = gain > AGREEMENT_MARGIN and beyond_chance and speed * MAX_SLOWDOWN >= 1
        as_well = gain >= -AGREEMENT_MARGIN or (gain < 0 and not beyond_chance)
        if better or (as_well and speed > 1 + SPEED_MARGIN):
            chosen = level
    told = "; ".join(_said(level, levels[level]) for level in MEASURED)
    rule = (
        f"another level than {default} is taken where it agrees better (by over {AGREEMENT_MARGIN:.0%}, p < {SIGNIFICANT_P}, "
        f"at most {MAX_SLOWDOWN:g} times slower) or as well and over {SPEED_MARGIN:.0%} faster"
    )
    measured = {str(level): facts for level, facts in levels.items()}
    return {"chosen": chosen, "why": f"{told}; {rule}", "measured": measured}


def _said(level: int, facts: dict[str, Any]) -> str:
    speed = f"{facts['decode_tok_per_s']:.0f} tok/s"
    if facts["agreement"] is None:
        return f"level {level} was not asked, for at {speed} it can't win"
    return (
        f"level {level} agrees with {facts['agreement']:.1%} of the merged model's greedy tokens at {speed}"
    )
