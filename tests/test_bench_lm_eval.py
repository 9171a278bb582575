"""lm-eval on an artefact: the likelihoods against a direct computation, and a task of local files where lm-eval is there."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from edgeft.bench import lm_eval as adapter
from edgeft.bench.likelihood import windows
from edgeft.bench.targets import find
from edgeft.errors import UsageError
from tests.conftest import write_rows
from tests.test_cli import assert_two_lines, edgeft

needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'edgeft[lm-eval]'"
)
PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is ", "Paris"),  # the space goes with the word
    ("Two and two are", " four apples"),
    ("", "An empty context"),
    ("   ", "only spaces before"),
]


@pytest.fixture(scope="module")
def llama(tiny_models, tmp_path_factory):
    """A Reader of the tiny Llama, and its model and tokenizer for direct computations."""
    from edgeft.engines.transformers import load

    target = find([tiny_models["llama"]], [])[0]
    with adapter.reading(target, tmp_path_factory.mktemp("logs"), 1, 256) as reader:
        yield reader, *load(tiny_models["llama"], 1)


def direct(model, prompt: list[int], continuation: list[int]) -> tuple[float, bool]:
    import torch

    with torch.inference_mode():
        logp = model(torch.tensor([prompt + continuation])).logits[0].double().log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(continuation) - 1)
    picked = [float(logp[place, token]) for place, token in zip(places, continuation, strict=True)]
    return sum(picked), [int(logp[place].argmax()) for place in places] == continuation


def test_likelihoods_are_those_of_a_direct_computation(llama):
    reader, model, tokenizer = llama
    found = reader.likelihoods(PAIRS)
    bos = tokenizer.bos_token_id
    for (context, continuation), (total, greedy) in zip(PAIRS, found, strict=True):
        bare = context.rstrip()
        whole = tokenizer.encode(context + continuation)
        prompt = tokenizer.encode(bare) if bare else [bos]
        rest = whole[len(prompt) :] if bare else whole
        wanted, wanted_greedy = direct(model, prompt, rest)
        assert total == pytest.approx(wanted, abs=1e-3) and greedy == wanted_greedy
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)


def test_a_greedy_continuation_is_known_as_one(llama):
    reader, _, tokenizer = llama
    answer = reader.continued("Once upon a time", 4, [])
    ids = tokenizer.encode("Once upon a time")
    for _ in range(4):
        ids.append(greedy_next(llama[1], ids))
    assert answer == tokenizer.decode(ids[-4:])
    assert (
        tokenizer.encode("Once upon a time" + answer) != ids
        or reader.likelihoods([("Once upon a time", answer)])[0][1]
    )
    assert reader.continued("Once upon a time", 4, [answer[1:3]]) == answer[: answer.index(answer[1:3])]


def greedy_next(model, ids: list[int]) -> int:
    import torch

    with torch.inference_mode():
        return int(model(torch.tensor([ids])).logits[0, -1].argmax())


def test_a_whole_text_is_the_sum_over_its_windows(llama):
    reader, model, tokenizer = llama
    text = "A text that is longer than one window. " * 60
    ids = tokenizer.encode(text)
    assert len(ids) > 2 * reader.context
    wanted, begin = 0.0, 0
    while begin < len(ids):  # each token once; the last window looks back as far as it can
        end = min(begin + reader.context, len(ids))
        before = ids[end - reader.context - 1 : begin] if begin else [tokenizer.bos_token_id]
        wanted += direct(model, before, ids[begin:end])[0]
        begin = end
    short = reader.rolling([text, "short"])
    assert short[0] == pytest.approx(wanted, abs=0.05)
    assert short[1] == pytest.approx(
        direct(model, [tokenizer.bos_token_id], tokenizer.encode("short"))[0], abs=1e-3
    )


@needs_lm_eval
@pytest.mark.parametrize("length", [0, 1, 9, 10, 11, 20, 25])
def test_windows_are_lm_evals(length):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    ids = list(range(100, 100 + length))
    theirs = [make_disjoint_window(w) for w in get_rolling_token_windows(ids, 7, 10, 1)]
    assert windows(ids, 7, 10) == [tuple(w) for w in theirs]


def test_windows_of_the_pictured_example():
    assert windows(list(range(10)), -1, 4) == [([-1], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]


def test_what_is_too_long_loses_its_beginning():
    assert adapter.fitted([1, 2, 3, 4], [5, 6], 4) == ([2, 3, 4], [5, 6]), "five ids, of which four are fed"
    assert adapter.fitted([1, 2], [3, 4], 8) == ([1, 2], [3, 4])
    assert adapter.fitted([1, 2], [3, 4, 5, 6], 2) == ([2], [5, 6])


def test_an_answer_that_leaves_no_room_is_refused(llama):
    with pytest.raises(UsageError, match="256"):
        llama[0].continued("a", 300, [])


def test_a_gguf_files_likelihoods_are_its_sources(tiny_dist, tmp_path):
    found = []
    for name in ("gguf-f16", "merged"):
        target = find([tiny_dist / "dist" / name], [])[0]
        with adapter.reading(target, tmp_path, 1, 256) as reader:
            found.append([[total for total, _ in reader.likelihoods(PAIRS)], reader.prefix, reader.before])
            assert reader.continued("Once upon a time", 6, [])
    assert found[0][0] == pytest.approx(found[1][0], abs=0.05) and found[0][1:] == found[1][1:]


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_the_extra_the_line_that_installs_it_is_told(tiny_models, tmp_path):
    done = edgeft("bench", "lm-eval", tiny_models["llama"], "--tasks", "arc_easy", "--out", tmp_path / "out")
    assert_two_lines(done, 3, "lm_eval", "edgeft[lm-eval]")
    assert not (tmp_path / "out").exists()


# --- lm-eval itself, on a task of local files

ITEMS = [
    {"question": "Grass is", "choices": ["green", "a kind of machine"], "label": 0},
    {"question": "Fire is", "choices": ["wet water", "hot"], "label": 1},
    {"question": "Snow is", "choices": ["white", "black"], "label": 0},
]
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: label
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ANSWER = """
task: local_answer
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
"""


@pytest.fixture
def task_folder(tmp_path):
    file = write_rows(tmp_path / "items.jsonl", ITEMS)
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in (("choice", CHOICE), ("answer", ANSWER), ("rolling", ROLLING)):
        (folder / f"{name}.yaml").write_text(text.replace("FILE", json.dumps(str(file))))
    return folder


@needs_lm_eval
def test_local_tasks_run_through_the_command(llama, tiny_models, task_folder, tmp_path):
    import math

    reader, *_ = llama
    done = edgeft(
        "bench", "lm-eval", tiny_models["llama"], "--tasks", "local_choice,local_answer,local_rolling",
        "--include-path", task_folder, "--out", tmp_path / "out", "--threads", 1, "--context", 256,
        EDGEFT_HOME=str(tmp_path / "home"), HF_DATASETS_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    sums = [
        [
            total
            for total, _ in reader.likelihoods(
                [(item["question"], f" {choice}") for choice in item["choices"]]
            )
        ]
        for item in ITEMS
    ]
    right = [values.index(max(values)) == item["label"] for values, item in zip(sums, ITEMS, strict=True)]
    assert results["local_choice"]["acc,none"] == pytest.approx(sum(right) / len(ITEMS))
    texts = [item["question"] for item in ITEMS]
    bits = -sum(reader.rolling(texts)) / math.log(2) / sum(len(text.encode()) for text in texts)
    assert results["local_rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    samples = [
        json.loads(line)
        for line in (tmp_path / "out" / "samples-local_answer.jsonl").read_text().splitlines()
    ]
    assert [s["resps"][0][0] for s in samples] == [reader.continued(text, 4, ["\n"]) for text in texts]
    assert "local_choice" in done.stderr + done.stdout


@needs_lm_eval
def test_an_unknown_task_names_the_nearest(tiny_models, task_folder, tmp_path):
    done = edgeft(
        "bench",
        "lm-eval",
        tiny_models["llama"],
        "--tasks",
        "local_choise",
        "--include-path",
        task_folder,
        "--out",
        tmp_path / "o",
    )
    assert_two_lines(done, 2, "local_choise", "local_choice")


@needs_lm_eval
def test_the_chat_template_is_the_artefacts(llama, task_folder, tmp_path):
    from edgeft.bench.lm_eval_model import run, task_manager

    reader, _, tokenizer = llama
    found = run(reader, ["local_answer"], task_manager(["local_answer"], task_folder), 1, chat=True)
    prompt = found["samples"]["local_answer"][0]["arguments"]
    wanted = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Grass is"}], add_generation_prompt=True, tokenize=False
    )
    assert wanted in json.dumps(prompt, ensure_ascii=False).encode().decode("unicode_escape")
