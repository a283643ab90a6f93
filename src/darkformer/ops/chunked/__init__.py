"""Linear-time attention in plain torch, on any device.

A causal call walks over super-chunks: the window and the sinks exactly, the far keys through their features,
quadratic inside a chunk and through the running sums before it (`span`). Far keys are the keys `window` positions back,
so "far" is ordinary causal linear attention. For gradients the sums before each super-chunk are kept and the rest is
computed again (`autograd`). A bidirectional call is two such walks, left to right and right to left, merged by their
log-normalizers. In a trace a walk is one super-chunk without a loop over the length (`scan`).
Derivation: Φ(Q)(Φ(K)ᵀV) / Φ(Q)(Φ(K)ᵀ1) of the paper, with the stabiliser described in `span`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...features.affine import attention_forms
from ..state import LOG_ZERO, AttentionState, Problem, State, next_buffers, without_digits
from .autograd import Direction, Inputs, attend
from .log_domain import count_log_domain
from .span import Masks, Rules, Sizes

__all__ = ["Sizes", "chunked", "chunked_with", "count_log_domain", "fastest_sizes"]

#: Normalisers below this are computed again in the log domain. Far above the smallest number, so that a row has kept
#: all the digits of what it does see when its normaliser is larger.
UNDERFLOW = {torch.float32: 1e-18, torch.float64: 1e-150}


def fastest_sizes(problem: Problem) -> Sizes:
    """The fastest measured: chunks of 64 tokens, more under a long window (its band costs chunk + window)."""
    window, length = problem.config.window, problem.query.shape[3]
    underflow = UNDERFLOW[problem.state.feature_sum.dtype]
    if problem.traced:  # where a query is paired with each of a chunk's keys feature by feature
        return Sizes(16, 16, underflow)
    chunk = 64
    while chunk < min(window, 256):
        chunk *= 2
    while chunk > 1 and chunk >= 2 * length:
        chunk //= 2
    # At most 3,072 rows (query head, token): the caches hold their features, and memory stays small.
    span = max(1, min(1024, 3072 // problem.query.shape[:3].numel()) // chunk) * chunk
    return Sizes(chunk, span, underflow)


def _rows_that_see(masks: Masks, log_scale: Tensor, rules: Rules) -> Tensor:
    """(B, L): which queries see any key."""
    length, reach = masks.far.shape[1], rules.window - rules.nearest
    seen = torch.zeros_like(masks.far)
    if log_scale.shape[2]:
        stored = (log_scale > LOG_ZERO / 2).flatten(1).any(1, keepdim=True)
        seen = (masks.far.cumsum(1) > 0) | stored
    if reach > 0:
        count = F.pad(masks.window.cumsum(1), (1, 0))  # valid keys in slots before i
        end = masks.window.shape[1] - length + 1 - rules.nearest  # query 0 sees slots below this
        seen = seen | (count[:, end : end + length] > count[:, end - reach : end - reach + length])
    return seen | masks.sinks.any(-1)


def _left_to_right(problem: Problem, sizes: Sizes) -> tuple[Inputs, Direction]:
    """Keys at or before the query, behind the state's recent keys; sinks included."""
    state, window, sinks = problem.state, problem.config.window, problem.state.sink_key.shape[2]
    length, device = problem.query.shape[3], problem.query.device
    new = torch.arange(length, device=device)
    real = new < problem.lengths[:, None]
    slot = torch.arange(window + length, device=device)
    position = state.count[:, None] - window + slot  # of [recent | new]
    in_window = (position >= sinks) & (slot < window + problem.lengths[:, None])
    query_position = state.count[:, None] + new
    sink = torch.arange(sinks, device=device)
    sink_visible = (sink < (state.count + problem.lengths)[:, None])[:, None].expand(-1, length, -1)
    if problem.is_causal:
        sink_visible = sink_visible & (sink <= query_position[..., None])
    sink_slot = sink - state.count[:, None]
    rules = Rules(problem.scaling, problem.softcap, window, 0, sizes, problem.traced)
    query_form, key_form = (form.of_raw(problem.scaling**0.5) for form in attention_forms(problem.parameters))
    masks = Masks(real, in_window[:, :length] & real, in_window, sink_visible & real[..., None], query_position,
                  position[:, :length])  # fmt: skip
    masks = masks._replace(rows=_rows_that_see(masks, state.log_scale, rules) & real)
    return Inputs(
        problem.query, problem.key, problem.value, state.recent_key, state.recent_value, state.sink_key,
        state.sink_value, torch.cat([state.feature_values, state.feature_sum[..., None]], dim=-1),
        query_form, key_form,
    ), Direction(
        rules, masks, state.log_scale.detach(), sink_slot.clamp(0, length - 1),
        (sink_slot >= 0) & (sink_slot < problem.lengths[:, None]),
        # The two directions are merged in full precision.
        problem.query.dtype if problem.is_causal else state.feature_sum.dtype,
    )  # fmt: skip


def _right_to_left(problem: Problem, inputs: Inputs, forward: Direction) -> tuple[Inputs, Direction]:
    """Keys after the query: everything reversed, offsets from 1, no sinks (the first direction has them)."""
    window, length, masks = problem.config.window, problem.query.shape[3], forward.masks
    prefix = max(window, 1)
    in_window = F.pad(masks.window[:, window:].flip(1), (prefix, 0))
    real = torch.arange(length, device=in_window.device).flip(0) < problem.lengths[:, None]
    query_position = masks.query_position.flip(1)
    key_position = F.pad(query_position, (prefix, 0))[:, :length]
    rules = forward.rules._replace(nearest=1)
    masks = Masks(real, in_window[:, :length], in_window, masks.sinks[..., :0], query_position, key_position)
    masks = masks._replace(rows=_rows_that_see(masks, forward.log_scale, rules) & real)

    def before(x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:2], prefix, x.shape[-1])

    return inputs._replace(
        query=problem.query.flip(3), key=problem.key.flip(2), value=problem.value.flip(2),
        key_before=before(problem.key), value_before=before(problem.value),
        sink_key=inputs.sink_key[:, :, :0], sink_value=inputs.sink_value[:, :, :0],
    ), forward._replace(
        rules=rules, masks=masks, sink_slot=forward.sink_slot[:, :0], sink_new=forward.sink_new[:, :0]
    )  # fmt: skip


def chunked(problem: Problem) -> tuple[Tensor, State]:
    """Attention in time and memory linear in L, forward and backward.

    Returns:
        output (B, G, R, L, d_v) in the query's dtype (bidirectional: in the compute dtype), zero at pads, and the state
        after the last token.
    """
    return chunked_with(problem, fastest_sizes(problem))


def chunked_with(problem: Problem, sizes: Sizes) -> tuple[Tensor, State]:
    """`chunked` with other sizes than the fastest."""
    inputs, forward = _left_to_right(problem, sizes)
    result = attend(inputs, forward)
    output, log_normalizer = result.output, result.log_normalizer
    # Without features and with window 1 a query sees no key after itself.
    if not problem.is_causal and (problem.config.feature_count or problem.config.window > 1):
        other = attend(*_right_to_left(problem, inputs, forward))
        other_normalizer = other.log_normalizer.flip(3)
        share = torch.sigmoid(log_normalizer - other_normalizer)[..., None]
        output = share * output + (1 - share) * other.output.flip(3)
        log_normalizer = torch.maximum(log_normalizer, other_normalizer)
    lost = without_digits(log_normalizer) & (log_normalizer != LOG_ZERO)  # LOG_ZERO: the row sees nothing
    if problem.traced or bool(lost.any()):
        output = output.masked_fill(lost[..., None], torch.nan)  # the public door reports it
    return output, AttentionState(
        feature_values=result.sums.values[..., :-1], feature_sum=result.sums.values[..., -1],
        log_scale=result.sums.log_scale,
        **next_buffers(problem),
    )  # fmt: skip
