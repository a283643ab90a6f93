"""For GPUs, from well-kept parts: far field by flash-linear-attention, window and sinks by FlexAttention, merged.

Not measured: no GPU was available. The algebra is tested with CPU stand-ins for the two parts; `auto` never takes this.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from ..features.affine import attention_forms
from .state import LOG_ZERO, AttentionState, Problem, State, capped, join, next_buffers, without_digits

#: q, k (B, L, H, m), v (B, L, H, d_v), log-decays g (B, L, H, m), state (B, H, m, d_v) → out (B, L, H, d_v) of
#: S_t = e^{g_t} S_{t-1} + k_t v_tᵀ, out_t = q_tᵀ S_t.
FarPart = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
#: q (B, H, L, d), k, v (B, G, K, …), which (b, h, t, j) are seen, scaling, softcap → softmax attention (B, H, L, d_v)
#: and its log-normaliser (B, H, L).
NearPart = Callable[[Tensor, Tensor, Tensor, Callable[..., Tensor], float, float | None], tuple[Tensor, Tensor]]


def why_not(problem: Problem) -> str | None:
    """Why the assembled backend cannot take a problem, or None."""
    if problem.config.method == "exact":
        return "exact attention has no far field"
    if not problem.is_causal:
        return "it is causal only"
    if problem.query.device.type != "cuda":
        return f"it needs CUDA, the tensors are on {problem.query.device.type}"
    if importlib.util.find_spec("fla") is None:
        return "it needs the operators of flash-linear-attention: pip install 'darkformer[gpu]'"
    return None


#: Tokens that `FarPart` adds up by itself, in chunks of its own; its rounding errors end with them.
PIECE = 16_384


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Tensor:
    """`FarPart` by flash-linear-attention."""
    chunk_gla: Any = importlib.import_module("fla.ops.gla").chunk_gla
    return chunk_gla(q, k, v, g, scale=1.0, initial_state=state)[0]


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex.flex_attention)


def flex_near(
    q: Tensor, k: Tensor, v: Tensor, seen: Callable[..., Tensor], scaling: float, softcap: float | None,
    function: Callable[..., Any] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`NearPart` by FlexAttention, compiled unless another `function` replaces it."""
    mask = flex.create_block_mask(seen, q.shape[0], None, q.shape[2], k.shape[2], device=q.device.type)
    cap = None if softcap is None else lambda score, *place: capped(score, softcap)
    output, extra = (function or _compiled())(
        q, k, v, score_mod=cap, block_mask=mask, scale=scaling, enable_gqa=True,
        return_aux=flex.AuxRequest(lse=True),
    )  # fmt: skip
    return output, extra.lse


def _near(problem: Problem, part: NearPart, buffers: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Output and log-normaliser of window and sinks, over the keys [sinks | before this call | this call]."""
    state, window, sinks = problem.state, problem.config.window, problem.state.sink_key.shape[2]
    key, value = (
        torch.cat([buffers[f"sink_{name}"], getattr(state, f"recent_{name}").to(new.dtype), new], dim=2)
        for name, new in (("key", problem.key), ("value", problem.value))
    )
    count, lengths = state.count, problem.lengths

    def seen(b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        own = j - sinks - window  # token of this call, negative before it
        inside = (own <= t) & (t - own < window) & (count[b] + own >= sinks) & (own < lengths[b])
        return torch.where(j < sinks, j <= count[b] + t, inside)

    return part(problem.query.flatten(1, 2), key, value, seen, problem.scaling, problem.softcap)


def _far(problem: Problem, part: FarPart) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output and log-normaliser of the features, and the sums after the last token.

    S_t is carried in units of e^-μ_t, μ the running maximum of the keys' log-features, so the decay is e^(μ_t-1 - μ_t):
    no key of the future is in any maximum, and the normaliser of a row that sees a far key is at least 1.
    """
    state, window, heads = problem.state, problem.config.window, problem.query.shape[2]
    length, compute, root = problem.query.shape[3], state.feature_sum.dtype, problem.scaling**0.5
    new = torch.arange(length, device=problem.query.device)
    key, value = (
        torch.cat([getattr(state, f"recent_{name}").to(x.dtype), x], dim=2)[:, :, :length].to(compute)
        for name, x in (("key", problem.key), ("value", problem.value))
    )
    position = state.count[:, None] - window + new
    real = ((position >= state.sink_key.shape[2]) & (new < problem.lengths[:, None]))[:, None, :, None]
    query_form, key_form = attention_forms(problem.parameters)
    lk = key_form(key * root, position).masked_fill(~real, LOG_ZERO)
    scale = torch.cat([state.log_scale[:, :, None], lk], dim=2).detach().cummax(2).values
    before, after = scale[:, :, :-1], scale[:, :, 1:]
    ek = (lk - after).exp() * real
    decay = torch.where(before < LOG_ZERO / 2, 0, before - after)  # of an empty sum any will do: 0 loses no digits
    query = problem.query.to(compute).flatten(2, 3) * root
    lq = query_form(query, (state.count[:, None] + new).repeat(1, heads))
    lq = lq.unflatten(2, (heads, length)) + after[:, :, None]
    top = lq.detach().amax(-1, keepdim=True)
    ones = torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)
    sums = torch.cat([state.feature_values, state.feature_sum[..., None]], dim=-1)
    dead = (state.log_scale < LOG_ZERO / 2) & (scale[:, :, -1] > LOG_ZERO / 2)  # the first key decays them to nothing
    sums = sums.masked_fill(dead[..., None], 0)

    def spread(x: Tensor) -> Tensor:  # one copy a query head
        return x.repeat_interleave(heads, dim=1).transpose(1, 2)

    eq = (lq - top).exp().flatten(1, 2).transpose(1, 2)
    tokens, pieces = (eq, spread(ek), spread(ones), spread(decay)), []
    for start in range(0, length, PIECE):
        here, last = slice(start, start + PIECE), after[:, :, start : start + PIECE][:, :, -1]
        q, k, v, g = (x[:, here] for x in tokens)
        pieces.append(part(q, k, v, g, sums.repeat_interleave(heads, dim=1)).transpose(1, 2))
        weight = (lk[:, :, here] - last[:, :, None]).exp() * real[:, :, here]
        carry = (before[:, :, start] - last).exp()[..., None]
        sums = join(sums, carry, weight.mT @ ones[:, :, here], state.count + start)
    sums_of_rows = torch.cat(pieces, dim=2)
    if not window + state.sink_key.shape[2]:  # a long query could make up for what the keys have lost
        top = top.masked_fill(without_digits(after.amax(-1))[:, :, None, :, None], torch.nan)
    normaliser = sums_of_rows[..., -1]
    safe = torch.where(normaliser > 0, normaliser, 1)
    log_normalizer = torch.where(normaliser > 0, top.flatten(1, 2)[..., 0] + safe.log(), LOG_ZERO)
    after_all = {"feature_values": sums[..., :-1], "feature_sum": sums[..., -1], "log_scale": scale[:, :, -1]}
    return sums_of_rows[..., :-1] / safe[..., None], log_normalizer, after_all


def assemble(problem: Problem, far_part: FarPart, near_part: NearPart) -> tuple[Tensor, State]:
    """Both parts under one normaliser: out = σ(far - near)·out_far + (1 - σ)·out_near, of their log-normalisers."""
    buffers, state = next_buffers(problem), problem.state
    sums = {name: getattr(state, name) for name in ("feature_values", "feature_sum", "log_scale")}
    exact, features = problem.config.window + problem.config.sinks > 0, problem.config.feature_count > 0
    if exact:
        output, log_normalizer = _near(problem, near_part, buffers)
    if features:
        far, far_log_normalizer, sums = _far(problem, far_part)
        if exact:
            share = torch.sigmoid(far_log_normalizer - log_normalizer)[..., None]
            far = share * far + (1 - share) * output
            far_log_normalizer = torch.maximum(far_log_normalizer, log_normalizer)
        output = far.masked_fill(without_digits(far_log_normalizer)[..., None], torch.nan)
    pads = torch.arange(output.shape[2], device=output.device) >= problem.lengths[:, None]
    output = output.masked_fill(pads[:, None, :, None], 0)
    return output.unflatten(1, problem.query.shape[1:3]), AttentionState(**sums, **buffers)


def assembled(problem: Problem) -> tuple[Tensor, State]:
    """Attention by the two GPU parts. Returns output (B, G, R, L, d_v), zero at pads, and the state after it."""
    return assemble(problem, gated_linear_attention, flex_near)
