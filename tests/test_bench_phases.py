"""The phases of a bench, each against a stand-in whose times are known."""

from __future__ import annotations

import itertools
import json
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edgeft.bench import energy, load, paired, speed, speed_figures, verdict
from edgeft.bench.journal import Journal
from edgeft.bench.score import check, score
from edgeft.bench.targets import Target
from edgeft.bench.watch import judge
from edgeft.engines.client import Reply
from edgeft.errors import EnvironmentFault, GateError, Inconclusive, UsageError
from edgeft.types import BenchReport

ROWS = [
    {"id": str(i), "task": "exact", "messages": [{"role": "user", "content": f"question {i} of many"}, {"role": "assistant", "content": "a"}]}
    for i in range(9)
]  # fmt: skip


def reply(ttft_s: float = 0.1, e2e_s: float = 0.2, prompt: int = 100, output: int = 11) -> Reply:
    gaps = np.linspace(ttft_s, e2e_s, output)
    return Reply("x" * output, prompt, output, ttft_s, e2e_s, gaps.tolist(), None, "length")


# --- what was found is not measured again


def test_a_journal_is_read_back_and_a_half_written_line_is_not(tmp_path):
    file = tmp_path / "work" / "journal.jsonl"
    first = Journal(file, "k")
    first.add("m", "answer", {"n": 1})
    first.add("m", "answer", {"n": 2})
    with file.open("a") as out:
        out.write('{"target": "m", "kind": "ans')
    again = Journal(file, "k")
    assert again.all("m", "answer") == [{"n": 1}, {"n": 2}] and again.last("m", "answer") == {"n": 2}
    again.add("m", "answer", {"n": 3})
    assert [json.loads(line) for line in file.read_text().splitlines()][-1]["value"] == {"n": 3}
    again.add("m", "error", "gone")
    assert Journal(file, "k").last("m", "error") is None, "what broke is tried again"
    assert Journal(file, "another").empty(), "another workload must not take what this one found"


def test_a_full_disk_is_told_in_two_lines(tmp_path):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    journal = Journal(tmp_path / "journal.jsonl", "k")
    journal.file = full
    with pytest.raises(EnvironmentFault, match="the disk is full") as found:
        journal.add("m", "answer", {"n": 1})
    assert found.value.hint.startswith("df -h")


PIDS = itertools.count(1000)


class Stand:
    """A pool of one model whose requests take known times."""

    def __init__(self, replies):
        self.replies, self.asked, self.local, self.breaks_at = replies, [], None, None
        self.started = self.ended = 0

    @contextmanager
    def use(self, target):
        if self.local is None:
            self.started += 1
            self.local = SimpleNamespace(
                pid=next(PIDS), cold_start_s=1.0, load_s=0.5, load_mode="mmap", device="cpu", build="b", run_profile={}
            )  # fmt: skip
        yield self

    def end(self, target):
        self.ended += self.local is not None
        self.local = None

    def ask(self, body):
        self.asked.append(body)
        if self.breaks_at and len(self.asked) >= self.breaks_at:
            raise EnvironmentFault("the engine is gone", "less log")
        return self.replies(len(self.asked))


def target(name: str = "m") -> Target:
    return Target(name, "artifact", "gguf", Path("/nowhere"), "sha", 10**6)


POINTS = (speed.Point(128, 64),)


def measured(tmp_path, pool, seconds: float, repetitions: int = 5, restarts: int = 1) -> Journal:
    journal = Journal(tmp_path / "j.jsonl", "k")
    go_on(journal, pool, repetitions, seconds, restarts)
    return journal


def go_on(journal: Journal, pool, repetitions: int, seconds: float, restarts: int, names: str = "m") -> None:
    speed.measure(
        [target(name) for name in names], pool, journal, ROWS, POINTS, repetitions, seconds, restarts, energy.Meter(), lambda text: None
    )  # fmt: skip


def test_steady_times_settle_at_once_and_scattered_ones_use_their_time(tmp_path):
    steady = measured(tmp_path / "a", Stand(lambda n: reply()), 100.0)
    found, _ = speed_figures.result(steady, target(), POINTS, 100.0)
    assert found["settled"] and found["rounds"] == 5
    assert found["decode_tok_per_s"]["p50"] == pytest.approx(100) and found["prefill_tok_per_s"][
        "p50"
    ] == pytest.approx(1000)
    assert found["itl_s"]["p50"] == pytest.approx(0.01, abs=1e-5) and found["tpot_s"]["p50"] == pytest.approx(
        0.01
    )
    chance = np.random.default_rng(0)
    wild = measured(tmp_path / "b", Stand(lambda n: reply(chance.uniform(0.05, 0.5), 1.0)), 0.0)
    found, _ = speed_figures.result(wild, target(), POINTS, 0.0)
    assert (
        not found["settled"]
        and found["rounds"] == 5
        and "were up" in found["why"]
        and found["widest_interval"] > 0.05
    )


def test_an_interrupted_speed_run_goes_on_where_it_was(tmp_path):
    journal = measured(tmp_path, Stand(lambda n: reply()), 0.0, repetitions=2)
    again = Stand(lambda n: reply())
    go_on(journal, again, 3, 0.0, 1)
    assert len(journal.all("m", "block")) == 3 and len(journal.all("m", "warm-up")) == 1
    assert len(again.asked) == 3, (
        "one request that warms a new process, one that wakes the engine, one that is timed"
    )
    assert [b["process"] for b in journal.all("m", "block")] == [0, 0, 1]


def test_processes_share_the_rounds_and_the_time_and_say_which_they_were(tmp_path):
    pool = Stand(lambda n: reply())
    journal = measured(tmp_path, pool, 0.0, repetitions=5, restarts=3)
    assert (pool.started, pool.ended) == (3, 2), "the last one stays, to answer the rows"
    found, _ = speed_figures.result(journal, target(), POINTS, 0.0)
    point = found["points"][0]
    assert point["process"] == [0, 0, 1, 1, 2, 2] and point["round"] == list(range(6))
    assert (found["processes"], found["rounds"], found["decode_tok_per_s"]["processes"]) == (3, 6, 3)
    assert len(journal.all("m", "warm-up")) == 1, "every process is asked for the same shapes"


def test_a_run_killed_between_processes_goes_on_and_pairs_what_was_taken_together(tmp_path):
    """Each model has a pool's process of its own; the second run begins with new ones, in the middle of the second restart."""

    class Pools(Stand):
        def __init__(self):
            super().__init__(None)
            self.of = {name: Stand(lambda n: reply()) for name in "ab"}

        def use(self, target):
            if self.breaks_at and sum(len(p.asked) for p in self.of.values()) >= self.breaks_at:
                raise KeyboardInterrupt
            return self.of[target.id].use(target)

        def end(self, target):
            self.of[target.id].end(target)

    whole = Journal(tmp_path / "whole.jsonl", "k")
    go_on(whole, Pools(), 6, 0.0, 3, "ab")
    journal, killed = Journal(tmp_path / "j.jsonl", "k"), Pools()
    killed.breaks_at = 20
    with pytest.raises(KeyboardInterrupt):
        go_on(journal, killed, 6, 0.0, 3, "ab")
    before = {name: len(journal.all(name, "block")) for name in "ab"}
    assert sorted(before.values()) == [3, 4], (
        "one has been asked once more than the other, of its second process"
    )
    again = Journal(tmp_path / "j.jsonl", "k")
    go_on(again, Pools(), 6, 0.0, 3, "ab")
    for name in "ab":
        assert [b["restart"] for b in again.all(name, "block")] == [
            b["restart"] for b in whole.all(name, "block")
        ]
    points = {name: speed_figures.result(again, target(name), POINTS, 0.0)[0]["points"][0] for name in "ab"}
    late = min(before, key=before.get)
    assert points[late]["process"] == [0, 0, 1, 2, 3, 3], (
        "what was cut off in its second process went on in another"
    )
    rounds = [set(p["round"]) for p in points.values()]
    assert len(rounds[0] & rounds[1]) == 5 and len(rounds[0] | rounds[1]) == 7, (
        "the round that was cut has no pair"
    )


def test_a_model_that_breaks_is_told_and_asked_no_more(tmp_path):
    pool = Stand(lambda n: reply())
    pool.breaks_at = 7
    journal = measured(tmp_path, pool, 100.0)
    assert journal.last("m", "error") == "the engine is gone" and len(pool.asked) == 7
    assert journal.all("m", "block"), "what was measured before stays"


def test_a_slow_model_is_asked_for_fewer_tokens_and_every_prompt_has_the_asked_length(tmp_path):
    def counting(pool):  # 2 tok/s; a token is five characters, and the template adds twenty
        return lambda n: reply(1.0, 6.0, 20 + len(pool.asked[-1]["messages"][0]["content"]) // 5, 11)

    pool = Stand(None)
    pool.replies = counting(pool)
    journal = measured(tmp_path, pool, 0.0, 2)
    found, _ = speed_figures.result(journal, target(), POINTS, 0.0)
    assert found["shortened_to_tokens"] == 10 == pool.asked[-1]["max_tokens"]
    assert found["prompt_tokens"][0] == pytest.approx(128, abs=2)


@pytest.mark.parametrize("text", ["", "128", "128x1", "4x64", "axb"])
def test_a_shape_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match="PROMPTxOUTPUT"):
        speed.read_points(text)


# --- what disturbs


def look(**box):
    return {"monotonic_s": 0.0, "clock_s": 0.0, "own_s": 0.0, "box": box, "sensors": {"sensors": []}}


def test_other_work_swapping_a_hypervisor_and_a_clock_that_jumps_are_told():
    before = look(busy_s=100.0, steal_s=5.0, swap_in_pages=7, swap_out_pages=0)
    quiet = {
        **look(busy_s=118.0, steal_s=5.0, swap_in_pages=7, swap_out_pages=0),
        "monotonic_s": 10.0,
        "clock_s": 10.0,
        "own_s": 17.5,
    }
    sensors = {
        "sensors": [],
        "throttle_events": None,
        "pi_bits": None,
        "cooling": None,
        "cpufreq": None,
        "gpu": None,
    }
    before["sensors"] = quiet["sensors"] = sensors
    assert judge(before, quiet, 2) == []
    bad = {
        **quiet,
        "own_s": 8.0,
        "clock_s": 3600.0,
        "box": {"busy_s": 118.0, "steal_s": 6.0, "swap_in_pages": 9, "swap_out_pages": 1},
    }
    found = {f["what"]: f["detail"] for f in judge(before, bad, 2)}
    assert set(found) == {"busy", "steal", "swap", "clock"}
    assert "1.0 cores" in found["busy"] and "5 %" in found["steal"] and "3 pages" in found["swap"]


# --- verdicts


def summary_of(p50: float, low: float, high: float, n: int = 10) -> dict:
    return {"p50": p50, "p50_ci95": [low, high], "n": n}


def test_the_interval_decides_and_says_how_many_samples_would():
    result = {
        "speed": {"ttft_s": summary_of(1.0, 0.9, 1.1), "decode_tok_per_s": summary_of(10.0, 9.0, 11.0)},
        "memory": {"peak_rss_bytes": 3e9},
    }
    found = {
        v["limit"]: v
        for v in verdict.verdicts(
            result, {"memory_budget_gb": 4, "ttft_s": 0.8, "decode_tok_per_s": 9.5, "watts": 5}
        )
    }
    assert [found[k]["verdict"] for k in ("memory_budget_gb", "ttft_s", "decode_tok_per_s", "watts")] == [
        "PASS", "FAIL", "INCONCLUSIVE", "INCONCLUSIVE",
    ]  # fmt: skip
    # The interval reaches 1.0 below the median and the limit is 0.5 below it: four times the samples halve the interval.
    assert found["decode_tok_per_s"]["n_needed"] == 40 and found["watts"]["why"] == "not measured"


def test_a_part_of_the_box_within_the_watts_is_no_pass():
    """A limit is at the wall: a package's counter can break it, and not show that it holds."""
    for method, low, says in (
        ("RAPL package", 5.0, "INCONCLUSIVE"),
        ("RAPL package", 20.0, "FAIL"),
        ("wall meter", 5.0, "PASS"),
    ):
        energy_found = {"method": method, "mean_w": low + 1, "mean_w_ci95": [low, low + 2], "n": 9}
        (found,) = verdict.verdicts({"energy": energy_found}, {"watts": 10})
        assert found["verdict"] == says, (method, found)


def test_a_gate_ends_with_its_exit_code():
    def report(words):
        results = [{"id": "q", "error": None, "verdict": [
            {"verdict": w, "limit": "ttft_s", "value": 1.0, "bound": 1.0, "why": None, "n_needed": 9} for w in words
        ]}]  # fmt: skip
        return BenchReport("2026", {}, {"id": "box"}, {}, results, "merged")

    verdict.gated(report(["PASS"]))
    with pytest.raises(GateError, match="ttft_s"):
        verdict.gated(report(["PASS", "FAIL", "INCONCLUSIVE"]))
    with pytest.raises(Inconclusive, match="9 samples"):
        verdict.gated(report(["PASS", "INCONCLUSIVE"]))
    with pytest.raises(Inconclusive, match="no limits"):
        verdict.gated(report([]))


# --- paired tests


def test_pairs_are_of_the_rows_that_both_answered():
    chance = np.random.default_rng(1)
    items = []
    for row in range(400):
        hard = chance.random()
        for model, skill in (("a", 0.8), ("b", 0.8), ("c", 0.6)):
            if not (model == "b" and row < 100):
                items.append({"model_id": model, "item_id": str(row), "correct": bool(hard < skill)})
    items.append({"model_id": "a", "item_id": "unscored", "correct": None})
    found = {(p["a"], p["b"]): p for p in paired.pairs(items, ["a", "b", "c"])}
    assert found["a", "b"]["n"] == 300 and not found["a", "b"]["different"] and found["a", "b"]["lost"] == 0
    assert found["a", "c"]["different"] and found["a", "c"]["points"] == pytest.approx(-20, abs=5)
    low, high = found["a", "c"]["points_ci95"]
    assert low < found["a", "c"]["points"] < high < 0


# --- energy


def test_a_wall_meters_watts_are_integrated_and_a_gap_is_not_bridged(tmp_path):
    file = tmp_path / "meter.csv"
    file.write_text("time,watts\n" + "".join(f"{t},{10 if t < 5 else 20}\n" for t in range(11)))
    times, watts = energy.read_wall(file)
    assert energy.joules_between(times, watts, 0, 4) == pytest.approx(40)
    assert energy.joules_between(times, watts, 5, 10) == pytest.approx(100)
    assert energy.joules_between(times, watts, 5, 12) is None, "the meter ended before the block did"
    keep = (times < 2) | (times > 9)
    assert energy.joules_between(times[keep], watts[keep], 1, 10) is None, (
        "nobody knows what happened in the gap"
    )
    blocks = [{"begun_s": 1.0, "ended_s": 3.0, "wall_s": 2.0, "requests": [{"output_tokens": 10}]}]
    found = energy.result(blocks, energy.Meter(file))
    assert found["method"] == "wall meter" and found["joules_per_output_token"] == pytest.approx(2.0)
    assert found["mean_w"] == pytest.approx(10)
    file.write_text("time,watts\n1,five\n2,6\n")
    with pytest.raises(UsageError, match="line 2"):
        energy.read_wall(file)


def test_rapl_counts_and_wraps(tmp_path):
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "max_energy_range_uj").write_text("1000000")
    (zone / "energy_uj").write_text("900000")
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of the package: not counted twice
    (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("5")
    meter = energy.Meter(rapl_root=tmp_path)
    meter.gpu = None
    span = meter.start()
    (zone / "energy_uj").write_text("400000")
    assert meter.stop(span) == pytest.approx(0.5)


def test_without_a_meter_nothing_is_claimed(tmp_path):
    meter = energy.Meter(rapl_root=tmp_path)
    meter.gpu = meter.method = None
    assert meter.stop(meter.start()) is None
    assert energy.result([{"joules": None, "begun_s": 0.0, "ended_s": 1.0, "requests": []}], meter) is None


# --- load


def test_goodput_counts_what_held_the_limits_and_the_knee_is_where_it_stops_growing():
    requests = [
        {"error": None, "ttft_s": 0.1 * i, "e2e_s": 1.0, "tpot_s": 0.01, "output_tokens": 10}
        for i in range(1, 11)
    ]
    requests.append({"error": "gone", "ttft_s": None, "e2e_s": None, "tpot_s": None, "output_tokens": 0})
    found = load.judged({"requests": requests, "wall_s": 5.0}, {"ttft_s": 0.5})
    assert found["goodput_per_s"] == 1.0 and found["requests_per_s"] == 2.0 and found["failed"] == 1
    assert found["good_share"] == pytest.approx(5 / 11)
    closed = [{"clients": n, "output_tok_per_s": rate} for n, rate in ((1, 50), (2, 90), (4, 99), (8, 100))]
    assert load.knee(closed) == 4


def test_open_loop_counts_waiting_from_the_moment_that_was_meant():
    """One slot of 50 ms and arrivals twice as fast: the last ones wait for all before them, and that is in their TTFT."""
    import threading

    slot = threading.Lock()

    def ask(body):
        begun = time.perf_counter()
        with slot:
            time.sleep(0.05)
        spent = time.perf_counter() - begun
        return reply(spent, spent + 0.001)

    run = load.open_loop(ask, ROWS, rate=40.0, seconds=1.0)
    waits = [r["ttft_s"] for r in run["requests"]]
    assert len(waits) == 40 and max(waits) > 0.5, (
        "forty requests of 50 ms take two seconds; the queue is part of TTFT"
    )
    lone = load.closed_loop(ask, ROWS, 1, 0.3)
    assert max(r["ttft_s"] for r in lone["requests"]) < 0.3


# --- scores


def row(task: str, answer: str, **more) -> dict:
    return {
        "id": "r",
        "task": task,
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}],
        **more,
    }


def test_json_is_held_to_the_rows_schema():
    schema = {
        "type": "object",
        "required": ["a"],
        "properties": {"a": {"type": "integer"}},
        "additionalProperties": False,
    }
    asked = row("json_schema", '{"a": 1}', schema=schema)
    assert score(asked, '{"a": 5}') == 1.0 and score(asked, '```json\n{"a": 5}\n```') == 1.0
    assert [score(asked, text) for text in ('{"a": "5"}', '{"a": 5, "b": 1}', "a: 5", "")] == [0.0] * 4


def test_free_text_is_scored_by_shared_words():
    asked = row("text", "the cat sat")
    assert score(asked, "The cat sat.") == 1.0 and score(asked, "dogs") == 0.0
    assert score(asked, "the cat") == pytest.approx(2 * 2 / 5)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (row("json_schema", "{}"), "no 'schema'"),
        (row("json_schema", "{}", schema={"type": "banana"}), "is none"),
        (row("numeric", "many"), "no number"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named_before_anything_starts(bad, says):
    with pytest.raises(UsageError, match=says):
        check([bad], "rows.jsonl")
