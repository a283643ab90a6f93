"""Sums over the keys before every chunk, for a number of chunks that may be a symbol: no loop over the length."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..state import LOG_ZERO

#: Chunks of a block, whose sums are added one after the other.
BLOCK = 8
#: Doublings where the length is a symbol: 2^16 blocks are 8 million tokens, whose sums no
#: memory holds.
DOUBLINGS = 16


class Sums(NamedTuple):
    """Sums over keys, each feature scaled by exp(-log_scale)."""

    values: Tensor  # (…, m, d_v + 1); the last column is that of a value that is 1 for every key
    log_scale: Tensor  # (…, m)


def _join(earlier: Sums, later: Sums) -> Sums:
    """Sums over the keys of both, at the larger scale."""
    log_scale = torch.maximum(earlier.log_scale, later.log_scale)
    old, new = ((x.log_scale - log_scale).exp()[..., None] for x in (earlier, later))
    return Sums(old * earlier.values + new * later.values, log_scale)


def _delayed(sums: Sums, places: int) -> Sums:
    """What stood `places` earlier along dimension 2; sums over nothing before the first."""
    count = sums.log_scale.shape[2]
    values = F.pad(sums.values, (0, 0, 0, 0, places, 0))[:, :, :count]
    return Sums(values, F.pad(sums.log_scale, (0, 0, places, 0), value=LOG_ZERO)[:, :, :count])


def prefix_sums(chunks: Sums, start: Sums) -> tuple[Sums, Sums]:
    """The sums before every chunk, and those over all chunks without `start`, at the scale of both.

    Between blocks by doubling (Hillis and Steele, 1986).

    Args:
        chunks: of each chunk by itself, (B, G, N, m, …), N a multiple of BLOCK. start: (B, G, m, …).
    """
    count, device = chunks.log_scale.shape[2], chunks.log_scale.device
    # Picked by index: a trace would ask of views as (blocks, chunks of a block) whether they are contiguous.
    first = torch.arange(count // BLOCK, device=device) * BLOCK
    single = [Sums(*(x.index_select(2, first + i) for x in chunks)) for i in range(BLOCK)]
    inside = list(itertools.accumulate(single, _join))
    first_block = Sums(torch.zeros_like(start.values), start.log_scale)  # nothing yet, at the scale of `start`
    blocks = Sums(*(torch.cat([x[:, :, None], y], dim=2) for x, y in zip(first_block, inside[-1], strict=True)))
    entries = blocks.log_scale.shape[2]
    for step in range((entries - 1).bit_length() if isinstance(entries, int) else DOUBLINGS):
        blocks = _join(_delayed(blocks, 2**step), blocks)
    new = Sums(*(x[:, :, -1] for x in blocks))
    decay = (start.log_scale[:, :, None] - blocks.log_scale).exp()[..., None]
    values = torch.addcmul(blocks.values, start.values[:, :, None], decay)
    before = Sums(values[:, :, :-1], blocks.log_scale[:, :, :-1])
    # All blocks' first chunks, then their second ones, …
    by_place = [before, *(_join(before, earlier) for earlier in inside[:-1])]
    chunk = torch.arange(count, device=device)
    order = chunk % BLOCK * (count // BLOCK) + chunk // BLOCK
    return Sums(*(torch.cat(x, dim=2).index_select(2, order) for x in zip(*by_place, strict=True))), new
