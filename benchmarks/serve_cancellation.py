"""How long an engine works on after its client has left: engine × moment × way of leaving, against the contract.

    python benchmarks/serve_cancellation.py ENGINE=FOLDER … [--threads N] [--prompt 1000] [--repeats 3] [--json]
    python benchmarks/serve_cancellation.py --random 1b [--prompt 4000]

Contract (docs/engines.md): the slot is free again within 0.25 s plus one micro-batch. ENGINE is gguf, llama_server, llama_cpp, onnx or
transformers. `--random` writes a model of 1.06 billion random weights in Q4_0 that reads bytes, and runs it by `gguf`.

A request is sent and left (a) while its prompt is read, (b) after its first tokens, (c) the same, not streamed; by FIN or RST. The time that
counts is a second request's wait for its first token beyond what it takes on the idle engine, which has one slot. One micro-batch
is the longest time between two reports of progress (llama.cpp) or the 0.25 s that pieces are cut to. What the engine would have gone on
for otherwise stands beside: the rival is the same engine without the contract (`batch_s` off, no progress asked), in the same run.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import socket
import statistics
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

from edgeft.engines.local import LocalModel

BATCH_S = 0.25
MOMENTS = ("prompt", "mid-stream", "non-stream")
WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "for",
    "it",
    "as",
    "was",
    "with",
    "be",
    "by",
    "on",
    "not",
    "he",
    "his",
    "but",
)


BYTES_A_WORD = sum(len(word) + 1 for word in WORDS) / len(WORDS)  # what the random model reads one by one


def prompt_of(tokens: int, turn: int) -> str:
    """About so many words, no two turns beginning alike."""
    return " ".join(WORDS[(turn * 7 + i * (1 + turn % 5)) % len(WORDS)] for i in range(tokens))


def body_of(
    local: LocalModel, tokens: int, turn: int, output: int, stream: bool, contract: bool
) -> dict[str, Any]:
    """A request that does not end early and reuses nothing."""
    return {
        "messages": [{"role": "user", "content": prompt_of(tokens, turn)}], "max_tokens": output, "temperature": 0,
        "ignore_eos": True, "cache_prompt": False, "stream": stream, **(local.fields(stream=stream) if contract else {}),
    }  # fmt: skip


def send(local: LocalModel, body: dict[str, Any]) -> socket.socket:
    """The connection on which a chat request was sent."""
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", local.port))
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        + f"Authorization: Bearer {local.key}\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    return connection


def leave(connection: socket.socket, how: str) -> None:
    """Close (FIN) or reset (RST) a connection."""
    if how == "RST":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def first_token_s(local: LocalModel, turn: int) -> float:
    """Seconds to the first token of a short request."""
    begun = time.perf_counter()
    answered(local, body_of(local, 4, turn, 1, True, True))
    return time.perf_counter() - begun


def answered(local: LocalModel, body: dict[str, Any]) -> list[tuple[float, bytes]]:
    """The lines of a streamed answer, each with its time."""
    connection = http.client.HTTPConnection("127.0.0.1", local.port, timeout=600)
    head = {"Authorization": f"Bearer {local.key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), head)
    response = connection.getresponse()
    assert response.status == 200, response.read()
    found = [(time.perf_counter(), line) for line in response if line.startswith(b"data:")]
    connection.close()
    return found


def longest_batch_s(local: LocalModel, tokens: int, turn: int) -> float:
    """The longest time that the engine was busy with one piece of a prompt; BATCH_S where it does not say."""
    if not local.features.get("prompt_progress"):
        return BATCH_S
    seen = [
        at
        for at, line in answered(local, body_of(local, tokens, turn, 1, True, True))
        if b'"prompt_progress":' in line
    ]
    return max((b - a for a, b in itertools.pairwise(seen)), default=BATCH_S)


def wait_s(
    local: LocalModel, moment: str, how: str, tokens: int, output: int, turn: int, contract: bool = True
) -> float:
    """Seconds that a second request waits because the first one's client has left at that moment (its own time taken off)."""
    own = statistics.median(first_token_s(local, turn + i) for i in range(3))
    stream = moment != "non-stream"
    connection = send(
        local, body_of(local, tokens if moment != "mid-stream" else 8, turn, output, stream, contract)
    )
    if moment == "mid-stream":
        got = b""
        while got.count(b'"content":"') < 2 and got.count(b'"content": "') < 2:
            got += connection.recv(1 << 16)
    else:
        time.sleep(0.1)  # it is being read now
    leave(connection, how)
    begun = time.perf_counter()
    answered(local, body_of(local, 4, turn + 9, 1, True, True))
    return max(0.0, time.perf_counter() - begun - own)


def table(engine: str, folder: Path, options: argparse.Namespace, log: Path) -> list[dict[str, Any]]:
    """A row a moment and way of leaving: medians and the longest of `repeats`."""
    rows: list[dict[str, Any]] = []
    context = options.prompt * 2 + options.output + 64
    for contract in (True, False):
        more = {"batch_s": BATCH_S} if contract else {}
        with LocalModel(
            folder, engine, log=log, threads=options.threads, context=context, options={**more, "slots": 1}
        ) as local:
            turn = 0
            batch = longest_batch_s(local, options.words, 1) if contract else None
            for moment in MOMENTS:
                for how in ("FIN", "RST"):
                    waits = []
                    for _ in range(options.repeats):
                        turn += 20
                        # llama.cpp's server is always asked for a stream, also for clients that want none
                        asked = (
                            "prompt"
                            if contract and moment == "non-stream" and local.features.get("prompt_progress")
                            else moment
                        )
                        waits.append(wait_s(local, asked, how, options.words, options.output, turn, contract))
                    rows.append({
                        "engine": engine, "contract": contract, "moment": moment, "how": how, "batch": local.batch,
                        "micro_batch_s": batch, "median_s": statistics.median(waits), "longest_s": max(waits),
                    })  # fmt: skip
    return rows


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}{{ 'assistant:' }}"
)


def random_gguf(out: Path, width: int, feed: int, layers: int, heads: int, kv_heads: int) -> Path:
    """A Llama of random weights in Q4_0 that reads bytes; its answers are noise, its arithmetic is real."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType

    writer = GGUFWriter(out, "llama")
    # GPT-2's names of bytes: printable ones stand for themselves, others for what comes from 256 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    letters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    tokens = ["<|end|>", *letters, letters[ord("e")] + letters[ord(" ")]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] + [TokenType.NORMAL] * (len(tokens) - 1))
    writer.add_token_merges([f"{letters[ord('e')]} {letters[ord(' ')]}"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    vocabulary = len(tokens)
    writer.add_vocab_size(vocabulary)
    writer.add_context_length(16384)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(feed)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    chance = np.random.default_rng(0)

    def q4(name: str, rows: int, columns: int) -> None:
        blocks = chance.integers(0, 256, (rows, columns // 32, 18), dtype=np.uint8)
        blocks[:, :, :2] = np.array([0.004], dtype="<f2").view(np.uint8)  # each block's scale
        writer.add_tensor(f"{name}.weight", blocks.reshape(rows, -1), raw_dtype=GGMLQuantizationType.Q4_0)

    ones = np.ones(width, dtype=np.float32)
    small = width // heads * kv_heads
    q4("token_embd", vocabulary, width)
    writer.add_tensor("output_norm.weight", ones)
    for layer in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", ones)
        for name, rows, columns in (
            ("attn_q", width, width), ("attn_k", small, width), ("attn_v", small, width), ("attn_output", width, width),
            ("ffn_gate", feed, width), ("ffn_up", feed, width), ("ffn_down", width, feed),
        ):  # fmt: skip
            q4(f"blk.{layer}.{name}", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


SIZES = {"1b": (2048, 5632, 24, 32, 4), "small": (512, 1536, 8, 8, 4)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*")
    parser.add_argument("--random", choices=SIZES)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--prompt", type=int, default=1000)
    parser.add_argument("--output", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        models = [(name.partition("=")[0], Path(name.partition("=")[2])) for name in options.models]
        options.words = options.prompt
        if options.random:
            options.words = round(options.prompt / BYTES_A_WORD)
            made = random_gguf(Path(scratch, "random.gguf"), *SIZES[options.random])
            models.append(("gguf", made))
        rows = [
            row for engine, folder in models for row in table(engine, folder, options, Path(scratch, "log"))
        ]
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(
        "| engine | left | by | tokens a batch | one micro-batch, s | free after, s: median, longest | without the contract |"
    )
    print("|---|---|---|---|---|---|---|")
    kept = {(r["engine"], r["moment"], r["how"]): r for r in rows if not r["contract"]}
    for row in (r for r in rows if r["contract"]):
        other = kept[row["engine"], row["moment"], row["how"]]
        print(
            f"| {row['engine']} | {row['moment']} | {row['how']} | {row['batch'] or '-'} | {row['micro_batch_s']:.2f} "
            f"| {row['median_s']:.2f}, {row['longest_s']:.2f} | {other['median_s']:.2f}, {other['longest_s']:.2f} |"
        )


if __name__ == "__main__":
    main()
