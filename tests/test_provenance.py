"""What an artefact says of itself: inputs, steps, machine, bill of materials, card; and that it can be made again."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from edgeft.compress import Recipe, compress, load_artifact, provenance
from edgeft.compress.card import front_matter_sha256
from edgeft.files import sha256_file
from edgeft.rows import load_rows, row_hash
from edgeft.types import Artifact
from tests.test_cli import assert_two_lines, edgeft

pytest.importorskip("llama_cpp", reason="needs the extra: compress")
pytest.importorskip("peft", reason="needs the extra: tune")


@pytest.fixture(scope="module")
def made(tiny_dist):
    """Home of base/, adapter/, rows.jsonl and dist/."""
    return tiny_dist


def manifest(made: Path, name: str) -> dict:
    return json.loads((made / "dist" / name / "artifact.json").read_text())


def test_inputs_are_recorded_by_hash_and_no_place_of_this_machine_is(made):
    found = manifest(made, "gguf-q4_k_m")
    base, adapter = found["made_from"]["base"], found["made_from"]["adapters"][0]
    assert base["files"]["model.safetensors"] == sha256_file(made / "base" / "model.safetensors")
    assert base["files"]["tokenizer.json"] == sha256_file(made / "base" / "tokenizer.json")
    assert "README.md" not in base["files"]
    weights = made / "adapter" / "adapter_model.safetensors"
    assert adapter["files"]["adapter_model.safetensors"] == sha256_file(weights)
    assert found["asked"]["to"] == "gguf:q4_k_m" and found["asked"]["threads"] == 1
    assert found["asked"]["calibration"] == {"name": "rows.jsonl", "sha256": sha256_file(made / "rows.jsonl")}
    for name in ("merged", "gguf-f16", "gguf-q4_k_m"):
        for file in ("artifact.json", "README.md", "sbom.cdx.json"):
            assert str(made) not in (made / "dist" / name / file).read_text()


def test_a_changed_template_is_another_input(made, tmp_path):
    """The weights alone do not decide: what is asked again with another chat template must be made again."""
    shutil.copytree(made / "base", tmp_path / "base")
    before = provenance.inputs_of(tmp_path / "base", [])
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert provenance.inputs_of(tmp_path / "base", []) != before


def test_every_step_has_its_cost_and_its_rows(made):
    steps = {name: manifest(made, name)["steps"] for name in ("merged", "gguf-f16", "gguf-q4_k_m")}
    assert [s["name"] for s in steps["merged"]] == ["merging", "proving the merge"]
    assert [s["name"] for s in steps["gguf-f16"]] == ["llama.cpp's converter"]
    names = [s["name"] for s in steps["gguf-q4_k_m"]]
    assert names[-3:] == ["what the layers see", "llama_model_quantize", "rounding with error feedback"]
    for step in (s for listed in steps.values() for s in listed):
        assert step["wall_s"] > 0 and step["peak_rss_bytes"] >= step["peak_anon_bytes"] > 0
        assert step.get("kept", False) is False
    rows = [row_hash(row) for row in load_rows(made / "rows.jsonl")]
    assert manifest(made, "gguf-q4_k_m")["seen_rows"]["calibrate"] == rows
    assert manifest(made, "merged")["checks"]["proof"]["rows"] == rows


def test_the_machine_and_both_llama_cpps_are_named(made):
    on = manifest(made, "gguf-f16")["made_on"]
    assert on["cpu"] and on["cores"] >= 1 and on["packages"]["torch"]
    builds = on["llama_cpp"]
    assert builds["llama-cpp-python"]["version"] == on["packages"]["llama-cpp-python"]
    assert re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", builds["llama-cpp-python"]["commit"])
    if "xllamacpp" in on["packages"]:
        assert {"version", "commit", "build_number"} <= set(builds["xllamacpp"])


def test_a_hub_folder_has_its_name_and_revision(tmp_path):
    from edgeft.pull import origin_of

    folder = tmp_path / "models--some-org--some-model" / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    assert origin_of(folder) == {"kind": "hub", "name": "some-org/some-model", "revision": "0123abcd"}
    assert provenance.pull_name(origin_of(folder)) == "some-org/some-model"
    assert origin_of(tmp_path)["kind"] == "folder"


PURL = re.compile(r"pkg:pypi/[a-z0-9.-]+@[A-Za-z0-9.%_-]+")


@pytest.mark.parametrize("name", ["merged", "gguf-q4_k_m"])
def test_the_bill_of_materials_is_cyclonedx_1_6(made, name):
    """The fields that the 1.6 schema requires, its uniqueness rules, and every input with its hash."""
    found = json.loads((made / "dist" / name / "sbom.cdx.json").read_text())
    assert (found["bomFormat"], found["specVersion"], found["version"]) == ("CycloneDX", "1.6", 1)
    assert re.fullmatch(
        r"urn:uuid:[0-9a-f]{8}-[0-9a-f]{4}-5[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", found["serialNumber"]
    )
    refs: list[str] = []

    def walk(component: dict) -> None:
        assert component["type"] in ("machine-learning-model", "library", "file") and component["name"]
        refs.append(component["bom-ref"])
        for entry in component.get("hashes", []):
            assert entry["alg"] == "SHA-256" and re.fullmatch(r"[0-9a-f]{64}", entry["content"])
        for entry in component.get("properties", []):
            assert isinstance(entry["name"], str) and isinstance(entry["value"], str)
        if "purl" in component:
            assert PURL.fullmatch(component["purl"])
        for inside in component.get("components", []):
            walk(inside)

    for component in (found["metadata"]["component"], *found["components"]):
        walk(component)
    assert len(refs) == len(set(refs)), "a bom-ref must be unique in its document"
    assert all(d["ref"] in refs and set(d.get("dependsOn", [])) <= set(refs) for d in found["dependencies"])
    models = [c for c in found["components"] if c["type"] == "machine-learning-model"]
    hashes = {f["name"]: f["hashes"][0]["content"] for m in models for f in m["components"]}
    assert hashes["model.safetensors"] == sha256_file(made / "base" / "model.safetensors")
    weights = made / "adapter" / "adapter_model.safetensors"
    assert hashes["adapter_model.safetensors"] == sha256_file(weights)
    own = {f["name"]: f["hashes"][0]["content"] for f in found["metadata"]["component"]["components"]}
    assert own == {k: v["sha256"] for k, v in manifest(made, name)["files"].items()}
    assert any(c.get("purl", "").startswith("pkg:pypi/torch@") for c in found["components"])


def test_the_bill_is_valid_by_its_schema(made):
    validation = pytest.importorskip(
        "cyclonedx.validation.json", reason="needs cyclonedx-python-lib[json-validation]"
    )
    from cyclonedx.schema import SchemaVersion

    for name in ("merged", "gguf-f16", "gguf-q4_k_m"):
        text = (made / "dist" / name / "sbom.cdx.json").read_text()
        assert validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None


def test_the_card_says_what_was_measured_and_what_a_person_must_fill(made):
    text = (made / "dist" / "merged" / "README.md").read_text()
    front, _, body = text.removeprefix("---\n").partition("\n---\n")
    known = yaml.safe_load(front)
    assert known["pipeline_tag"] == "text-generation" and known["library_name"] == "transformers"
    assert "license" not in known and "# TODO license" in front, "what nobody knows is not made up"
    assert body.count("TODO") >= 4
    proof = manifest(made, "merged")["checks"]["proof"]
    assert f"{proof['kld_base']:.4g}" in body and "13,763,840" in body
    quantized = (made / "dist" / "gguf-q4_k_m" / "README.md").read_text()
    assert (
        f"{manifest(made, 'gguf-q4_k_m')['bits_per_weight']:.2f}" in quantized
        and "--to gguf:q4_k_m" in quantized
    )


def test_a_person_may_edit_the_card(made, tmp_path):
    """The card is no part of what is verified, survives the next run, and its front matter is an input of GGUF."""
    out = tmp_path / "dist"
    shutil.copytree(made / "dist", out)
    card = out / "gguf-f16" / "README.md"
    card.write_text(card.read_text().replace("## Contact\n\nTODO", "## Contact\n\nme"))
    before = front_matter_sha256(out / "merged")
    recipe = Recipe(out=out, formats=("gguf:f16",), calibration=made / "rows.jsonl", name="tiny", threads=1,
                    no_gate=True)  # fmt: skip
    kept = load_artifact(out / "gguf-f16", verify=True)
    again = compress(made / "base", made / "adapter", recipe)[1]
    assert again.created_at == kept.created_at and "## Contact\n\nme" in card.read_text()
    merged = out / "merged" / "README.md"
    merged.write_text(merged.read_text().replace("# TODO language: [en]", "language: [nl]"))
    assert front_matter_sha256(out / "merged") != before
    load_artifact(out / "merged", verify=True)
    another = compress(made / "base", made / "adapter", recipe)[1]
    assert another.sha256 != kept.sha256 and another.recipe_sha256 != kept.recipe_sha256
    assert b"general.languages" in next((out / "gguf-f16").glob("*.gguf")).read_bytes()[: 1 << 20]


def test_rebuild_is_bit_identical(made):
    done = edgeft("rebuild", made / "dist" / "gguf-f16" / "artifact.json", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["identical"] and [f["verdict"] for f in found["files"]] == ["identical"]


def test_rebuild_says_which_file_differs(made, tmp_path):
    """A manifest whose file was another: rebuilt elsewhere, the inputs named by hand."""
    folder = tmp_path / "merged"
    shutil.copytree(made / "dist" / "merged", folder)
    artifact = Artifact.load(folder / "artifact.json")
    artifact.files["config.json"]["sha256"] = "0" * 64
    artifact.save(folder / "artifact.json")
    done = edgeft("rebuild", folder, "--base", made / "base", "--adapter", made / "adapter", "--calibration",
                  made / "rows.jsonl", "--out", tmp_path / "again", "--json")  # fmt: skip
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    verdicts = {f["file"]: f["verdict"] for f in found["files"]}
    assert not found["identical"] and verdicts.pop("config.json") == "differs"
    assert set(verdicts.values()) == {"identical"}
    assert (tmp_path / "again" / "merged" / "model.safetensors").is_file()


def test_rebuild_refuses_inputs_that_are_not_the_same(made, tmp_path):
    folder = made / "dist" / "gguf-q4_k_m"
    other = tmp_path / "other"
    shutil.copytree(made / "base", other)
    (other / "tokenizer_config.json").write_text("{}")
    assert_two_lines(
        edgeft("rebuild", folder, "--base", other), 2, "the base", "tokenizer_config.json", "another hash"
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text((made / "rows.jsonl").read_text() + "\n")
    assert_two_lines(edgeft("rebuild", folder, "--calibration", rows), 2, "rows.jsonl", "its hash is another")
    adapter = tmp_path / "adapter"
    shutil.copytree(made / "adapter", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 9}))
    assert_two_lines(
        edgeft("rebuild", folder, "--adapter", adapter), 2, "the adapter 'adapter'", "adapter_config.json"
    )


def test_rebuild_asks_for_what_it_can_not_find(made, tmp_path):
    folder = tmp_path / "gguf-f16"
    shutil.copytree(made / "dist" / "gguf-f16", folder)
    assert_two_lines(edgeft("rebuild", folder), 2, "1 adapter", "--adapter")
    assert_two_lines(edgeft("rebuild", folder, "--adapter", made / "adapter"), 2, "'base'", "--base")
    assert_two_lines(
        edgeft("rebuild", folder, "--adapter", made / "adapter", "--base", made / "base"),
        2,
        "rows.jsonl",
        "--calibration",
    )
    assert_two_lines(edgeft("rebuild", tmp_path / "none"), 2, "none")
