"""The router: features, ridge, fitting on synthetic reports whose truth is known, refusals."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from edgeft.cli import run as cli
from edgeft.errors import UsageError
from edgeft.router import Options, decide, evaluate, fit, load_policy, ridge
from edgeft.router.features import request_text, vector
from edgeft.router.figures import choose_threshold, figures, verdict
from edgeft.router.fitting import halves
from edgeft.types import BenchReport

PAIR = ["weak", "strong"]
WORDS = [
    "card",
    "payment",
    "transfer",
    "refund",
    "limit",
    "address",
    "app",
    "login",
    "fee",
    "cash",
    "account",
    "statement",
    "top",
    "order",
    "bank",
]


def write_report(folder: Path, items: dict[str, list[dict]], sha: str = "a" * 64, **changes) -> Path:
    """A report as `edgeft bench` writes it, holding what the router reads. `items`: model id -> lines."""
    folder.mkdir(parents=True)
    results = [
        {"id": name, "kind": "artifact", "engine": "gguf", "path": f"/nowhere/{name}", "artifact_sha256": sha, "price": None}
        for name in items
    ]  # fmt: skip
    report = BenchReport("2026-01-01T00:00:00+00:00", {}, {}, {}, results, None, {})
    replace(report, **changes).save(folder / "report.json")
    lines = [
        {
            "model_id": name,
            "artifact_sha256": sha,
            "prompt_tokens": 10,
            "output_tokens": 2,
            "e2e_s": 0.1,
            **line,
        }
        for name, own in items.items()
        for line in own
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def line(index: int, request: str, score: float | None, seed: int = 0) -> dict:
    digest = hashlib.sha256(f"{seed}-{index}-{request}".encode()).hexdigest()[:16]
    return {
        "item_id": f"item-{seed}-{index}",
        "prompt_hash": digest,
        "row_hash": f"row{digest}",
        "request": request,
        "output": "x",
        "correct": None if score is None else score == 1.0,
        "score": score,
    }


def synthetic(n: int, seed: int, p_weak, p_strong) -> dict[str, list[dict]]:
    """n items of random words; p_*(words) is the chance that a model is right."""
    chance = random.Random(seed)
    weak, strong = [], []
    for index in range(n):
        words = chance.choices(WORDS, k=8)
        request = " ".join(words)
        weak.append(line(index, request, float(chance.random() < p_weak(words)), seed))
        strong.append(line(index, request, float(chance.random() < p_strong(words)), seed))
    return {"weak": weak, "strong": strong}


def by_word(n: int, seed: int) -> dict[str, list[dict]]:
    """The weak model fails where 'refund' stands, and nowhere else."""
    return synthetic(n, seed, lambda words: 0.05 if "refund" in words else 0.95, lambda _: 0.95)


def noise(n: int, seed: int) -> dict[str, list[dict]]:
    return synthetic(n, seed, lambda _: 0.5, lambda _: 0.8)


def test_the_short_way_to_words_is_the_long_one():
    from edgeft.router.features import spaced

    for text in ("", "a_b 12, x-y\n\tz's \x1c\x1f q", "".join(map(chr, range(128))) * 2):
        short, long = spaced(text), spaced(text + "\u2003")
        assert list(filter(None, short.split(b"\0"))) == list(filter(None, long.split(b"\0")))


def features_by_definition(text: str) -> tuple[list[int], list[float]]:
    """features.SPEC, word by word: what the weights of every policy on disk were fitted on."""
    wrap, base, factor = (1 << 64) - 1, 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93
    mixed = []
    for word in re.findall(r"\w+", text[:2000].lower()):
        value = sum(byte * pow(base, place, 1 << 64) for place, byte in enumerate(word.encode())) & wrap
        mixed.append(value ^ value >> 32)
    hashed = [m * factor & wrap for m in mixed] + [
        (a * factor + b) * factor & wrap for a, b in pairwise(mixed)
    ]
    net: Counter[int] = Counter()
    for h in hashed:
        net[h >> 51 & 4095] += -1 if h >> 63 else 1
    columns = sorted(column for column, count in net.items() if count)
    values = [math.copysign(1 + math.log(abs(net[c])), net[c]) for c in columns]
    length = math.sqrt(sum(v * v for v in values))
    return columns, [v / length for v in values]


def test_features_are_those_of_the_definition():
    from edgeft.router.features import arrays

    chance = random.Random(3)
    letters = "abAB_019 \t\n\0\x1c\x7f.,-'éßÄ\u0130\u212aΩ漢\ud800\u00a0"
    texts = ["", " !?", "a", "\u212aelvin", "a " * 3000, "x" * 3000, "one two one two one two"]
    texts += ["\u0130" * 2000, "\U00020000 " * 1500, "\U00020000" * 2000]  # the most bytes
    texts += ["".join(chance.choices(letters, k=chance.randrange(80))) for _ in range(300)]
    texts += [" ".join(chance.choices(WORDS, k=400)) for _ in range(20)]
    seen = hashlib.sha256()
    for text in texts:
        (columns, values), (known, right) = arrays(text), features_by_definition(text)
        assert columns.tolist() == known, repr(text)
        np.testing.assert_allclose(values, right, rtol=1e-12)
        seen.update(columns.astype(np.int64).tobytes())
    assert seen.hexdigest() == "2619dbc06be8fb6fadbd7758c2c78ca648e72baa2552a470925fbc0f5fc211ea", (
        "hashes of another edgeft: its policies would be misread"
    )


def test_features_are_the_same_in_another_process_and_of_length_one():
    text = "I want my REFUND, not a card; überweisung 42 refund"
    program = f"from edgeft.router.features import vector; import json; print(json.dumps(vector({text!r})))"
    out = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        env={"PYTHONHASHSEED": "77"},
        text=True,
    ).stdout
    assert {int(k): v for k, v in json.loads(out).items()} == vector(text)
    assert sum(v * v for v in vector(text).values()) == pytest.approx(1.0)
    assert vector("a b") != vector("b a"), "the order of words is seen"
    assert vector("") == vector(" !?") == {}


def test_request_text_is_the_last_user_message():
    parts = [
        {"type": "text", "text": "two"},
        {"type": "image_url", "image_url": {}},
        {"type": "text", "text": "three"},
    ]
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "one"},
        {"role": "user", "content": parts},
    ]
    assert request_text([*messages, {"role": "assistant", "content": None}]) == "two\nthree"
    assert request_text("plain") == "plain"
    assert request_text([{"role": "system", "content": "s"}]) == ""


@pytest.mark.parametrize("shape", [(12, 30), (40, 6)], ids=["dual", "primal"])
def test_ridge_equals_a_slow_solve_and_a_refit_without_each_row(shape):
    chance = np.random.default_rng(1)
    x, y = chance.normal(size=shape), chance.normal(size=shape[0]) + 3

    def slow(x, y, strength):
        """The normal equations with an unpenalised column of ones."""
        ones = np.column_stack([x, np.ones(len(y))])
        penalty = strength * np.eye(ones.shape[1])
        penalty[-1, -1] = 0
        return np.linalg.solve(ones.T @ ones + penalty, ones.T @ y)

    def left_out(strength):
        errors = []
        for i in range(len(y)):
            rest = np.arange(len(y)) != i
            solved = slow(x[rest], y[rest], strength)
            errors.append((y[i] - x[i] @ solved[:-1] - solved[-1]) ** 2)
        return np.mean(errors)

    for strength in (0.1, 1.0, 50.0):
        fitted = ridge.fit(x, y, (strength,))
        solved = slow(x, y, strength)
        np.testing.assert_allclose([*fitted.weights, fitted.bias], solved, atol=1e-9)
        assert fitted.loo_mse == pytest.approx(left_out(strength))
    chosen = ridge.fit(x, y)
    assert chosen.strength == min(ridge.STRENGTHS, key=left_out)


def test_threshold_is_the_smallest_share_within_the_loss():
    scores = np.array([0.9, 0.8, 0.8, 0.1, 0.0])
    weak, strong = np.array([0, 0, 0, 1, 1.0]), np.array([1, 1, 1, 1, 1.0])
    assert choose_threshold(scores, weak, strong, 0.0) == pytest.approx(0.45)
    assert choose_threshold(scores, weak, strong, 0.3) == pytest.approx(0.45), "equal scores go together"
    assert choose_threshold(scores, weak, strong, 0.6) == 2.0
    assert choose_threshold(-scores, weak, strong, 0.0) == -2.0
    assert choose_threshold(scores, strong, weak, 0.0) == 2.0, "a strong one that is worse gets nothing"


def test_figures_against_plain_sums():
    chance = np.random.default_rng(2)
    weak, strong, sent = (chance.integers(0, 2, 50) for _ in range(3))
    found = figures(weak.astype(float), strong.astype(float), sent.astype(bool))
    policy = np.where(sent, strong, weak).mean()
    share = sent.mean()
    assert found["policy"]["mean"] == pytest.approx(policy)
    assert found["random_same_share"] == pytest.approx((1 - share) * weak.mean() + share * strong.mean())
    assert found["gain_over_random"]["mean"] == pytest.approx(policy - found["random_same_share"])
    assert found["oracle"] == np.maximum(weak, strong).mean()
    low, high = found["gain_over_random"]["ci95"]
    assert low < found["gain_over_random"]["mean"] < high


def test_a_predictable_gain_is_found_and_holds_on_new_items(tmp_path):
    policy = fit([write_report(tmp_path / "one", by_word(600, 1))], PAIR, tmp_path / "policy")
    found = policy.policy.fitted
    assert found["worth_it"] and found["verdict"].startswith("Worth it")
    assert found["figures"]["gain_over_random"]["ci95"][0] > 0.05
    assert found["n_fit"] + found["n_threshold"] == 600
    assert decide(policy, "refund my card please").choice == "strong"
    assert decide(policy, "card limit address").choice == "weak"

    later = evaluate(policy, [write_report(tmp_path / "two", by_word(400, 2))])
    assert later["worth_it"] and later["figures"]["n"] == 400
    assert later["figures"]["policy"]["mean"] > later["figures"]["random_same_share"] + 0.05
    assert later["figures"]["always_strong"]["mean"] - later["figures"]["policy"]["mean"] < 0.05


def test_noise_is_not_worth_it(tmp_path):
    """A 95 % interval lets 2.5 % of noise through: two of ten would happen once in fifty runs of other seeds."""
    said = []
    for seed in range(10):
        report = write_report(tmp_path / f"report-{seed}", noise(200, seed))
        said.append(fit([report], PAIR, tmp_path / f"policy-{seed}").policy.fitted)
    assert sum(not fitted["worth_it"] for fitted in said) >= 9
    assert all(fitted["verdict"].startswith("Worth it") == fitted["worth_it"] for fitted in said)


def test_noise_is_called_worth_it_no_more_often_than_its_interval_allows():
    """The head's scores are random here: 2.5 % of the verdicts may be wrong, and the bound leaves room for chance."""
    chance, wrong = np.random.default_rng(5), 0
    for _ in range(100):
        weak, strong = (chance.random(150) < 0.5).astype(float), (chance.random(150) < 0.8).astype(float)
        wrong += verdict(figures(weak, strong, chance.random(150) < 0.5), 0.01)[0]
    assert wrong <= 8


def test_one_class_only_is_a_policy_that_says_so(tmp_path):
    same = {name: [line(i, f"request {i}", 1.0) for i in range(30)] for name in ("weak", "strong")}
    policy = fit([write_report(tmp_path / "same", same)], PAIR, tmp_path / "a")
    assert decide(policy, "request 3").choice == "weak" and "every request" in decide(policy, "x").reason
    assert "no item of 15 is scored differently" in policy.policy.fitted["verdict"]

    better = {
        "weak": [line(i, f"r {i}", 0.0) for i in range(30)],
        "strong": [line(i, f"r {i}", 1.0) for i in range(30)],
    }
    policy = fit([write_report(tmp_path / "better", better)], PAIR, tmp_path / "b")
    assert decide(policy, "request 3").choice == "strong"
    assert not policy.policy.fitted["worth_it"] and "use strong alone" in policy.policy.fitted["verdict"]


def test_equal_texts_stay_in_one_half(tmp_path):
    from edgeft.router.reports import join

    lines = [line(i, f"request {i % 10}", float(i % 2)) for i in range(60)]
    joined = join([write_report(tmp_path / "r", {"weak": lines, "strong": lines})], PAIR)
    one, two = halves(joined.items)
    assert not {p.request for p in one} & {p.request for p in two}
    assert len(one) + len(two) == 60 and min(len(one), len(two)) > 20


def test_a_policy_reads_back_as_it_was_fitted(tmp_path):
    report = write_report(tmp_path / "r", by_word(100, 3))
    made = fit([report], PAIR, tmp_path / "policy")
    assert (tmp_path / "policy" / "weights.safetensors").stat().st_mode & 0o044, "a service is another user"
    read = load_policy(tmp_path / "policy")
    assert read == made
    assert (
        read.candidates["weak"]["artifact_sha256"] == "a" * 64
        and read.candidates["weak"]["mean_prompt_tokens"] == 10
    )
    assert len(read.policy.seen_rows["fit router"]) == 200, "the hashes of prompts and rows"
    assert sorted(p.name for p in (tmp_path / "policy").iterdir()) == ["policy.json", "weights.safetensors"]
    fit([report], PAIR, tmp_path / "policy")  # over an old policy
    assert decide(load_policy(tmp_path / "policy"), "refund now") == decide(made, "refund now")


def test_damaged_policies_are_refused(tmp_path):
    fit([write_report(tmp_path / "r", by_word(60, 3))], PAIR, tmp_path / "policy")
    weights = tmp_path / "policy" / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UsageError, match=r"weights\.safetensors is missing or not the one"):
        load_policy(tmp_path / "policy")
    weights.write_bytes(whole)
    manifest = tmp_path / "policy" / "policy.json"
    manifest.write_text(manifest.read_text().replace('"dimensions": 4096', '"dimensions": 8'))
    with pytest.raises(UsageError, match="features"):
        load_policy(tmp_path / "policy")
    with pytest.raises(UsageError, match=r"no policy\.json"):
        load_policy(tmp_path)


def test_refusals_name_what_is_wrong(tmp_path):
    report = write_report(tmp_path / "r", by_word(60, 3))
    out = tmp_path / "policy"
    with pytest.raises(UsageError, match=r"'stron' is not known\. Did you mean 'strong'"):
        fit([report], ["weak", "stron"], out)
    with pytest.raises(UsageError, match="two or more different candidates"):
        fit([report], ["weak", "weak"], out)
    with pytest.raises(UsageError, match="19 items were answered by both"):
        fit([write_report(tmp_path / "few", by_word(19, 3))], PAIR, out)
    blank = {name: [line(i, "text", None) for i in range(30)] for name in ("weak", "strong")}
    with pytest.raises(UsageError, match=r"none of the 30 items .* has a score"):
        fit([write_report(tmp_path / "blank", blank)], PAIR, out)
    with pytest.raises(UsageError, match=r"no report\.json"):
        fit([tmp_path], PAIR, out)
    with pytest.raises(UsageError, match="twice"):
        fit([report, report], PAIR, out)
    other = write_report(tmp_path / "other", by_word(60, 4), sha="b" * 64)
    with pytest.raises(UsageError, match="not the same artefact"):
        fit([report, other], PAIR, out)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "report.json").write_text((report / "report.json").read_text())
    (tmp_path / "broken" / "items.jsonl").write_text('{"item_id": 1}\n')
    with pytest.raises(UsageError, match="line 1 is not an item"):
        fit([tmp_path / "broken"], PAIR, out)
    assert not out.exists(), "nothing half-written"
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    with pytest.raises(UsageError, match="is no policy; it is left alone"):
        fit([report], PAIR, precious)
    assert (precious / "thesis.txt").read_text() == "years"


def test_unscored_items_are_left_out_and_counted(tmp_path):
    items = by_word(60, 3)
    items["weak"][0]["score"] = None
    policy = fit([write_report(tmp_path / "r", items)], PAIR, tmp_path / "policy").policy
    assert policy.fitted["n_unscored"] == 1 and policy.fitted["n_fit"] + policy.fitted["n_threshold"] == 59


def test_evaluate_refuses_items_that_it_has_seen_and_other_artefacts(tmp_path):
    policy = fit([write_report(tmp_path / "r", by_word(60, 3))], PAIR, tmp_path / "policy")
    mixed = by_word(60, 4)
    old = by_word(60, 3)
    for name in mixed:
        mixed[name].append(old[name][7])
    with pytest.raises(
        UsageError, match=r"1 item\(s\) were used to fit router already \(first: 'item-3-7'\)"
    ):
        evaluate(policy, [write_report(tmp_path / "mixed", mixed)])
    with pytest.raises(UsageError, match="not the artefact"):
        evaluate(policy, [write_report(tmp_path / "other", by_word(60, 5), sha="b" * 64)])


def test_rows_that_training_saw_are_refused(tmp_path):
    items = by_word(60, 3)
    folder = tmp_path / "weak-artefact"
    folder.mkdir()
    manifest = {
        "id": "weak", "format": "gguf", "variant": "q", "engine": "gguf", "model_name": "m", "created_at": "", "made_from": {},
        "recipe": {}, "recipe_sha256": "", "versions": {}, "files": {}, "size_bytes": 0, "parameters": 1, "bits_per_weight": 4.0,
        "tensor_types": {}, "fallback_share": None, "seen_rows": {"train": [items["weak"][5]["row_hash"]]}, "cost": {},
        "schema": "edgeft/artifact@1",
    }  # fmt: skip
    (folder / "artifact.json").write_text(json.dumps(manifest))
    report = write_report(tmp_path / "r", items)
    stored = json.loads((report / "report.json").read_text())
    stored["results"][0]["path"] = str(folder)
    (report / "report.json").write_text(json.dumps(stored))
    with pytest.raises(UsageError, match=r"'item-3-5'.*cannot be used to fit a router"):
        fit([report], PAIR, tmp_path / "policy")
    policy = fit([report], PAIR, tmp_path / "policy", Options(allow_seen_rows=True))
    assert "train" in policy.policy.seen_rows


def test_cli_prints_figures_and_json(tmp_path, capsys, monkeypatch):
    from edgeft.console import output

    monkeypatch.setattr(output, "json", False)
    report = write_report(tmp_path / "r", by_word(300, 1))
    policy = str(tmp_path / "policy")
    assert cli(["route", "fit", str(report), "--weak", "weak", "--strong", "strong", "--out", policy]) == 0
    shown = capsys.readouterr().out
    assert "always strong: strong" in shown and "Worth it:" in shown
    assert cli(["route", "decide", policy, "a refund", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["choice"] == "strong"
    other = write_report(tmp_path / "r2", by_word(300, 2))
    assert cli(["route", "eval", policy, str(other), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["worth_it"] is True
    assert cli(["route", "eval", policy, str(report)]) == 2
    problem = capsys.readouterr().err.splitlines()
    assert len(problem) == 2 and problem[0].startswith("Error: 300 item(s) were used to fit router already")


def table(path: Path, n: int, seed: int) -> Path:
    """Three candidates: the cheap one fails on refunds, the middle one on transfers and refunds' half, the dear one seldom."""
    chance = random.Random(seed)
    rows = []
    for index in range(n):
        words = chance.choices(WORDS, k=6)
        p_cheap = 0.1 if "refund" in words or "transfer" in words else 0.9
        p_middle = 0.1 if "transfer" in words else 0.92
        rows.append(
            {
                "id": index, "request": " ".join(words), "group": words[0],
                "openai:http://127.0.0.1:1#cheap:score": int(chance.random() < p_cheap),
                "litellm:mid:score": int(chance.random() < p_middle), "litellm:dear:score": int(chance.random() < 0.95),
                "litellm:mid:output_tokens": 20 + 30 * ("fee" in words), "litellm:dear:output_tokens": 40,
                "openai:http://127.0.0.1:1#cheap:output_tokens": 25,
            }
        )  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_three_candidates_from_a_table(tmp_path, capsys):
    names = ["litellm:dear", "openai:http://127.0.0.1:1#cheap", "litellm:mid"]
    rows, policy = table(tmp_path / "rows.jsonl", 900, 1), str(tmp_path / "policy")
    arguments = [
        "route",
        "fit",
        str(rows),
        "--out",
        policy,
        "--max-loss",
        "4",
        *(w for n in names for w in ("--candidate", n)),
    ]
    prices = ["--price", "litellm:mid=0.5,1", "--price", "litellm:dear=5,20"]
    assert cli([*arguments, *prices]) == 0
    assert "energy of local candidates: not given, counted as 0 (assumed)" in capsys.readouterr().err
    made = load_policy(Path(policy))
    assert list(made.candidates) == ["openai:http://127.0.0.1:1#cheap", "litellm:mid", "litellm:dear"], (
        "by cost, the best last"
    )
    assert [c["remote"] for c in made.policy.candidates] == [False, True, True] and made.policy.cost[
        "unit"
    ] == "usd"
    chance, plain = random.Random(5), [word for word in WORDS if word not in ("refund", "transfer")]

    def chosen(word: str) -> str:
        """Where most of 60 texts with this word go."""
        texts = [" ".join([word, *chance.choices(plain, k=5)]) for _ in range(60)]
        return Counter(decide(made, text).choice for text in texts).most_common(1)[0][0].rpartition(":")[2]

    assert list(map(chosen, ("card", "refund", "transfer"))) == ["1#cheap", "mid", "dear"]
    short, long = (decide(made, f"card limit {word}").costs["litellm:mid"] for word in ("app", "fee"))
    assert long > 1.5 * short, "the output's length is predicted"
    assert cli(["route", "eval", policy, str(table(tmp_path / "other.jsonl", 400, 2)), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["worth_it"]
        and found["cost_per_request"]["policy"] < 0.5 * found["cost_per_request"]["always"]["litellm:dear"]
    )
    assert found["frontier"]["aiq"] > found["frontier"]["aiq_of_singles"] and set(found["groups"]) == set(
        WORDS
    )
    assert found["near_duplicates"]["n"] == 0
    assert cli([*arguments, "--price", "litellm:mid=0.5"]) == 2
    assert "is not ID=IN,OUT" in capsys.readouterr().err
    assert cli([*arguments, "--price", "litellm:midd=0.5,1"]) == 2
    assert "Did you mean 'litellm:mid'" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"the price of 'litellm:dear', 'litellm:mid' is not known"):
        fit([rows], names, tmp_path / "p", Options(unit="usd"))
    settings = tmp_path / "settings.yaml"
    settings.write_text("privacy:\n  paterns: [email]\n")
    assert cli([*arguments, "--settings", str(settings)]) == 2
    assert "'paterns' is not known. Did you mean 'patterns'" in capsys.readouterr().err


def test_bad_tables_are_refused_by_line(tmp_path):
    for text, message in (
        ('{"request": "a", "x:score": 2, "y:score": 0}', "line 1: x:score is 2"),
        ('{"request": "a", "x:score": "good", "y:score": 0}', "line 1: x:score is no number"),
        ('{"prompt": "a", "x:score": 1, "y:score": 0}', "line 1: a table needs the column 'request'"),
        ("{", "line 1 is not an item"),
    ):
        path = tmp_path / "t.jsonl"
        path.write_text(text + "\n")
        with pytest.raises(UsageError, match=message):
            fit([path], ["x", "y"], tmp_path / "policy")
    other = tmp_path / "t.txt"
    other.write_text("x")
    with pytest.raises(UsageError, match=r"neither \.csv nor \.jsonl"):
        fit([other], ["x", "y"], tmp_path / "policy")
