"""No way out: whatever else is asked, a private request reaches no remote candidate, as a choice or as a fallback."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeft.errors import UsageError
from edgeft.router import LoadedPolicy, NoCandidate, Request, State, decide, from_openai, removed_for, rule
from edgeft.router.features import DIMENSIONS, SPEC, vector
from edgeft.router.privacy import PATTERNS, found, plain, why_private
from edgeft.types import Policy

NAMES = ("local-small", "local-large", "api-mid", "api-big")
PRIVACY: dict[str, Any] = {
    "patterns": list(PATTERNS), "names": ["Müller", "Project Nightjar"], "tags": ["hr"], "tenants": ["clinic"], "unreadable": "private",
}  # fmt: skip
SECRETS = [
    "write to erika.mustermann@example.org please", "GB82 WEST 1234 5698 7654 32", "DE89370400440532013000", "4111 1111 1111 1111",
    "card 5500-0000-0000-0004", "call +49 30 901820", "+1 (415) 555-2671", "030 / 901820", "Dear Frau MÜLLER,", "about project nightjar",
    "４１１１ １１１１ １１１１ １１１１", "erika\u200b@example.org",
]  # fmt: skip


def policy(**changes: Any) -> LoadedPolicy:
    """Two local and two remote candidates; the heads love the remote ones."""
    candidates = [
        {"id": n, "kind": "api", "remote": n.startswith("api"), "artifact_sha256": n, "path": None, "price": None, "tools": n != "local-small",
         "context_tokens": 400 if n == "local-small" else None, "mean_e2e_s": 0.1 * i, "mean_output_tokens": 20}
        for i, n in enumerate(NAMES)
    ]  # fmt: skip
    (column, sign), *_ = vector("hard").items()
    rows = [[0.0] * DIMENSIONS for _ in NAMES]
    rows[3][column] = sign
    made = Policy(
        "2026-01-01",
        candidates,
        dict(SPEC),
        {**rule.DEFAULTS, "threshold": 0.1},
        {"max_loss": 0},
        dict(PRIVACY),
    )
    return LoadedPolicy(replace(made, **changes), tuple(map(tuple, rows)), (0.2, 0.1, 0.5, 0.7))


def rules() -> st.SearchStrategy[dict[str, Any]]:
    number = st.floats(-2, 2, allow_nan=False)
    return st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["loss", "tradeoff"]), "threshold": number, "price_of_cost": number,
            "explore": st.sampled_from([0.0, 0.5, 1.0]),
            "sticky": st.booleans(), "far": st.none() | st.just(2.0), "floor": st.none() | number, "max_cost": st.none() | number,
            "max_latency_s": st.none() | number, "on_suspended": st.sampled_from(["strong", -1.0]), "budget": st.none(),
        }
    )  # fmt: skip


def states() -> st.SearchStrategy[State]:
    return st.builds(
        State,
        unavailable=st.frozensets(st.sampled_from(NAMES)),
        queue_s=st.dictionaries(st.sampled_from(NAMES), st.floats(0, 1e3)),
        price_of_cost=st.none() | st.floats(-10, 10),
        suspended=st.booleans(),
    )


@st.composite
def private_requests(draw: Any) -> Request:
    """A request that is private for one reason, which may stand in any place that goes upstream."""
    words = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
    before, after = draw(words), draw(words)
    secret = f"{before} {draw(st.sampled_from(SECRETS))} {after}"
    reason = draw(
        st.sampled_from(
            ["text", "system", "history", "part", "call", "schema", "tag", "tenant", "said", "image"]
        )
    )
    messages: list[dict[str, Any]] = [{"role": "user", "content": "hard question"}]
    more: dict[str, Any] = {}
    if reason == "text":
        messages[0]["content"] = secret
    elif reason in ("system", "history"):
        messages.insert(0, {"role": "system" if reason == "system" else "assistant", "content": secret})
    elif reason == "part":
        messages[0]["content"] = [{"type": "text", "text": secret}]
    elif reason == "image":
        messages[0]["content"] = [
            {"type": "text", "text": "what is it"},
            {"type": "image_url", "image_url": {"url": "data:,"}},
        ]
    elif reason == "call":
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": secret}}
        messages.insert(0, {"role": "assistant", "content": None, "tool_calls": [call]})
    elif reason == "schema":
        more["extra_text"] = secret
    elif reason == "tag":
        more["tags"] = frozenset(["x", "hr"])
    elif reason == "tenant":
        more["tenant"] = "clinic"
    else:
        more["private"] = True
    return Request(
        messages, tools=draw(st.booleans()), max_tokens=draw(st.none() | st.integers(1, 4000)),
        previous=draw(st.none() | st.sampled_from(NAMES)), floor=draw(st.none() | st.floats(0, 2)), max_cost=draw(st.none() | st.floats(-1, 9)),
        max_latency_s=draw(st.none() | st.floats(0, 9)), **more,
    )  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(private_requests(), rules(), states(), st.floats(0, 1), st.booleans())
def test_no_path_out(request_, settings_, state, u, suspended):
    loaded = replace(policy(rule=settings_), certificate={"suspended": suspended})
    try:
        decision = decide(loaded, request_, u, state)
    except NoCandidate as nobody:
        assert nobody.private and {"api-mid", "api-big"} <= set(nobody.removed)
        return
    assert decision.private and not decision.certified
    answering = {decision.choice, *decision.fallbacks}
    assert answering <= {"local-small", "local-large"}
    assert not answering & set(decision.removed) and not answering & state.unavailable
    assert set(decision.scores) == set(decision.costs) == answering
    assert {"api-mid", "api-big"} <= set(removed_for(loaded, request_, state))


@settings(max_examples=200, deadline=None)
@given(rules(), states(), st.floats(0, 1))
def test_a_public_request_may_go_anywhere_and_exploration_only_up(settings_, state, u):
    loaded = policy(rule=settings_)
    asked = Request([{"role": "user", "content": "a hard question"}])
    try:
        plainly, explored = decide(loaded, asked, 1.0, state), decide(loaded, asked, u, state)
    except NoCandidate:
        assert state.unavailable == set(NAMES)
        return
    assert not plainly.private and 0 < plainly.propensity <= 1
    assert NAMES.index(explored.choice) >= NAMES.index(plainly.choice) and 0 < explored.propensity <= 1
    assert {plainly.choice, *plainly.fallbacks} == set(NAMES) - state.unavailable


def test_the_heads_would_send_it_out():
    """Without this the property test could pass because nothing ever goes out."""
    assert decide(policy(), "a hard question").choice == "api-big"
    assert decide(policy(), "a hard question for +49 30 901820").choice == "local-large"


@pytest.mark.parametrize(
    "text",
    [
        "order 4111 1111 1111 1112",
        "room 12, floor 3",
        "2024-05-01 10:30",
        "a@b",
        "version 1.2.3.4",
        "in 2023 we sold 120 000 pieces",
        "DE00 1234 5678 9012 3456 78",
    ],
)
def test_what_is_public_stays_public(text):
    assert why_private(PRIVACY, Request([{"role": "user", "content": text}])) is None


@pytest.mark.parametrize("text", SECRETS[:10])
def test_what_is_private_is_found(text):
    assert why_private(PRIVACY, Request([{"role": "user", "content": text}])) is not None
    assert why_private({}, Request([{"role": "user", "content": text}])) is None


@pytest.mark.parametrize(
    "text", ["4111 1111 1111 1111 0", "12 4111 1111 1111 1111 99", "AB12 GB82 WEST 1234 5698 7654 32",
     "tel:+49 30 901820", "IBAN:DE89370400440532013000x"]
)  # fmt: skip
def test_what_stands_beside_a_number_does_not_hide_it(text):
    assert why_private(PRIVACY, Request([{"role": "user", "content": text}])) is not None


def test_a_number_cut_in_two_parts_of_a_message_is_found():
    parts = [{"type": "text", "text": "4111 1111"}, {"type": "text", "text": " 1111 1111"}]
    assert why_private(PRIVACY, Request([{"role": "user", "content": parts}])) == "pattern card"


def test_tools_and_schemas_are_read():
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "tools": [{"function": {"description": "mail erika@example.org"}}],
    }
    asked = from_openai(body)
    assert asked.tools and why_private(PRIVACY, asked) == "pattern email"


def test_a_candidate_without_the_field_counts_as_remote():
    loaded = policy()
    for candidate in loaded.policy.candidates:
        del candidate["remote"]
    with pytest.raises(NoCandidate, match="a private request has no local candidate"):
        decide(loaded, "mail erika@example.org")


def test_the_reason_quotes_nothing():
    decision = decide(policy(), "mail erika.mustermann@example.org about Project Nightjar")
    assert "erika" not in str(decision) and "ightjar" not in str(decision)


def test_an_unknown_privacy_setting_is_refused(tmp_path):
    import numpy as np

    from edgeft.router.policy import save_policy

    loaded = policy(privacy={"pattern": ["email"]})
    with pytest.raises(UsageError, match=r"privacy setting 'pattern' is not known\. Did you mean 'patterns'"):
        save_policy(
            loaded.policy,
            {"text.weights": np.float32(loaded.weights), "text.bias": np.float32(loaded.bias)},
            tmp_path / "p",
        )


def test_luhn_and_iban_against_known_numbers():
    assert found("card", "378282246310005") and not found("card", "378282246310006")
    assert found("iban", plain("FR14\u00a02004 1010 0505 0001 3M02 606 is mine")) and not found(
        "iban", "FR15 2004 1010 0505 0001 3M02 606"
    )
