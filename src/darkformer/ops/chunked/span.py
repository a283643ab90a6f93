"""One super-chunk of one direction as ordinary differentiable torch: the whole arithmetic of `chunked`.

With ek = exp(ℓ_k - μ), eq = exp(ℓ_q + μ - top), μ the running maximum of ℓ_k up to and including the chunk:
out = (tril(eq ekᵀ) v + eq S + exact part) / (the same with 1 for v), S the sums over the chunks before in units of e^μ.
Shapes: P = B·G pairs of a batch row and a kv head, N chunks of C tokens each, the R query heads of a group one after
the other in a chunk, and K = P·N chunks of all pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...features.affine import Affine
from ..state import LOG_ZERO, capped
from .log_domain import Term, highest, log_domain_attention, weighted_sum
from .scan import BLOCK, Sums, prefix_sums


class Operands(NamedTuple):
    """The differentiable tensors of one super-chunk of T tokens, in the compute dtype."""

    query: Tensor  # (B, G, R, T, d)
    key: Tensor  # (B, G, prefix + T, d): those before the super-chunk that its window reaches come first
    value: Tensor  # (B, G, prefix + T, d_v)
    sink_key: Tensor  # (B, G, sinks, d)
    sink_value: Tensor  # (B, G, sinks, d_v)
    sums: Tensor  # (B, G, m, d_v + 1) over the keys before, scaled by exp(-log_scale); the last column is that of v = 1
    query_form: Affine  # of raw tokens
    key_form: Affine


class Masks(NamedTuple):
    """What may be seen."""

    rows: Tensor  # (B, T) queries that see any key
    far: Tensor  # (B, T) which of the first T keys enter the sums
    near: Tensor  # (B, prefix + T) keys that the window may see
    sinks: Tensor  # (B, T, sinks)
    query_position: Tensor  # (B, T)
    key_position: Tensor  # (B, T) of the first T keys
    complete: bool = False  # all of it is true, and T is a multiple of the chunk

    def span(self, start: int, stop: int, complete: bool) -> Masks:
        """Those of the tokens start…stop."""
        length, reach = self.rows.shape[1], stop + self.near.shape[1] - self.rows.shape[1]
        masks = Masks(*(x[:, start:stop] if x.shape[1] == length else x[:, start:reach] for x in self[:-1]))
        return masks._replace(near=self.near[:, start:reach], complete=complete)


class Sizes(NamedTuple):
    """How the work is cut; any choice gives the same numbers up to rounding."""

    chunk: int  # C
    span: int  # tokens of a super-chunk, a multiple of the chunk
    underflow: float  # a row with a smaller normaliser is computed in the log domain


class Rules(NamedTuple):
    """What a query sees exactly, and how a pass is computed."""

    scaling: float
    softcap: float | None  # of the exact logits
    window: int
    nearest: int  # smallest offset query - key that the pass covers: 0, or 1 for the backward direction
    sizes: Sizes
    traced: bool  # nothing may be decided by numbers or the length


class Result(NamedTuple):
    """A super-chunk's share of the answer."""

    output: Tensor  # (B, G, R, T, d_v)
    log_normaliser: Tensor  # (B, G, R, T), LOG_ZERO where a query sees nothing
    sums: Tensor  # (B, G, m, d_v + 1) after the last token
    log_scale: Tensor  # (B, G, m)
    underflowed: Tensor | None  # (K, R·C) rows whose chunks were computed in the log domain; None for no row


def _by_chunk(x: Tensor, count: int, chunk: int) -> Tensor:
    """(B, T, …) → (B, N, C, …), zeros after the last token."""
    if x.shape[1] != count * chunk:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, count * chunk - x.shape[1]))
    return x.unflatten(1, (count, chunk))


def _exact_terms(q: Tensor, key: Tensor, value: Tensor, x: Operands, masks: Masks, rules: Rules) -> Iterator[Term]:
    """The window's band and the sinks, for queries q (K, R·C, d), keys and values (P, prefix + N·C, …)."""
    chunk, (batch, groups, heads), count = rules.sizes.chunk, x.query.shape[:3], len(q) // len(key)

    def logits(keys: Tensor, visible: Tensor | None) -> Tensor:  # visible broadcasts to (B, G, N, R, C, J)
        product = torch.baddbmm(q.new_zeros(1), q, keys.mT, beta=0, alpha=rules.scaling)
        product = capped(product, rules.softcap)
        if visible is None:
            return product
        # A sum, unlike masked_fill, costs nothing in the backward pass.
        bias = q.new_zeros(visible.shape).masked_fill_(~visible, -torch.inf)
        return (product.view(batch, groups, count, heads, chunk, -1) + bias).view(product.shape)

    if rules.window > rules.nearest:
        width = key.shape[1] - (count - 1) * chunk  # prefix + C
        slot = torch.arange(width, device=q.device)
        offset = width - chunk + slot[:chunk, None] - slot
        visible = (offset >= rules.nearest) & (offset < rules.window)
        if not masks.complete:
            near = F.pad(masks.near, (0, key.shape[1] - masks.near.shape[1]))
            visible = visible & near.unfold(1, width, chunk)[:, None, :, None, None]
        keys, values = (y.unfold(1, width, chunk).mT.flatten(0, 1) for y in (key, value))
        yield logits(keys, visible), values
    if x.sink_key.shape[2]:
        keys, values = (
            y[:, :, None].expand(-1, -1, count, -1, -1).flatten(0, 2)
            for y in (x.sink_key, F.pad(x.sink_value, (0, 1), value=1.0))
        )
        visible = None if masks.complete else _by_chunk(masks.sinks, count, chunk)[:, None, :, None]
        yield logits(keys, visible), values


def attend_span(x: Operands, masks: Masks, log_scale: Tensor, rules: Rules) -> Result:
    """Attention of a super-chunk's queries; `log_scale` (B, G, m) is that of the sums before."""
    batch, groups, heads, length, _ = x.query.shape
    pairs, m, chunk = (batch, groups), x.sums.shape[2], rules.sizes.chunk
    count = (length + chunk - 1) // chunk
    if rules.traced:  # whole blocks; a trace would ask whether there is a single one, so it has one more than it needs
        count = (count + (0 if isinstance(length, int) else BLOCK) + BLOCK - 1) // BLOCK * BLOCK
    query, key, value = x.query, x.key, F.pad(x.value, (0, 1), value=1.0)  # weights times the ones: the normaliser
    if rules.traced or count * chunk != length:
        query, key, value = (F.pad(y, (0, 0, 0, count * chunk - length)) for y in (query, key, value))
    q = query.unflatten(3, (count, chunk)).transpose(2, 3).reshape(-1, heads * chunk, query.shape[-1])
    key, value = key.flatten(0, 1), value.flatten(0, 1)
    far_key, far_value = (y[:, : count * chunk].unflatten(1, (count, chunk)).flatten(0, 1) for y in (key, value))

    def query_features() -> Tensor:  # (K, R·C, m)
        positions = _by_chunk(masks.query_position, count, chunk)[:, :, None].expand(-1, -1, heads, -1).flatten(1)
        return x.query_form(q.unflatten(0, (*pairs, count)).flatten(2, 3), positions).view(*q.shape[:2], m)

    def key_features() -> Tensor:  # (K, C, m)
        positions = _by_chunk(masks.key_position, count, chunk).flatten(1)
        lk = x.key_form(far_key.unflatten(0, (*pairs, count)).flatten(2, 3), positions).view(-1, chunk, m)
        return lk if hidden is None else lk.masked_fill(hidden, LOG_ZERO)

    hidden = None
    if not masks.complete:
        hidden = ~_by_chunk(masks.far, count, chunk)[:, None].expand(-1, groups, -1, -1).reshape(-1, chunk, 1)
    exact = list(_exact_terms(q, key, value, x, masks, rules))
    sums, underflowed = x.sums, None
    if not m:
        total, top = weighted_sum(exact)
    elif rules.traced:
        lk = key_features()
        own_scale = lk.detach().amax(1)
        own = (lk - own_scale[:, None]).exp().masked_fill(hidden, 0).mT @ far_value
        own_sums = Sums(own.unflatten(0, (*pairs, count)), own_scale.unflatten(0, (*pairs, count)))
        before, (sums, log_scale) = prefix_sums(own_sums, Sums(sums, log_scale))
        far = query_features(), lk, far_value, before.values.flatten(0, 2), before.log_scale.flatten(0, 2)
        total, top = log_domain_attention(*far, exact, recompute=False)
    else:
        lk = key_features()
        peaks = lk.detach().amax(1).unflatten(0, (*pairs, count))
        scales = torch.cat([log_scale[:, :, None], peaks], dim=2).cummax(2).values
        earlier, scale = scales[:, :, :-1], scales[:, :, 1:]  # before each chunk, and with it
        ek = (lk - scale.flatten(0, 2)[:, None]).exp_()
        ek = ek if hidden is None else ek.masked_fill(hidden, 0)
        own, decay = (ek.mT @ far_value).unflatten(0, (*pairs, count)), (earlier - scale).exp()[..., None]
        running = [sums]
        for here, fading in zip(own.unbind(2), decay.unbind(2), strict=True):
            running.append(torch.addcmul(here, running[-1], fading))
        before, sums, log_scale = torch.stack(running[:-1], 2), running[-1], scales[:, :, -1]
        past = query_features() + scale.flatten(0, 2)[:, None]
        top = highest([*(logits for logits, _ in exact), past])
        eq = past.sub_(top).exp_()
        inside = (eq @ ek.mT).view(-1, heads, chunk, chunk).tril().view(*q.shape[:2], chunk)
        total = torch.baddbmm(inside @ far_value, eq, (before * decay).flatten(0, 2))
        for logits, values in exact:
            total = torch.baddbmm(total, logits.sub_(top).exp_(), values)
        underflowed = _underflowed(total, masks, x.query.shape, rules.sizes)
        if underflowed is not None:
            at = underflowed.any(-1).nonzero().squeeze(1)
            far = query_features()[at], key_features()[at], far_value[at], before.flatten(0, 2)[at]
            terms = [(logits[at], values[at]) for logits, values in _exact_terms(q, key, value, x, masks, rules)]
            slow, slow_top = log_domain_attention(*far, earlier.flatten(0, 2)[at], terms, recompute=True)
            total, top = total.index_put((at,), slow), top.index_put((at,), slow_top)

    normaliser = total[..., -1:]
    dead = normaliser == 0  # a NaN is not dead: the public door reports it
    if not masks.complete:
        rows = _by_chunk(masks.rows, count, chunk)[:, None, :, None].expand(-1, groups, -1, heads, -1)
        dead = dead | ~rows.reshape(dead.shape)
    normaliser = normaliser.masked_fill(dead, 1)
    output = (total[..., :-1] / normaliser).masked_fill_(dead, 0)
    log_normaliser = (top + normaliser.log()).masked_fill_(dead, LOG_ZERO)

    def by_token(y: Tensor) -> Tensor:
        y = y.unflatten(1, (heads, chunk)).unflatten(0, (*pairs, count)).transpose(2, 3).flatten(3, 4)
        # A slice in a trace would ask whether it is all of y.
        return y.index_select(3, torch.arange(length, device=y.device)) if rules.traced else y[:, :, :, :length]

    return Result(by_token(output), by_token(log_normaliser).squeeze(-1), sums, log_scale, underflowed)


def _underflowed(total: Tensor, masks: Masks, shape: torch.Size, sizes: Sizes) -> Tensor | None:
    """(K, R·C) rows whose normaliser is too small to be trusted although they see a key; None for no row."""
    normaliser = total[..., -1].detach()
    low = normaliser < sizes.underflow
    if not bool(low.any()):
        return None
    if not masks.complete:
        batch, groups, heads, _, _ = shape
        rows = _by_chunk(masks.rows, low.numel() // (batch * groups * heads * sizes.chunk), sizes.chunk)
        low = low & rows[:, None, :, None].expand(-1, groups, -1, heads, -1).reshape(low.shape)
    return low if bool(low.any()) else None
