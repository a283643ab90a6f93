"""Softmax attention through the same door: the reference that everything else approximates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .state import KeyValueState, Problem, State, capped, compute_dtype, last_tokens


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    allowed: Tensor | None,
    is_causal: bool,
    softcap: float | None = None,
) -> Tensor:
    """torch's scaled_dot_product_attention with grouped heads. Rows that may see nothing give zeros.

    With a softcap it is computed in plain products, as torch's kernels have none: L·K numbers a head are in memory.

    Args:
        query: (B, H, L, d); key (B, G, K, d); value (B, G, K, d_v), any dtype.
        allowed: (B or 1, L, K) bool, which keys a query sees; None: all, or a causal triangle if `is_causal`.
        is_causal: only looked at when `allowed` is None; then K must equal L, or L be 1: a last query sees every key.
        softcap: c of the logits c·tanh(logit / c).

    Returns:
        (B, H, L, d_v).
    """
    if softcap is not None:
        return _capped_attention(query, key, value, scaling, allowed, is_causal, softcap)
    grouped = query.shape[1] != key.shape[1]
    if allowed is None:
        is_causal = is_causal and query.shape[2] > 1
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scaling, enable_gqa=grouped)
    unseeing = ~allowed.any(-1)
    mask = (allowed | unseeing[..., None])[:, None]
    output = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=grouped)
    return output.masked_fill(unseeing[:, None, :, None], 0)


def _capped_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, allowed: Tensor | None, is_causal: bool, softcap: float
) -> Tensor:
    heads = query.shape[1] // key.shape[1]
    logits = query.unflatten(1, (-1, heads)) @ key[:, :, None].mT * scaling
    if allowed is None and is_causal and query.shape[2] > 1:
        allowed = torch.ones(1, *logits.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if allowed is None:
        allowed = torch.ones(1, 1, 1, dtype=torch.bool, device=query.device)
    allowed = allowed[:, None, None]
    # Masked logits may be beyond the range, and the cap's gradient there NaN.
    logits = capped(logits.masked_fill(~allowed, 0), softcap)
    logits = logits.float() if logits.dtype.itemsize < 4 else logits  # as eager attention does
    weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
    weights = weights.masked_fill(~allowed.any(-1, keepdim=True), 0)
    return (weights.to(value.dtype) @ value[:, :, None]).flatten(1, 2)


def exact(problem: Problem) -> tuple[Tensor, State]:
    """Method `exact`: softmax over everything seen so far; its state keeps every key (it grows).

    Returns:
        output (B, G, R, L, d_v) in the compute dtype and the state.
    """
    state, compute = problem.state, compute_dtype(problem.query)
    past, length = state.key.shape[2], problem.query.shape[3]
    key = torch.cat([state.key.to(problem.key.dtype), problem.key], dim=2).to(compute)
    value = torch.cat([state.value.to(problem.value.dtype), problem.value], dim=2).to(compute)
    slot = torch.arange(past + length, device=key.device)
    stored = (slot >= past - state.count[:, None]) & (slot < past + problem.lengths[:, None])
    new = torch.arange(length, device=key.device)
    allowed = stored[:, None] & (new < problem.lengths[:, None])[..., None]
    if problem.is_causal:
        allowed = allowed & (slot <= past + new[:, None])
    simple = past == 0 and not problem.padded
    query = problem.query.flatten(1, 2).to(compute)
    output = softmax_attention(
        query, key, value, scaling=problem.scaling, allowed=None if simple else allowed, is_causal=problem.is_causal,
        softcap=problem.softcap,
    )  # fmt: skip
    after = KeyValueState(
        state.count + problem.lengths,
        *(
            last_tokens(problem, before.to(x.dtype), x, past + length)
            for before, x in ((state.key, problem.key), (state.value, problem.value))
        ),
    )
    return output.unflatten(1, problem.query.shape[1:3]), after
