"""The slow, safe path: chunks whose normaliser underflowed are recomputed with a logarithm per (query, key) pair.

A chunk here is one (row of the batch, group, chunk): K of them are done at once. Logarithms are to base 2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .state import LOG_ZERO

#: Elements of the (chunk, query, key, feature) tensor that is in memory at once.
SLICE = 1 << 21


@dataclass
class LogDomainCount:
    """How often the safe path was taken; the backward pass takes it for the same rows.

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
    """Counts, within the block, how often forward passes of `chunked` took the safe path.

    >>> from darkformer.ops.log_domain import count_log_domain
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


def note(rows: int, bad: Tensor | None) -> None:
    """Adds one super-chunk of `rows` rows to the active counts; `bad` (chunks, rows of a chunk) or None."""
    for count in _counts.get():
        count.rows += rows
        if bad is not None:
            count.underflowed_rows += int(bad.sum())
            count.recomputed_rows += int(bad.any(-1).sum()) * bad.shape[-1]


class ChunkTerms(NamedTuple):
    """The far part of K chunks."""

    query: Tensor  # (K, R·C, m) ℓ_q
    key: Tensor  # (K, C, m) ℓ_k, LOG_ZERO where masked
    value: Tensor  # (K, C, d_v)
    values: Tensor  # (K, m, d_v) sums of the keys before the chunk, scaled by 2^-scale
    total: Tensor  # (K, m)
    scale: Tensor  # (K, m) running maximum of ℓ_k before the chunk

    def slices(self) -> Iterator[tuple[slice, Tensor]]:
        """Query rows in slices, and which keys each sees (rows, C): those of its own token and before."""
        chunks, rows, m = self.query.shape
        width = self.key.shape[1]
        step = max(1, SLICE // (chunks * width * m))
        token = torch.arange(rows, device=self.query.device) % width
        key = torch.arange(width, device=self.query.device)
        for i in range(0, rows, step):
            yield slice(i, i + step), key <= token[i : i + step, None]


def log_domain_chunks(bad: Tensor, far: ChunkTerms, near: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Numerator (K, R·C, d_v), normaliser and subtracted maximum (K, R·C, 1) of K chunks.

    Each far weight is log Σ_features exp(ℓ_q + ℓ_k): no maximum is shared with a key the query does not see. The sums
    before the chunk are taken at the scale they had before it.

    Args:
        bad: (K, R·C) the rows that made the chunks come here.
        near: logits (K, R·C, J), -inf where masked, and values (K, J, d_v) of the exact terms.
    """
    inside = far.query.new_empty(bad.shape[0], bad.shape[1], far.key.shape[1])
    for rows, seen in far.slices():
        pairs = far.query[:, rows, None, :] + far.key[:, None]
        most = pairs.amax(-1)
        logits = pairs.sub_(most[..., None]).exp2_().sum(-1).log2_().add_(most)
        inside[:, rows] = logits.masked_fill_(~seen, -torch.inf)
    past = far.query + far.scale[:, None]
    terms = [*near, (inside, far.value), (past, far.values)]
    top = torch.stack([logits.amax(-1) for logits, _ in terms]).amax(0).clamp_min(LOG_ZERO)[..., None]
    weights = [(logits - top).exp2() for logits, _ in terms]
    numerator = torch.stack([w @ v for w, (_, v) in zip(weights, terms, strict=True)]).sum(0)
    normaliser = torch.stack([w.sum(-1) for w in weights[:-1]]).sum(0) + (weights[-1] @ far.total[..., None])[..., 0]
    return numerator, normaliser[..., None], top


class ChunkGradients(NamedTuple):
    """What `log_domain_gradients` adds to the gradients of K chunks; shapes as in `ChunkTerms`."""

    query: Tensor
    key: Tensor
    value: Tensor
    values: Tensor  # of the sums before the chunk, at their scale
    total: Tensor


def log_domain_gradients(far: ChunkTerms, log_normaliser: Tensor, change: Tensor, shift: Tensor) -> ChunkGradients:
    """The gradient of the far part of K chunks; nothing in it exceeds 1 but the inputs.

    dL/da_tj = w_tj (dO_t·v_j - D_t) for the weight w_tj = Σ_i exp(ℓ_q,ti + ℓ_k,ji - log n_t), and D_t = dO_t·O_t.

    Args:
        log_normaliser: (K, R·C, 1), to base 2; +1e30 for rows that see nothing.
        change: (K, R·C, d_v) dL/dO.
        shift: (K, R·C, 1) D.
    """
    past = (far.query + far.scale[:, None] - log_normaliser).exp2()
    dq = past * (change @ far.values.mT - shift * far.total[:, None])
    dk, dv = torch.zeros_like(far.key), torch.zeros_like(far.value)
    for rows, seen in far.slices():
        weight = far.query[:, rows, None, :] + far.key[:, None]
        weight = weight.sub_(log_normaliser[:, rows, None]).masked_fill_(~seen[..., None], -torch.inf).exp2_()
        gap = change[:, rows] @ far.value.mT - shift[:, rows]
        dv += weight.sum(-1).mT @ change[:, rows]
        weight.mul_(gap[..., None])
        dq[:, rows] += weight.sum(2)
        dk += weight.sum(1)
    return ChunkGradients(dq, dk, dv, past.mT @ change, -(past * shift).sum(1))
