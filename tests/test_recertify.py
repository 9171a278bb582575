"""The way back to a certificate: sampling, answering, grading and issuing against a stand-in server on loopback."""

from __future__ import annotations

import json
import random
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from edgeft.cli import run as cli
from edgeft.errors import EnvironmentFault, Inconclusive, UsageError
from edgeft.router import Options, decide, fit, load_policy
from edgeft.router.grading import issue, judge, marks
from edgeft.router.recertify import address_of, eligible, read_lines, sample
from tests.test_router import PAIR, WORDS, by_word, write_report


class Upstream:
    """Candidates and judges by model name: weak fails on 'refund', strong never, `judge` knows, `blind` likes everything."""

    def __init__(self) -> None:
        self.asked: list[dict] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body)
                if body["model"] == "down":
                    return self.send_error(503)
                chunk = {"choices": [{"delta": {"content": outer.reply(body)}, "finish_reason": "stop"}]}
                usage = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 1}}
                data = "".join(f"data: {json.dumps(c)}\n\n" for c in (chunk, usage)) + "data: [DONE]\n\n"
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data.encode())
                return None

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reply(self, body: dict) -> str:
        text = body["messages"][-1]["content"]
        if body["model"] == "judge":
            return " ".join(f"{part[0]}={10 if 'right' in part else 0}" for part in text.split("Answer ")[1:])
        if body["model"] == "blind":
            return "a=10 b=10"
        return "wrong" if body["model"] == "weak" and "refund" in text else "right"


@pytest.fixture
def upstream():
    made = Upstream()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted")
    fit(
        [write_report(folder / "one", by_word(600, 1))],
        PAIR,
        folder / "policy",
        Options(privacy={"patterns": ["email"]}),
    )
    place = folder / "policy" / "policy.json"
    stored = json.loads(place.read_text())
    grid = stored["fitted"]["grid"]
    stored["fitted"]["grid"] = [
        *grid[:-1:10],
        grid[-1],
    ]  # every rule is tried by `decide` on every row: fewer will do here
    place.write_text(json.dumps(stored))
    return folder / "policy"


@pytest.fixture
def policy(fitted, tmp_path):
    import shutil

    return shutil.copytree(fitted, tmp_path / "policy")


def traffic(path, n: int, *more: dict):
    chance = random.Random(5)
    lines = [{"request": " ".join(chance.choices(WORDS, k=9))} for _ in range(n)]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *more]))
    return path


def grade(folder, count: int, skip: int | None = None, score=lambda text: float(text == "right")) -> None:
    """What a person would fill in, from the top."""
    lines = read_lines(folder / "to_grade.jsonl")
    for place, line in enumerate(lines[:count]):
        if place != skip:
            line["scores"] = {letter: score(text) for letter, text in line["answers"].items()}
    (folder / "to_grade.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def drawn(policy, tmp_path, upstream, n: int = 300):
    places = {name: (upstream.url, name) for name in PAIR}
    sample(load_policy(policy), traffic(tmp_path / "log.jsonl", 400), tmp_path / "grading", places, n)
    return tmp_path / "grading"


def test_only_what_was_logged_with_its_text_is_new_and_may_be_answered_by_all_is_drawn(
    policy, tmp_path, upstream
):
    loaded = load_policy(policy)
    seen = by_word(600, 1)["weak"][0]["request"]
    log = traffic(
        tmp_path / "log.jsonl", 30, {"choice": "weak"}, {"request": "card of anna@example.com"}, {"request": "top secret", "private": True},
        {"messages": [{"role": "system", "content": "short"}, {"role": "user", "content": "my card"}]},
    )  # fmt: skip
    remote = [loaded.policy.candidates[0], {**loaded.policy.candidates[1], "remote": True}]
    lines, counts = eligible(replace(loaded, policy=replace(loaded.policy, candidates=remote)), log)
    assert len(lines) == 31 and counts == {"lines": 34, "no_text": 1, "seen": 0, "removed": 2}
    at_home, _ = eligible(loaded, log)  # nobody is remote: private requests stay in the house and count
    assert sum(line["private"] for line in at_home) == 2
    from hashlib import sha256

    held = {**loaded.policy.seen_rows, "certify": [sha256(seen.encode()).hexdigest()]}
    again = replace(loaded, policy=replace(loaded.policy, seen_rows=held))
    assert eligible(again, traffic(tmp_path / "seen.jsonl", 1, {"request": seen}))[1]["seen"] == 1
    (tmp_path / "none.jsonl").write_text('{"choice": "weak"}\n')
    with pytest.raises(UsageError, match="1 hold no text"):
        sample(loaded, tmp_path / "none.jsonl", tmp_path / "g", {n: (upstream.url, n) for n in PAIR})
    with pytest.raises(UsageError, match="nobody says where 'strong'"):
        sample(loaded, log, tmp_path / "g", {"weak": (upstream.url, "weak")})


def test_answers_are_blind_kept_and_asked_once(policy, tmp_path, upstream):
    log = traffic(tmp_path / "log.jsonl", 40, {"request": "same words"}, {"request": "same words"})
    places = {name: (upstream.url, name) for name in PAIR}
    counts = sample(load_policy(policy), log, tmp_path / "g", places, 42)
    assert counts["drawn"] == 42 and counts["different_texts"] == 41 and len(upstream.asked) == 82
    assert all(body["temperature"] == 0 for body in upstream.asked)
    lines = read_lines(tmp_path / "g" / "to_grade.jsonl")
    assert set(lines[0]) == {"id", "request", "answers", "scores"} and "strong" not in json.dumps(lines)
    wrong = {k for line in lines for k, v in line["answers"].items() if v == "wrong"}
    assert wrong == {"a", "b"}, "the letter must not tell who it is"
    sample(load_policy(policy), log, tmp_path / "g", places, 42)
    assert len(upstream.asked) == 82, "a second run asks nobody again"
    grade(tmp_path / "g", 1)
    with pytest.raises(UsageError, match="holds grades already"):
        sample(load_policy(policy), log, tmp_path / "g", places, 42)
    with pytest.raises(EnvironmentFault, match="answered 503"):
        sample(load_policy(policy), log, tmp_path / "h", {**places, "strong": (upstream.url, "down")}, 2)


def test_a_persons_grades_carry_a_certificate(policy, tmp_path, upstream):
    folder = drawn(policy, tmp_path, upstream)
    with pytest.raises(UsageError, match=r"nothing in .* is graded"):
        issue(policy, folder)
    grade(folder, 250)
    found = issue(policy, folder)
    assert found["n"] == 250 and found["judge"] is None and found["recertified"]["drawn"] == 300
    assert found["share_kept"] > 0 and found["bound"] <= 0.05
    loaded = load_policy(policy)
    assert loaded.certificate and loaded.certificate["void"] is None
    assert (
        decide(loaded, "card limit").certified and decide(loaded, "refund refund refund").choice == "strong"
    )
    with pytest.raises(UsageError, match="used to certify already"):
        issue(policy, folder)


def test_what_was_passed_over_counts_as_lost(policy, tmp_path, upstream):
    folder = drawn(policy, tmp_path, upstream)
    grade(folder, 200, skip=100)
    assert issue(policy, folder)["recertified"]["passed_over_counted_as_lost"] == 1


def test_a_judges_misses_are_bounded_by_a_hundred_human_grades(policy, tmp_path, upstream):
    folder = drawn(policy, tmp_path, upstream)
    judge(folder, (upstream.url, "judge"), f"openai:{upstream.url}#judge")
    grade(folder, 99)
    with pytest.raises(UsageError, match="100 at least"):
        issue(policy, folder, alpha=0.1)
    grade(folder, 120)
    found = issue(policy, folder, alpha=0.1)
    assert found["n"] == 300 and found["judge"] == {
        "n": 120,
        "missed": 0,
        "bound": pytest.approx(0.0246, abs=1e-3),
    }
    assert found["bound"] <= 0.1


def test_a_judge_that_likes_everything_carries_nothing(policy, tmp_path, upstream):
    folder = drawn(policy, tmp_path, upstream)
    before = (policy / "policy.json").read_bytes()
    judge(folder, (upstream.url, "blind"), f"openai:{upstream.url}#blind")
    grade(folder, 120)
    with pytest.raises(Inconclusive, match="the judge may miss losses"):
        issue(policy, folder)
    assert (policy / "policy.json").read_bytes() == before and not (policy / "certificate.json").exists()


def test_a_remote_judge_never_sees_a_private_request(policy, tmp_path, upstream):
    log = traffic(tmp_path / "log.jsonl", 20, {"request": "mail to anna@example.com"})
    sample(load_policy(policy), log, tmp_path / "g", {name: (upstream.url, name) for name in PAIR}, 21)
    upstream.asked.clear()
    counts = judge(tmp_path / "g", (upstream.url, "judge"), "openai:https://api.example.com#judge")
    assert counts["private_kept_back"] == 1 and len(upstream.asked) == 20
    assert "anna@" not in json.dumps(upstream.asked)
    judge(tmp_path / "g", (upstream.url, "judge"), f"openai:{upstream.url}#judge")
    assert "anna@" in json.dumps(upstream.asked), "a judge in the house may"


def test_marks_are_read_whole_or_not_at_all():
    assert marks("a=7 b=10", "ab") == {"a": 0.7, "b": 1.0}
    assert marks("A: 7.5, b: 3.", "ab") == {"a": 0.75, "b": 0.3}
    for reply in ("a=7", "a=7 b=8 a=9", "both are fine", "a=7 b=3 c=1", "a=11 b=2"):
        assert set(marks(reply, "ab").values()) == {None}, reply


def test_another_artefact_is_certified_anew_from_the_command_line(policy, tmp_path, upstream, capsys):
    from tests.test_bundle import artifact

    folder, log = tmp_path / "grading", traffic(tmp_path / "log.jsonl", 400)
    words = [
        "route",
        "recertify",
        "sample",
        str(policy),
        str(log),
        "--out",
        str(folder),
        "--n",
        "200",
        "--server",
        upstream.url,
    ]
    assert cli(words) == 0
    grade(folder, 200)
    new = artifact(tmp_path / "new")
    assert cli(["route", "recertify", "issue", str(policy), str(folder), "--artifact", f"weak={new}"]) == 0
    assert "certified on 200 rows" in capsys.readouterr().out
    loaded = load_policy(policy)
    weak = json.loads((new / "artifact.json").read_text())
    assert loaded.candidates["weak"]["artifact_sha256"] == loaded.certificate["artifacts"]["weak"] != "a" * 64
    assert loaded.candidates["weak"]["engine"] == weak["engine"] and loaded.certificate["void"] is None
    assert cli(["route", "recertify", "issue", str(policy), str(folder), "--artifact", "weaker=x"]) == 2
    assert "Did you mean 'weak'" in capsys.readouterr().err
    assert cli(["route", "recertify", "judge", str(folder), "--model", "gpt"]) == 2
    with pytest.raises(UsageError, match="is not URL#NAME"):
        address_of("127.0.0.1:80#x")
