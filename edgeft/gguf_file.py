"""GGUF files opened for their tensors.

gguf-py's reader builds arrays for each token and merge of the vocabulary, most of the time that opening takes: 3 s for
49,152 tokens, where this one steps over them in 0.1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType

LONGEST_READ = 4096  # elements


class Tensors(GGUFReader):
    """gguf-py's reader; fields that hold an array of more than LONGEST_READ elements have no contents."""

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        if raw_type == GGUFValueType.ARRAY:
            kind = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
            count = int(self._get(orig_offs + 4, np.uint64)[0])
            start = orig_offs + 12
            if count > LONGEST_READ and self.byte_order == "I" and kind != GGUFValueType.ARRAY:
                if kind == GGUFValueType.STRING:
                    end = _after_strings(self.data.data, start, count)
                else:
                    end = start + count * np.dtype(self.gguf_scalar_to_np[kind]).itemsize
                return end - orig_offs, [], [], [GGUFValueType.ARRAY, kind]
        return super()._get_field_parts(orig_offs, raw_type)


def _after_strings(view: memoryview, at: int, count: int) -> int:
    """Where `count` strings end that begin at `at`, each eight bytes of its length and the text."""
    for _ in range(count):
        at += 8 + int.from_bytes(view[at : at + 8], "little")
    return at
