"""Softmax attention through the same door: the reference that everything else approximates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import AttentionState, Problem, next_buffers


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float, allowed: Tensor | None, is_causal: bool
) -> Tensor:
    """torch's scaled_dot_product_attention with grouped heads. Rows that may see nothing give zeros.

    Args:
        query: (B, H, L, d); key (B, G, K, d); value (B, G, K, d_v), any dtype.
        allowed: (B or 1, L, K) bool, which keys a query sees; None: all, or a causal triangle if `is_causal`.
        is_causal: only looked at when `allowed` is None; then K must equal L.

    Returns:
        (B, H, L, d_v).
    """
    grouped = query.shape[1] != key.shape[1]
    if allowed is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scaling, enable_gqa=grouped)
    nothing = ~allowed.any(-1)
    mask = (allowed | nothing[..., None])[:, None]
    output = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=grouped)
    return output.masked_fill(nothing[:, None, :, None], 0)


def exact(problem: Problem) -> tuple[Tensor, AttentionState]:
    """Method `exact`: softmax over everything seen so far; its state keeps every key (it grows).

    Returns:
        output (B, G, R, L, d_v) in the compute dtype and the state.
    """
    state, compute = problem.state, problem.state.feature_sum.dtype
    past, length = state.recent_key.shape[2], problem.query.shape[3]
    key = torch.cat([state.recent_key.to(problem.key.dtype), problem.key], dim=2).to(compute)
    value = torch.cat([state.recent_value.to(problem.value.dtype), problem.value], dim=2).to(compute)
    slot = torch.arange(past + length, device=key.device)
    stored = (slot >= past - state.count[:, None]) & (slot < past + problem.lengths[:, None])
    new = torch.arange(length, device=key.device)
    allowed = stored[:, None] & (new < problem.lengths[:, None])[..., None]
    if problem.is_causal:
        allowed = allowed & (slot <= past + new[:, None])
    simple = past == 0 and not problem.padded
    query = problem.query.flatten(1, 2).to(compute)
    output = softmax_attention(
        query, key, value, scaling=problem.scaling, allowed=None if simple else allowed, is_causal=problem.is_causal
    )
    after = AttentionState(
        feature_values=state.feature_values,
        feature_sum=state.feature_sum,
        log_scale=state.log_scale,
        **next_buffers(problem),
    )
    return output.unflatten(1, problem.query.shape[1:3]), after
