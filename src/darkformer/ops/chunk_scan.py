"""One direction of `chunked` for traces: differentiable operators of torch, no loop over the length, nothing in place.

Blocks of 128 tokens are 8 chunks of 16. The sums before a chunk are those of the chunks before it in its block, added
one after the other, and those before the block: a prefix sum over the blocks by doubling (Hillis and Steele, 1986) in a
fixed number of steps, so the length may be a symbol. Inside a chunk far weights are log Σ exp(ℓ_q + ℓ_k) pair by pair:
no row can underflow, and nothing has to be looked at and computed again.
Time is linear in L, but a query takes exp of 16·m numbers where `chunk_forward` multiplies them; the log-features and
the sums of all chunks (L/16·m·d_v numbers a kv head) are in memory at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..features.affine import key_log_features, query_log_features
from .chunk_forward import Sums
from .state import LOG_ZERO, capped, gather_tokens
from .super_chunks import Frame, Tensors

CHUNK, BLOCK = 16, 128
#: Doublings where the length is a symbol: 2^16 blocks are 8 million tokens, whose sums no memory holds.
DOUBLINGS = 16


class _Running(NamedTuple):
    """Sums over keys, each feature scaled by exp(-scale)."""

    values: Tensor  # (…, m, d_v + 1) with the values' count, a value that is 1 for every key, last
    scale: Tensor  # (…, m)


def _join(earlier: _Running, later: _Running) -> _Running:
    """Sums over the keys of both, at the larger scale."""
    scale = torch.maximum(earlier.scale, later.scale)
    old, new = ((x.scale - scale).exp()[..., None] for x in (earlier, later))
    return _Running(old * earlier.values + new * later.values, scale)


def _delayed(sums: _Running, places: int) -> _Running:
    """What stood `places` earlier along dimension 2; sums over nothing before the first."""
    count = sums.scale.shape[2]
    values = F.pad(sums.values, (0, 0, 0, 0, places, 0))[:, :, :count]
    return _Running(values, F.pad(sums.scale, (0, 0, places, 0), value=LOG_ZERO)[:, :, :count])


def _prefixes(chunks: _Running, start: _Running) -> tuple[_Running, _Running]:
    """The sums before every chunk and after the last one.

    Args:
        chunks: of each chunk by itself, (B, G, N, m, …), N a multiple of a block's chunks. start: (B, G, m, …).
    """
    size, count, device = BLOCK // CHUNK, chunks.scale.shape[2], chunks.scale.device
    # Picked by index: a trace would ask of views as (blocks, chunks of a block) whether they are contiguous.
    first = torch.arange(count // size, device=device) * size
    single = [_Running(*(x.index_select(2, first + i) for x in chunks)) for i in range(size)]
    inside = list(itertools.accumulate(single, _join))
    blocks = _Running(*(torch.cat([x[:, :, None], y], dim=2) for x, y in zip(start, inside[-1], strict=True)))
    entries = blocks.scale.shape[2]
    for step in range((entries - 1).bit_length() if isinstance(entries, int) else DOUBLINGS):
        blocks = _join(_delayed(blocks, 2**step), blocks)
    before = _Running(*(x[:, :, :-1] for x in blocks))
    found = [
        before,
        *(_join(before, some) for some in inside[:-1]),
    ]  # all blocks' first chunks, their second …
    chunk = torch.arange(count, device=device)
    order = chunk % size * (count // size) + chunk // size
    return (
        _Running(*(torch.cat(x, dim=2).index_select(2, order) for x in zip(*found, strict=True))),
        _Running(*(x[:, :, -1] for x in blocks)),
    )


def _chunks(x: Tensor, extra: int, fill: float = 0.0) -> Tensor:
    """(B, G, [R,] L, d) → (B, G, N, [R,] C, d), `fill` in `extra` rows after the last token."""
    x = F.pad(x, (0, 0, 0, extra), value=fill).unflatten(-2, (-1, CHUNK))
    return x if x.dim() == 5 else x.transpose(2, 3)


def _flags(valid: Tensor, extra: int) -> Tensor:
    """(B, L, J) → (B, 1, N, 1, C, J), False after the last token."""
    return F.pad(valid, (0, 0, 0, extra)).unflatten(1, (-1, CHUNK))[:, None, :, None]


def _counted(value: Tensor) -> Tensor:
    """A column of ones behind the values: weights times it are the normaliser."""
    return F.pad(value, (0, 1), value=1.0)


#: Logits (B, G, N, R·C, J), LOG_ZERO where masked, and values with their counts (B, G, N or 1, J, d_v + 1).
_Term = tuple[Tensor, Tensor]


def _far_terms(
    t: Tensors, frame: Frame, query: Tensor, slots: list[Tensor], extra: int
) -> tuple[list[_Term], _Running]:
    """The chunk's own far keys and the sums before it; also the sums after the last token.

    Args:
        query: (B, G, R, L, d) scaled. slots: scaled keys and counted values of [before | this call].
    """
    start = _Running(torch.cat([t.values, t.total[..., None]], dim=-1), frame.scale)
    heads, length = query.shape[2:4]
    if not t.total.shape[-1]:
        return [], start
    far_key, far_value = (x[:, :, :length] for x in slots)
    positions = frame.query_position.repeat(1, heads)
    lq = query_log_features(frame.parameters, query.flatten(2, 3), positions).unflatten(2, (heads, -1))
    lk = key_log_features(frame.parameters, far_key, frame.key_position)
    lk = lk.masked_fill(~frame.far_valid[:, None, :, None], LOG_ZERO)
    lq, lk, value = _chunks(lq, extra), _chunks(lk, extra, LOG_ZERO), _chunks(far_value, extra)
    scale = lk.detach().amax(3)
    entering = (lk - scale[:, :, :, None]).exp() * (lk > LOG_ZERO / 2)
    before, after = _prefixes(_Running(entering.mT @ value, scale), start)
    # One key of the chunk at a time: all pairs with their features would be 16 times the log-features.
    pairs = torch.stack([(lq + lk[:, :, :, None, i : i + 1]).logsumexp(-1) for i in range(CHUNK)], dim=-1)
    token = torch.arange(CHUNK, device=lq.device)
    inside = pairs.masked_fill(token > token[:, None], LOG_ZERO).flatten(3, 4)
    past = (lq + before.scale[:, :, :, None, None]).flatten(3, 4)
    return [(inside.clamp_min(LOG_ZERO), value), (past.clamp_min(LOG_ZERO), before.values)], after


def _exact_terms(t: Tensors, frame: Frame, q: Tensor, slots: list[Tensor], extra: int) -> Iterator[_Term]:
    """The window's band and the sinks, for scaled queries q (B, G, N, R·C, d)."""
    heads, prefix = t.query.shape[2], t.key_before.shape[2]

    def term(key: Tensor, value: Tensor, valid: Tensor) -> _Term:
        logits = capped(q @ key.mT, frame.softcap).unflatten(3, (heads, CHUNK))
        return logits.masked_fill(~valid, LOG_ZERO).flatten(3, 4), value

    if frame.window > frame.nearest:
        slot = torch.arange(prefix + CHUNK, device=q.device)
        offset = prefix + slot[:CHUNK, None] - slot
        band = (offset >= frame.nearest) & (offset < frame.window)
        place = torch.arange(0, t.query.shape[3] + extra, CHUNK, device=q.device)[:, None] + slot  # (N, prefix + C)
        key, value = (F.pad(x, (0, 0, 0, extra))[:, :, place] for x in slots)
        yield term(key, value, band & F.pad(frame.near_valid, (0, extra))[:, place][:, None, :, None, None])
    if t.sink_key.shape[2]:
        fresh = frame.sink_fresh[:, None, :, None]
        key, value = (
            torch.where(fresh, gather_tokens(x, frame.sink_slot), stored.to(x.dtype)).to(frame.compute)[:, :, None]
            for stored, x in ((t.sink_key, t.key), (t.sink_value, t.value))
        )
        yield term(key * frame.scaling**0.5, _counted(value), _flags(frame.sink_valid, extra))


def scan_pass(t: Tensors, frame: Frame) -> tuple[Tensor, Tensor, Sums]:
    """A whole pass. Returns output (B, G, R, L, d_v), log-normaliser (B, G, R, L) to base e, the sums after it."""
    heads, length = t.query.shape[2:4]
    root = frame.scaling**0.5
    # A trace would ask whether there is a single block and hold for that answer only, so it has one more than it needs.
    spare = 0 if isinstance(length, int) else BLOCK
    extra = (length + spare + BLOCK - 1) // BLOCK * BLOCK - length
    query = t.query.to(frame.compute) * root
    key, value = (
        torch.cat([before.to(frame.compute), x.to(frame.compute)], dim=2)
        for before, x in ((t.key_before, t.key), (t.value_before, t.value))
    )
    slots = [key * root, _counted(value)]
    terms, after = _far_terms(t, frame, query, slots, extra)
    terms += _exact_terms(t, frame, _chunks(query, extra).flatten(3, 4), slots, extra)

    top = torch.stack([logits.detach().amax(-1, keepdim=True) for logits, _ in terms]).amax(0)
    weighted = [((logits - top).exp() * (logits > LOG_ZERO / 2)) @ value for logits, value in terms]
    total = torch.stack(weighted).sum(0)
    numerator, normaliser = total[..., :-1], total[..., -1:]
    seen = _flags(frame.visible[..., None], extra).expand(-1, -1, -1, heads, -1, -1).flatten(3, 4)
    dead = ~seen | (normaliser == 0)
    normaliser = normaliser.masked_fill(dead, 1)
    output = (numerator / normaliser).masked_fill(dead, 0)
    log_normaliser = (top + normaliser.log()).masked_fill(dead, LOG_ZERO)

    def tokens(x: Tensor) -> Tensor:
        x = x.unflatten(3, (heads, CHUNK)).transpose(2, 3).flatten(3, 4)
        return x.index_select(3, torch.arange(length, device=x.device))  # a slice would ask whether it is all of x

    sums = Sums(after.values[..., :-1], after.values[..., -1], after.scale)
    return tokens(output).to(frame.output), tokens(log_normaliser).squeeze(-1), sums
