"""Which options run an artefact fastest on this box: a search within a budget, confirmed on rows it did not choose by.

One knob after the other: each value is asked in turns with the best so far, and taken where it saves time beyond doubt. The
engine comes first: a `llama-server` built on this box may beat the wheel's, which is built for all of them.
In the end the choice is measured against the engine's defaults once more; it is kept only where it is faster and neither
prefill nor decode nor the user's own rows are slower, else the defaults stay. Forced answers repeat themselves, which drafts
guess too well: drafts are chosen by the time of real answers to own rows alone. A coarser type for keys and values is tried
only where the answers stay: mean KLD against the same artefact with the engine's own type at most KV_MAX_KLD nats.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeft import child
from edgeft.bench import speed
from edgeft.bench.callers import Caller, caller
from edgeft.bench.pool import refuse_without_room
from edgeft.bench.speed import Point
from edgeft.bench.targets import Target
from edgeft.engines import GGUF
from edgeft.engines.llama_server import binary_of, build_of
from edgeft.engines.local import default_threads, usable_cores
from edgeft.engines.run_profile import can_run
from edgeft.errors import EnvironmentFault
from edgeft.rows import Row, load_rows, prompt_of, spread

if TYPE_CHECKING:
    from edgeft.bench.workload import Workload

POINTS = (Point(512, 8), Point(64, 48))  # one that is prefill, one that is decode
OWN = 2  # rows answered to their own end, a round
PARTS = (
    "time",
    "prefill",
    "decode",
    "own",
)  # of a round: all requests; TTFT of the long prompt; TPOT; own rows
TRY_ROUNDS, CONFIRM_ROUNDS = 5, 12
HOPELESS = 0.05  # two rounds that both lose so much are enough
GAIN, AGREEING = 0.02, 0.8  # a value is taken where the median round saves so much, and so many rounds agree
KV_MAX_KLD, KV_ROWS, KV_TOKENS = 0.002, 8, 512
DRAFT_SHARE = 0.7  # a draft must be smaller than this share of the artefact


def knobs(target: Target, beside: list[Target], speculate: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what is tried, the options that it sets), in the order in which they are tried."""
    cores = usable_cores()
    if target.engine == "gguf" and can_run("llama_server"):
        yield f"llama-server {build_of(binary_of({}))}", {"engine": "llama_server"}
    for threads in sorted({cores, max(1, cores // 2), max(1, cores - 1)} - {default_threads()}, reverse=True):
        yield f"{threads} threads", {"threads": threads}
    for name, group in core_groups().items():
        yield f"{name} cores", {"cores": group, "threads": len(group)}
    if target.engine == "onnx":
        yield "threads that sleep while they wait", {"spin": False}
    if target.engine not in GGUF:
        return
    for on in (True, False):
        yield f"flash attention {'on' if on else 'off'}", {"flash_attention": on}
    for ubatch in (128, 256, 1024):
        yield f"micro-batch {ubatch}", {"ubatch": ubatch, "batch": max(2048, ubatch)}
    if target.engine != "llama_cpp":
        for poll in (0, 100):
            yield f"polling {poll}", {"poll": poll}
    yield "keys and values in q8_0", {"kv_type": "q8_0", "flash_attention": True}
    if speculate and target.engine != "llama_cpp":
        yield "drafts from n-grams seen", {"speculative": "ngram_mod"}
        for other in beside:
            if (
                other.engine in GGUF
                and other.path
                and (other.size_bytes or 0) < DRAFT_SHARE * (target.size_bytes or 0)
            ):
                from edgeft.engines.gguf import gguf_file

                yield f"drafts of {other.id}", {
                    "speculative": "draft_simple", "draft": str(gguf_file(other.path)), "draft_tokens": 4,
                }  # fmt: skip


def core_groups(root: Path = Path("/sys/devices/system/cpu")) -> dict[str, list[int]]:
    """CPUs by their highest frequency where they differ (big and little cores): the fast ones. Empty where all are alike."""
    found: dict[int, list[int]] = {}
    for file in root.glob("cpu[0-9]*/cpufreq/cpuinfo_max_freq"):
        found.setdefault(int(file.read_text()), []).append(int(file.parts[-3].removeprefix("cpu")))
    return {"fast": sorted(found[max(found)])} if len(found) > 1 else {}


def tune(
    target: Target,
    beside: list[Target],
    rows: list[Row],
    workload: Workload,
    max_tokens: int,
    log: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """{"options", "gain", "tried", …}: what to run the target with here; the defaults ({}) where nothing is faster."""
    begun, context = time.monotonic(), workload.context
    asked, kept = (rows[::2], rows[1::2]) if len(rows) > 1 else (rows, rows)
    best: dict[str, Any] = {}
    tried: list[dict[str, Any]] = []
    for name, change in knobs(target, beside, workload.speculate):
        if time.monotonic() - begun > workload.autotune_seconds:
            tried.append({"what": name, "taken": False, "why": "the time was up"})
            continue
        say(name)
        candidate = best | change
        entry: dict[str, Any] = {"what": name, "options": change, "taken": False}
        tried.append(entry)
        try:
            if "kv_type" in change:
                entry["kld_nats"] = kv_kld(target, workload.tasks, change["kv_type"], log)
                if entry["kld_nats"] > KV_MAX_KLD:
                    entry["why"] = f"KLD {entry['kld_nats']:.4f} is over {KV_MAX_KLD}"
                    continue
            pair = [best, candidate]
            ratios = in_turns(target, asked, pair, TRY_ROUNDS, len(tried), context, max_tokens, log)[1]
        except EnvironmentFault as error:
            entry["why"] = error.message
            continue
        saved = 1 - np.exp(ratios["own" if "speculative" in change else "time"])
        entry["time_saved"] = float(np.median(saved))
        if np.median(saved) > GAIN and (saved > 0).mean() >= AGREEING:
            best, entry["taken"] = candidate, True
    chosen, gain = confirm(target, kept, best, context, max_tokens, log, say)
    return {
        "engine": target.engine, "options": chosen, "gain": gain, "tried": tried, "seconds": round(time.monotonic() - begun, 1),
        "points": [str(point) for point in POINTS],
    }  # fmt: skip


def notes(result: dict[str, Any]) -> list[str]:
    """What tuning gained over the engine's defaults, in words."""
    found = result.get("autotune")
    if not found:
        return []
    gain, tried = found["gain"], sum("time_saved" in entry for entry in found["tried"])
    if not gain:
        return [
            f"{result['id']}, tuned: none of {tried} settings saved more than {100 * GAIN:.0f} %; the defaults stay."
        ]
    listed = ", ".join(
        f"{name} {g['ratio']:.2f} ({g['ci95'][0]:.2f} to {g['ci95'][1]:.2f})"
        for name in PARTS
        if (g := gain.get(name))
    )
    said = f"{result['id']}, tuned: rates over the defaults' in {gain['time']['rounds']} rounds in turns: {listed}"
    if not gain["kept"]:
        return [f"{said}; something is slower or nothing faster for certain, so the defaults stay."]
    chosen = ", ".join(f"{key} {value}" for key, value in found["options"].items())
    return [f"{said}; kept: {chosen}. The other figures are taken with it."]


def confirm(
    target: Target, rows: list[Row], best: dict[str, Any], context: int, max_tokens: int, log: Path,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, Any] | None]:  # fmt: skip
    """(what is kept, its gain over the defaults): `best` where the fresh rounds show it faster, and nothing slower."""
    if not best:
        return {}, None
    say("measured against the defaults")
    ratios = in_turns(target, rows, [{}, best], CONFIRM_ROUNDS, 1000, context, max_tokens, log)[1]
    gain: dict[str, Any] = {name: interval(values) for name, values in ratios.items()}
    faster = gain["time"]["ci95"][0] > 1
    slower = [name for name in PARTS[1:] if gain[name]["ci95"][1] < 1 or gain[name]["ratio"] < 0.99]
    gain["kept"] = faster and not slower
    return (best if gain["kept"] else {}), gain


def interval(log_ratios: Any) -> dict[str, Any]:
    """The ratio of rates (defaults' time over the choice's), with the 95 % bootstrap interval of the mean over rounds."""
    log_ratios = -np.asarray(log_ratios)
    picks = np.random.default_rng(0).integers(0, len(log_ratios), (2000, len(log_ratios)))
    low, high = np.percentile(np.exp(log_ratios[picks].mean(1)), [2.5, 97.5])
    return {
        "ratio": float(np.exp(log_ratios.mean())),
        "ci95": [float(low), float(high)],
        "rounds": len(log_ratios),
    }


def in_turns(
    target: Target, rows: list[Row], configurations: list[dict[str, Any]], rounds: int, seed: int, context: int,
    max_tokens: int, log: Path,
) -> list[dict[str, Any]]:  # fmt: skip
    """For each configuration, log ratios of its times to the first one's, round by round, of each of PARTS."""
    refuse_without_room(target, len(configurations))
    with ExitStack() as stack:
        asks = [stack.enter_context(started(target, options, context, log)) for options in configurations]
        plan = speed.warm_up(asks[0], rows, POINTS)
        found: list[list[list[float]]] = []
        for number in range(rounds):
            found.append(turn(asks, plan, rows, max_tokens, seed * rounds + number, number % 2 == 1))
            saved = [1 - seconds[-1][0] / seconds[0][0] for seconds in found]
            if rounds == TRY_ROUNDS and number == 1 and max(saved) < -HOPELESS:
                break
    times = np.array(found)
    return [
        {name: np.log(times[:, i, k] / times[:, 0, k]) for k, name in enumerate(PARTS)}
        for i in range(len(configurations))
    ]


@contextmanager
def started(target: Target, options: dict[str, Any], context: int, log: Path) -> Iterator[Caller]:
    """The target running with these options and none of its run profile; yields what asks it."""
    by = replace(target, engine=options.get("engine", target.engine))
    told = {key: value for key, value in options.items() if key != "engine"}
    with caller(by, log, options.get("threads"), context, {**told, "run_profile": False}) as (ask, _):
        yield ask


def turn(
    asks: list[Caller], plan: dict[str, Any], rows: list[Row], max_tokens: int, number: int, back: bool
) -> list[list[float]]:
    """One round: for each configuration the seconds of PARTS."""
    own = [
        {"messages": prompt_of(rows[(number * OWN + i) % len(rows)]), "max_tokens": max_tokens, "temperature": 0, "cache_prompt": False}
        for i in range(OWN)
    ]  # fmt: skip
    found: list[list[float]] = [[] for _ in asks]
    order = range(len(asks))
    for index in reversed(order) if back else order:
        ask = asks[index]
        ask(speed.body_of(rows, number, 40, 4))
        replies = [
            ask(speed.body_of(rows, number * len(POINTS) + i, plan["chars"][i], plan["output_tokens"][i]))
            for i in range(len(POINTS))
        ]
        decode = replies[1].decode_tok_per_s or math.inf
        own_s = sum(ask(body).e2e_s for body in own)
        found[index] = [sum(r.e2e_s for r in replies) + own_s, replies[0].ttft_s, 1 / decode, own_s]
    return found


def kv_kld(target: Target, tasks: Path, kv_type: str, log: Path) -> float:
    """Mean KLD in nats of the artefact with keys and values in `kv_type` from itself with the engine's own."""
    found = child.call(
        "edgeft.bench.autotune:kv_distances", log=log, title=f"logits with {kv_type} keys", folder=str(target.path),
        rows_file=str(tasks), kv_type=kv_type,
    )  # fmt: skip
    return float(found["kld_mean"])


def kv_distances(folder: str, rows_file: str, kv_type: str) -> dict[str, Any]:
    """{"kld_mean"} over the positions of KV_ROWS rows' texts. Runs in a child process."""
    from llama_cpp import Llama

    from edgeft.bench.fidelity import distances, log_softmax
    from edgeft.engines import gguf

    file, _ = gguf.model_and_adapter(Path(folder))
    reader = Llama(str(file), vocab_only=True, verbose=False)
    texts = [
        "\n".join(str(m.get("content") or "") for m in row["messages"])
        for row in spread(load_rows(Path(rows_file)), KV_ROWS)
    ]
    ids = [reader.tokenize(text.encode(), special=True)[:KV_TOKENS] for text in texts]
    ids = [row for row in ids if len(row) > 1]
    own = gguf.logits(Path(folder), ids, {"threads": usable_cores()})
    coarse = gguf.logits(Path(folder), ids, {"threads": usable_cores(), "kv_type": kv_type})
    found: list[float] = []
    for row, p, q in zip(ids, own, coarse, strict=True):
        found += distances(log_softmax(p[:-1]), q[:-1], row[1:])["kld"]
    return {"kld_mean": float(np.mean(found)), "positions": len(found)}
