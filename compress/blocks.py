"""GGUF's quantized blocks as a grid and codes: value = scale * level(code) - offset.

Knows the layout of ggml's block types (ggml-common.h) and nothing about how a code is chosen. A tensor's bytes are
uint8 [rows, row bytes]; its grid and codes are [rows, columns].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray

# IQ4_NL's and IQ4_XS's sixteen levels (ggml: kvalues_iq4nl).
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Layout:
    """One block type: how many values and bytes a block has, and the levels its codes stand for."""

    values: int
    size_bytes: int
    levels: tuple[int, ...]


LAYOUTS = {
    "q4_0": Layout(32, 18, tuple(range(-8, 8))),
    "q4_1": Layout(32, 20, tuple(range(16))),
    "q5_0": Layout(32, 22, tuple(range(-16, 16))),
    "q5_1": Layout(32, 24, tuple(range(32))),
    "q8_0": Layout(32, 34, tuple(range(-128, 128))),
    "q2_k": Layout(256, 84, tuple(range(4))),
    "q3_k": Layout(256, 110, tuple(range(-4, 4))),
    "q4_k": Layout(256, 144, tuple(range(16))),
    "q5_k": Layout(256, 176, tuple(range(32))),
    "q6_k": Layout(256, 210, tuple(range(-32, 32))),
    "iq4_nl": Layout(32, 18, IQ4_LEVELS),
    "iq4_xs": Layout(256, 136, IQ4_LEVELS),
}


def grid(kind: str, data: Array) -> tuple[Array, Array]:
    """(scale, offset) of every value, float32 [rows, columns], out of a tensor's bytes."""
    layout = LAYOUTS[kind]
    rows = data.shape[0]
    blocks = np.ascontiguousarray(data).reshape(-1, layout.size_bytes)
    scale, offset = _GRIDS[kind](blocks)
    repeat = layout.values // scale.shape[1]
    scale = np.repeat(scale.astype(np.float32), repeat, axis=1).reshape(rows, -1)
    if offset is None:
        return scale, np.zeros_like(scale)
    return scale, np.repeat(offset.astype(np.float32), repeat, axis=1).reshape(rows, -1)


def pack(kind: str, data: Array, codes: Array) -> Array:
    """A tensor's bytes with its codes replaced; `codes` index the layout's levels, uint8 [rows, columns]."""
    layout = LAYOUTS[kind]
    blocks = np.ascontiguousarray(data).reshape(-1, layout.size_bytes).copy()
    _PACKS[kind](blocks, np.ascontiguousarray(codes, dtype=np.uint8).reshape(-1, layout.values))
    return blocks.reshape(data.shape)


def _half(blocks: Array, start: int) -> Array:
    """A float16 at a byte of every block, float32 [blocks, 1]."""
    return blocks[:, start : start + 2].copy().view(np.float16).astype(np.float32)


def _six_bits(packed: Array) -> tuple[Array, Array]:
    """Q4_K's and Q5_K's eight scales and eight mins of 6 bits, out of 12 bytes."""
    low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=1)
    mins = np.concatenate([middle & 63, (high >> 4) | ((middle >> 6) << 4)], axis=1)
    return scales, mins


def _q3_scales(packed: Array) -> Array:
    """Q3_K's sixteen scales of 6 bits around 32, out of 12 bytes."""
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = np.concatenate([(packed[:, 8:12] >> (2 * k)) & 3 for k in range(4)], axis=1)
    return (low | (high << 4)).astype(np.int16) - 32


def _iq4_xs_scales(blocks: Array) -> Array:
    """IQ4_XS's eight scales of 6 bits around 32: 4 low bits each in bytes 4 to 7, 2 high bits each in bytes 2 and 3."""
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(len(blocks), 8)
    packed = blocks[:, 2:4].copy().view(np.uint16)
    high = np.concatenate([(packed >> (2 * k)) & 3 for k in range(8)], axis=1)
    return (low | (high << 4)).astype(np.int16) - 32


def _k_grid(blocks: Array) -> tuple[Array, Array]:
    scales, mins = _six_bits(blocks[:, 4:16])
    return _half(blocks, 0) * scales, _half(blocks, 2) * mins


_GRIDS: dict[str, Any] = {
    "q4_0": lambda b: (_half(b, 0), None),
    "q4_1": lambda b: (_half(b, 0), -_half(b, 2)),
    "q5_0": lambda b: (_half(b, 0), None),
    "q5_1": lambda b: (_half(b, 0), -_half(b, 2)),
    "q8_0": lambda b: (_half(b, 0), None),
    "q2_k": lambda b: (_half(b, 80) * (b[:, :16] & 15), _half(b, 82) * (b[:, :16] >> 4)),
    "q3_k": lambda b: (_half(b, 108) * _q3_scales(b[:, 96:108]), None),
    "q4_k": _k_grid,
    "q5_k": _k_grid,
    "q6_k": lambda b: (_half(b, 208) * b[:, 192:208].copy().view(np.int8), None),
    "iq4_nl": lambda b: (_half(b, 0), None),
    "iq4_xs": lambda b: (_half(b, 0) * _iq4_xs_scales(b), None),
}


def _nibbles(codes: Array) -> Array:
    """Blocks of 32 as 16 bytes: value l in the low half of byte l, value l + 16 in the high half."""
    return (codes[:, :16] & 15) | ((codes[:, 16:] & 15) << 4)


def _fifth_bits(codes: Array) -> Array:
    """The fifth bit of 32 codes as 4 bytes, value l in bit l."""
    return np.packbits(codes >> 4, axis=1, bitorder="little")


def _pack_simple(start: int) -> Any:
    def pack_(blocks: Array, codes: Array) -> None:
        blocks[:, start : start + 16] = _nibbles(codes)

    return pack_


def _pack_five(start: int) -> Any:
    def pack_(blocks: Array, codes: Array) -> None:
        blocks[:, start : start + 4] = _fifth_bits(codes)
        blocks[:, start + 4 : start + 20] = _nibbles(codes)

    return pack_


def _pack_q8_0(blocks: Array, codes: Array) -> None:
    blocks[:, 2:34] = codes ^ 128  # level = code - 128, as two's complement


def _k_nibbles(codes: Array) -> Array:
    """256 codes as 128 bytes: of each 64 values the first 32 in the low halves, the others in the high ones."""
    parts = codes.reshape(-1, 4, 2, 32) & 15
    return (parts[:, :, 0] | (parts[:, :, 1] << 4)).reshape(-1, 128)


def _pack_q4_k(blocks: Array, codes: Array) -> None:
    blocks[:, 16:144] = _k_nibbles(codes)


def _pack_q5_k(blocks: Array, codes: Array) -> None:
    fifth = (codes >> 4).reshape(-1, 8, 32)  # value l of 32-group g in bit g of byte l
    blocks[:, 16:48] = np.bitwise_or.reduce(fifth << np.arange(8, dtype=np.uint8)[None, :, None], axis=1)
    blocks[:, 48:176] = _k_nibbles(codes)


def _pack_q6_k(blocks: Array, codes: Array) -> None:
    parts = codes.reshape(-1, 2, 4, 32)  # of each 128 values four runs of 32
    low = parts & 15
    blocks[:, :128] = np.concatenate(
        [low[:, :, 0] | (low[:, :, 2] << 4), low[:, :, 1] | (low[:, :, 3] << 4)], axis=2
    ).reshape(-1, 128)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[None, None, :, None]
    blocks[:, 128:192] = np.bitwise_or.reduce((parts >> 4) << shifts, axis=2).reshape(-1, 64)


def _two_bits(codes: Array) -> Array:
    """256 codes as 64 bytes: of each 128 values the four runs of 32 in bits 0-1, 2-3, 4-5, 6-7 of 32 bytes."""
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[None, None, :, None]
    return np.bitwise_or.reduce((codes.reshape(-1, 2, 4, 32) & 3) << shifts, axis=2).reshape(-1, 64)


def _pack_q2_k(blocks: Array, codes: Array) -> None:
    blocks[:, 16:80] = _two_bits(codes)


def _pack_q3_k(blocks: Array, codes: Array) -> None:
    third = (codes >> 2).reshape(-1, 8, 32)  # set: no 4 is taken off
    blocks[:, :32] = np.bitwise_or.reduce(third << np.arange(8, dtype=np.uint8)[None, :, None], axis=1)
    blocks[:, 32:96] = _two_bits(codes)


def _pack_iq4_xs(blocks: Array, codes: Array) -> None:
    parts = codes.reshape(-1, 8, 2, 16)
    blocks[:, 8:136] = (parts[:, :, 0] | (parts[:, :, 1] << 4)).reshape(-1, 128)


_PACKS: dict[str, Any] = {
    "q4_0": _pack_simple(2),
    "q4_1": _pack_simple(4),
    "q5_0": _pack_five(2),
    "q5_1": _pack_five(4),
    "q8_0": _pack_q8_0,
    "q2_k": _pack_q2_k,
    "q3_k": _pack_q3_k,
    "q4_k": _pack_q4_k,
    "q5_k": _pack_q5_k,
    "q6_k": _pack_q6_k,
    "iq4_nl": _pack_simple(2),
    "iq4_xs": _pack_iq4_xs,
}
