"""Linear-time attention in plain torch, on any device.

A causal pass walks over super-chunks of `SUPER` tokens. Inside one, all chunks are computed at once: the near keys
exactly (window band, sinks), the far keys through their features, quadratic inside a chunk and through the running
state before it. Far keys are the keys `window` positions back, so "far" is ordinary causal linear attention.
A bidirectional call is two such passes, the second one backwards, merged by their log-normalisers.
Derivation: Φ(Q)(Φ(K)ᵀV) / Φ(Q)(Φ(K)ᵀ1) of the paper, with the stabiliser described at `_Block`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..features.maps import FeatureParameters, key_log_features, query_log_features
from .log_domain import ChunkTerms, log_domain_chunks
from .problem import LOG_ZERO, AttentionState, Problem, next_buffers

#: Tokens of one super-chunk: what is in memory at once (and recomputed in the backward pass).
SUPER = 1024
#: Tokens whose intermediate values may stay in memory for the backward pass without recomputation.
KEEP = 512
#: Normalisers below this are recomputed in the log domain. Far above the smallest number, so that what a row does see
#: has kept all its digits when it is larger.
UNDERFLOW = {torch.float32: 1e-18, torch.float64: 1e-150}


class Sums(NamedTuple):
    """The running sums over far keys, each feature scaled by exp(-scale)."""

    values: Tensor  # (B, G, m, d_v)
    total: Tensor  # (B, G, m)
    scale: Tensor  # (B, G, m)


class Pass(NamedTuple):
    """One direction over the tokens. `prefix` keys stand before the first query; P = prefix."""

    query: Tensor  # (B, G, R, L, d)
    key: Tensor  # (B, G, P + L, d)
    value: Tensor  # (B, G, P + L, d_v)
    far_valid: Tensor  # (B, L) which of key[:, :, :L] may enter the sums
    near_valid: Tensor  # (B, P + L) which keys the window may see
    query_valid: Tensor  # (B, L)
    query_position: Tensor  # (B, L)
    key_position: Tensor  # (B, L) of key[:, :, :L]
    sink_key: Tensor  # (B, G, sinks, d)
    sink_value: Tensor
    sink_valid: Tensor  # (B, L, sinks)
    nearest: int  # smallest offset query - key that this pass covers: 0, or 1 for the backward direction
    scaling: float
    parameters: FeatureParameters
    compute: torch.dtype


class Piece(NamedTuple):
    """The T tokens of one super-chunk, and the P keys and values before its keys."""

    query: Tensor  # (B, G, R, T, d)
    key_before: Tensor  # (B, G, P, d)
    key: Tensor  # (B, G, T, d)
    value_before: Tensor
    value: Tensor


def pieces(p: Pass, span: int) -> Iterator[Piece]:
    """Cuts a pass into super-chunks of `span` tokens.

    Split, not sliced: the gradient of one slice is a tensor of zeros as long as the sequence, so that a backward pass
    over all slices would take quadratic time.
    """
    prefix = p.key.shape[2] - p.query.shape[3]

    def cut(x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        before, rest = x.split([prefix, x.shape[2] - prefix], dim=2)
        for piece in rest.split(span, dim=2):
            yield before, piece
            long = piece if piece.shape[2] >= prefix else torch.cat([before, piece], dim=2)
            before = long[:, :, long.shape[2] - prefix :]

    for query, key, value in zip(p.query.split(span, dim=3), cut(p.key), cut(p.value), strict=True):
        yield Piece(query, *key, *value)


def chunk_length(window: int, length: int) -> int:
    """Chunk size: 64, longer under a long window (the band costs chunk + window), shorter for short inputs."""
    chunk = 64
    while chunk < min(window, 256):
        chunk *= 2
    while chunk > 1 and chunk >= 2 * length:
        chunk //= 2
    return chunk


class _Block:
    """One super-chunk of N chunks of C tokens. Shapes: (B, G, N, R·C, …) for queries, (B, G, N, C, …) for keys.

    Stabiliser: feature i's key sums are scaled by exp(-running maximum of ℓ_k,i up to and including the chunk). That
    maximum may belong to a key the query does not see, so a row's normaliser can underflow; such chunks are found
    afterwards (`visible` but a tiny normaliser) and recomputed in the log domain.
    """

    def __init__(self, p: Pass, window: int, chunk: int) -> None:
        self.p, self.window, self.chunk = p, window, chunk
        self.prefix = p.key.shape[2] - p.query.shape[3]

    def __call__(self, start: int, stop: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Tokens start…stop: (output (B, G, R, T, d_v), log-normaliser (B, G, R, T), values, total, scale).

        `tensors` are the fields of `Piece`, then those of the `Sums` before it.
        """
        p, piece, before = self.p, Piece(*tensors[:5]), Sums(*tensors[5:])
        C, T = self.chunk, stop - start
        N, heads = T // C, p.query.shape[2]
        root = p.scaling**0.5
        q = piece.query.to(p.compute) * root
        q = q.unflatten(3, (N, C)).transpose(2, 3).flatten(3, 4)  # (B, G, N, R·C, d)
        keys = torch.cat([piece.key_before, piece.key], dim=2).to(p.compute) * root
        values = torch.cat([piece.value_before, piece.value], dim=2).to(p.compute)

        terms, after, visible = [], before, self._far_count(start, stop, before).unflatten(1, (N, C)) > 0
        if p.parameters.config.feature_count:
            far, after = self._far(q, keys[:, :, :T], values[:, :, :T], start, stop, before)
        else:
            far = None
        if self.window > p.nearest:
            logits, mask = self._near(q, keys, start, stop)
            visible = visible | mask.any(-1)
            terms.append((logits, mask, values.unfold(2, C + self.prefix, C).mT))
        if p.sink_key.shape[2]:
            mask = p.sink_valid[:, start:stop].unflatten(1, (N, C))
            logits = q @ (p.sink_key.to(p.compute) * root).mT[:, :, None]
            visible = visible | mask.any(-1)
            terms.append((logits, mask, p.sink_value.to(p.compute)[:, :, None]))
        visible = visible & p.query_valid[:, start:stop].unflatten(1, (N, C))
        # Masks are per (row of the batch, chunk, token); every group and query head shares them.
        shared = [(lg.masked_fill(~m[:, None].repeat(1, 1, 1, heads, 1), LOG_ZERO), m, v) for lg, m, v in terms]
        numerator, normaliser, top = self._combine(far, shared, visible, heads)
        safe = torch.where(normaliser > 0, normaliser, 1)
        output = numerator / safe[..., None]
        log_normaliser = torch.where(normaliser > 0, top + safe.log(), LOG_ZERO)

        def unfold(x: Tensor) -> Tensor:  # (B, G, N, R·C, …) → (B, G, R, T, …)
            return x.unflatten(3, (heads, C)).transpose(2, 3).flatten(3, 4)

        return unfold(output), unfold(log_normaliser), *after

    def _far_count(self, start: int, stop: int, before: Sums) -> Tensor:
        """(B, T): how many far keys a query sees, counting a non-empty state as one."""
        if not self.p.parameters.config.feature_count:
            return torch.zeros_like(self.p.far_valid[:, start:stop], dtype=torch.int64)
        stored = (before.scale > LOG_ZERO / 2).flatten(1).any(1)
        return self.p.far_valid[:, start:stop].cumsum(1) + stored[:, None]

    def _far(
        self, q: Tensor, keys: Tensor, values: Tensor, start: int, stop: int, before: Sums
    ) -> tuple[ChunkTerms, Sums]:
        """Log-features, stabilisers and prefix sums of every chunk, and the sums after the last one."""
        p, C = self.p, self.chunk
        N = (stop - start) // C
        heads = q.shape[3] // C
        valid = p.far_valid[:, start:stop]
        lk = key_log_features(p.parameters, keys, p.key_position[:, start:stop])
        lk = lk.masked_fill(~valid[:, None, :, None], LOG_ZERO).unflatten(2, (N, C))
        position = p.query_position[:, start:stop].unflatten(1, (N, C)).repeat(1, 1, heads).flatten(1)
        lq = query_log_features(p.parameters, q.flatten(2, 3), position).unflatten(2, (N, -1))
        with torch.no_grad():  # stabilisers: mathematically without effect, so without gradient
            scale = torch.cat([before.scale[:, :, None], lk.amax(-2)], dim=2).cummax(2).values  # (B, G, N+1, m)
        ek = (lk - scale[:, :, 1:, None]).exp().masked_fill(~valid.unflatten(1, (N, C))[:, None, :, :, None], 0)
        v = values.unflatten(2, (N, C))
        all_values = torch.cat([before.values[:, :, None], ek.mT @ v], dim=2)  # (B, G, N+1, m, d_v)
        all_total = torch.cat([before.total[:, :, None], ek.sum(-2)], dim=2)
        # Row c sums the state and the chunks before c at chunk c's scale; row N is the state after the last chunk.
        at = torch.cat([scale[:, :, 1:], scale[:, :, -1:]], dim=2)
        decay = (scale[:, :, None] - at[:, :, :, None]).clamp_max(0).exp()  # (B, G, row, source, m)
        order = torch.arange(N + 1, device=q.device)
        decay = decay * (order[None, :] <= order[:, None])[..., None]
        sums = torch.einsum("bgcsm,bgsmd->bgcmd", decay, all_values)
        totals = torch.einsum("bgcsm,bgsm->bgcm", decay, all_total)
        terms = ChunkTerms(lq, lk, ek, v, sums[:, :, :N], totals[:, :, :N], scale, all_values, all_total)
        return terms, Sums(sums[:, :, N], totals[:, :, N], scale[:, :, -1])

    def _near(self, q: Tensor, keys: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Logits (B, G, N, R·C, C+P) of the window's band and the mask (B, N, C, C+P)."""
        C, P = self.chunk, self.prefix
        logits = q @ keys.unfold(2, C + P, C)  # unfold's last axis is the key axis: (B, G, N, d, C+P)
        rows = torch.arange(C, device=q.device)[:, None]
        offset = P + rows - torch.arange(C + P, device=q.device)
        band = (offset >= self.p.nearest) & (offset < self.window)
        valid = self.p.near_valid[:, start : stop + P].unfold(1, C + P, C)
        return logits, band & valid[:, :, None]

    def _combine(
        self, far: ChunkTerms | None, near: list[tuple[Tensor, Tensor, Tensor]], visible: Tensor, heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Numerator, normaliser and the subtracted maximum, each (B, G, N, R·C[, d_v])."""
        tops = [logits.detach().amax(-1) for logits, _, _ in near]
        if far is not None:
            shifted = far.query + far.scale[:, :, 1:, None]
            tops.append(shifted.detach().amax(-1))
        top = torch.stack(tops).amax(0)
        numerator: Tensor | float = 0.0
        normaliser: Tensor | float = 0.0
        if far is not None:
            eq = (shifted - top[..., None]).exp()
            inside = (eq @ far.key_exp.mT).unflatten(3, (heads, self.chunk)).tril().flatten(3, 4)
            numerator = eq @ far.sums + inside @ far.value
            normaliser = (eq @ far.totals[..., None]).squeeze(-1) + inside.sum(-1)
        for logits, _, value in near:
            weight = (logits - top[..., None]).exp() * (logits > LOG_ZERO / 2)
            numerator = numerator + weight @ value
            normaliser = normaliser + weight.sum(-1)
        assert isinstance(numerator, Tensor) and isinstance(normaliser, Tensor)
        if far is not None:
            bad = (normaliser < UNDERFLOW[top.dtype]) & visible.repeat(1, 1, heads)[:, None]
            if bool(bad.any()):
                return log_domain_chunks(bad, far, near, (numerator, normaliser, top))
        return numerator, normaliser, top


def _padded(p: Pass, padding: int) -> Pass:
    """The pass with `padding` more tokens at the end, all masked."""
    rows = {n: F.pad(getattr(p, n), (0, 0, 0, padding)) for n in ("query", "key", "value", "sink_valid")}
    flat = ("far_valid", "near_valid", "query_valid", "query_position", "key_position")
    tensors: dict[str, Any] = {**rows, **{n: F.pad(getattr(p, n), (0, padding)) for n in flat}}
    return p._replace(**tensors)


def _run(p: Pass, sums: Sums, window: int) -> tuple[Tensor, Tensor, Sums]:
    """A whole pass. Returns output (B, G, R, L, d_v), log-normaliser (B, G, R, L), the sums after it."""
    length = p.query.shape[3]
    chunk = chunk_length(window, length)
    padding = -length % chunk
    if padding:
        p = _padded(p, padding)
    block = _Block(p, window, chunk)
    total, span = length + padding, max(SUPER, chunk)
    recompute = torch.is_grad_enabled() and p.query.shape[0] * total > KEEP
    outputs, normalisers = [], []
    for start, piece in zip(range(0, total, span), pieces(p, span), strict=True):
        arguments = (start, min(start + span, total), *piece, *sums)
        if recompute:
            result = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            result = block(*arguments)
        outputs.append(result[0])
        normalisers.append(result[1])
        sums = Sums(*result[2:])
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=3)
    normaliser = normalisers[0] if len(outputs) == 1 else torch.cat(normalisers, dim=3)
    return output[:, :, :, :length], normaliser[..., :length], sums


def _forward_pass(problem: Problem) -> Pass:
    """Keys at or before the query, behind the state's recent keys; sinks included."""
    state, window, sinks = problem.state, problem.config.window, problem.state.sink_key.shape[2]
    length, device = problem.query.shape[3], problem.query.device
    new = torch.arange(length, device=device)
    query_valid = new < problem.lengths[:, None]
    slot = torch.arange(window + length, device=device)
    position = state.count[:, None] - window + slot  # of [recent | new]
    valid = (position >= sinks) & (slot < window + problem.lengths[:, None])
    after = next_buffers(problem)
    sink = torch.arange(sinks, device=device)
    sink_valid = (sink < after["count"][:, None])[:, None].expand(-1, length, -1)
    query_position = state.count[:, None] + new
    if problem.is_causal:
        sink_valid = sink_valid & (sink <= query_position[..., None])
    return Pass(
        query=problem.query,
        key=torch.cat([state.recent_key.to(problem.key.dtype), problem.key], dim=2) if window else problem.key,
        value=torch.cat([state.recent_value.to(problem.value.dtype), problem.value], dim=2)
        if window
        else problem.value,
        far_valid=valid[:, :length] & query_valid,
        near_valid=valid,
        query_valid=query_valid,
        query_position=query_position,
        key_position=position[:, :length],
        sink_key=after["sink_key"],
        sink_value=after["sink_value"],
        sink_valid=sink_valid & query_valid[..., None],
        nearest=0,
        scaling=problem.scaling,
        parameters=problem.parameters,
        compute=state.feature_sum.dtype,
    )


def _backward_pass(problem: Problem, forward: Pass) -> Pass:
    """Keys after the query: everything reversed, offsets from 1, no sinks (the forward pass has them)."""
    window, length = problem.config.window, problem.query.shape[3]
    prefix = max(window, 1)
    valid = F.pad(forward.near_valid[:, window:].flip(1), (prefix, 0))
    return forward._replace(
        query=problem.query.flip(3),
        key=F.pad(problem.key.flip(2), (0, 0, prefix, 0)),
        value=F.pad(problem.value.flip(2), (0, 0, prefix, 0)),
        far_valid=valid[:, :length],
        near_valid=valid,
        query_valid=forward.query_valid.flip(1),
        query_position=forward.query_position.flip(1),
        key_position=F.pad(forward.query_position.flip(1), (prefix, 0))[:, :length],
        sink_key=forward.sink_key[:, :, :0],
        sink_value=forward.sink_value[:, :, :0],
        sink_valid=forward.sink_valid[..., :0],
        nearest=1,
    )


def chunked(problem: Problem) -> tuple[Tensor, AttentionState]:
    """Attention in time and memory linear in L, forward and backward.

    Returns:
        output (B, G, R, L, d_v) in the compute dtype, zero at pads, and the state after the last token.
    """
    state, window = problem.state, problem.config.window
    forward = _forward_pass(problem)
    sums = Sums(state.feature_values, state.feature_sum, state.log_scale.detach())
    output, log_normaliser, after = _run(forward, sums, window)
    # Without features and with window 1 a query sees no key after itself.
    if not problem.is_causal and (problem.config.feature_count or window > 1):
        other, other_normaliser, _ = _run(_backward_pass(problem, forward), sums, window)
        other, other_normaliser = other.flip(3), other_normaliser.flip(3)
        share = torch.sigmoid(log_normaliser - other_normaliser)[..., None]
        output = share * output + (1 - share) * other
    output = output * forward.query_valid[:, None, None, :, None]
    return output, AttentionState(
        feature_values=after.values, feature_sum=after.total, log_scale=after.scale, **next_buffers(problem)
    )
