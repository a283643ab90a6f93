"""The oracle: quadratic, float64-capable, obvious. Every other backend is tested against it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..features.affine import attention_forms
from .state import (
    LOG_ZERO,
    AttentionState,
    KeyValueState,
    Problem,
    State,
    capped,
    compute_dtype,
    last_tokens,
    next_buffers,
    without_digits,
)


def _row(problem: Problem, b: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One row without its padding: output (G, R, n, d_v), then feature values, sum and scale after it."""
    config, parameters, state = problem.config, problem.parameters, problem.state
    n, count = int(problem.lengths[b]), int(state.count[b])
    dtype = compute_dtype(problem.query)
    root = problem.scaling**0.5
    recent = min(count, state.recent_key.shape[2])
    first = state.sink_key.shape[2]  # positions below this are sinks; 0 for exact attention
    sinks = min(count, first)

    def joined(sink: Tensor, old: Tensor, new: Tensor) -> Tensor:
        return torch.cat([sink[b, :, :sinks], old[b, :, old.shape[2] - recent :], new[b, :, :n]], dim=1).to(dtype)

    q = problem.query[b, :, :, :n].to(dtype) * root  # (G, R, n, d)
    k = joined(state.sink_key, state.recent_key, problem.key) * root  # (G, K, d)
    v = joined(state.sink_value, state.recent_value, problem.value)
    t = torch.arange(count, count + n, device=q.device)
    j = torch.cat([t.new_tensor(range(sinks)), t.new_tensor(range(count - recent, count)), t])
    # A sink key that is still in `recent` stands there twice: the sink buffer's copy counts.
    single = torch.arange(len(j), device=q.device) < sinks
    single = single | (j >= first) | (torch.arange(len(j), device=q.device) >= sinks + recent)

    offset = t[:, None] - j[None, :]
    seen = single & ((offset >= 0) if problem.is_causal else torch.ones_like(offset, dtype=torch.bool))
    far = offset.abs() >= config.window if not problem.is_causal else offset >= config.window
    if config.method == "exact":
        far = torch.zeros_like(seen)
    far = far & (j >= first)

    groups, heads = q.shape[:2]
    query_form, key_form = attention_forms(parameters)
    lq = query_form(q.flatten(1, 2)[None], t.repeat(heads)[None])[0].unflatten(1, (heads, n))
    done = (
        single & (j >= first) & (j < count + n - config.window)
    )  # no later query sees them exactly: they enter the sums
    # The others may have features beyond the range, and then gradients of NaN.
    featured = k.masked_fill(~(done | (far & seen).any(0))[:, None], 0)
    lk = key_form(featured[None], j[None])[0]  # (G, K, m)
    # So may the logits of what is masked, and then the cap's.
    logits = torch.einsum("grtd,gjd->grtj", q, k).masked_fill(far | ~seen, 0)
    weight = capped(logits, problem.softcap)
    if config.feature_count:
        kernel = torch.logsumexp(lq[:, :, :, None, :] + lk[:, None, None, :, :], dim=-1)
        weight = torch.where(far, kernel, weight)
    visible = seen if config.feature_count else seen & ~far
    weight = weight.masked_fill(~visible, LOG_ZERO)

    past = lq + state.log_scale[b][:, None, None, :]  # what is only in the state: (G, R, n, m)
    # Without tokens there may be neither keys nor features, and a maximum over nothing is an error.
    nothing = past.new_zeros(groups, heads, 0, 1)
    top = torch.cat([weight, past], dim=-1).amax(-1, keepdim=True).detach() if n else nothing
    exact, stored = (weight - top).exp() * visible, (past - top).exp()
    numerator = torch.einsum("grtj,gjd->grtd", exact, v)
    numerator = numerator + torch.einsum("grtm,gmd->grtd", stored, state.feature_values[b])
    normaliser = exact.sum(-1) + torch.einsum("grtm,gm->grt", stored, state.feature_sum[b])
    lost = without_digits(top)
    if not config.window + config.sinks and config.feature_count:  # keys can make up for what a long query has lost
        lost = lost | without_digits(lq.abs().amax(-1, keepdim=True))
    sees = visible.any(-1) | (state.log_scale[b] > LOG_ZERO / 2).any()
    lost, sees = lost & sees[:, None], sees[:, None]
    output = (numerator / torch.where(sees, normaliser[..., None], 1)).masked_fill(lost, torch.nan)

    lk = lk.masked_fill(~done[:, None], LOG_ZERO)
    scale = torch.cat([lk, state.log_scale[b][:, None]], dim=1).amax(1).detach()
    entering = (lk - scale[:, None]).exp() * done[:, None]
    carry = (state.log_scale[b] - scale).exp()
    values = carry[..., None] * state.feature_values[b] + torch.einsum("gjm,gjd->gmd", entering, v)
    return output, values, carry * state.feature_sum[b] + entering.sum(1), scale


def reference(problem: Problem) -> tuple[Tensor, State]:
    """Quadratic attention, one batch row at a time, every far pair by log Σ_features exp(ℓ_q + ℓ_k).

    Returns:
        output (B, G, R, L, d_v) in the compute dtype, zero at pads, and the state after the last token.
    """
    state = problem.state
    if isinstance(state, KeyValueState):  # all keys are recent, and there are no sums
        config, compute = problem.config, compute_dtype(problem.query)
        empty = AttentionState.empty(config, problem.key, problem.value, batch=len(problem.key), compute=compute)
        none = {f"sink_{name}": getattr(empty, f"sink_{name}")[:, :, :0] for name in ("key", "value")}
        problem = problem._replace(state=replace(
            empty, count=state.count, recent_key=state.key.to(problem.key.dtype),
            recent_value=state.value.to(problem.value.dtype), **none,
        ))  # fmt: skip
    rows = [_row(problem, b) for b in range(problem.query.shape[0])]
    padded = [torch.nn.functional.pad(x, (0, 0, 0, problem.query.shape[3] - x.shape[2])) for x, *_ in rows]
    if isinstance(state, KeyValueState):
        keep = state.key.shape[2] + problem.key.shape[2]
        key = last_tokens(problem, problem.state.recent_key, problem.key, keep)
        value = last_tokens(problem, problem.state.recent_value, problem.value, keep)
        return torch.stack(padded), KeyValueState(state.count + problem.lengths, key, value)
    values, sums, scales = (torch.stack(x) for x in list(zip(*rows, strict=True))[1:])
    return torch.stack(padded), AttentionState(
        feature_values=values, feature_sum=sums, log_scale=scales, **next_buffers(problem)
    )
