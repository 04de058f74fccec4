"""Packed rows: how a model is made to see each row alone, and the check that it does.

Two ways, tried in this order on the model at hand:

``attention``
    The model's attention is replaced by :func:`packed_attention` while rows are packed. Fast; windows, soft-capping and
    attention sinks are known to it. The model has to use transformers' attention interface and to hand keywords on.
``mask``
    Positions start at 0 in every row, and transformers makes the mask from them. Its memory grows with the square of
    the tokens.

A model that gives other hidden states packed than padded by both is refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from thence.errors import UserError, first_line
from thence.kernels.attention import packed_causal_attention
from thence.models.layers import check_model, decoder_of
from thence.models.probing import (
    MOST_ROUNDING,
    WINDOW,
    largest_difference,
    nudged,
    probe_tokens,
    short_windows,
    tolerance,
)
from thence.models.quick_layers import quick_layers
from thence.models.ulysses import Piece, attend_in_pieces

Way = Literal["attention", "mask"]
ATTENTION = "thence_packed"
ROUNDINGS = 10  # so many times what one rounding of the embeddings does is still rounding
PROBE_LENGTHS = (19, 23, 11)  # of the rows of the check; with windows made WINDOW long, two are longer

_ways: weakref.WeakKeyDictionary[nn.Module, Way | UserError] = weakref.WeakKeyDictionary()


def way_of(model: Any) -> Way:
    """How this model packs; found by trying, once for every model.

    Raises:
        UserError: packed rows do not give what padded rows give.
    """
    if model not in _ways:
        try:
            _ways[model] = _found_way(model)
        except UserError as error:
            _ways[model] = error
    found = _ways[model]
    if isinstance(found, UserError):
        raise found
    return found


def is_known(model: Any) -> bool:
    """Whether :func:`way_of` has been asked of this model, or was told."""
    return model in _ways


def know_way(model: Any, way: Way) -> None:
    """Take over how this model packs, where another rank has found it with the whole model."""
    _ways[model] = way


@contextmanager
def attending(model: Any, packing: bool) -> Iterator[None]:
    """While it lasts, the model attends as packed rows need it; afterwards it is as it was.

    The backward pass belongs inside: activation checkpointing runs the forward pass again.
    """
    if not packing or way_of(model) != "attention":
        yield
        return
    with _replaced_attention(model):
        yield


def packed_hidden_states(
    decoder: Any, token_ids: Tensor, lengths: tuple[int, ...], way: Way, piece: Piece | None = None
) -> Tensor:
    """Last hidden states of rows that lie end to end, shape (1, total, D); inside :func:`attending`.

    Args:
        token_ids: (1, total), or (1, n) where this rank holds a piece of n tokens.
        lengths: tokens of each row, all pieces together.

    Raises:
        UserError: the rows are cut in pieces, and the model's attention is not known to work so.
    """
    positions = torch.cat([torch.arange(n, device=token_ids.device) for n in lengths])[None]
    if piece is not None:
        if way != "attention":
            raise _uncut(type(decoder).__name__)
        positions = positions[:, piece.of(positions.shape[1])]
    if way == "mask":
        return decoder(input_ids=token_ids, position_ids=positions, use_cache=False).last_hidden_state
    # transformers takes a mask of four dimensions as finished; ours is not looked at (see packed_attention)
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=token_ids.device)
    output = decoder(
        input_ids=token_ids,
        position_ids=positions,
        attention_mask=no_mask,
        use_cache=False,
        packed_lengths=lengths,
        **({} if piece is None else {"packed_piece": piece}),
    )
    return output.last_hidden_state


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_lengths: tuple[int, ...] | None = None,
    packed_piece: Piece | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each packed row over itself alone, by transformers' attention interface.

    Args:
        query: (1, heads, T, head size); key and value may have fewer heads.
        packed_lengths: tokens of each row, end to end along T.
        packed_piece: T tokens are only this rank's part of the rows.
        sliding_window, softcap, s_aux: as in :func:`~thence.kernels.attention.packed_causal_attention`.

    Returns:
        (1, T, heads, value size), and no attention weights.

    Raises:
        UserError: the model asks for something that this function does not do.
    """
    if packed_lengths is None or position_bias is not None or is_causal is False or dropout:
        what = "its layers do not hand on where rows end" if packed_lengths is None else "it has attention of its own"
        raise _refusal(type(module).__name__, what)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks_H = s_aux if s_aux is None or packed_piece is None else s_aux[packed_piece.of(len(s_aux))]
    how = {"window": sliding_window, "softcap": softcap, "sinks_H": sinks_H}
    if packed_piece is None:
        return packed_causal_attention(q, k, v, packed_lengths, scale, **how)[None], None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_causal_attention(q, k, v, packed_lengths, scale, **how)

    return attend_in_pieces(packed_piece, q, k, v, attend)[None], None


def _found_way(model: Any) -> Way:
    check_model(model)
    with torch.no_grad():
        plain = _rows_alone(model, PROBE_LENGTHS)
        with short_windows(model) as window:
            expected = _rows_alone(model, PROBE_LENGTHS)
            if window is None or largest_difference(expected, plain) > 0:
                return _matching_way(model, PROBE_LENGTHS, expected)
        # the model has a window that cannot be made short from outside: rows as long as it
        lengths = (window + WINDOW, *PROBE_LENGTHS[1:])
        return _matching_way(model, lengths, _rows_alone(model, lengths))


def _rows_alone(model: Any, lengths: tuple[int, ...]) -> Tensor:
    rows = probe_tokens(model, sum(lengths)).split(lengths)
    decoder = decoder_of(model)
    return torch.cat([decoder(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in rows])


def _matching_way(model: Any, lengths: tuple[int, ...], expected: Tensor) -> Way:
    """The first way whose packed hidden states are those of the rows alone. Raises UserError."""
    token_ids, reasons = probe_tokens(model, sum(lengths))[None], []
    usual = allowed = tolerance(expected.dtype, expected.device)
    ways: tuple[Way, ...] = ("attention", "mask")
    for way in ways:
        try:
            with _replaced_attention(model) if way == "attention" else nullcontext():
                packed = packed_hidden_states(decoder_of(model), token_ids, lengths, way)[0]
        except Exception as error:  # any error of a model's own code means: not this way
            reasons.append(first_line(error))
            continue
        difference = largest_difference(packed, expected)
        if difference > usual == allowed:  # a model that makes roundings large, or rows that see each other?
            allowed = max(usual, min(ROUNDINGS * _rounding(model, lengths, expected), MOST_ROUNDING))
        if difference <= allowed:
            return way
        reasons.append(f"hidden states are off by {difference:.1g}")
    raise _refusal(type(model).__name__, f"by its attention: {reasons[0]}; by a mask: {reasons[1]}")


def _rounding(model: Any, lengths: tuple[int, ...], expected: Tensor) -> float:
    """What one rounding of the input embeddings does to the hidden states, relative to their size."""
    with nudged(model):
        return largest_difference(_rows_alone(model, lengths), expected)


@contextmanager
def _replaced_attention(model: Any) -> Iterator[None]:
    """The model's modules read the name of their attention from their configurations."""
    if model.config._attn_implementation_internal == ATTENTION:
        yield
        return
    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = [
        (c, c._attn_implementation_internal) for c in configs.values() if hasattr(c, "_attn_implementation_internal")
    ]
    try:
        for config, _ in before:
            config._attn_implementation_internal = ATTENTION
        with quick_layers(model, packed_attention):
            yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


def _refusal(name: str, why: str) -> UserError:
    return UserError(f"{name} cannot be packed: {why}", remedy="set packing = false", field="packing")


def _uncut(name: str) -> UserError:
    return UserError(
        f"rows of {name} cannot be cut over ranks: its attention cannot be replaced",
        remedy="set sharding.context = 1",
        field="sharding.context",
    )
