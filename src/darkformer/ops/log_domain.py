"""The slow, safe path: chunks whose normaliser underflowed are recomputed with a logarithm per (query, key) pair."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .problem import LOG_ZERO


class ChunkTerms(NamedTuple):
    """The far part of N chunks: log-features, stabilised sums before each chunk, and what they were made of."""

    query: Tensor  # (B, G, N, R·C, m) ℓ_q
    key: Tensor  # (B, G, N, C, m) ℓ_k, LOG_ZERO where masked
    key_exp: Tensor  # (B, G, N, C, m) exp(ℓ_k - scale[chunk + 1])
    value: Tensor  # (B, G, N, C, d_v)
    sums: Tensor  # (B, G, N, m, d_v) before the chunk, at scale[chunk + 1]
    totals: Tensor  # (B, G, N, m)
    scale: Tensor  # (B, G, N+1, m) running maximum: [0] of the state, [c + 1] up to chunk c
    source_values: Tensor  # (B, G, N+1, m, d_v) the state and every chunk's own sum, each at its own scale
    source_total: Tensor  # (B, G, N+1, m)


def log_domain_chunks(
    bad: Tensor,
    far: ChunkTerms,
    near: list[tuple[Tensor, Tensor, Tensor]],
    fast: tuple[Tensor, Tensor, Tensor],
    slice_rows: int = 8,
) -> tuple[Tensor, Tensor, Tensor]:
    """Recomputes every chunk in which a row is `bad` and puts it in place of the fast result.

    Each far weight is log Σ_features exp(ℓ_q + ℓ_k): no maximum is shared with a key the query does not see. The sums
    before the chunk are taken at the scale they had before it. Nothing of the fast result of these chunks is used,
    so their gradients through it are exactly zero.

    Args:
        bad: (B, G, N, R·C) rows whose normaliser is tiny although they see keys.
        fast: numerator, normaliser, maximum.
        slice_rows: query rows whose (row, key, feature) tensor is in memory at once.

    Returns:
        The three tensors of `fast`, corrected.
    """
    b, n = bad.any(-1).any(1).nonzero(as_tuple=True)  # K pairs (row of the batch, chunk)

    def pick(x: Tensor) -> Tensor:
        return x.transpose(1, 2)[b, n if x.shape[2] > 1 else 0]  # sink values are the same for every chunk

    lq, lk, value = pick(far.query), pick(far.key), pick(far.value)  # (K, G, R·C | C, …)
    chunk = lk.shape[2]
    rows = [
        torch.logsumexp(lq[:, :, i : i + slice_rows, None, :] + lk[:, :, None, :, :], dim=-1)
        for i in range(0, lq.shape[2], slice_rows)
    ]
    inside = torch.cat(rows, dim=2)  # (K, G, R·C, C)
    token = torch.arange(lq.shape[2], device=lq.device) % chunk
    key_index = torch.arange(chunk, device=lq.device)
    inside = inside.masked_fill(key_index > token[:, None], LOG_ZERO)
    # The sums before chunk n, at the running maximum before chunk n: strictly past keys only.
    order = torch.arange(far.scale.shape[2], device=lq.device)
    scale = far.scale[b]  # (K, G, N+1, m)
    before = scale[torch.arange(len(n), device=n.device), :, n]  # (K, G, m)
    decay = (scale - before[:, :, None]).clamp_max(0).exp() * (order <= n[:, None])[:, None, :, None]
    sums = torch.einsum("kgsm,kgsmd->kgmd", decay, far.source_values[b])
    totals = torch.einsum("kgsm,kgsm->kgm", decay, far.source_total[b])
    past = lq + before[:, :, None]

    pieces = [(pick(logits), pick(v)) for logits, _, v in near]
    pieces.append((inside, value))
    tops = [logits.detach().amax(-1) for logits, _ in pieces] + [past.detach().amax(-1)]
    top = torch.stack(tops).amax(0)
    stored = (past - top[..., None]).exp()
    numerator, normaliser = stored @ sums, (stored @ totals[..., None]).squeeze(-1)
    for logits, v in pieces:
        weight = (logits - top[..., None]).exp() * (logits > LOG_ZERO / 2)
        numerator, normaliser = numerator + weight @ v, normaliser + weight.sum(-1)

    def put(old: Tensor, new: Tensor) -> Tensor:
        return old.transpose(1, 2).index_put((b, n), new).transpose(1, 2)

    return put(fast[0], numerator), put(fast[1], normaliser), put(fast[2], top)
