"""openai-python's own API tests, and schemathesis on /openapi.json, against the proxy.

    python benchmarks/serve_openai_suite.py [--examples 50] [--openai-python PYTHON] [--schemathesis-python PYTHON] [--openai-tests FOLDER]

The tests are those of openai-python's source distribution on PyPI (chat, completions, embeddings, models, responses), in a virtual
environment of their own, by TEST_API_BASE_URL, before a stand-in that fills in every field (serving/openai_shaped.py). They are made for a
mock that takes anything; what is rewritten in them and what can't apply stands below with its reason and is printed.
Must hold: all that apply pass; under schemathesis no 5xx, and in no response a traceback, a path of this machine or the upstream's key.
Prints two tables and one JSON line; exit 1 where it does not hold.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as Xml
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from serving import stage
from serving.proxy import edgeft
from serving.rivals import venv

from edgeft.home import cache_dir

VERSION, PLANTED = "2.54.0", "sk-planted-7731-the-upstreams-key"
OPENAI = (
    f"openai[aiohttp]=={VERSION}",
    "pytest",
    "pytest-asyncio",
    "respx",
    "dirty-equals",
    "inline-snapshot",
    "rich",
    "jsonschema",
)
FILES = (
    "chat/test_completions.py",
    "test_completions.py",
    "test_embeddings.py",
    "test_models.py",
    "test_responses.py",
)
# (what is rewritten in the tests, by what, why)
REWRITTEN = (
    (r'model="[a-z][^"]*"', 'model="auto"', "their models are not served here"),
    (r'"gpt-4o-mini"', '"auto"', "the same, of models.retrieve"),
    (r"max_(completion_)?tokens=0", r"max_\1tokens=16", "no tokens can't be asked for"),
    (r"responses(\.with_\w+)?\.create\(\)", r'responses\1.create(model="auto", input="string")', "an empty request is no request"),
    (r"responses(\.with_\w+)?\.create\(\s*stream=True,\s*\)", r'responses\1.create(model="auto", input="string", stream=True)', "the same"),
)  # fmt: skip
# (which tests can't apply, why)
NOT_APPLICABLE = (
    (r"chat.test_completions.*(retrieve|update|list|delete)", "stored chat completions: nothing is stored"),
    (r"test_models.*delete", "models are not deleted over the API"),
    (r"test_responses.*(retrieve|cancel|delete|compact)", "stored responses: nothing is stored"),
    (r"test_responses.*create_with_all_params", "asks for background, conversation, prompt and previous_response_id: nothing is stored"),
    (r"test_embeddings.*(strict|aiohttp)", "the client asks for base64, and its strict type refuses the base64 that it asked for"),
)  # fmt: skip


def main() -> None:
    """Run both, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=50, help="of schemathesis, an operation")
    parser.add_argument("--openai-python", type=Path)
    parser.add_argument("--schemathesis-python", type=Path)
    parser.add_argument("--openai-tests", type=Path, help="folder of the unpacked source distribution")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        scratch = Path(name)
        upstream = stack.enter_context(stage.module("openai_shaped", scratch=scratch))
        candidates = [f"openai:{upstream.url}#{n}" for n in ("small", "large")]
        proxy = stack.enter_context(edgeft(candidates, scratch, upstream_key=PLANTED))
        tests = rewritten(options.openai_tests or source(), scratch)
        python = options.openai_python or venv(f"openai-{VERSION}", *OPENAI)
        cases = suite(proxy, tests, python, scratch)
        python = options.schemathesis_python or venv("schemathesis", "schemathesis")
        fuzzed = schemathesis(proxy, python, options.examples, scratch)
    show(cases, fuzzed)


def source() -> Path:
    """The unpacked source distribution, kept in the user's cache."""
    place = cache_dir("bench-sources", f"openai-{VERSION}")
    if not place.is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            command = [
                "download",
                "-q",
                "--no-deps",
                "--no-binary",
                "openai",
                f"openai=={VERSION}",
                "-d",
                scratch,
            ]
            subprocess.run([sys.executable, "-m", "pip", *command], check=True)
            with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
                archive.extractall(scratch, filter="data")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(Path(scratch, f"openai-{VERSION}"), place)
    return place


def rewritten(folder: Path, scratch: Path) -> Path:
    """A copy of the tests with REWRITTEN applied."""
    shutil.copytree(folder / "tests", scratch / "suite" / "tests")
    for file in FILES:
        path = scratch / "suite" / "tests" / "api_resources" / file
        text = path.read_text()
        for pattern, new, _ in REWRITTEN:
            text = re.sub(pattern, new, text)
        path.write_text(text)
    (scratch / "suite" / "pytest.ini").write_text(
        "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = session\n"
    )
    return scratch / "suite"


def suite(proxy: stage.Server, tests: Path, python: Path, scratch: Path) -> list[dict[str, str]]:
    """Every case with its outcome: passed, failed (and what it said), not applicable (and why)."""
    names = [f"tests/api_resources/{file}" for file in FILES]
    if proxy.key:  # the suite's own key
        conftest = tests / "tests" / "conftest.py"
        conftest.write_text(conftest.read_text().replace('"My API Key"', json.dumps(proxy.key)))
    env = stage.environment(TEST_API_BASE_URL=f"{proxy.url}/v1", PYTHONPATH="")
    report = scratch / "suite.xml"
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *names]
    done = subprocess.run(command, cwd=tests, env=env, capture_output=True, text=True, check=False)
    if not report.is_file():
        sys.exit(f"the suite did not run:\n{done.stdout[-3000:]}{done.stderr[-2000:]}")
    cases = []
    for case in Xml.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').removeprefix('tests.api_resources.')}::{case.get('name')}"
        bad = next((part for part in case if part.tag in ("failure", "error")), None)
        skipped = next((part for part in case if part.tag == "skipped"), None)
        why = next((reason for pattern, reason in NOT_APPLICABLE if re.search(pattern, name)), "")
        if bad is None and skipped is None:
            cases.append({"name": name, "outcome": "passed", "why": ""})
        elif skipped is not None:
            cases.append(
                {"name": name, "outcome": "not applicable", "why": f"skipped: {skipped.get('message')}"}
            )
        elif why:
            cases.append({"name": name, "outcome": "not applicable", "why": why})
        else:
            cases.append(
                {
                    "name": name,
                    "outcome": "failed",
                    "why": (bad.get("message") or "")[:200].replace("\n", " "),
                }
            )  # type: ignore[union-attr]
    return cases


def schemathesis(proxy: stage.Server, python: Path, examples: int, scratch: Path) -> dict[str, Any]:
    """schemathesis on /openapi.json: its exit code and last words; how many responses held what must not be there."""
    program, kept = str(python.parent / "schemathesis"), scratch / "exchanges.har"
    command = [
        program,
        "run",
        f"{proxy.url}/openapi.json",
        "--checks",
        "not_a_server_error",
        "-n",
        str(examples),
    ]
    command += ["--report", "har", "--report-har-path", str(kept)]
    command += ["-H", f"Authorization: Bearer {proxy.key}"] if proxy.key else []
    env = stage.environment(PYTHONPATH="")
    done = subprocess.run(command, cwd=scratch, env=env, capture_output=True, text=True, check=False)
    entries = json.loads(kept.read_text())["log"]["entries"]
    secrets = ("Traceback", "site-packages", str(scratch), str(stage.HERE.parent.parent), PLANTED)
    texts = [json.dumps(entry["response"].get("headers")) + body_of(entry["response"]) for entry in entries]
    if not any('"error"' in text for text in texts):
        sys.exit("the bodies of the responses were not kept: nothing could be looked for in them")
    leaks = Counter(what for text in texts for what in secrets if what in text)
    tail = (done.stdout + done.stderr)[-4000:]
    return {"code": done.returncode, "tail": tail, "leaks": dict(leaks), "responses": len(entries)}


def body_of(response: dict[str, Any]) -> str:
    """The body of a HAR file's response."""
    content = response.get("content") or {}
    text = content.get("text") or ""
    return base64.b64decode(text).decode(errors="replace") if content.get("encoding") == "base64" else text


def show(cases: list[dict[str, str]], fuzzed: dict[str, Any]) -> None:
    """By file, then every case that did not pass by its reason, then schemathesis' own words."""
    files = sorted({re.split(r"\.Test|::", case["name"])[0] for case in cases})
    outcomes = ("passed", "failed", "not applicable")
    table = [["file", *outcomes]]
    for file in files:
        counts = Counter(case["outcome"] for case in cases if re.split(r"\.Test|::", case["name"])[0] == file)
        table.append([file, *(str(counts[outcome]) for outcome in outcomes)])
    print("Rewritten in the tests:", *(f"{new}: {why}" for _, new, why in REWRITTEN), sep="\n  ")
    for why, count in Counter(case["why"] for case in cases if case["outcome"] == "not applicable").items():
        print(f"not applicable, {count}: {why}")
    for case in cases:
        if case["outcome"] == "failed":
            print(f"FAILED {case['name']}: {case['why']}")
    print(fuzzed["tail"])
    totals = Counter(case["outcome"] for case in cases)
    holds = not totals["failed"] and bool(totals["passed"]) and fuzzed["code"] == 0 and not fuzzed["leaks"]
    found = {"holds": holds, **{outcome: totals[outcome] for outcome in outcomes}, "openai": VERSION}
    found |= {"schemathesis_exit": fuzzed["code"], "responses": fuzzed["responses"], "leaks": fuzzed["leaks"]}
    stage.show(table, found)
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
