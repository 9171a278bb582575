"""A LoRA adapter from rows: peft and transformers, loss on the answer only.

Runs in a child process (`edgeft.child`). The loop is written out because it computes the head at
the answer's positions alone (a fifth of SmolLM2's work is its head) and keeps its state in
safetensors, so that an interrupted run goes on without unpickling anything.
"""

from __future__ import annotations

import csv
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeft.device import name_of, torch_device
from edgeft.rows import Row, load_rows, prompt_of

PATIENCE = 3  # evaluations without a better held-out loss before training stops


def train(base: str, data: str, out: str, work: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """Train an adapter into the folder `out`; returns its history and what it was trained on.

    `recipe`: rank, alpha, dropout, learning_rate, batch_size, epochs, seed, max_length (tokens),
    held_out (share of rows), max_seconds (or None). `work` holds the state to resume from.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    from edgeft.tokenizer import load_tokenizer

    torch.manual_seed(recipe["seed"])
    tokenizer = load_tokenizer(Path(base))
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe["rank"],
        lora_alpha=recipe["alpha"],
        lora_dropout=recipe["dropout"],
        target_modules=linear_names(model),
        layers_to_transform=last_layers(model.config.num_hidden_layers, recipe["last_layers"]),
    )
    model = get_peft_model(model, config).to(torch_device())

    rows = load_rows(Path(data))
    encoded = [encode(tokenizer, row, recipe["max_length"]) for row in rows]
    kept = [e for e in encoded if e is not None]
    random.Random(recipe["seed"]).shuffle(kept)
    held = max(1, round(len(kept) * recipe["held_out"]))
    evaluation, training = kept[:held], kept[held:]

    steps_per_epoch = math.ceil(len(training) / recipe["batch_size"])
    steps = steps_per_epoch * recipe["epochs"]
    evaluate_every = steps_per_epoch
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=recipe["learning_rate"], weight_decay=0.0)
    state = State(Path(work))
    first, history = state.load(parameters, optimizer, load_file)
    started = time.monotonic() - (history[-1]["elapsed_s"] if history else 0.0)
    running: list[float] = []
    stopped_by = "epochs"
    for step in range(first, steps):
        elapsed = time.monotonic() - started
        progress = step / steps
        if recipe["max_seconds"]:
            progress = max(progress, elapsed / recipe["max_seconds"])
        # Seeded by the step, so that a resumed run draws the same dropout as an unbroken one.
        torch.manual_seed(recipe["seed"] + step)
        for group in optimizer.param_groups:
            group["lr"] = recipe["learning_rate"] * schedule(progress)
        model.train()
        batch = batch_of(training, step, recipe["batch_size"], recipe["seed"])
        loss, _ = answer_loss(model, batch, tokenizer.pad_token_id or 0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running.append(loss.item())
        last = step + 1 == steps
        late = progress >= 1.0
        if (step + 1) % evaluate_every == 0 or last or late:
            held_loss, accuracy = evaluate(model, evaluation, tokenizer.pad_token_id or 0)
            history.append(
                {
                    "step": step + 1,
                    "epoch": (step + 1) / steps_per_epoch,
                    "train_loss": sum(running) / len(running),
                    "held_out_loss": held_loss,
                    "held_out_accuracy": accuracy,
                    "elapsed_s": time.monotonic() - started,
                }
            )
            running = []
            best = min(range(len(history)), key=lambda i: history[i]["held_out_loss"])
            if best == len(history) - 1:
                model.save_pretrained(Path(work, "best"))
            state.save(step + 1, history, parameters, optimizer, save_file)
            if len(history) - 1 - best >= PATIENCE:
                stopped_by = "early stopping"
                break
            if late:
                stopped_by = "max_seconds"
                break
        print(
            f"progress: step {step + 1}/{steps}, loss {running[-1] if running else history[-1]['train_loss']:.3f}"
        )

    best_row = min(history, key=lambda h: h["held_out_loss"])
    shutil.copytree(Path(work, "best"), out, dirs_exist_ok=True)
    tokenizer.save_pretrained(out)
    write_curve(history, Path(out))
    return {
        "history": history,
        "best": best_row,
        "stopped_by": stopped_by,
        "rows": len(rows),
        "rows_too_long": len(encoded) - len(kept),
        "rows_held_out": held,
        "device": name_of(torch_device()),
        "trained_parameters": sum(p.numel() for p in parameters.values()),
    }


def linear_names(model: Any) -> list[str]:
    """The last part of the names of all linear layers but the head, as q_proj."""
    import torch

    head = model.get_output_embeddings()
    found = {
        n.rsplit(".", 1)[-1]
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and m is not head
    }
    return sorted(found)


def last_layers(total: int, wanted: int | None) -> list[int] | None:
    """Indices of the last `wanted` layers, or None for all: what lies below needs no backward pass."""
    return list(range(max(0, total - wanted), total)) if wanted and wanted < total else None


def encode(tokenizer: Any, row: Row, max_length: int) -> tuple[list[int], int] | None:
    """(token ids of the whole chat, index of the answer's first token), or None where it is too long."""
    prompt = tokenizer.apply_chat_template(prompt_of(row), add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(row["messages"], return_dict=False)
    start = len(prompt)
    if whole[:start] != prompt:
        # A template that renders an answered turn otherwise than an open one: append the answer itself.
        whole = prompt + tokenizer.encode(row["messages"][-1]["content"], add_special_tokens=False)
        whole.append(tokenizer.eos_token_id)
    elif tokenizer.eos_token_id in whole[start:]:
        # What follows the end-of-turn token is the template's and never generated.
        whole = whole[: start + whole[start:].index(tokenizer.eos_token_id) + 1]
    return (whole, start) if len(whole) <= max_length else None


def batch_of(
    rows: list[tuple[list[int], int]], step: int, size: int, seed: int
) -> list[tuple[list[int], int]]:
    """The rows of one step: shuffled anew each epoch, rows of like length together, depending on `step` alone."""
    per_epoch = math.ceil(len(rows) / size)
    epoch, index = divmod(step, per_epoch)
    chance = random.Random(f"{seed}/{epoch}")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + chance.uniform(-4, 4))
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    chance.shuffle(batches)
    return [rows[i] for i in batches[index]]


def answer_loss(model: Any, batch: list[tuple[list[int], int]], pad: int) -> tuple[Any, list[bool]]:
    """Mean cross-entropy over the answers' tokens (nats), and for each row whether greedy decoding gives its answer.

    The batch's common prefix (its system prompt) is computed once and its keys and values are shared,
    gradients included. The rest is padded on the left, so that answers end at the same column and
    only the last columns need the head.
    """
    import torch

    where = next(model.parameters()).device
    shared = common_prefix(batch)
    longest = max(len(ids) for ids, _ in batch) - shared
    keep = max(len(ids) - start for ids, start in batch) + 1
    inputs = torch.full((len(batch), longest), pad)
    mask = torch.zeros((len(batch), longest), dtype=torch.long)
    labels = torch.full((len(batch), longest), -100)
    for index, (ids, start) in enumerate(batch):
        offset = longest - (len(ids) - shared)
        inputs[index, offset:] = torch.tensor(ids[shared:])
        mask[index, offset:] = 1
        labels[index, offset + start - shared :] = torch.tensor(ids[start:])
    inputs, mask, labels = inputs.to(where), mask.to(where), labels.to(where)
    positions = (mask.cumsum(-1) - 1).clamp(min=0) + shared
    past = None
    if shared:
        prefix = torch.tensor([batch[0][0][:shared]], device=where)
        past = model(input_ids=prefix, use_cache=True, logits_to_keep=1).past_key_values
        past.batch_repeat_interleave(len(batch))
        mask = torch.cat([torch.ones((len(batch), shared), dtype=torch.long, device=where), mask], dim=1)
    logits = model(
        input_ids=inputs,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=past,
        use_cache=past is not None,
        logits_to_keep=keep,
    ).logits
    predicted, wanted = logits[:, :-1], labels[:, -keep + 1 :]
    loss = torch.nn.functional.cross_entropy(predicted.flatten(0, 1), wanted.flatten(), ignore_index=-100)
    right = ((predicted.argmax(-1) == wanted) | (wanted == -100)).all(-1)
    return loss, right.tolist()


def common_prefix(batch: list[tuple[list[int], int]]) -> int:
    """How many leading prompt tokens all rows share, leaving at least one of each prompt."""
    shortest = min(start for _, start in batch) - 1
    first = batch[0][0]
    for index in range(shortest):
        if any(ids[index] != first[index] for ids, _ in batch):
            return index
    return max(0, shortest)


def evaluate(model: Any, rows: list[tuple[list[int], int]], pad: int) -> tuple[float, float]:
    """(mean loss in nats, share of rows answered exactly) on held-out rows."""
    import torch

    model.eval()
    losses, right = [], []
    with torch.inference_mode():
        for batch in chunks(sorted(rows, key=lambda r: len(r[0])), 16):
            loss, good = answer_loss(model, batch, pad)
            losses.append(loss.item() * len(batch))
            right += good
    return sum(losses) / len(rows), sum(right) / len(rows)


def chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Consecutive slices of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def schedule(progress: float, warmup: float = 0.05) -> float:
    """Learning-rate factor at a share of the run: linear warm-up, then a cosine to a twentieth."""
    if progress < warmup:
        return (progress + 0.01) / (warmup + 0.01)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


class State:
    """What a run needs to go on: adapter and optimizer as safetensors, step and history as JSON."""

    def __init__(self, folder: Path) -> None:
        self.tensors, self.facts = folder / "state.safetensors", folder / "state.json"
        folder.mkdir(parents=True, exist_ok=True)

    def save(
        self, step: int, history: list[dict[str, Any]], parameters: Any, optimizer: Any, save_file: Any
    ) -> None:
        """Write the state; the JSON names the step and is renamed last."""
        tensors = {}
        for name, parameter in parameters.items():
            tensors[f"weight/{name}"] = parameter.detach().contiguous()
            for key, value in optimizer.state[parameter].items():
                tensors[f"{key}/{name}"] = value.detach().contiguous()
        partial = self.tensors.with_suffix(".part")
        save_file(tensors, partial, metadata={"step": str(step)})
        partial.replace(self.tensors)
        partial = self.facts.with_suffix(".part")
        partial.write_text(json.dumps({"step": step, "history": history}))
        partial.replace(self.facts)

    def load(self, parameters: Any, optimizer: Any, load_file: Any) -> tuple[int, list[dict[str, Any]]]:
        """(next step, history) with the parameters and the optimizer put back, or (0, []) for a fresh start."""
        if not (self.facts.exists() and self.tensors.exists()):
            return 0, []
        from safetensors import safe_open

        facts = json.loads(self.facts.read_text())
        with safe_open(self.tensors, "pt") as file:
            if file.metadata()["step"] != str(facts["step"]):
                return 0, []
        tensors = load_file(self.tensors)
        for name, parameter in parameters.items():
            parameter.data.copy_(tensors[f"weight/{name}"])
            moments = {k: tensors[f"{k}/{name}"].to(parameter.device) for k in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": tensors[f"step/{name}"], **moments}
        print(f"progress: going on from step {facts['step']}")
        return facts["step"], facts["history"]


def write_curve(history: list[dict[str, Any]], out: Path) -> None:
    """`curve.csv` and `curve.png`: losses and held-out accuracy over steps."""
    with (out / "curve.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(history[0]))
        writer.writeheader()
        writer.writerows(history)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [h["step"] for h in history]
    figure, left = plt.subplots(figsize=(7, 4), layout="constrained")
    left.plot(steps, [h["train_loss"] for h in history], label="training loss", color="#888")
    left.plot(steps, [h["held_out_loss"] for h in history], label="held-out loss", color="#c43")
    left.set(xlabel="step", ylabel="loss on the answer (nats a token)", ylim=(0, None))
    right = left.twinx()
    right.plot(
        steps, [100 * h["held_out_accuracy"] for h in history], label="held-out accuracy", color="#26a"
    )
    right.set(ylabel="answers exactly right (%)", ylim=(0, 100))
    lines = [*left.get_lines(), *right.get_lines()]
    left.legend(lines, [str(line.get_label()) for line in lines], loc="center right", frameon=False)
    figure.savefig(out / "curve.png", dpi=120)
    plt.close(figure)
