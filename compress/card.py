"""The model card of an artefact: README.md in the form the model hub reads (YAML front matter, then text).

Says what was measured and how it was made; what only a person can know is marked TODO. Written from `artifact.json`
alone, without a date or a duration, so that the same artefact has the same card. A person edits it afterwards, which
is why it is no part of the artefact's hash. Upstream's GGUF converter reads the front matter of the merged model's
card into the file's metadata, so what stands there is an input of GGUF (`front_matter_sha256`).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from edgeft.types import Artifact

CARD = "README.md"
LIBRARIES = {
    "safetensors": "transformers",
    "gguf": "gguf",
    "onnx": "onnxruntime-genai",
    "gptq": "transformers",
}
RUN = {
    "safetensors": "AutoModelForCausalLM.from_pretrained(FOLDER) of transformers",
    "gptq": "transformers with optimum and gptqmodel, or vLLM",
    "gguf": "llama-server -m FILE, or any program that reads GGUF",
    "onnx": "onnxruntime-genai",
}


def card(artifact: Artifact) -> str:
    """The text of README.md."""
    parts = [
        _front_matter(artifact),
        f"# {artifact.model_name}, {artifact.id}\n\n{_summary(artifact)}",
        "TODO: what it is for, who made it, who may use it.",
        _measured(artifact),
        _how(artifact),
        "## Intended use\n\nTODO: the task, the users, and what it must not be used for.",
        f"## Training data\n\n{_training(artifact)}",
        "## Limits and risks\n\nTODO: known failures, biases, languages and inputs it was not tested on.",
        "## Contact\n\nTODO",
    ]
    return "\n\n".join(parts) + "\n"


def front_matter_sha256(folder: Path) -> str | None:
    """SHA-256 of what stands between the two `---` of a folder's card; None where there is none."""
    file = folder / CARD
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    if not lines or lines[0].strip() != "---" or "---" not in lines[1:]:
        return None
    return hashlib.sha256("\n".join(lines[1 : lines.index("---", 1)]).encode()).hexdigest()


def _front_matter(artifact: Artifact) -> str:
    import yaml

    base = artifact.made_from.get("base", {})
    known: dict[str, Any] = {
        **({"license": str(base["license"]).lower()} if base.get("license") else {}),
        "library_name": LIBRARIES.get(artifact.format, artifact.format),
        "pipeline_tag": "text-generation",
        "tags": [
            "edgeft",
            *(["lora", "merged"] if artifact.made_from.get("adapters") else []),
            artifact.format,
        ],
    }
    if base.get("kind") in ("built-in", "hub"):  # a name that the hub knows
        known["base_model"] = base["name"]
        known["base_model_relation"] = "quantized" if artifact.format != "safetensors" else "finetune"
    text = yaml.safe_dump(known, sort_keys=False, allow_unicode=True).strip()
    todo = [
        "# TODO license: the line above is the base's; say under which one this model is given"
        if base.get("license")
        else "# TODO license: ID (nothing is known of the base's)",
        "# TODO language: [en]",
        *([] if "base_model" in known else ["# TODO base_model: OWNER/NAME on the hub"]),
    ]
    return "\n".join(["---", text, *todo, "---"])


def _summary(artifact: Artifact) -> str:
    base = artifact.made_from.get("base", {}).get("name", "a base")
    adapters = [a["name"] for a in artifact.made_from.get("adapters", [])]
    merged = (
        f" with the LoRA adapter{'s' if len(adapters) > 1 else ''} {', '.join(adapters)} merged in"
        if adapters
        else ""
    )
    kind = "unquantized" if artifact.format == "safetensors" else f"as {artifact.format}:{artifact.variant}"
    return f"{base}{merged}, {kind}. Runs with {RUN.get(artifact.format, artifact.engine)}."


def _measured(artifact: Artifact) -> str:
    rows = [
        ("size of the files", f"{artifact.size_bytes / 1e6:.1f} MB"),
        ("parameters", f"{artifact.parameters:,}"),
        ("bits per weight (8 × bytes of the tensors / parameters)", f"{artifact.bits_per_weight:.2f}"),
        (
            "tensors by stored type",
            ", ".join(f"{k}: {v['tensors']}" for k, v in sorted(artifact.tensor_types.items())),
        ),
    ]
    if artifact.fallback_share:
        rows.append(
            (
                "parameters in rows too narrow for the asked type, stored wider",
                f"{artifact.fallback_share:.0%}",
            )
        )
    rows += _figures(artifact.checks)
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    owed = "" if artifact.checks.get("gate") else (
        "\n\nQuality on the task was not measured when it was made: TODO `edgeft bench` says accuracy, KLD and speed on a box."
    )  # fmt: skip
    return f"## What was measured\n\n| | |\n|---|---|\n{table}{owed}"


def _figures(checks: dict[str, Any]) -> list[tuple[str, str]]:
    """The gate's lines, and every other figure that a check recorded, by its path. Timings are left out.

    They belong to one run: with them the same inputs would not give the same card.
    """
    found = [
        (f"gate, {line['check']}", _gate_line(line)) for line in checks.get("gate", {}).get("checks", [])
    ]

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, inside in value.items():
                timing = key.endswith(("_s", "_per_s")) or (key == "why" and path.startswith("choices"))
                if key not in ("cost", "thresholds", "rows") and not timing:
                    walk(inside, f"{path} {key}".strip())
        elif isinstance(value, bool | str):
            found.append((path.replace("_", " "), str(value)))
        elif isinstance(value, int | float):
            found.append((path.replace("_", " "), f"{value:.4g}"))

    gate = checks.get("gate", {})
    walk({**checks, **({"gate": gate.get("status", "not checked")} if gate else {})}, "")
    return [(name, value.replace("|", "\\|").replace("\n", " ")) for name, value in found]


def _gate_line(line: dict[str, Any]) -> str:
    """A check of the gate: figure, interval, limit and verdict, as far as they are there."""
    if line.get("seen") is None:
        return f"{line['verdict']}: {line['why']}" if line.get("why") else str(line["verdict"])
    interval = " ({:.4g} to {:.4g})".format(*line["ci95"]) if line.get("ci95") else ""
    limit = f", {line.get('rule', 'limit')} {line['limit']:g}" if line.get("limit") is not None else ""
    return f"{line['seen']:.4g}{interval}{limit}: {line['verdict']}"


def _how(artifact: Artifact) -> str:
    asked = artifact.asked
    words = ["edgeft compress", str(asked.get("base") or "BASE")]
    words += [f"--adapter {adapter}" for adapter in asked.get("adapter", [])]
    words += [f"--to {asked['to']}"] if asked.get("to") else []
    if calibration := asked.get("calibration"):
        words.append(f"--calibration {calibration['name']}")
    words.append(f"--name {artifact.model_name}")
    versions = ", ".join(f"{k} {v}" for k, v in sorted(artifact.versions.items()))
    return (
        f"## How it was made\n\n    {' '.join(words)}\n\n"
        f"Packages that decide the result: {versions}. `artifact.json` has every input and file with its SHA-256, each "
        "step's cost and the machine; `sbom.cdx.json` is the bill of materials (CycloneDX); `edgeft rebuild artifact.json` "
        "makes it again and says whether it is bit-identical."
    )


def _training(artifact: Artifact) -> str:
    seen = {kind: len(hashes) for kind, hashes in artifact.seen_rows.items() if hashes}
    known = ", ".join(f"{count} rows to {kind}" for kind, count in sorted(seen.items()))
    return f"{f'Seen: {known} (their hashes are in `artifact.json`). ' if known else ''}TODO: where the rows come from and their licence."
