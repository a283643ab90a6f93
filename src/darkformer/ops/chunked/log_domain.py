"""Attention of chunks with a logarithm per (query, key) pair: slow, and safe whatever the size of the logits.

The fast path scales a chunk's features by one maximum, which may belong to a key that an early row does not see. Where
the row's own keys are e^87 times smaller its normaliser underflows, and the chunk is computed here instead. Traces,
which cannot look at a normaliser, compute all chunks here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..state import LOG_ZERO, without_digits
from .scan import Sums

#: Logits (…, R·C, J) of a chunk's rows, -inf where masked, and values (…, J, d_v + 1) whose last column is 1.
Term = tuple[Tensor, Tensor]


def highest(logits: list[Tensor]) -> Tensor:
    """The largest of a row's logits (…, R·C, J): (…, R·C, 1), LOG_ZERO for a row without any."""
    return torch.stack([x.detach().amax(-1, keepdim=True) for x in logits]).amax(0).clamp_min(LOG_ZERO)


def weighted_sum(terms: list[Term]) -> tuple[Tensor, Tensor]:
    """Σ exp(logits - top) values of all terms, (…, R·C, d_v + 1), and top, their largest logit."""
    top = highest([logits for logits, _ in terms])
    return torch.stack([(logits - top).exp() @ values for logits, values in terms]).sum(0), top


def _key_logits(lq: Tensor, lk: Tensor) -> Tensor:
    return (lq + lk[..., None, :]).logsumexp(-1)


def log_domain_attention(
    lq: Tensor, lk: Tensor, value: Tensor, before: Sums, exact: list[Term], *, recompute: bool, has_norm: bool
) -> tuple[Tensor, Tensor]:
    """Weighted sums (…, R·C, d_v + 1), in units of exp(top), and top (…, R·C, 1) of chunks.

    Args:
        lq: (…, R·C, m) log-features of the queries. lk: (…, C, m) of the far keys, LOG_ZERO where masked.
        value: (…, C, d_v + 1). before: (…, m, …) sums over the keys before the chunk. exact: the window and the sinks.
        recompute: whether the backward pass computes the pairs again: they are C times the log-features.
        has_norm: whether the queries' norms are part of lq.
    """
    rows, width = lq.shape[-2], lk.shape[-2]
    # One key at a time: memory stays that of the rows.
    logits = [
        checkpoint(_key_logits, lq, key, use_reentrant=False, preserve_rng_state=False)
        if recompute
        else _key_logits(lq, key)
        for key in lk.unbind(-2)
    ]
    inside = torch.stack(logits, -1)
    token = torch.arange(width, device=lq.device)
    later = token > token.repeat(rows // width)[:, None]
    inside = inside.masked_fill(later | (inside < LOG_ZERO / 2), -torch.inf)
    total, top = weighted_sum([*exact, (inside, value), (lq + before.log_scale[..., None, :], before.values)])
    if not has_norm:  # keys could make up for what a long query has lost
        top = top.masked_fill(without_digits(lq.detach().abs().amax(-1, keepdim=True)), torch.nan)
    return total, top


@dataclass
class LogDomainCount:
    """How often forward passes took the log domain; the backward pass takes it for the same rows.

    Attributes:
        underflowed_rows: rows (batch, query head, token) whose normaliser underflowed.
        recomputed_rows: rows of all the chunks with such a row; this is what is paid for.
        rows: all rows of the super-chunks seen.
    """

    underflowed_rows: int = 0
    recomputed_rows: int = 0
    rows: int = 0


_counts: ContextVar[tuple[LogDomainCount, ...]] = ContextVar("log_domain_counts", default=())


@contextlib.contextmanager
def count_log_domain() -> Iterator[LogDomainCount]:
    """Counts, within the block, how often forward passes of `chunked` took the log domain.

    >>> from darkformer.ops.chunked import count_log_domain
    >>> with count_log_domain() as count:
    ...     pass
    >>> count.underflowed_rows
    0
    """
    count = LogDomainCount()
    token = _counts.set((*_counts.get(), count))
    try:
        yield count
    finally:
        _counts.reset(token)


def add_to_counts(rows: int, underflowed: Tensor | None) -> None:
    """Adds one super-chunk of `rows` rows; `underflowed` (chunks…, rows of a chunk), None for no row."""
    for count in _counts.get():
        count.rows += rows
        if underflowed is not None:
            count.underflowed_rows += int(underflowed.sum())
            count.recomputed_rows += int(underflowed.any(-1).sum()) * underflowed.shape[-1]
