"""Call every function of a fresh library once, in a process that may die of it: `python trial.py LIBRARY SOURCE HEAD`.

Standard library only, so that it starts at once. Whether the results are right is asked later, against torch.
"""

from __future__ import annotations

import ctypes
import sys

ROWS, TOKENS, COLUMNS = 2, 9, 16


def floats(count: int) -> ctypes.Array:
    """A buffer of small numbers."""
    return (ctypes.c_float * count)(*(0.01 * (i % 7) for i in range(count)))


def integers(*values: int) -> ctypes.Array:
    """A buffer of 64-bit integers."""
    return (ctypes.c_int64 * len(values))(*values)


def struct(*values: ctypes.Array | ctypes.c_int64 | ctypes.c_float | None) -> ctypes.Structure:
    """A C struct of these fields; an array, or None, is a pointer."""
    plain = (ctypes.c_int64, ctypes.c_float)
    kinds = [type(value) if isinstance(value, plain) else ctypes.c_void_p for value in values]
    made = type("Struct", (ctypes.Structure,), {"_fields_": [(f"field{i}", kind) for i, kind in enumerate(kinds)]})
    told = made(*(ctypes.addressof(v) if isinstance(v, ctypes.Array) else v for v in values))
    told.kept = values  # what it points to lives as long as it does
    return told


def main(path: str, source: str, head: int) -> None:
    """Two rows, two heads, one key-value head."""
    library = ctypes.CDLL(path)
    number, scale = ctypes.c_int64, ctypes.c_float(0.3)
    if source == "attention.c":
        total = ROWS * TOKENS
        wide, narrow, logsum = total * 2 * head, total * head, floats(total * 2)
        q, k, v, out, starts = floats(wide), floats(narrow), floats(narrow), floats(wide), integers(0, TOKENS, total)
        sizes = (number(ROWS), number(2), number(1), scale)
        library.attention_forward(q, k, v, starts, out, logsum, *sizes)
        slopes = floats(wide), floats(narrow), floats(narrow)
        library.attention_backward(q, k, v, starts, out, logsum, floats(wide), *slopes, *sizes)
    elif source == "layer.c":
        wide, width, a, b, c, d = number(ROWS * 2 * head), number(head), *(floats(ROWS * 2 * head) for _ in range(4))
        parts, inverse = floats(3 * head), floats(2 * ROWS)
        library.norm_forward(a, floats(head), b, inverse, number(2 * ROWS), width, ctypes.c_float(1e-6))
        library.norm_backward(a, floats(head), inverse, b, c, parts, number(2 * ROWS), width, number(3))
        library.gate_forward(a, b, c, wide)
        library.gate_backward(a, b, c, d, floats(ROWS * 2 * head), wide)
        library.turn_heads(a, floats(ROWS * head), floats(ROWS * head), b, number(ROWS), number(2), scale)
    else:
        heads, kv, width, inner, wide = 2, 1, 5, 3, int(library.panel())
        keys, values = floats(ROWS * head * COLUMNS), floats(ROWS * head * COLUMNS)
        cosines, sines, places, first = floats(TOKENS * head), floats(TOKENS * head), integers(1, 0), integers(0, 3)
        sizes = map(number, (heads, kv, 1, TOKENS - 1))
        cache = struct(keys, values, cosines, sines, places, first, *sizes, scale)
        qkv, out = floats(ROWS * (heads + 2 * kv) * head), floats(ROWS * heads * head)
        library.attend(ctypes.byref(cache), qkv, out, number(ROWS))
        library.rms_norm(floats(ROWS * head), out, number(ROWS), number(head), ctypes.c_float(1e-6))
        library.swiglu(floats(ROWS * 2 * head), out, number(ROWS), number(head))

        def panels(columns: int, depth: int) -> ctypes.Array:
            return floats(-(-columns // wide) * wide * depth)

        combined = (heads + 2 * kv) * head
        matrices = panels(combined, width), floats(combined), panels(width, heads * head), panels(2 * inner, width)
        layer = struct(*matrices, panels(width, inner), keys, values)
        embedding, logits = floats(7 * width), floats((ROWS + int(library.tile())) * wide)
        told = map(number, (1, width, inner, 7, 7))
        model = struct((type(layer) * 1)(layer), embedding, panels(7, width), *told, ctypes.c_float(1e-6))
        tokens = integers(*range(ROWS))
        library.step(ctypes.byref(model), ctypes.byref(cache), tokens, logits, number(ROWS), number(library.tile()))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
