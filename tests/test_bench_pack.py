"""Reference packs: bound, estimate and interval against the exact KLD on random distributions; then a tiny model's pack."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edgeft.bench import fidelity, pack, pack_compare, pack_estimate, report
from edgeft.bench.compare_items import kld_figure
from edgeft.bench.targets import Target
from edgeft.bench.verdict import verdicts
from edgeft.errors import EnvironmentFault, UsageError
from edgeft.types import BenchReport
from tests.conftest import write_rows

VOCABULARY = 400


def two(seed: int, positions: int, apart: float = 0.4, vocabulary: int = VOCABULARY):
    """(reference scores, artefact scores, right tokens): the second is the first with noise of a deviation."""
    chance = np.random.default_rng(seed)
    p = chance.normal(0.0, 2.0, (positions, vocabulary))
    return (
        p,
        p + apart * chance.normal(size=p.shape),
        chance.integers(0, vocabulary, positions),
    )


def packed(p, right, k=16, samples=16, seed=0):
    return pack_estimate.of_reference(p, right, k, samples, np.random.default_rng(seed))


def exact(p, q, right):
    found = fidelity.distances(fidelity.log_softmax(p), q, list(right))
    return {key: np.array(values) for key, values in found.items()}


def test_a_pack_keeps_the_likeliest_tokens_and_the_tail():
    p, _, right = two(1, 5)
    kept, whole = packed(p, right), np.exp(fidelity.log_softmax(p))
    for row in range(5):
        order = np.argsort(-whole[row])
        assert kept["top_ids"][row].tolist() == order[:16].tolist()
        assert kept["tail_mass"][row] == pytest.approx(whole[row][order[16:]].sum())
        assert not set(kept["tail_ids"][row]) & set(order[:16])
        assert np.exp(kept["tail_logprobs"][row]) == pytest.approx(whole[row][kept["tail_ids"][row]])
        assert np.exp(kept["right_logprobs"][row]) == pytest.approx(whole[row][right[row]])


def test_tail_tokens_are_drawn_by_their_share():
    p, _, _ = two(2, 1, vocabulary=12)
    drawn = packed(p, [0], k=4, samples=40_000)["tail_ids"][0]
    whole = np.exp(fidelity.log_softmax(p[0]))
    tail = np.argsort(-whole)[4:]
    share = whole[tail] / whole[tail].sum()
    found = np.array([(drawn == token).mean() for token in tail])
    assert np.abs(found - share).max() < 5 * np.sqrt(0.25 / 40_000)


@pytest.mark.parametrize("apart", [0.0, 0.1, 1.0, 3.0])
@pytest.mark.parametrize("k", [1, 16, 399])
def test_the_bound_never_exceeds_the_divergence_and_the_estimate_never_falls_below_it(apart, k):
    p, q, right = two(3, 200, apart)
    true = exact(p, q, right)["kld"]
    found = pack_estimate.against(packed(p, right, k), q, right, VOCABULARY)
    assert (found["bound"] <= true + 1e-12).all()
    assert (found["kld"] >= found["bound"]).all()
    if k == 399:  # a tail of one token: nothing is left out
        assert found["bound"] == pytest.approx(true, abs=1e-9)
    if k == 16 and apart == 1.0:
        assert found["bound"].mean() < 0.9 * true.mean()


def test_the_estimate_is_unbiased_and_its_variance_is_what_it_says():
    p, q, right = two(4, 20)
    true = exact(p, q, right)["kld"]
    runs = [pack_estimate.against(packed(p, right, seed=s), q, right, VOCABULARY) for s in range(600)]
    means = np.array([run["kld"] for run in runs])
    error = means.std(0, ddof=1) / np.sqrt(len(runs))
    assert (np.abs(means.mean(0) - true) < 4.5 * error).all()
    assert means.mean() == pytest.approx(true.mean(), abs=4 * means.mean(1).std(ddof=1) / np.sqrt(len(runs)))
    told = np.array([run["variance"] for run in runs]).mean(0)
    assert told.sum() == pytest.approx(means.var(0, ddof=1).sum(), rel=0.1)


def test_the_control_variate_narrows_the_plain_estimate_of_the_same_expectation():
    p, q, right = two(5, 20)
    plain, better = [], []
    for seed in range(200):
        kept = packed(p, right, seed=seed)
        better.append(pack_estimate.against(kept, q, right, VOCABULARY)["kld"])
        lq = fidelity.log_softmax(q)
        top = kept["top_logprobs"]
        head = (np.exp(top) * (top - np.take_along_axis(lq, kept["top_ids"], 1))).sum(1)
        ratio = kept["tail_logprobs"] - np.take_along_axis(lq, kept["tail_ids"], 1)
        plain.append(head + kept["tail_mass"] * ratio.mean(1))
    difference = np.array(plain) - np.array(better)
    assert np.abs(difference.mean(0)).max() < 5 * (difference.std(0) / np.sqrt(200)).max()
    assert np.var(better, axis=0).sum() < 0.5 * np.var(plain, axis=0).sum()


def test_top_token_right_token_and_nll_are_exact():
    p, q, right = two(6, 50)
    found, true = pack_estimate.against(packed(p, right), q, right, VOCABULARY), exact(p, q, right)
    for key in ("same_top1", "right_delta", "nll", "nll_reference"):
        assert found[key] == pytest.approx(true[key]), key


def test_tokens_past_the_reference_vocabulary_are_left_out():
    p, q, right = two(7, 10)
    padded = np.concatenate([q, np.full((10, 3), 9.0)], axis=1)
    kept = packed(p, right)
    same = [pack_estimate.against(kept, scores, right, VOCABULARY)["kld"] for scores in (q, padded)]
    assert same[0] == pytest.approx(same[1])


def test_two_and_four_byte_storage_costs_a_millionth_of_a_nat():
    p, q, right = two(8, 200, vocabulary=2000)
    p[:20, 0] += 40.0  # a token that is all but certain: ln p near 0
    kept = packed(p, right)
    stored = {name: pack.narrow(name, values, 2000) for name, values in kept.items()}
    assert {str(v.dtype) for v in stored.values()} == {"uint16", "float32"}
    a, b = (pack_estimate.against(value, q, right, 2000) for value in (kept, stored))
    assert np.abs(a["kld"] - b["kld"]).max() < 1e-5 and np.abs(a["bound"] - b["bound"]).max() < 1e-5
    assert pack.narrow("top_ids", np.array([70_000]), 80_000).dtype == np.uint32


def rows_of(kept, q, right, per_row: int) -> dict:
    """Figures of positions cut into rows, as `compare_all` returns them; every third is an answer's."""
    found = pack_estimate.against(kept, q, right, q.shape[1])
    cut = {
        key: [values[i : i + per_row].tolist() for i in range(0, len(right), per_row)]
        for key, values in found.items()
    }
    answer = [[int(i % 3 == 0) for i in range(per_row)]] * (len(right) // per_row)
    return {**cut, "answer": answer, "build": "b"}


def test_the_interval_holds_the_exact_mean_of_the_same_rows():
    """How far the figure may be from the full vocabulary's on these very rows: at least 95 of 100 draws."""
    p, q, right = two(9, 60)
    true = exact(p, q, right)["kld"].mean()
    inside = sampling = 0
    for seed in range(200):
        figures = pack_estimate.summarize(rows_of(packed(p, right, seed=seed), q, right, 6), 16, False)["all"]
        inside += figures["kld_ci95"][0] <= true <= figures["kld_ci95"][1]
        sampling += abs(figures["kld_mean"] - true) < 1.96 * figures["kld_sampling_error"]
    assert inside >= 186
    assert 176 <= sampling <= 200  # the sampling error alone: 95 % of 200 is 190, give or take 3


def test_the_interval_holds_the_mean_of_all_rows_that_could_have_been_drawn():
    """Rows differ in how far apart the two are; the interval says where the mean over all rows lies."""
    chance = np.random.default_rng(10)
    pool = []
    for row in range(300):
        p, q, right = two(1000 + row, 4, apart=float(chance.uniform(0.1, 0.8)), vocabulary=60)
        pool.append((p, q, right, exact(p, q, right)["kld"].sum()))
    true = sum(entry[3] for entry in pool) / (4 * len(pool))
    inside = 0
    for draw in range(200):
        picked = [pool[i] for i in chance.integers(0, len(pool), 40)]
        p, q, right = (np.concatenate([entry[i] for entry in picked]) for i in range(3))
        kept = packed(p, right, k=8, samples=8, seed=draw)
        low, high = pack_estimate.summarize(rows_of(kept, q, right, 4), 8, False)["all"]["kld_ci95"]
        inside += low <= true <= high
    assert inside >= 178  # 95 % of 200 is 190; a bootstrap over 40 rows gives somewhat less


def test_without_tail_samples_the_figure_is_a_bound_and_says_so():
    p, q, right = two(11, 60)
    found = pack_estimate.summarize(rows_of(packed(p, right, samples=0), q, right, 6), 0, False)
    assert found["basis"].startswith("lower bound")
    assert found["all"]["kld_mean"] == pytest.approx(found["all"]["kld_lower_bound"])
    assert found["all"]["kld_mean"] < exact(p, q, right)["kld"].mean()


def test_figures_keep_the_keys_of_the_full_vocabulary():
    p, q, right = two(12, 60)
    by_pack = pack_estimate.summarize(rows_of(packed(p, right), q, right, 6), 16, False)
    full = fidelity.summarize(
        {k: v for k, v in rows_of(packed(p, right), q, right, 6).items() if k != "bound"}
    )
    assert set(full) <= set(by_pack) and set(full["all"]) <= set(by_pack["all"])
    assert full["basis"] == "full vocabulary" and by_pack["answer"]["positions"] == 20
    alone = pack_estimate.summarize(rows_of(packed(p, right), q, right, 6), 16, True)
    assert alone["all"] is None and alone["basis"].endswith("answer positions alone")


def figures(mean, interval, bound, basis=pack_estimate.ESTIMATE):
    part = {
        "kld_mean": mean, "kld_ci95": interval, "kld_lower_bound": bound, "kld_lower_bound_ci95": [0.9 * bound, 1.1 * bound],
        "kld_sampling_error": 0.001, "positions": 9, "rows": 3,
    }  # fmt: skip
    return {"all": part, "answer": part, "basis": basis, "logits_build": "b"}


@pytest.mark.parametrize(
    ("fidelity_", "limit", "verdict"),
    [
        (figures(0.10, [0.08, 0.12], 0.09), 0.2, "PASS"),
        (figures(0.10, [0.08, 0.12], 0.09), 0.11, "INCONCLUSIVE"),
        (figures(0.10, [0.08, 0.12], 0.09), 0.05, "FAIL"),
        (figures(0.10, [0.02, 0.30], 0.09), 0.05, "FAIL"),  # by the bound, where the estimate is wide
        (figures(0.09, [0.081, 0.099], 0.09, pack_estimate.BOUND), 0.2, "INCONCLUSIVE"),  # never a PASS
        (figures(0.09, [0.081, 0.099], 0.09, pack_estimate.BOUND), 0.05, "FAIL"),
    ],
)
def test_a_bound_shows_a_fail_and_never_a_pass(fidelity_, limit, verdict):
    for measured in (fidelity_, {**fidelity_, "all": None}):
        (found,) = verdicts({"fidelity": measured}, {"kld_nats": limit})
        assert found["verdict"] == verdict, found


def test_a_report_says_that_a_figure_is_an_estimate():
    made = {"top_k": 64, "tail_samples": 16, "rows_file": "rows.jsonl"}
    estimate = {**figures(0.1, [0.08, 0.12], 0.09), "pack": made}
    bound = {**figures(0.1, [0.08, 0.12], 0.1, pack_estimate.BOUND), "pack": {**made, "tail_samples": 0}}
    value = BenchReport(
        created_at="2026-01-01", environment={}, profile={"id": "box"}, reference=None,
        results=[{"id": "e", "fidelity": estimate}, {"id": "b", "fidelity": {**bound, "all": None}}],
        workload={"rows": 4, "tasks": "rows.jsonl", "max_tokens": 16, "threads": 2},
    )  # fmt: skip
    said = report.notes(value)
    assert any(
        "e: KLD: estimate from a pack" in line and "0.0900 nats (lower bound)" in line for line in said
    )
    assert any("b: KLD: lower bound" in line and "only fail" in line for line in said)
    assert not any("over the full vocabulary" in line for line in said)
    assert pack.note(None) is None and pack.note(figures(0.1, [0, 1], 0.1)) is None


def test_an_estimate_is_not_compared_with_a_full_figure():
    a, b = (
        {"fidelity": figures(m, [m, m], m, basis)}
        for m, basis in ((0.1, "full vocabulary"), (0.2, "estimate"))
    )
    assert kld_figure("all", a, b, True)["verdict"] == "not comparable"
    assert kld_figure("all", a, a, True)["verdict"] == "not told apart"


# --- with a tiny model


@pytest.fixture(scope="module")
def made(tiny_models, tmp_path_factory):
    """(the reference's folder, rows, the pack's folder, what write_pack said)."""
    from tests.conftest import DESK

    home = tmp_path_factory.mktemp("pack")
    rows = write_rows(
        home / "rows.jsonl",
        [json.loads(line) for line in (DESK / "select.jsonl").read_text().splitlines()[:6]],
    )
    said = pack.write_pack(tiny_models["llama"], rows, home / "pack", [None, 4], threads=1)
    return tiny_models["llama"], rows, home / "pack", said


def test_a_pack_says_what_it_was_made_of(made):
    reference, _, folder, said = made
    read = pack.load_pack(folder)
    assert said["reference"]["sha256"] == pack.reference_in(reference).sha256
    assert len(read.facts["rows"]) == 4 and read.facts["positions"] == len(read.arrays["tail_mass"])
    assert said["bytes"] < 700 * said["positions"] + 4096
    ids, kept = read.row(2)
    row = read.facts["rows"][2]
    assert len(ids) == row["tokens"] and len(kept["top_ids"]) == row["tokens"] - row["skip"]
    assert sorted(p.name for p in folder.iterdir()) == ["pack.json", "pack.safetensors"]
    assert (folder / "pack.safetensors").stat().st_mode & 0o044


def test_the_reader_reads_what_safetensors_reads(made):
    load_file = pytest.importorskip("safetensors.numpy").load_file
    folder = made[2]
    ours, theirs = pack.read_arrays(folder / pack.ARRAYS), load_file(folder / pack.ARRAYS)
    assert set(ours) == set(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and (ours[name] == theirs[name]).all()


def test_a_row_is_drawn_the_same_whatever_else_is_packed(made, tmp_path):
    reference, rows, folder, _ = made
    pack.write_pack(reference, rows, tmp_path / "two", [None, 2], threads=1)
    one, two_ = pack.load_pack(folder), pack.load_pack(tmp_path / "two")
    place = {row["id"]: i for i, row in enumerate(one.facts["rows"])}
    shared = [(place[row["id"]], i) for i, row in enumerate(two_.facts["rows"]) if row["id"] in place]
    assert shared
    for a, b in shared:
        assert one.row(a)[0] == two_.row(b)[0]
        if one.facts["rows"][a]["skip"] == two_.facts["rows"][b]["skip"]:
            assert (one.row(a)[1]["tail_ids"] == two_.row(b)[1]["tail_ids"]).all()


def test_a_model_against_its_own_pack_is_at_no_distance(made, tmp_path):
    found = pack_compare.compare_with_pack(
        "transformers", made[0], pack.load_pack(made[2]), 1, tmp_path / "log"
    )
    assert found["all"]["kld_mean"] < 1e-6 and found["all"]["same_top1"] == 1.0
    assert found["answer"]["perplexity"] == pytest.approx(found["answer"]["perplexity_reference"])


@pytest.mark.slow
def test_artefacts_by_pack_and_by_the_full_vocabulary(tiny_dist, tmp_path, monkeypatch):
    """Through logits all positions, through llama.cpp's server the answer's: both hold the exact figure."""
    pytest.importorskip("llama_cpp", reason="needs the extra: compress")
    pytest.importorskip("xllamacpp", reason="needs the extra: gguf")
    dist, rows = tiny_dist / "dist", tiny_dist / "rows.jsonl"
    pack.write_pack(dist, rows, tmp_path / "pack", [None], top_k=8, threads=1)
    read = pack.load_pack(tmp_path / "pack")
    plan = fidelity.prepare(str(dist / "merged"), str(rows), [None], str(tmp_path), 1)
    for engine, name in (("gguf", "gguf-q4_k_m"), ("onnx", "onnx-int8")):
        full = fidelity.summarize(
            fidelity.compare(engine, str(dist / name), plan, str(tmp_path / "reference.npy"), 1)
        )
        by_pack = pack_compare.compare_with_pack(engine, dist / name, read, 1, tmp_path / "log")
        for part in ("all", "answer"):
            have, true = by_pack[part], full[part]
            assert have["positions"] == true["positions"] and have["same_top1"] == true["same_top1"]
            assert have["kld_lower_bound"] <= true["kld_mean"] + 1e-6
            assert abs(have["kld_mean"] - true["kld_mean"]) < 4 * have["kld_sampling_error"] + 1e-6
            assert have["perplexity"] == pytest.approx(true["perplexity"], rel=1e-4)
    target = Target("q", "artifact", "gguf", dist / "gguf-q4_k_m", "x", 1, {"merged_sha256": "another"})
    monkeypatch.setattr(pack_compare, "gives_logits", lambda engine: False)
    served = pack_compare.PackYardstick(tmp_path / "pack", 1).compare(target, tmp_path / "server")
    exact_ = fidelity.summarize(
        fidelity.compare("gguf", str(dist / "gguf-q4_k_m"), plan, str(tmp_path / "reference.npy"), 1)
    )["answer"]
    assert served["of_another_model"] and served["all"] is None and "(server)" in served["logits_build"]
    assert served["answer"]["positions"] == exact_["positions"]
    # Two builds of llama.cpp, which round differently: a share of the figure.
    assert served["answer"]["kld_mean"] == pytest.approx(exact_["kld_mean"], rel=0.25)
    assert served["answer"]["perplexity"] == pytest.approx(exact_["perplexity"], rel=0.02)


# --- what is refused


def test_a_changed_or_foreign_folder_is_no_pack(made, tmp_path):
    import shutil

    with pytest.raises(UsageError, match="is no pack"):
        pack.load_pack(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(made[2], copy)
    whole = (copy / pack.ARRAYS).read_bytes()
    (copy / pack.ARRAYS).write_bytes(whole[:-1] + b"\x01")
    with pytest.raises(UsageError, match="cut or changed"):
        pack.load_pack(copy)
    (copy / pack.FACTS).write_text('{"schema": "edgeft/pack@9"}')
    with pytest.raises(UsageError, match="schema"):
        pack.load_pack(copy)


def test_a_folder_of_something_else_is_not_written_over(made, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="is no pack"):
        pack.write_pack(made[0], made[1], tmp_path, [None])
    assert (tmp_path / "mine.txt").read_text() == "keep"
    with pytest.raises(UsageError, match="says nothing of its error"):
        pack.write_pack(made[0], made[1], tmp_path / "new", [None], tail_samples=1)


def test_rows_that_an_artefact_has_seen_are_refused(made, tmp_path):
    row = pack.load_pack(made[2]).facts["rows"][0]
    target = Target("q", "artifact", "gguf", tmp_path, "x", 1, {}, {"calibrate": [row["row_hash"]]})
    with pytest.raises(UsageError, match="used to calibrate"):
        pack.check(made[2], [target], False)
    assert row["row_hash"] in pack.check(made[2], [target], True)


def test_another_tokenizer_is_told_before_anything_is_loaded(made, tmp_path):
    value = json.loads((made[0] / "tokenizer.json").read_text())
    words = value["model"]["vocab"]
    first, second = list(words)[300:302]
    words[first], words[second] = words[second], words[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(EnvironmentFault, match="another tokenizer"):
        pack_compare.compare_with_pack("onnx", tmp_path, pack.load_pack(made[2]), 1, tmp_path / "log")


def test_a_smaller_vocabulary_is_refused(made):
    read = pack.load_pack(made[2])
    _, kept = read.row(0)
    with pytest.raises(EnvironmentFault, match="knows 5 tokens"):
        next(pack_compare.figures(read, kept, np.zeros((3, 5)), [0, 1, 2]))


def test_the_pack_is_part_of_what_a_run_depends_on(made, tmp_path):
    from edgeft.bench import Workload

    keys = [Workload(tasks=made[1], pack=folder).key() for folder in (None, made[2])]
    assert keys[0]["pack"] is None and len(keys[1]["pack"]) == 64
    json.dumps(keys)
