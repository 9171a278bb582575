"""Paths beside the two that stream text: embeddings, and the guide's /generate."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from edgeft.router import Request, removed_for
from edgeft.serve import endpoints
from edgeft.serve.admission import Busy
from edgeft.serve.http import Reply
from edgeft.serve.protocol import CHAT, EMBEDDING_FIELDS, Asked, Refusal, listed, loads, options_of
from edgeft.serve.proxy import AUTO, Proxy
from edgeft.serve.refusals import not_ready

MOST_INPUTS = 2048
# field -> (least, most, default), as the guide has them
GENERATE = {"max_length": (50, 1024, 512), "temperature": (0.1, 2.0, 0.7), "top_p": (0.1, 1.0, 0.9)}
PROMPT_CHARACTERS = (1, 1000)


async def embeddings(proxy: Proxy, body: bytes, reply: Reply) -> None:
    """POST /v1/embeddings: the named model, or with `auto` the cheapest that can and may."""
    value = loads(body)
    model = value.get("model")
    if not isinstance(model, str) or not model:
        raise Refusal(400, "'model' must be a string: 'auto', or the id of a model.", param="model")
    fields = listed(value, EMBEDDING_FIELDS)
    contents, tokens = _contents(fields.get("input"))
    own = options_of(value)
    if fields.get("encoding_format", "float") not in ("float", "base64"):
        raise Refusal(400, "'encoding_format' must be 'float' or 'base64'.", param="encoding_format")
    request = Request(
        [{"role": "user", "content": content} for content in contents],
        tenant=reply.tenant,
        prompt_tokens=tokens,
        tags=frozenset(own.get("tags", ())),
        private=bool(own.get("private")),
    )
    candidate_id = _embedder(proxy, model, request)
    reply.route = candidate_id
    reply.headers |= {"x-edgeft-route": candidate_id, "x-edgeft-cache": "off"}
    upstream = proxy.upstreams[candidate_id]
    usage: dict[str, Any] = {}
    sent = False
    try:
        async with proxy.admission(candidate_id).slot(request.tokens), upstream.hold():
            sent = True
            answer = await upstream.embeddings(fields)
        usage = answer.get("usage") or {}
    except (Refusal, Busy):
        sent = False
        raise
    finally:
        if usage:
            prompt = usage.get("prompt_tokens") or 0
            proxy.metrics.tokens_used(candidate_id, prompt, 0, 0)
            if price := proxy.policy.candidates[candidate_id].get("price"):
                proxy.metrics.paid(candidate_id, prompt * price["usd_per_mtok_in"] / 1e6, None)
        elif sent:
            proxy.metrics.usage_unresolved(candidate_id)
    await reply.json(200, {**answer, "model": candidate_id})


def _embedder(proxy: Proxy, model: str, request: Request) -> str:
    known = proxy.policy.candidates
    if model != AUTO and model not in known:
        names = ", ".join(f"'{name}'" for name in (AUTO, *known))
        raise Refusal(
            404,
            f"The model '{model[:100]}' is not served. Known: {names}.",
            param="model",
            code="model_not_found",
        )
    removed = removed_for(proxy.policy, request)
    wanted = list(known) if model == AUTO else [model]
    if model != AUTO and (why := removed.get(model)):
        raise Refusal(403, f"The model '{model}' may not take this request ({why}).", code="no_candidate")
    able = [
        n
        for n in wanted
        if n not in removed and n in proxy.upstreams and proxy.upstreams[n].features.embeddings
    ]
    if able:
        return able[0]
    if loading := next((n for n in wanted if n not in proxy.upstreams), None):
        raise not_ready(loading, "loading")
    raise Refusal(
        400, "No candidate that may take this makes embeddings.", param="model", code="no_candidate"
    )


def _contents(value: Any) -> tuple[list[Any], int | None]:
    """(contents of messages as privacy rules read them, tokens where they are counted): token ids are nothing that can be read."""
    if isinstance(value, str) and value:
        return [value], None
    if isinstance(value, list) and value and len(value) <= MOST_INPUTS:
        if all(isinstance(entry, str) and entry for entry in value):
            return value, None
        several = value if isinstance(value[0], list) else [value]
        if all(isinstance(ids, list) and ids and all(type(i) is int for i in ids) for ids in several):
            return [[{"type": "tokens", "ids": ids}] for ids in several], sum(map(len, several))
    raise Refusal(400, f"'input' must be a text, up to {MOST_INPUTS} texts, or token ids.", param="input")


async def generate(proxy: Proxy, body: bytes, reply: Reply) -> None:
    """POST /generate: a prompt in, `response, model, timestamp, cached` out."""
    value = loads(body)
    prompt = value.get("prompt")
    least, most = PROMPT_CHARACTERS
    if not isinstance(prompt, str) or not least <= len(prompt) <= most:
        raise Refusal(422, f"'prompt' must be a text of {least} to {most} characters.", param="prompt")
    given: dict[str, Any] = {}
    for name, (low, high, usual) in GENERATE.items():
        number = value.get(name, usual)
        if (
            isinstance(number, bool)
            or not isinstance(number, int if isinstance(usual, int) else (int, float))
            or not low <= number <= high
        ):
            raise Refusal(422, f"'{name}' must be between {low:g} and {high:g}.", param=name)
        given[name] = number
    model = value.get("model", AUTO)
    if not isinstance(model, str):
        raise Refusal(422, "'model' must be a string.", param="model")
    fields = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": given["max_length"], "temperature": given["temperature"], "top_p": given["top_p"],
    }  # fmt: skip
    answer = await endpoints.whole(proxy, Asked(CHAT, model, fields, False, False, options_of(value)), reply)
    await reply.json(
        200,
        {
            "response": answer.text,
            "model": reply.route,
            "timestamp": datetime.now(UTC).isoformat(),
            "cached": reply.cache in endpoints.KEPT,
        },
    )
