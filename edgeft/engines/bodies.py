"""OpenAI's JSON for engines without a server: what a request may ask, and what answers look like."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from edgeft.engines.decoding import MAX_TOP_LOGPROBS, BadRequest, Piece, Sampling, Token, sampling_of

CHAT, TEXT = "chat", "text"


def asked(body: Any, kind: str, can_constrain: bool) -> Sampling:
    """What a chat or text completion's body asks. Raises BadRequest for what can't be done here, and says what."""
    if not isinstance(body, dict):
        raise BadRequest("bad request: the body is not an object")
    for field in ("n", "best_of"):
        if body.get(field) not in (None, 1):
            raise BadRequest(f"this engine gives one answer a request: {field} must be 1")
    if body.get("tools") and body.get("tool_choice") != "none":
        raise BadRequest("this engine has no tool calls; the engine 'gguf' has")
    for field in ("echo", "suffix", "logit_bias"):
        if body.get(field):
            raise BadRequest(f"this engine has no {field}")
    wanted = sampling_of(body)
    top = body.get("top_logprobs") if kind == CHAT else body.get("logprobs")
    wants = bool(body.get("logprobs")) if kind == CHAT else body.get("logprobs") is not None
    if not isinstance(top or 0, int) or not 0 <= int(top or 0) <= MAX_TOP_LOGPROBS:
        raise BadRequest(f"top_logprobs must be 0 to {MAX_TOP_LOGPROBS}")
    return Sampling(
        **{
            **vars(wanted),
            "logprobs": wants,
            "top_logprobs": int(top or 0) if wants else 0,
            "schema": schema_of(body.get("response_format"), can_constrain),
        }
    )


def schema_of(wanted: Any, can_constrain: bool) -> str | None:
    """The JSON schema of a `response_format` as text; None where none is asked."""
    if wanted is None or (isinstance(wanted, dict) and wanted.get("type") == "text"):
        return None
    if not isinstance(wanted, dict) or wanted.get("type") not in ("json_schema", "json_object"):
        raise BadRequest("response_format must be of type text, json_object or json_schema")
    if not can_constrain:
        raise BadRequest(f"this engine has no grammars: response_format {wanted['type']} is not possible")
    if wanted["type"] == "json_object":
        return json.dumps(wanted.get("schema") or {"type": "object"})
    inner = wanted.get("json_schema")
    if not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict):
        raise BadRequest("response_format.json_schema.schema must be a schema")
    return json.dumps(inner["schema"])


def head(kind: str, model: str, streamed: bool) -> dict[str, Any]:
    """The fields that every part of an answer carries."""
    chat = kind == CHAT
    name = ("chat.completion.chunk" if streamed else "chat.completion") if chat else "text_completion"
    prefix = "chatcmpl" if chat else "cmpl"
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": name,
        "created": int(time.time()),
        "model": model,
    }


def part(kind: str, piece: Piece, wanted: Sampling) -> dict[str, Any]:
    """One choice of a streamed chunk."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": piece.finish_reason}
    if kind == CHAT:
        choice["delta"] = {"content": piece.text} if piece.text else {}
    else:
        choice["text"] = piece.text
    if wanted.logprobs and piece.token:
        choice["logprobs"] = logprobs_of(kind, [piece.token])
    return choice


def whole(kind: str, pieces: list[Piece], wanted: Sampling) -> dict[str, Any]:
    """The one choice of an answer that is not streamed."""
    text = "".join(piece.text for piece in pieces)
    choice: dict[str, Any] = {"index": 0, "finish_reason": pieces[-1].finish_reason}
    if kind == CHAT:
        choice["message"] = {"role": "assistant", "content": text}
    else:
        choice["text"] = text
    if wanted.logprobs:
        choice["logprobs"] = logprobs_of(kind, [piece.token for piece in pieces if piece.token])
    return choice


def logprobs_of(kind: str, tokens: list[Token]) -> dict[str, Any]:
    """OpenAI's `logprobs` of a choice: a list of entries in chat, four lists side by side in text completions."""
    entries = [logprob_entry(token) for token in tokens]
    return {"content": entries} if kind == CHAT else side_by_side(entries)


def side_by_side(entries: list[dict[str, Any]], begin: int = 0) -> dict[str, Any]:
    """Text completions' `logprobs` of chat's entries, which llama.cpp's server gives for both; `begin`: the first offset."""
    offsets = [begin]
    for entry in entries:
        offsets.append(offsets[-1] + len(entry["token"]))
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [
            {top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries
        ],
        "text_offset": offsets[:-1],
    }


def logprob_entry(token: Token) -> dict[str, Any]:
    """One entry of OpenAI's `logprobs.content`."""
    return {
        **_named(token.text, token.logprob),
        "top_logprobs": [_named(text, logprob) for text, logprob in token.top],
    }


def _named(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def usage(prompt_tokens: int, output_tokens: int, reused: int | None = None) -> dict[str, Any]:
    """OpenAI's usage block; `reused` prompt tokens were not computed again, None where the engine keeps nothing between requests."""
    found: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
    }
    return found if reused is None else {**found, "prompt_tokens_details": {"cached_tokens": reused}}


def embeddings(model: str, vectors: list[list[float]], tokens: int, encoding: str) -> dict[str, Any]:
    """The answer of /v1/embeddings; `encoding` is float or base64 (little-endian float32)."""
    return {
        "object": "list",
        "model": model,
        "data": [
            {"object": "embedding", "index": index, "embedding": _encoded(vector, encoding)}
            for index, vector in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _encoded(vector: list[float], encoding: str) -> Any:
    if encoding == "float":
        return vector
    import base64
    import struct

    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
