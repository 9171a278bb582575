"""The page: it loads nothing, runs nothing that is not its own, and shows what a real Live counted (made-up traffic)."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette", reason="edgeft[serve] is not installed")
pytest.importorskip("uvicorn", reason="edgeft[serve] is not installed")

from edgeft.serve.live import OUTCOMES, Live
from edgeft.serve.page import page
from tests.conftest import ROOT
from tests.page_stage import HOSTILE, LONG, busy, create_app
from tests.serve_stage import running

LIVE = "document.getElementById('link')?.textContent.startsWith('live')"
TEXT = "document.body.innerText"


def chromium() -> Any:
    """The module of the benchmarks that drives the browser."""
    spec = importlib.util.spec_from_file_location("chromium", ROOT / "benchmarks" / "chromium.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["chromium"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    module = chromium()
    if module.found() is None:
        pytest.skip("chromium is not installed: make test-deps")
    with module.Chromium() as one:
        yield one


# --- the file


def test_it_is_small_and_loads_nothing():
    text = page()[0].decode()
    assert len(page()[0]) < 30_000
    assert not re.search(r"\ssrc=|@import|url\(|<(iframe|img|object|embed|base)\b", text)
    assert re.findall(r'href="(.*?)"', text) == ["data:,"]
    assert set(re.findall(r"https?://[^\s\"'`)]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "https://HOST/…#MODEL",
    }


def test_nothing_that_is_inserted_can_run():
    body, headers = page()
    text = body.decode()
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function|srcdoc", text
    )
    assert not re.search(r"<[^>]+\s(on\w+|style)=", text), "the policy would not let it work"
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    for tag in ("script", "style"):
        (inner,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert "unsafe" not in headers["content-security-policy"]
    assert all("\n" not in value and value.isascii() for value in headers.values())


def test_every_outcome_has_a_name_and_a_colour():
    text = page()[0].decode()
    for outcome in OUTCOMES:
        assert f".{outcome} {{ background: var(--{outcome}); fill: var(--{outcome}); }}" in text
        assert text.count(f"--{outcome}: #") == 2, "one for light, one for dark"
    (names,) = re.findall(r"OUTCOMES = \{(.*?)\}", text)
    assert re.findall(r"(\w+):", names) == list(OUTCOMES)


# --- in a browser


@pytest.mark.parametrize(("width", "dark"), [(360, False), (768, True), (1280, False)])
def test_a_busy_proxy_is_shown(browser, width, dark):
    shown, engines, certificate = busy(20)
    with running(create_app(shown, engines, certificate)) as client:
        browser.tab(width, 800, dark)
        browser.open(str(client.base_url))
        browser.until(LIVE)
        text = browser.ask(TEXT)
        state = client.get("/edgeft/state").json()
        assert browser.complaints() == []
        assert {url.split("/")[2] for url in browser.requested() if not url.startswith("data:")} == {
            client.base_url.netloc.decode()
        }
        assert browser.ask("document.documentElement.scrollWidth") == width, "it scrolls sideways"
    for word in (
        "gguf-q4_k_m",
        "onnx-int4",
        "api.example.org",
        "holds",
        "1,204 rows",
        "7 of 32",
        "loading",
        "saved",
    ):
        assert word in text, word
    assert LONG not in text and browser.ask(f"!!document.querySelector('td[title=\"{LONG}\"]')")
    assert HOSTILE in text and browser.ask("document.images.length") == 0
    assert f"{state['shares']['last_15_min']['local']:,}" in text
    drawn = browser.ask("[...document.querySelectorAll('#bar i')].map(i => i.getBoundingClientRect().width)")
    shares = [state["shares"]["last_15_min"][f"{name}_share"] for name in OUTCOMES]
    assert [w / sum(drawn) for w in drawn] == pytest.approx(shares, abs=0.02)
    assert browser.ask("document.querySelectorAll('#hour rect').length") > 20
    ground = browser.ask("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 150) == dark


def test_an_idle_proxy_is_shown(browser):
    with running(create_app(Live(), [], None)) as client:
        browser.tab(360, 800)
        browser.open(str(client.base_url))
        browser.until(LIVE)
        text = browser.ask(TEXT)
        assert browser.complaints() == []
        insert = "document.head.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
        browser.ask(insert)
        assert browser.ask("window.ran") is None and "Content Security Policy" in browser.complaints()[0]
    for word in ("no prices known", "edgeft route calibrate", "none yet", "no answers yet", "nothing"):
        assert word in text, word
    assert "NaN" not in text and "undefined" not in text and "null" not in text


def test_it_stands_before_its_figures_are_there_and_follows_them(browser):
    shown, gate = Live(), threading.Event()
    with running(create_app(shown, [], None, gate=gate)) as client:
        browser.tab(768, 800)
        browser.open(str(client.base_url))
        browser.until("performance.getEntriesByType('paint').length")
        assert "waiting for the first figures" in browser.ask(TEXT) and "Who answered" in browser.ask(TEXT)
        gate.set()
        browser.until(LIVE)
        shown.begin("0123456789abcdef", True, None)
        shown.routed("0123456789abcdef", "weak", True)
        browser.until(f"{TEXT}.includes('waiting, streams')", 5)
        shown.end(
            "0123456789abcdef",
            200,
            cache=False,
            prompt_tokens=1,
            output_tokens=1,
            cost_usd=None,
            always_api_usd=None,
        )
        browser.until(f"!{TEXT}.includes('waiting, streams')", 5)
    browser.until("document.getElementById('link').className === 'bad'", 5)
    assert "no answer from the proxy" in browser.ask(TEXT)


def test_it_asks_for_a_key_and_keeps_it_in_the_tab(browser):
    shown, engines, certificate = busy(3)
    with running(create_app(shown, engines, certificate, key="ek-right")) as client:
        url = str(client.base_url)
        browser.tab(360, 800)
        browser.open(url)
        browser.until("document.getElementById('ask')?.hidden === false")
        assert "gguf-q4_k_m" not in browser.ask(TEXT)
        enter = "document.getElementById('key').value = '{}'; document.querySelector('#form button').click()"
        browser.ask(enter.format("ek-wrong"))
        browser.until("!document.getElementById('wrong').hidden")
        browser.ask(enter.format("ek-right"))
        browser.until(LIVE)
        assert "gguf-q4_k_m" in browser.ask(TEXT) and browser.ask("document.getElementById('ask').hidden")
        browser.open(url)
        browser.until(LIVE)
        assert "ek-right" not in browser.ask(
            "document.documentElement.outerHTML + document.cookie + JSON.stringify(localStorage)"
        )
        assert not any("ek-right" in asked for asked in browser.requested())
        browser.tab(360, 800)
        browser.open(url)
        browser.until("document.getElementById('ask')?.hidden === false")


def test_a_hidden_page_asks_seldom(browser):
    with running(create_app(Live(), [], None)) as client:
        browser.tab(360, 800)
        browser.call(
            "Page.addScriptToEvaluateOnNewDocument",
            source="Object.defineProperty(document, 'hidden', {get: () => true})",
        )
        browser.open(str(client.base_url))
        browser.until(LIVE)
        time.sleep(2.5)
        browser.ask("0")
        assert sum("/edgeft/state" in url for url in browser.requested()) == 1
