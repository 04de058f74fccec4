"""A decoding step of a Llama-like model in C: the functions of ``decode.c`` on contiguous float32 tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, rms_norm, silu

from thence.kernels.addresses import address
from thence.kernels.build import load_library
from thence.kernels.numbers import plain_numbers

LANE = 16
"""Columns of a block of the cache, as in ``decode.c``."""
BLOCK = 32
"""Rows that a thread takes at once: enough to read each weight seldom, few enough to share rows out evenly."""

pointer, number = ctypes.c_void_p, ctypes.c_int64


class _Cache(ctypes.Structure):
    """``struct cache``."""

    _fields_ = [(name, pointer) for name in ("keys", "values", "cosines", "sines", "place", "first")] + [
        *((name, number) for name in ("heads", "kv", "blocks", "column")),
        ("scale", ctypes.c_float),
    ]


class _Layer(ctypes.Structure):
    """``struct layer``."""

    _fields_ = [(name, pointer) for name in ("qkv", "bias", "out", "gate_up", "down", "keys", "values")]


class _Model(ctypes.Structure):
    """``struct model``."""

    _fields_ = [
        *((name, pointer) for name in ("layers", "embedding", "head")),
        *((name, number) for name in ("depth", "width", "inner", "vocabulary", "embedded")),
        ("eps", ctypes.c_float),
    ]


@dataclass(frozen=True)
class Rows:
    """What the rows of a step share.

    Args:
        cos, sin: (positions, head size / 2).
        place: where in the cache each row is, (rows,), int64.
        first: first column of each row that is no padding, (rows,), int64.
        column: where the token goes.
    """

    cos: Tensor
    sin: Tensor
    place: Tensor
    first: Tensor
    column: int


@dataclass(frozen=True)
class Matrices:
    """A layer's matrices, each (out, in), norms' weights multiplied in.

    Args:
        qkv: queries, keys and values; ``bias`` is theirs.
        out: of attention.
        gate_up: gate, then up.
        down: back from the gate.
    """

    qkv: Tensor
    bias: Tensor | None
    out: Tensor
    gate_up: Tensor
    down: Tensor


class DecodeKernels:
    """The compiled functions for one head size, on contiguous float32 tensors."""

    def __init__(self, library: ctypes.CDLL):
        self._attend, self._rms_norm, self._swiglu = library.attend, library.rms_norm, library.swiglu
        self._step = library.step
        self._attend.argtypes = [pointer] * 3 + [number]
        self._step.argtypes = [pointer] * 4 + [number] * 2
        self._rms_norm.argtypes = [pointer] * 2 + [number] * 2 + [ctypes.c_float]
        self._swiglu.argtypes = [pointer] * 2 + [number] * 2
        self._attend.restype = self._step.restype = ctypes.c_int
        self._rms_norm.restype = self._swiglu.restype = None
        library.panel.restype = library.tile.restype = number
        self.panel, self.tile = int(library.panel()), int(library.tile())
        """Columns and rows of a matrix product's tile."""

    def attend(self, qkv: Tensor, keys: Tensor, values: Tensor, rows: Rows) -> Tensor:
        """Append one token a row to the cache in place and attend to all of its row.

        Args:
            qkv: (rows, (heads + 2 kv) * head size).
            keys: (places, blocks, kv, head size, ``LANE``); see :func:`keys_in_blocks`.
            values: (places, blocks, kv, ``LANE``, head size); see :func:`values_in_blocks`.

        Returns:
            (rows, heads * head size).

        Raises:
            MemoryError: no room for a row's scores.
        """
        kv, head_size = keys.shape[2:4]
        heads = qkv.shape[1] // head_size - 2 * kv
        out = qkv.new_empty(len(qkv), heads * head_size)
        cache = _cache(keys, values, rows, heads)
        if self._attend(ctypes.byref(cache), address(qkv), address(out), len(qkv)):
            raise MemoryError("no memory for the scores of a decoding step")
        return out

    def rms_norm(self, x: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm of every row, without weights."""
        out = torch.empty_like(x)
        self._rms_norm(address(x), address(out), *x.shape, eps)
        return out

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """``silu(gate) * up`` of rows that hold gate and up side by side."""
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, width)
        self._swiglu(address(gate_up), address(out), rows, width)
        return out


class WholeStep:
    """A decoding step through all layers in one call. Threads share rows, so none waits for another within a step.

    Each thread reads all weights, so it pays for models that fit the processor's caches.

    Args:
        embedding: (vocabulary, width).
        head: the output layer, (vocabulary, width).
        caches: keys and values of each layer, as :meth:`DecodeKernels.attend` has them; they change in place.
    """

    def __init__(
        self,
        kernels: DecodeKernels,
        embedding: Tensor,
        layers: Sequence[Matrices],
        head: Tensor,
        caches: Sequence[tuple[Tensor, Tensor]],
        eps: float,
    ):
        self.kernels, self.caches, self.vocabulary = kernels, caches, len(head)
        # what the pointers point to; detached, since a parameter can be given other storage
        self.kept: list[Tensor] = [embedding.detach().contiguous()]
        self.heads = layers[0].out.shape[1] // caches[0][0].shape[3]
        told = (_Layer * len(layers))()
        for layer, (keys, values), to in zip(layers, caches, told, strict=True):
            to.qkv, to.out, to.gate_up, to.down = map(self._panels, (layer.qkv, layer.out, layer.gate_up, layer.down))
            to.bias = None if layer.bias is None else self._kept(layer.bias)
            to.keys, to.values = address(keys), address(values)
        width, inner = embedding.shape[1], layers[0].down.shape[1]
        sizes = (len(layers), width, inner, self.vocabulary, len(embedding))
        self.told = told
        self.model = _Model(ctypes.addressof(told), address(self.kept[0]), self._panels(head), *sizes, eps)

    def __call__(self, token: Tensor, rows: Rows) -> Tensor:
        """Logits (rows, vocabulary) after one token a row, (rows,), int64.

        Raises:
            MemoryError: no room for the rows of a thread.
            IndexError: a token that has no embedding.
        """
        tile, n, token = self.kernels.tile, len(token), token.to(torch.int64).contiguous()
        share = -(-n // (2 * torch.get_num_threads()))
        block = min(BLOCK, -(-share // tile) * tile)
        width = -(-self.vocabulary // self.kernels.panel) * self.kernels.panel
        logits = rows.cos.new_empty(n + tile, width)  # the last tile may reach past the last row
        cache = _cache(*self.caches[0], rows, self.heads)
        told = ctypes.byref(self.model), ctypes.byref(cache)
        failed = self.kernels._step(*told, address(token, torch.int64), address(logits), n, block)
        if failed == 2:
            raise IndexError(f"a token is not one of the {self.model.embedded} that have an embedding")
        if failed:
            raise MemoryError("no memory for the rows of a decoding step")
        return logits[:n, : self.vocabulary]

    def _panels(self, matrix: Tensor) -> int:
        """A matrix (out, in) in panels (out / panel, in, panel), filled up with zeros: where it is."""
        panel = self.kernels.panel
        filled = pad(matrix, (0, 0, 0, -len(matrix) % panel))
        return self._kept(filled.unflatten(0, (-1, panel)).transpose(1, 2))

    def _kept(self, tensor: Tensor) -> int:
        self.kept.append(tensor.detach().contiguous())
        return address(self.kept[-1])


def _cache(keys: Tensor, values: Tensor, rows: Rows, heads: int) -> _Cache:
    _, blocks, kv, head_size, _ = keys.shape
    numbers = map(address, (keys, values, rows.cos, rows.sin))
    whole = (address(tensor, torch.int64) for tensor in (rows.place, rows.first))
    return _Cache(*numbers, *whole, heads, kv, blocks, rows.column, head_size**-0.5)


def keys_in_blocks(keys: Tensor) -> Tensor:
    """Keys (rows, kv, columns, head size) as the kernels want them: (rows, blocks, kv, head size, ``LANE``)."""
    return _in_blocks(keys).transpose(-2, -1).contiguous()


def values_in_blocks(values: Tensor) -> Tensor:
    """Values (rows, kv, columns, head size) as the kernels want them: (rows, blocks, kv, ``LANE``, head size)."""
    return _in_blocks(values).contiguous()


def _in_blocks(x: Tensor) -> Tensor:
    """Whole blocks of columns, zeros at the end: (rows, blocks, kv, ``LANE``, head size)."""
    return pad(x, (0, 0, 0, -x.shape[2] % LANE)).unflatten(2, (-1, LANE)).transpose(1, 2)


def decode_kernels(head_size: int) -> DecodeKernels | None:
    """The kernels for a head size, or None where they cannot be built."""
    library = load_library("decode.c", head_size, _is_torchs)
    return None if library is None else DecodeKernels(library)


def _is_torchs(head_size: int, library: ctypes.CDLL) -> bool:
    """Whether a decoding step's attention, norm, gate and the whole step are torch's, and a NaN does not vanish."""
    kernels = DecodeKernels(library)
    return _small_parts_are(kernels) and _attention_is(kernels, head_size) and _step_is(kernels, head_size)


def _close(ours: Tensor, exact: Tensor) -> bool:
    return torch.allclose(ours, exact, rtol=1e-4, atol=1e-5)


def _small_parts_are(kernels: DecodeKernels) -> bool:
    x, gates = plain_numbers(3, 37), plain_numbers(3, 50, place=1)
    if not _close(kernels.rms_norm(x, 1e-6), rms_norm(x, x.shape[-1:], eps=1e-6)):
        return False
    if not _close(kernels.swiglu(gates), silu(gates[:, :25]) * gates[:, 25:]):
        return False
    x[1, 3] = gates[1, 3] = float("nan")
    return bool(kernels.rms_norm(x, 1e-6)[1].isnan().all() and kernels.swiglu(gates)[1, 3].isnan())


def _attention_is(kernels: DecodeKernels, head_size: int) -> bool:
    heads, kv, capacity, column = 4, 2, 2 * LANE, LANE + 3
    qkv = plain_numbers(2, (heads + 2 * kv) * head_size, place=2)
    angles = plain_numbers(capacity, head_size // 2, place=3)
    place, first = torch.tensor([2, 0]), torch.tensor([0, 3])  # of a cache of three places
    rows = Rows(angles.cos(), angles.sin(), place, first, column)
    past_k, past_v = (plain_numbers(3, kv, capacity, head_size, place=i) for i in (4, 5))
    keys, values = keys_in_blocks(past_k), values_in_blocks(past_v)
    out = kernels.attend(qkv, keys, values, rows)

    heads_of_row = qkv.reshape(2, heads + 2 * kv, head_size)
    turned = torch.stack([_turned(heads_of_row[r], angles[column - int(first[r])]) for r in range(2)])
    past_k[place, :, column], past_v[place, :, column] = turned[:, heads : heads + kv], heads_of_row[:, heads + kv :]
    for r in range(2):
        seen = slice(int(first[r]), column + 1)
        k, v = (p[place[r], :, seen].repeat_interleave(heads // kv, 0) for p in (past_k, past_v))
        share = (k @ turned[r, :heads, :, None]).squeeze(-1).mul(head_size**-0.5).softmax(-1)
        if not _close(out[r], (share[:, None] @ v).reshape(-1)):
            return False
    keys[:, 1, :, :, 2] = float("nan")
    return bool(kernels.attend(qkv, keys, values, rows).isnan().all())


def _step_is(kernels: DecodeKernels, head_size: int) -> bool:
    """Two layers with a bias, of odd sizes, for more rows than a thread takes at once."""
    heads, kv, width, inner, vocabulary, n = 2, 1, 13, 21, 35, 2 * kernels.tile + 3
    shapes = ((heads + 2 * kv) * head_size, width), (width, heads * head_size), (2 * inner, width), (width, inner)
    layers = []
    for i in range(2):
        qkv, out, gate_up, down = (0.3 * plain_numbers(*shape, place=10 * i + j) for j, shape in enumerate(shapes))
        layers.append(Matrices(qkv, plain_numbers(len(qkv), place=7 + i), out, gate_up, down))
    embedding, head = (plain_numbers(vocabulary, width, place=i) for i in (30, 31))
    angles, token = plain_numbers(LANE, head_size // 2, place=3), torch.arange(n) % vocabulary
    rows = Rows(angles.cos(), angles.sin(), torch.arange(n), torch.zeros(n, dtype=torch.int64), 1)
    past = [plain_numbers(n, kv, 1, head_size, place=i) for i in (40, 41)]
    caches, own = ([(keys_in_blocks(past[0]), values_in_blocks(past[1])) for _ in layers] for _ in range(2))
    x = embedding[token]
    for layer, cache in zip(layers, own, strict=True):
        qkv = linear(rms_norm(x, (width,), eps=1e-6), layer.qkv, layer.bias)
        x = x + linear(kernels.attend(qkv, *cache, rows), layer.out)
        gate, up = linear(rms_norm(x, (width,), eps=1e-6), layer.gate_up).chunk(2, -1)
        x = x + linear(silu(gate) * up, layer.down)
    step = WholeStep(kernels, embedding, layers, head, caches, 1e-6)
    if not _close(step(token, rows), linear(rms_norm(x, (width,), eps=1e-6), head)):
        return False
    caches[1][1][4, 0, 0, 0, 0] = float("nan")
    spoiled = step(token, rows).isnan()
    return bool(spoiled[4].all() and spoiled.sum() == vocabulary)


def _turned(x: Tensor, angle: Tensor) -> Tensor:
    """Heads (n, head size) turned by a position's angles (head size / 2)."""
    left, right = x.chunk(2, -1)
    return torch.cat([left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()], -1)
