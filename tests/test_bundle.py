"""What a bundle holds: the same bytes each time, checked against the box before it is made; scripts that shells accept; signatures."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement

from edgeft.cli import run
from edgeft.deploy import Wanted, bundle, packages, templates
from edgeft.deploy.archive import Bundle
from edgeft.deploy.containers import write_folder
from edgeft.deploy.preflight import arch_of, memory_bytes
from edgeft.deploy.signing import sign, verify
from edgeft.errors import GateError, UsageError
from edgeft.files import list_files, write_json
from edgeft.profiles import load_profiles
from edgeft.router import decide, load_policy
from edgeft.types import Artifact

pytest.importorskip("safetensors", reason="edgeft[serve] is not installed")
PI = load_profiles()["raspberry-pi-5-8gb"]


def artifact(folder: Path, content: bytes = b"weights") -> Path:
    """An artefact as to its manifest; what it holds is no model."""
    folder.mkdir(parents=True)
    (folder / "model.gguf").write_bytes(content)
    files = list_files(folder)
    made = Artifact(
        folder.name, "gguf", "q4_k_m", "gguf", "tiny", datetime(2026, 11, 25, tzinfo=UTC).isoformat(), {}, {}, "0" * 64, {}, files,
        len(content), 1, 8.0, {}, None, {}, {},
    )  # fmt: skip
    write_json(folder / "artifact.json", made.to_dict())
    return folder


@pytest.fixture
def lock_only(tmp_path):
    """What bundles of a tiny artefact need; no wheels are fetched."""
    return Wanted([artifact(tmp_path / "dist" / "gguf-q4_k_m")], PI, lock_only=True)


def test_the_same_inputs_give_the_same_bytes(lock_only, tmp_path):
    manifest = bundle(lock_only, tmp_path / "a.tar")
    for path in lock_only.artifacts[0].iterdir():  # times of files are not in it
        path.touch()
    bundle(lock_only, tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    other = bundle(replace(lock_only, port=9090), tmp_path / "c.tar")
    assert other["id"] != manifest["id"]
    with tarfile.open(tmp_path / "a.tar") as tar:
        members = tar.getmembers()
    assert members[0].name == "bundle.json" and {(m.uid, m.gid, m.mtime, m.uname) for m in members} == {
        (0, 0, 0, "")
    }
    read = Bundle(tmp_path / "a.tar")
    read.check()
    assert (
        read.manifest == manifest
        and manifest["needs"]["machine"] == "aarch64"
        and manifest["promised"]["ttft_s"] == 5
    )


def test_its_sums_are_checked_by_sha256sum_and_its_scripts_by_a_shell(lock_only, tmp_path):
    bundle(lock_only, tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as tar:
        tar.extractall(tmp_path / "x", filter="data")
    names = {p.relative_to(tmp_path / "x").as_posix() for p in (tmp_path / "x").rglob("*") if p.is_file()}
    summed = {line[66:] for line in (tmp_path / "x" / "SHA256SUMS").read_text().splitlines()}
    assert names - summed == {"SHA256SUMS"}
    subprocess.run(["sha256sum", "--quiet", "--strict", "-c", "SHA256SUMS"], cwd=tmp_path / "x", check=True)
    for script in (tmp_path / "x" / "install.sh", tmp_path / "x" / "service.sh", templates.HERE / "box.sh"):
        subprocess.run(["sh", "-n", script], check=True)
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", "-s", "sh", script], check=True)
    assert "--port 8080 --context 2048" in (tmp_path / "x" / "service.sh").read_text()
    (tmp_path / "x" / "model").write_text("")
    (tmp_path / "x" / "artifacts" / "gguf-q4_k_m" / "model.gguf").write_bytes(b"changed")
    done = subprocess.run(
        ["sh", tmp_path / "x" / "install.sh", tmp_path / "p"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3 and "a file is damaged" in done.stderr and not (tmp_path / "p").exists()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_unit_is_one_that_systemd_reads(lock_only, tmp_path):
    unit = templates.scripts({"host": "127.0.0.1", "port": 8080, "context": 2048}, "abc", "3.11")[
        "edgeft.service"
    ].decode()
    text = unit.replace("%PREFIX%/venvs/abc/bin/python", sys.executable).replace("%PREFIX%", str(tmp_path))
    (tmp_path / "edgeft.service").write_text(text.replace("%WANTED%", "multi-user.target"))
    done = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / "edgeft.service"],
        capture_output=True,
        text=True,
        check=False,
    )
    ours = [line for line in done.stderr.splitlines() if "edgeft.service" in line]
    assert not ours, ours


def test_a_policy_of_one_sends_everything_to_it(lock_only, tmp_path):
    bundle(lock_only, tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as tar:
        tar.extractall(tmp_path / "x", filter="data")
    policy = load_policy(tmp_path / "x" / "policy")
    assert list(policy.candidates) == ["gguf-q4_k_m"]
    assert decide(policy, "whatever it is").choice == "gguf-q4_k_m"
    from edgeft.serve.candidates import check

    found = check(policy.policy.candidates[0], tmp_path / "x" / "artifacts")
    assert found["path"].endswith("artifacts/gguf-q4_k_m")


def test_a_policy_brings_the_artefacts_it_was_fitted_on(tmp_path):
    weak, strong = artifact(tmp_path / "dist" / "weak", b"w"), artifact(tmp_path / "dist" / "strong", b"s")
    artifact(tmp_path / "dist" / "other", b"o")
    from edgeft.router.features import DIMENSIONS, SPEC
    from edgeft.router.policy import save_policy
    from edgeft.router.rule import DEFAULTS
    from edgeft.types import Policy

    sides = [
        {"id": p.name, "kind": "artifact", "engine": "gguf", "path": str(p), "price": None,
         "artifact_sha256": Artifact.load(p / "artifact.json").sha256}
        for p in (weak, strong)
    ]  # fmt: skip
    tensors = {"text.weights": np.zeros((2, DIMENSIONS), np.float32), "text.bias": np.zeros(2, np.float32)}
    save_policy(Policy("2026", sides, dict(SPEC), dict(DEFAULTS), {}), tensors, tmp_path / "policy")
    manifest = bundle(
        Wanted([tmp_path / "dist"], PI, tmp_path / "policy", lock_only=True), tmp_path / "a.tar"
    )
    assert [a["id"] for a in manifest["artifacts"]] == ["weak", "strong"] and manifest["policy"][
        "candidates"
    ] == ["weak", "strong"]
    assert not any("other" in name for name in manifest["files"])
    with pytest.raises(UsageError, match="'strong' is not among those named"):
        bundle(Wanted([weak], PI, tmp_path / "policy", lock_only=True), tmp_path / "b.tar")
    with pytest.raises(UsageError, match="3 artefacts and no policy"):
        bundle(Wanted([tmp_path / "dist"], PI, lock_only=True), tmp_path / "b.tar")
    assert not (tmp_path / "b.tar").exists()


def test_what_does_not_fit_is_refused_before_anything_is_written(lock_only, tmp_path):
    small = replace(PI, limits={"memory_budget_gb": 0.1})
    with pytest.raises(UsageError, match=r"needs about 0\.28 GB .* has 0\.10 GB") as caught:
        bundle(replace(lock_only, profile=small), tmp_path / "a.tar")
    assert caught.value.hint and not (tmp_path / "a.tar").exists()
    with pytest.raises(UsageError, match="says nothing of its memory"):
        bundle(replace(lock_only, profile=replace(PI, limits={}, ram_gb=None)), tmp_path / "a.tar")
    with pytest.raises(UsageError, match="runs no systemd"):
        arch_of(load_profiles()["mac-mini-m4"])


def test_memory_grows_with_context_and_slots_by_the_files_shape(monkeypatch):
    from edgeft.bench.roofline import Shape
    from edgeft.bench.targets import Target

    shape = Shape(1, 1000, 1, 1, 1, "")
    monkeypatch.setattr("edgeft.deploy.preflight.shape_of", lambda target: shape)
    target = Target("a", "artifact", "gguf", Path("x"), "0", 100_000_000)
    one, many = memory_bytes([target], 2048, 1), memory_bytes([target], 4096, 4)
    assert one["a"]["cache"] == 2_048_000 and many["a"]["cache"] == 8 * one["a"]["cache"]
    assert one["total"] == pytest.approx(150e6 + 100e6 + 2_048_000 + 130e6 + 5e6)


def test_our_own_wheel_installs_and_is_the_same_each_time(tmp_path):
    name, content = packages.own_wheel()
    assert packages.own_wheel() == (name, content)
    (tmp_path / name).write_bytes(content)
    with zipfile.ZipFile(tmp_path / name) as wheel:
        names = set(wheel.namelist())
        assert {
            "edgeft/cli/tco.py",
            "edgeft/deploy/templates/box.sh",
            "edgeft/profiles/boxes/l4.yaml",
            "edgeft/tco/scenarios/edge-fleet.yaml",
        } <= names
        assert not any("__pycache__" in n for n in names)
    place = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-compile",
        "--target",
        place,
        tmp_path / name,
    ]
    subprocess.run(command, check=True, capture_output=True)
    code = "import edgeft.cli, edgeft.serve.run, edgeft.deploy.check, edgeft; print(edgeft.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(place)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip().startswith(str(place))


def test_our_own_wheel_needs_what_the_sources_declare(tmp_path):
    """Not what an editable install of last month declared."""
    name, content = packages.own_wheel()
    (tmp_path / name).write_bytes(content)
    (found,) = distributions(path=[str(tmp_path / name)])
    needs = [Requirement(line) for line in found.requires or []]
    sources = Path(__file__).parent.parent / "pyproject.toml"
    declared = tomllib.loads(sources.read_text())["project"]
    for extra in ("", "gguf", "onnx", "serve", "compress"):
        wanted = declared["optional-dependencies"][extra] if extra else declared["dependencies"]
        got = {str(Requirement(f"{n.name}{n.specifier}")) for n in needs
               if (n.marker.evaluate({"extra": extra}) and extra in str(n.marker) if n.marker else not extra)}  # fmt: skip
        assert got == {str(Requirement(line)) for line in wanted}, extra


def test_a_lock_has_the_hash_of_every_wheel(tmp_path):
    (tmp_path / "Some_Thing-1.2-py3-none-any.whl").write_bytes(b"x")
    line = packages.lock([tmp_path / "Some_Thing-1.2-py3-none-any.whl"]).decode()
    assert line == f"some-thing==1.2 --hash=sha256:{hashlib.sha256(b'x').hexdigest()}\n"
    pins = packages.installed()
    assert "\nnumpy==" in pins and "edgeft" not in pins and "+cpu" not in pins


def test_tags_of_wheels_that_a_box_takes():
    assert packages.platforms("arm64")[0] == "manylinux_2_36_aarch64" and packages.platforms("arm64")[-2:] == [
        "manylinux_2_17_aarch64", "manylinux2014_aarch64"
    ]  # fmt: skip
    assert {"manylinux_2_5_x86_64", "manylinux1_x86_64"} <= set(packages.platforms("amd64"))


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_signatures(lock_only, tmp_path):
    for name in ("mine", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    for out in ("a.tar", "b.tar"):
        bundle(replace(lock_only, key=tmp_path / "mine"), tmp_path / out)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    read = Bundle(tmp_path / "a.tar")
    content, signature = read.read("SHA256SUMS"), read.read("SHA256SUMS.sig")
    verify(content, signature, tmp_path / "mine.pub")
    for wrong in (
        (content + b" ", signature, "mine.pub"),
        (content, signature, "other.pub"),
        (content, None, "mine.pub"),
    ):
        with pytest.raises(GateError):
            verify(wrong[0], wrong[1], tmp_path / wrong[2])
    with pytest.raises(UsageError, match="there is no key"):
        sign(b"", tmp_path / "nothing")


def test_containers_and_kubernetes(lock_only, tmp_path):
    write_folder(lock_only, tmp_path / "box", "me/box:1", k8s=False)
    compose = yaml.safe_load((tmp_path / "box" / "compose.yaml").read_text())["services"]["edgeft"]
    assert (
        compose["image"] == "me/box:1"
        and compose["mem_limit"] == "268m"
        and compose["platform"] == "linux/arm64"
    )
    docker = (tmp_path / "box" / "Dockerfile").read_text()
    assert (
        "FROM python:3.11-slim" in docker
        and "USER 10001" in docker
        and "libgomp1" in docker  # the slim image has none, and llama.cpp's wheel does not bring it
        and '"--port", "8080"' in docker
        and "@" not in docker
    )
    write_folder(lock_only, tmp_path / "box", "me/box:1", k8s=True)  # takes the place of what it wrote itself
    pod = next(yaml.safe_load_all((tmp_path / "box" / "k8s.yaml").read_text()))["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"] == {"memory": "268Mi"} and pod["nodeSelector"] == {
        "kubernetes.io/arch": "arm64"
    }
    assert not (tmp_path / "box" / "compose.yaml").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(UsageError, match="it is left alone"):
        write_folder(lock_only, tmp_path / "full", "x", k8s=False)


def test_the_command(lock_only, tmp_path, capfd):
    place = str(lock_only.artifacts[0])
    out = tmp_path / "box.tar"
    assert (
        run(["bundle", place, "--for", "raspberry-pi-5-8gb", "--lock-only", "--out", str(out), "--quiet"])
        == 0
    )
    assert f"wrote {out}" in capfd.readouterr().out
    for words in (
        [place, "--for", "raspbery"],
        [str(tmp_path / "no"), "--for", "l4"],
        [place, "--for", "mac-mini-m4"],
        [str(out), "--for", "l4"],
    ):
        assert run(["bundle", *words]) == 2, words
        assert len(capfd.readouterr().err.splitlines()) == 2
    assert json.loads(Bundle(out).read("bundle.json"))["packages"] == "lock"
