"""One super-chunk of one direction as ordinary differentiable torch: the whole arithmetic of `chunked`.

With ek = exp(ℓ_k - μ), eq = exp(ℓ_q + μ - top), μ the running maximum of ℓ_k up to and including the chunk:
out = (tril(eq ekᵀ) v + eq S + exact part) / (the same with 1 for v), S the sums over the chunks before in units of e^μ.
Shapes: N chunks of C tokens; the R query heads of a group stand one after the other in a chunk, R·C rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...features.affine import Affine
from ..state import LOG_ZERO, capped, join, without_digits
from .log_domain import Term, highest, log_domain_attention, weighted_sum
from .scan import BLOCK, Sums, prefix_sums


class Operands(NamedTuple):
    """The differentiable tensors of one super-chunk of T tokens, in the compute dtype; the sums before it aside."""

    query: Tensor  # (B, G, R, T, d)
    key: Tensor  # (B, G, prefix + T, d): those before the super-chunk that its window reaches come first
    value: Tensor  # (B, G, prefix + T, d_v + 1): the last column is 1, so that it sums up the weights
    sink_key: Tensor  # (B, G, sinks, d)
    sink_value: Tensor  # (B, G, sinks, d_v + 1) likewise
    query_form: Affine  # of raw tokens
    key_form: Affine


class Masks(NamedTuple):
    """What may be seen."""

    rows: Tensor  # (B, T) queries that see any key
    far: Tensor  # (B, T) which of the first T keys enter the sums
    window: Tensor  # (B, prefix + T) keys that the window may see
    sinks: Tensor  # (B, T, sinks)
    query_position: Tensor  # (B, T)
    key_position: Tensor  # (B, T) of the first T keys
    complete: bool = False  # all of it is true, and T is a multiple of the chunk

    def span(self, start: int, stop: int, complete: bool) -> Masks:
        """Those of the tokens start…stop."""
        here, reach = slice(start, stop), stop + self.window.shape[1] - self.rows.shape[1]
        masks = Masks._make([*(x[:, here] for x in self[:-1]), complete])
        return masks._replace(window=self.window[:, start:reach])


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
    log_normalizer: Tensor  # (B, G, R, T), LOG_ZERO where a query sees nothing
    sums: Sums  # (B, G, m, …) after the last token
    underflowed: Tensor | None  # (B, G, N, R·C) rows whose chunks were computed in the log domain; None for no row


def _padded(x: Tensor, dim: int, extra: int) -> Tensor:
    """x with `extra` zeros after the last entry of a dimension; a trace may not ask whether there are any."""
    return F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, extra)) if not isinstance(extra, int) or extra else x


def _by_chunk(x: Tensor, count: int, chunk: int) -> Tensor:
    """(B, T, …) → (B, N, C, …), zeros after the last token."""
    return _padded(x, 1, count * chunk - x.shape[1]).unflatten(1, (count, chunk))


def _exact_terms(q: Tensor, key: Tensor, value: Tensor, x: Operands, masks: Masks, rules: Rules) -> Iterator[Term]:
    """The window's band and the sinks, for queries q (B, G, N, R·C, d), keys and values (B, G, prefix + N·C, …)."""
    chunk, count = rules.sizes.chunk, q.shape[2]
    scaled = q * rules.scaling

    def logits(keys: Tensor, visible: Tensor | None) -> Tensor:  # visible broadcasts to (B, G, N, R, C, J)
        product = capped(scaled @ keys.mT, rules.softcap)
        if visible is None:
            return product
        # A sum, unlike masked_fill, costs nothing in the backward pass.
        bias = q.new_zeros(visible.shape).masked_fill_(~visible, -torch.inf)
        return (product.unflatten(3, (-1, chunk)) + bias).flatten(3, 4)

    if rules.window > rules.nearest:
        width = x.key.shape[2] - x.query.shape[3] + chunk  # prefix + C
        slot = torch.arange(width, device=q.device)
        offset = width - chunk + slot[:chunk, None] - slot
        visible = (offset >= rules.nearest) & (offset < rules.window)
        if not masks.complete:
            window = F.pad(masks.window, (0, count * chunk - masks.rows.shape[1]))
            visible = visible & window.unfold(1, width, chunk)[:, None, :, None, None]
        keys, values = (y.unfold(2, width, chunk).mT for y in (key, value))
        yield logits(keys, visible), values
    if x.sink_key.shape[2]:
        keys, values = x.sink_key[:, :, None], x.sink_value[:, :, None]
        sinks = None if masks.complete else _by_chunk(masks.sinks, count, chunk)[:, None, :, None]
        yield logits(keys, sinks), values


def _chunk_count(x: Operands, rules: Rules) -> int:
    """N; in a trace whole blocks, with one to spare, as it would ask whether there is a single one."""
    length, chunk = x.query.shape[3], rules.sizes.chunk
    count = (length + chunk - 1) // chunk
    return (count + (0 if isinstance(length, int) else BLOCK) + BLOCK - 1) // BLOCK * BLOCK if rules.traced else count


class Far(NamedTuple):
    """The far keys of a super-chunk and the sums over them."""

    lk: Tensor  # (B, G, N, C, m) log-features, LOG_ZERO where masked
    ek: Tensor  # (B, G, N, C, m) exp(lk - scale)
    value: Tensor  # (B, G, N, C, d_v + 1)
    scale: Tensor  # (B, G, N, m) μ; in a trace the chunk's own maximum
    before: Sums  # (B, G, N, m, …) before each chunk, at the scale they had there
    after: Sums  # (B, G, m, …) after the last token


def far_sums(x: Operands, masks: Masks, sums: Sums, rules: Rules) -> Far:
    """The key side of a super-chunk after `sums` (B, G, m, …)."""
    length, chunk, count = x.query.shape[3], rules.sizes.chunk, _chunk_count(x, rules)
    key, value = (_padded(y[:, :, :length], 2, count * chunk - length) for y in (x.key, x.value))
    value = value.unflatten(2, (count, chunk))
    lk = x.key_form(key, _by_chunk(masks.key_position, count, chunk).flatten(1)).unflatten(2, (count, chunk))
    hidden = None if masks.complete else ~_by_chunk(masks.far, count, chunk)[:, None, ..., None]
    if hidden is not None:
        lk = lk.masked_fill(hidden, LOG_ZERO)
    scale = lk.detach().amax(3)
    if not rules.traced:
        scales = torch.cat([sums.log_scale[:, :, None], scale], dim=2).cummax(2).values
        scale = scales[:, :, 1:]
    ek = (lk - scale[:, :, :, None]).exp_()
    ek = ek if hidden is None else ek.masked_fill(hidden, 0)
    own = ek.mT @ value
    if rules.traced:
        before, new = prefix_sums(Sums(own, scale), sums)
        decay_to_end = (sums.log_scale - new.log_scale).exp()
    else:
        # The super-chunk's own keys first, so that the sums before it round once.
        decay = (scales[:, :, 1:-1] - scale[:, :, 1:]).exp()[..., None]
        inside = [own[:, :, 0]]
        for own_of_chunk, decay_of_chunk in zip(own.unbind(2)[1:], decay.unbind(2), strict=True):
            inside.append(torch.addcmul(own_of_chunk, inside[-1], decay_of_chunk))
        decay_of_sums = (scales[:, :, :1] - scales).exp()
        earlier = torch.stack([torch.zeros_like(inside[0]), *inside[:-1]], 2)
        values = torch.addcmul(earlier, sums.values[:, :, None], decay_of_sums[:, :, :-1, :, None])
        before, new = Sums(values, scales[:, :, :-1]), Sums(inside[-1], scale[:, :, -1])
        decay_to_end = decay_of_sums[:, :, -1]
    after = join(sums.values, decay_to_end[..., None], new.values, masks.query_position[:, 0])
    return Far(lk, ek, value, scale, before, Sums(after, new.log_scale))


def attend_span(x: Operands, masks: Masks, sums: Sums, rules: Rules) -> Result:
    """Attention of a super-chunk's queries after `sums` (B, G, m, …)."""
    heads, length = x.query.shape[2:4]
    m, chunk, count = sums.values.shape[2], rules.sizes.chunk, _chunk_count(x, rules)
    query, key, value = (_padded(y, y.dim() - 2, count * chunk - length) for y in (x.query, x.key, x.value))
    q = query.unflatten(3, (count, chunk)).transpose(2, 3).flatten(3, 4)

    def query_features() -> Tensor:  # (B, G, N, R·C, m)
        positions = _by_chunk(masks.query_position, count, chunk)[:, :, None].expand(-1, -1, heads, -1).flatten(1)
        return x.query_form(q.flatten(2, 3), positions).unflatten(2, (count, -1))

    exact = list(_exact_terms(q, key, value, x, masks, rules))
    underflowed = None
    if not m:
        total, top = weighted_sum(exact)
    else:
        far = far_sums(x, masks, sums, rules)
        sums = far.after
    has_norm = x.query_form.has_norm
    if m and rules.traced:
        total, top = log_domain_attention(
            query_features(), far.lk, far.value, far.before, exact, recompute=False, has_norm=has_norm
        )
    elif m:
        past = query_features() + far.scale[:, :, :, None]
        top = highest([*(logits for logits, _ in exact), past])
        eq = past.sub_(top).exp_()
        inside = (eq @ far.ek.mT).unflatten(3, (heads, chunk)).tril().flatten(3, 4)
        decayed = far.before.values * (far.before.log_scale - far.scale).exp()[..., None]
        total = inside @ far.value + eq @ decayed
        for logits, values in exact:
            total = total + logits.sub_(top).exp_() @ values
        if not has_norm:  # a long query could make up for what the keys have lost
            top = top.masked_fill(without_digits(far.scale.amax(-1))[..., None, None], torch.nan)
        underflowed = _underflowed(total, masks, rules.sizes)
        if underflowed is not None:
            at = underflowed.any(-1).nonzero(as_tuple=True)  # batch row, kv head, chunk
            terms = [
                (logits[at], values.expand(-1, -1, count, -1, -1)[at])
                for logits, values in _exact_terms(q, key, value, x, masks, rules)
            ]
            far_terms = query_features()[at], far.lk[at], far.value[at], Sums(*(y[at] for y in far.before))
            slow, slow_top = log_domain_attention(*far_terms, terms, recompute=True, has_norm=has_norm)
            total, top = total.index_put(at, slow), top.index_put(at, slow_top)

    normaliser = total[..., -1:]
    if masks.complete:
        output, log_normalizer = total[..., :-1] / normaliser, top + normaliser.log()
    else:
        dead = ~_by_row(masks.rows, count, chunk, heads)[..., None]
        normaliser = normaliser.masked_fill(dead, 1)
        output = (total[..., :-1] / normaliser).masked_fill_(dead, 0)
        log_normalizer = (top + normaliser.log()).masked_fill_(dead, LOG_ZERO)

    def by_token(y: Tensor) -> Tensor:
        y = y.unflatten(3, (heads, chunk)).transpose(2, 3).flatten(3, 4)
        # A slice in a trace would ask whether it is all of y.
        return y.index_select(3, torch.arange(length, device=y.device)) if rules.traced else y[:, :, :, :length]

    return Result(by_token(output), by_token(log_normalizer).squeeze(-1), sums, underflowed)


def _by_row(x: Tensor, count: int, chunk: int, heads: int) -> Tensor:
    """(B, T) → (B, 1, N, R·C), the same for all query heads."""
    return _by_chunk(x, count, chunk)[:, None, :, None].expand(-1, -1, -1, heads, -1).flatten(3, 4)


def _underflowed(total: Tensor, masks: Masks, sizes: Sizes) -> Tensor | None:
    """(B, G, N, R·C) rows whose normaliser is too small to be trusted although they see a key; None for no row."""
    low = total[..., -1].detach() < sizes.underflow
    if not masks.complete and bool(low.any()):
        low = low & _by_row(masks.rows, low.shape[2], sizes.chunk, low.shape[3] // sizes.chunk)
    return low if bool(low.any()) else None
