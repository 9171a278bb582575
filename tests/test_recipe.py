"""Recipe files: the words are the flags, typos name the nearest right one and their line, flags beside them win."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

from edgeft.cli.compress import command
from edgeft.cli.recipes import words
from edgeft.compress import recipe
from edgeft.compress.recipe import Recipe
from edgeft.errors import UsageError
from tests.test_cli import assert_two_lines, edgeft


def written(folder: Path, text: str) -> Path:
    """A recipe file."""
    file = folder / "mine.yaml"
    file.write_text(text)
    return file


def foreseen(*arguments: str | Path) -> dict:
    """What a dry run says it would make."""
    done = edgeft("compress", *arguments, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_words_are_the_commands_own_options():
    """Every option that says what to make is a word, under its long name; none stands in a second list."""
    known = words(command)
    assert {"base", "adapter", "to", "calibration", "out", "name", "threads", "allow-seen-rows"} <= set(known)
    hidden = {"recipe", "dry-run", "json", "quiet", "debug", "help"}
    assert not hidden & set(known)
    made = {name for p in command.params for name in [p.name] if p.expose_value} - {"dry_run"}
    assert {p.name for p in known.values()} == made


def test_a_new_option_is_a_word_at_once():
    option = click.Option(["--fit-to"], type=click.IntRange(1))
    assert words(click.Command("x", params=[option])) == {"fit-to": option}


@pytest.mark.parametrize("name", sorted(recipe.shipped()))
def test_shipped_recipes_are_valid(name, tiny_models, rows_file, tmp_path):
    """Each is found by its name, read by the command, and every format in it is known and could be made here."""
    for package in ("llama_cpp", "onnxruntime_genai", "gptqmodel"):
        pytest.importorskip(package, reason="needs the extras: compress, onnx, gptq")
    seen = foreseen(
        tiny_models["llama"], "--recipe", name, "--calibration", rows_file, "--out", tmp_path / "dist"
    )
    wanted = recipe.read(recipe.find(name))["to"].texts
    assert [n for n in seen["disk_bytes"] if n not in ("merged", ".work")] == [
        w.replace(":", "-") for w in wanted
    ]
    assert len(wanted) >= 2 and not (tmp_path / "dist").exists()


def test_three_ship():
    assert set(recipe.shipped()) == {"edge-cpu", "server-gptq", "quality-check"}


def test_a_recipe_does_what_its_flags_do(tiny_models, tiny_adapters, rows_file, tmp_path):
    pytest.importorskip("llama_cpp", reason="needs the extra: compress")
    file = written(
        tmp_path,
        f"base: {tiny_models['llama']}\nadapter:\n  - {tiny_adapters['llama']}=0.5\nto: [gguf:f16, gguf:q4_k_m]\n"
        f"calibration: {rows_file}\nname: 1.10\nthreads: 2\nout: {tmp_path / 'a'}\nallow-seen-rows: yes\n",
    )
    by_file = foreseen("--recipe", file)
    by_flags = foreseen(
        tiny_models["llama"], "--adapter", f"{tiny_adapters['llama']}=0.5", "--to", "gguf:f16", "--to", "gguf:q4_k_m",
        "--calibration", rows_file, "--name", "1.10", "--threads", "2", "--out", tmp_path / "a",
    )  # fmt: skip
    for seen in (by_file, by_flags):  # what was measured or is free may differ by the moment
        for key in ("free_ram_bytes", "free_disk_bytes"):
            seen.pop(key)
        for step in seen["steps"]:
            step.pop("wall_s")
    assert by_file == by_flags
    assert set(by_file["disk_bytes"]) == {"merged", ".work", "gguf-f16", "gguf-q4_k_m"}


def test_flags_beside_it_win(tiny_models, tmp_path):
    pytest.importorskip("llama_cpp", reason="needs the extra: compress")
    file = written(tmp_path, f"base: nowhere\nto: gguf:q8_0\nout: {tmp_path / 'a'}\n")
    seen = foreseen(tiny_models["llama"], "--recipe", file, "--to", "gguf:f16")
    assert set(seen["disk_bytes"]) == {"merged", ".work", "gguf-f16"}


@pytest.mark.parametrize(
    ("text", "line", "seen"),
    [
        ("to: gguf:f16\ncalibraton: rows.jsonl\n", 2, ("'calibraton'", "'calibration'")),
        ("to: gguf:f16\nallow_seen_rows: true\n", 2, ("'allow_seen_rows'", "'allow-seen-rows'")),
        ("to: gguf:f16\n\nthreads: two\n", 3, ("'threads'", "'two'")),
        ("threads: 0\n", 1, ("'threads'", "0")),
        ("to:\n  - gguf:f16\n  - gguf:q4_k_mm\n", 3, ("gguf:q4_k_mm", "'gguf:q4_k_m'")),
        ("to: gguf:f16\nadapter: nowhere/adapter\n", 2, ("nowhere/adapter",)),
        ("to: gguf:f16\nto: gguf:q8_0\n", 2, ("'to'", "line 1")),
        ("name:\n  - a\n  - b\n", 1, ("'name'", "one value")),
        ("name:\n", 1, ("'name'", "no value")),
        ("adapter:\n  - dir: a\n    share: 1\n", 2, ("'adapter'", "map")),
        ("to: [gguf:f16\nout: x\n", 2, ("not valid YAML",)),
        ("allow-seen-rows: maybe\n", 1, ("'allow-seen-rows'", "maybe")),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_line(text, line, seen, tiny_models, tmp_path):
    file = written(tmp_path, text)
    done = edgeft("compress", tiny_models["llama"], "--recipe", file, "--out", tmp_path / "dist")
    assert_two_lines(done, 2, f"{file} line {line}", *seen)
    assert not (tmp_path / "dist").exists()


def test_a_recipe_that_is_not_there_names_the_nearest(tiny_models, tmp_path):
    assert_two_lines(edgeft("compress", tiny_models["llama"], "--recipe", "edge-cpus"), 2, "'edge-cpu'")
    missing = tmp_path / "none.yaml"
    assert_two_lines(
        edgeft("compress", tiny_models["llama"], "--recipe", missing), 2, str(missing), "edge-cpu"
    )


def test_an_error_is_blamed_on_no_other_line():
    entries = {"out": recipe.Entry("out", 4, ("dist",), (4,), False)}
    for text in ("the distance is wrong", "there is no folder /x/dist/merged", "cannot read dist-2"):
        assert recipe.located(UsageError(text), Path("r.yaml"), entries).message == text
    assert recipe.located(UsageError("no folder dist."), Path("r.yaml"), entries).message.startswith(
        "r.yaml line 4"
    )


def test_recipe_is_what_it_was():
    """`from edgeft.compress import Recipe` is the API; its fields have defaults but for two."""
    from edgeft.compress import Recipe as exported

    assert exported is Recipe
    assert Recipe(out=Path("x"), formats=("gguf:f16",)).calibration is None
