"""`edgeft profiles list|show|detect`."""

from pathlib import Path
from typing import Any

import click

from edgeft import console
from edgeft.cli import Group, options

MARKS = {"published": "p", "estimate": "e", "measured": "m"}


@click.group("profiles", cls=Group)
@options
def command() -> None:
    """List, show and detect hardware profiles."""


@command.command("list")
@options
def list_command() -> None:
    """List every profile: the packaged ones and your own."""
    from edgeft.home import config_dir
    from edgeft.profiles import load_profiles

    profiles = list(load_profiles().values())
    console.table(
        ("profile", "kind", "memory GB", "GB/s", "measured", "idle W", "load W", "USD", "as of", "from"),
        [_row(p) for p in profiles],
    )
    console.result(
        [p.to_dict() for p in profiles],
        "p published, e estimate, m measured, - nobody gave it.\n"
        f"Your own go into {config_dir('profiles')}; this box's: edgeft profiles detect --out FILE.yaml",
    )


def _row(p: Any) -> tuple[str, ...]:
    memory = "vram_gb" if p.kind == "gpu" else "ram_gb"
    keys = (memory, "bandwidth_gb_per_s", "bandwidth_measured_gb_per_s", "power_idle_w", "power_load_w")
    cells = (_figure(p, key) for key in keys)
    return (
        p.id,
        p.kind,
        *cells,
        _figure(p, "price_usd"),
        p.as_of,
        "packaged" if p.origin == "packaged" else "own",
    )


def _figure(p: Any, key: str) -> str:
    value = getattr(p, key)
    if value is None:
        return "-"
    if key == "price_usd":
        low, high = value
        text = f"{low:,.0f}" if low == high else f"{low:,.0f}-{high:,.0f}"
    else:
        text = f"{value:,g}"
    return f"{text} {MARKS[p.basis.get(key, 'estimate')]}"


@command.command("show")
@click.argument("profile_id", metavar="ID")
@options
def show_command(profile_id: str) -> None:
    """Show one profile and what each of its figures rests on."""
    from edgeft.profiles import get_profile
    from edgeft.profiles.loader import FIGURES, GEMM

    p = get_profile(profile_id)
    keys = (*FIGURES, "price_usd")
    rows = [
        (key, _figure(p, key).rsplit(" ", 1)[0], p.basis[key]) for key in keys if getattr(p, key) is not None
    ]
    rows += [(f"limits.{key}", f"{value:g}", "goal") for key, value in p.limits.items()]
    console.table((p.id, "value", "basis"), rows, title=f"{p.name} ({p.kind})")
    wanted = ("bandwidth_gb_per_s", *GEMM, "power_idle_w", "power_load_w", "price_usd")
    missing = [key for key in wanted if getattr(p, key) is None]
    lines = [f"as of {p.as_of}; source: {p.source}", *([p.notes] if p.notes else [])]
    lines += [f"not known: {', '.join(missing)}"] if missing else []
    console.result(p.to_dict(), "\n".join(lines))


@command.command("detect")
@click.option("--out", type=click.Path(path_type=Path), help="Write a profile file of this box.")
@click.option("--gpu", "gpu_alone", is_flag=True, help="Write the profile of its first GPU instead.")
@options
def detect_command(out: Path | None, gpu_alone: bool) -> None:
    """Measure this box: CPU, memory, GPU, bandwidth, matrix multiplication.

    Takes about ten seconds, under 20. With --out, writes what a profile holds; add power and price by hand.
    """
    from edgeft.files import write_text
    from edgeft.home import config_dir
    from edgeft.profiles import detect
    from edgeft.profiles.detection import as_profile, gpu_profile, need_gpu

    if gpu_alone:
        need_gpu()

    with console.step("measuring this box"):
        box = detect()
    console.table((box["id"], "value"), _facts(box), title=box["name"])
    lines = [f"{what}: {why}" for what, why in box["reasons"].items()]
    profile = gpu_profile(box) if gpu_alone else as_profile(box)
    if out is not None:
        import yaml

        write_text(out, yaml.safe_dump(profile, sort_keys=False, allow_unicode=True, width=110))
        box["written_to"] = str(out)
        lines.append(f"wrote {out}; in {config_dir('profiles')} it is found as '{profile['id']}'")
    console.result(box, "\n".join(lines))


def _facts(box: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, memory = box["cpu"], box["memory"]
    isa = (
        None
        if cpu["isa"] is None
        else ", ".join(name for name, there in cpu["isa"].items() if there) or "none of note"
    )
    caches = ", ".join(
        f"{c['count']} x L{c['level']} {c['type'].lower()} {c['bytes'] // 1024} KiB" for c in cpu["caches"]
    )
    gpus = [
        f"{g['name']}, {g['vram_gb']} GB, driver {g['driver']}"
        + (f", compute capability {g['compute_capability']}" if g["compute_capability"] else "")
        for g in box["gpu"] or []
    ]
    bandwidth = box["bandwidth"] or {}
    facts: list[tuple[str, Any]] = [
        ("CPU", cpu["model"]),
        (
            "cores",
            f"{cpu['physical_cores']} physical, {cpu['logical_cores']} logical, {cpu['usable_cores']} usable",
        ),
        ("instruction sets", isa),
        ("caches", caches or None),
        ("governor", cpu["governor"]),
        ("RAM", _gb(memory["total_bytes"], f"{_gb(memory['available_bytes'])} available")),
        ("disk free", _gb(box["disk"]["free_bytes"])),
        ("system", f"{box['os']['name']}, kernel {box['os']['kernel']}"),
        ("virtual machine", {True: "yes", False: "no", None: None}[box["virtualized"]]),
        ("GPU", "; ".join(gpus) or None),
        *_gpu_facts((box["gpu"] or [{}])[0]),
        ("memory read", f"{bandwidth['gb_per_s']} GB/s" if bandwidth.get("gb_per_s") else None),
        ("  method", bandwidth.get("method")),
        *_gemm_facts(box["gemm"] or {}),
        ("throttling", _throttling(box["throttling"])),
        ("temperature", ", ".join(f"{k} {v:.0f} C" for k, v in (box["thermal_c"] or {}).items()) or None),
        ("load average", box["load_average_1m"]),
    ]
    return [(name, "not known" if value is None else str(value)) for name, value in facts]


def _gemm_facts(gemm: dict[str, Any]) -> list[tuple[str, Any]]:
    from edgeft.profiles.loader import GEMM

    facts: list[tuple[str, Any]] = []
    for key, name in GEMM.items():
        found = gemm.get(key) or {"rate": None, "method": None}
        unit = "GOP/s" if key.endswith("gop_per_s") else "GFLOP/s"
        facts.append((f"GEMM {name}", None if found["rate"] is None else f"{found['rate']} {unit}"))
        facts.append(("  method", found["method"]))
    return facts


def _gpu_facts(gpu: dict[str, Any]) -> list[tuple[str, Any]]:
    from edgeft.profiles.loader import GEMM

    names = {"bandwidth_gb_per_s": ("GPU memory", "GB/s")}
    names |= {
        key: (f"GPU GEMM {name}", "GOP/s" if key.endswith("gop_per_s") else "GFLOP/s")
        for key, name in GEMM.items()
    }
    return [(name, f"{gpu[key]:,.0f} {unit}") for key, (name, unit) in names.items() if key in gpu]


def _throttling(found: dict[str, Any] | None) -> str | None:
    if found is None:
        return None
    return "; ".join(found["seen"]) or f"none seen by {', '.join(found['sensors'])}"


def _gb(byte_count: int | None, more: str = "") -> str:
    if byte_count is None:
        return "not known"
    return f"{byte_count / 1e9:.1f} GB" + (f", {more}" if more else "")
