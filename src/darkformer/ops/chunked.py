"""Linear-time attention in plain torch, on any device.

A causal pass walks over super-chunks in reused memory (`chunk_forward`, `chunk_backward`): the near keys exactly
(window band, sinks), the far keys through their features, quadratic inside a chunk and through the running state before
it. Far keys are the keys `window` positions back, so "far" is ordinary causal linear attention. A bidirectional call is
two such passes, the second one backwards, merged by their log-normalisers. In a trace `chunk_scan` computes a pass.
Derivation: Φ(Q)(Φ(K)ᵀV) / Φ(Q)(Φ(K)ᵀ1) of the paper, with the stabiliser described in `chunk_forward`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunk_backward import Backward
from .chunk_features import LOG2E, Form, forms
from .chunk_forward import Forward, Kept, Sums
from .chunk_scan import scan_pass
from .state import LOG_ZERO, AttentionState, Problem, next_buffers
from .super_chunks import Frame, Tensors

#: Tokens of one super-chunk at most, and (query head, token) rows: what is in the caches at once.
SUPER = 1024
ROWS = 4096


def chunk_length(window: int, length: int) -> int:
    """Chunk size: 64, longer under a long window (the band costs chunk + window), shorter for short inputs."""
    chunk = 64
    while chunk < min(window, 256):
        chunk *= 2
    while chunk > 1 and chunk >= 2 * length:
        chunk //= 2
    return chunk


def span_length(chunk: int, heads: int) -> int:
    """Tokens of a super-chunk for B·H = `heads` query heads: a multiple of the chunk."""
    return max(1, min(SUPER, ROWS // heads) // chunk) * chunk


class _Chunked(torch.autograd.Function):
    """One direction. Saves inputs, log-normaliser and sums before some super-chunks; recomputes the rest.

    `forward` has the context, as what it keeps is no output; `functional` hides it from torch.func.
    """

    @staticmethod
    def forward(ctx: Any, frame: Frame, keep: bool, *given: Tensor | None) -> tuple[Tensor, ...]:
        tensors, query, key = _unpack(given)
        run = Forward(tensors, frame, query, key)
        output, kept, sums = run.run(keep)
        scale = torch.where(sums.scale == run.start_scale, frame.scale.flatten(0, 1), sums.scale / LOG2E)
        scale = scale.masked_fill(sums.scale < LOG_ZERO / 2, LOG_ZERO).view_as(frame.scale)
        ctx.set_materialize_grads(False)
        if keep:
            ctx.save_for_backward(*given, kept.log_normaliser)
            ctx.frame, ctx.starts, ctx.stride, ctx.underflowed = frame, kept.starts, kept.stride, kept.underflowed
        ctx.mark_non_differentiable(scale)
        shape = tensors.values.shape
        return output, kept.log_normaliser, sums.values.view(shape), sums.total.view(shape[:-1]), scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *changes: Tensor | None) -> tuple[Any, ...]:
        change, log_change, values, total, _ = changes
        *given, log_normaliser = ctx.saved_tensors
        tensors, query, key = _unpack(given)
        run = Backward(tensors, ctx.frame, query, key)
        needed = dict(
            zip(
                Tensors._fields + tuple("q " + n for n in Form._fields) + tuple("k " + n for n in Form._fields),
                ctx.needs_input_grad[2:],
                strict=True,
            )
        )
        for side, prefix in ((run.query_side, "q "), (run.key_side, "k ")):
            side.needs = {name: needed[prefix + name] for name in Form._fields}
        kept = Kept(log_normaliser, ctx.starts, ctx.stride, ctx.underflowed)
        found = run.run(kept, change, log_change, [values, total])
        return None, None, *found, *run.query_side.form_gradients(), *run.key_side.form_gradients()


def _unpack(given: Any) -> tuple[Tensors, Form, Form]:
    tensors, size = len(Tensors._fields), len(Form._fields)
    return Tensors(*given[:tensors]), Form(*given[tensors : tensors + size]), Form(*given[tensors + size :])


def _apply(tensors: Tensors, frame: Frame) -> tuple[Tensor, Tensor, Sums]:
    """A whole pass. Returns output (B, G, R, L, d_v), log-normaliser (B, G, R, L) to base e, the sums after it."""
    query, key = forms(frame.parameters)
    given = (*tensors, *query, *key)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    output, log_normaliser, *sums = _Chunked.apply(frame, keep, *given)
    return output, log_normaliser / LOG2E, Sums(*sums)


def _seen(frame: Frame, length: int) -> Tensor:
    """(B, L): which queries see any key."""
    features = frame.parameters.config.feature_count > 0
    stored = (frame.scale > LOG_ZERO / 2).flatten(1).any(1, keepdim=True)
    seen = (frame.far_valid.cumsum(1) > 0) | stored if features else torch.zeros_like(frame.far_valid)
    if frame.window > frame.nearest:
        count = F.pad(frame.near_valid.cumsum(1), (1, 0))  # valid keys in slots before i
        end = frame.near_valid.shape[1] - length + 1 - frame.nearest  # query 0 sees slots below this
        first = end - (frame.window - frame.nearest)
        seen = seen | (count[:, end : end + length] > count[:, first : first + length])
    return seen | frame.sink_valid.any(-1)


def _forward_pass(problem: Problem) -> tuple[Tensors, Frame]:
    """Keys at or before the query, behind the state's recent keys; sinks included."""
    state, window, sinks = problem.state, problem.config.window, problem.state.sink_key.shape[2]
    length, device = problem.query.shape[3], problem.query.device
    new = torch.arange(length, device=device)
    query_valid = new < problem.lengths[:, None]
    slot = torch.arange(window + length, device=device)
    position = state.count[:, None] - window + slot  # of [recent | new]
    valid = (position >= sinks) & (slot < window + problem.lengths[:, None])
    sink = torch.arange(sinks, device=device)
    sink_valid = (sink < (state.count + problem.lengths)[:, None])[:, None].expand(-1, length, -1)
    query_position = state.count[:, None] + new
    if problem.is_causal:
        sink_valid = sink_valid & (sink <= query_position[..., None])
    sink_slot = sink - state.count[:, None]
    # Of a pass over super-chunks; a trace's length is not known.
    chunk = 1 if problem.traced else chunk_length(window, length)
    frame = Frame(
        scale=state.log_scale.detach(),
        far_valid=valid[:, :length] & query_valid,
        near_valid=valid,
        visible=query_valid,
        query_position=query_position,
        key_position=position[:, :length],
        sink_valid=sink_valid & query_valid[..., None],
        sink_slot=sink_slot.clamp(0, length - 1),
        sink_fresh=(sink_slot >= 0) & (sink_slot < problem.lengths[:, None]),
        window=window,
        nearest=0,
        scaling=problem.scaling,
        softcap=problem.softcap,
        parameters=problem.parameters,
        compute=state.feature_sum.dtype,
        # The two directions are merged in full precision.
        output=problem.query.dtype if problem.is_causal else state.feature_sum.dtype,
        chunk=chunk,
        span=1 if problem.traced else span_length(chunk, problem.query.shape[:3].numel()),
        row_matters=window + sinks > 0 or not problem.is_causal,
    )
    tensors = Tensors(
        problem.query, problem.key, problem.value, state.recent_key, state.recent_value,
        state.sink_key, state.sink_value, state.feature_values, state.feature_sum,
    )  # fmt: skip
    return tensors, frame._replace(visible=_seen(frame, length) & query_valid)


def _backward_pass(problem: Problem, tensors: Tensors, frame: Frame) -> tuple[Tensors, Frame]:
    """Keys after the query: everything reversed, offsets from 1, no sinks (the forward pass has them)."""
    window, length = problem.config.window, problem.query.shape[3]
    prefix = max(window, 1)
    valid = F.pad(frame.near_valid[:, window:].flip(1), (prefix, 0))
    query_position = frame.query_position.flip(1)
    query_valid = torch.arange(length, device=valid.device).flip(0) < problem.lengths[:, None]
    reverse = frame._replace(
        far_valid=valid[:, :length],
        near_valid=valid,
        query_position=query_position,
        key_position=F.pad(query_position, (prefix, 0))[:, :length],
        sink_valid=frame.sink_valid[..., :0],
        sink_slot=frame.sink_slot[:, :0],
        sink_fresh=frame.sink_fresh[:, :0],
        nearest=1,
    )

    def before(x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:2], prefix, x.shape[-1])

    flipped = tensors._replace(
        query=problem.query.flip(3), key=problem.key.flip(2), value=problem.value.flip(2),
        key_before=before(problem.key), value_before=before(problem.value),
        sink_key=tensors.sink_key[:, :, :0], sink_value=tensors.sink_value[:, :, :0],
    )  # fmt: skip
    return flipped, reverse._replace(visible=_seen(reverse, length) & query_valid)


def chunked(problem: Problem) -> tuple[Tensor, AttentionState]:
    """Attention in time and memory linear in L, forward and backward.

    Returns:
        output (B, G, R, L, d_v) in the query's dtype (bidirectional: in the compute dtype), zero at pads, and the state
        after the last token.
    """
    tensors, frame = _forward_pass(problem)
    apply = scan_pass if problem.traced else _apply
    output, log_normaliser, after = apply(tensors, frame)
    # Without features and with window 1 a query sees no key after itself.
    if not problem.is_causal and (problem.config.feature_count or problem.config.window > 1):
        other, other_normaliser, _ = apply(*_backward_pass(problem, tensors, frame))
        other, other_normaliser = other.flip(3), other_normaliser.flip(3)
        share = torch.sigmoid(log_normaliser - other_normaliser)[..., None]
        output = share * output + (1 - share) * other
    return output, AttentionState(
        feature_values=after.values, feature_sum=after.total, log_scale=after.scale, **next_buffers(problem)
    )
