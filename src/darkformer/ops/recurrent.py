"""One token: constant time and constant state whatever the history."""

from __future__ import annotations

import torch
from torch import Tensor

from ..features.affine import attention_forms
from .state import LOG_ZERO, AttentionState, Problem, State, capped, join, without_digits


def _weighted_mean(
    q: Tensor, stored: tuple[Tensor, Tensor, Tensor] | None, terms: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """One normaliser for the stored sums and the exact terms, below one maximum. q (B, G, R, d) → (B, G, R, d_v).

    Args:
        stored: logits (B, G, R, m) of the features, their sums (B, G, m, d_v) and totals (B, G, m).
        terms: logits (B, G, R, K) and values (B, G, K, d_v) of the window and the sinks; at least one of both.
    """
    tops = [logits.detach().amax(-1) for logits, *_ in [*terms, *([stored] if stored else [])]]
    top = torch.stack(tops).amax(0)[..., None]
    numerator: Tensor | float = 0.0
    normaliser: Tensor | float = 0.0
    if stored:
        weight = (stored[0] - top).exp()
        numerator, normaliser = weight @ stored[1], (weight @ stored[2][..., None]).squeeze(-1)
    for logits, value in terms:
        weight = (logits - top).exp() * (logits > LOG_ZERO / 2)
        numerator, normaliser = numerator + weight @ value.to(q.dtype), normaliser + weight.sum(-1)
    assert isinstance(numerator, Tensor) and isinstance(normaliser, Tensor)
    return (numerator / normaliser[..., None]).masked_fill(without_digits(top), torch.nan)


def recurrent(problem: Problem) -> tuple[Tensor, State]:
    """One real token per row (L = 1) after a state; the same numbers as the full forward.

    Returns:
        output (B, G, R, 1, d_v) in the compute dtype and the state after the token.
    """
    state, window, sinks = problem.state, problem.config.window, problem.state.sink_key.shape[2]
    compute, root, position = state.feature_sum.dtype, problem.scaling**0.5, state.count
    device = position.device
    q = problem.query.squeeze(3).to(compute) * root  # (B, G, R, d)

    recent_key = torch.cat([state.recent_key, problem.key.to(state.recent_key.dtype)], dim=2)
    recent_value = torch.cat([state.recent_value, problem.value.to(state.recent_value.dtype)], dim=2)
    sink_key, sink_value = state.sink_key, state.sink_value
    if sinks:
        slot = (torch.arange(sinks, device=device) == position[:, None])[:, None, :, None]
        sink_key = torch.where(slot, problem.key.to(sink_key.dtype), sink_key)
        sink_value = torch.where(slot, problem.value.to(sink_value.dtype), sink_value)

    values, total, scale = state.feature_values, state.feature_sum, state.log_scale
    terms: list[tuple[Tensor, Tensor]] = []
    if problem.config.feature_count:  # the key that leaves the window enters the sums
        leaving = position[:, None] - window
        valid = (leaving >= sinks)[:, :, None, None]
        query_form, key_form = attention_forms(problem.parameters)
        lk = key_form(recent_key[:, :, :1].to(compute) * root, leaving)
        lk = lk.masked_fill(~valid, LOG_ZERO).squeeze(2)
        scale = torch.maximum(state.log_scale, lk.detach())
        entering = (lk - scale).exp() * valid[:, :, 0]
        carry = (state.log_scale - scale).exp()
        summand = entering[..., None] * recent_value[:, :, :1].to(compute)
        values, total = join(values, carry[..., None], summand, position), join(total, carry, entering, position)
        past = query_form(q, position[:, None].expand(-1, q.shape[2])) + scale[:, :, None]  # (B, G, R, m)
        if not window + sinks:  # a long query could make up for what the keys have lost
            past = past.masked_fill(without_digits(scale.amax(-1))[:, :, None, None], torch.nan)
    near_key, near_value = recent_key[:, :, 1:], recent_value[:, :, 1:]
    if window:
        age = torch.arange(window - 1, -1, -1, device=device)
        valid = (position[:, None] - age >= sinks)[:, None, None]
        logits = capped(q @ (near_key.to(compute) * root).mT, problem.softcap)
        terms.append((logits.masked_fill(~valid, LOG_ZERO), near_value))
    if sinks:
        valid = (torch.arange(sinks, device=device) <= position[:, None])[:, None, None]
        logits = capped(q @ (sink_key.to(compute) * root).mT, problem.softcap)
        terms.append((logits.masked_fill(~valid, LOG_ZERO), sink_value))

    stored = (past, values, total) if problem.config.feature_count else None
    output = _weighted_mean(q, stored, terms)
    after = AttentionState(
        count=position + 1,
        feature_values=values,
        feature_sum=total,
        log_scale=scale,
        recent_key=near_key if window else state.recent_key,
        recent_value=near_value if window else state.recent_value,
        sink_key=sink_key,
        sink_value=sink_value,
    )
    return output[:, :, :, None], after
