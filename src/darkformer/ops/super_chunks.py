"""What the forward and the backward pass of `chunked` share: super-chunks of a sequence in reused memory.

Shapes: P = B·G pairs of a batch row and a kv head, N chunks of C tokens; queries (P, N·R·C, …) with the R query heads
of a group inside each chunk, keys (P, N·C, …). Names in comments: eq = 2^(ℓ_q + μ - …), ek = 2^(ℓ_k - μ).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..features.affine import FeatureParameters
from .chunk_features import LOG2E, Features, Form, Scratch, Side
from .log_domain import ChunkTerms
from .state import LOG_ZERO, gather_tokens


class Tensors(NamedTuple):
    """The differentiable inputs of one pass. The first slot of the window's keys is key_before's first row."""

    query: Tensor  # (B, G, R, L, d)
    key: Tensor  # (B, G, L, d)
    value: Tensor  # (B, G, L, d_v)
    key_before: Tensor  # (B, G, prefix, d)
    value_before: Tensor  # (B, G, prefix, d_v)
    sink_key: Tensor  # (B, G, sinks, d) the state's
    sink_value: Tensor
    values: Tensor  # (B, G, m, d_v) the state's sums, each feature scaled by exp(-scale)
    total: Tensor  # (B, G, m)


class Frame(NamedTuple):
    """What a pass is, apart from its numbers."""

    scale: Tensor  # (B, G, m) of the sums
    far_valid: Tensor  # (B, L) which of [key_before | key][:L] may enter the sums
    near_valid: Tensor  # (B, prefix + L) which keys the window may see
    visible: Tensor  # (B, L) which queries see any key
    query_position: Tensor  # (B, L)
    key_position: Tensor  # (B, L) of [key_before | key][:L]
    sink_valid: Tensor  # (B, L, sinks)
    sink_slot: Tensor  # (B, sinks) token of this call that becomes the sink
    sink_fresh: Tensor  # (B, sinks) whether one does
    window: int
    nearest: int  # smallest offset query - key that this pass covers: 0, or 1 for the backward direction
    scaling: float
    softcap: float | None  # of the exact logits
    parameters: FeatureParameters
    compute: torch.dtype
    output: torch.dtype
    chunk: int
    span: int  # tokens of a super-chunk
    row_matters: bool  # whether anything but features shares the queries' normaliser


class Exact(NamedTuple):
    """Keys with exact logits, in `batches` products: a window's band per chunk, or the sinks per pair."""

    name: str
    key: Tensor  # (batches, J, d)
    value: Tensor  # (batches, J, d_v)
    bias: Tensor | None  # added to (batches, R, C, J): -inf outside the band
    hidden: Tensor | None  # broadcasts to (B, G, N, R, C, J): True where masked


def fill(out: Tensor, source: Tensor) -> None:
    """Copies source (B, G, R, T', d) into chunks out (B, G, N, R, C, d), zeros after the last token."""
    out = out.transpose(2, 3)
    chunk, tokens = out.shape[4], source.shape[3]
    whole, rest = divmod(tokens, chunk)
    if whole:
        out[:, :, :, :whole].copy_(source[:, :, :, : whole * chunk].unflatten(3, (whole, chunk)))
    if whole < out.shape[3]:
        out[:, :, :, whole:].zero_()
    if rest:
        out[:, :, :, whole, :rest].copy_(source[:, :, :, whole * chunk :])


def drain(target: Tensor, chunks: Tensor) -> None:
    """Inverse of `fill`: chunks (B, G, N, R, C, d) into target (B, G, R, T', d)."""
    chunks = chunks.transpose(2, 3)
    chunk, tokens = chunks.shape[4], target.shape[3]
    whole, rest = divmod(tokens, chunk)
    if whole:
        target[:, :, :, : whole * chunk].unflatten(3, (whole, chunk)).copy_(chunks[:, :, :, :whole])
    if rest:
        target[:, :, :, whole * chunk :].copy_(chunks[:, :, :, whole, :rest])


def rows(before: Tensor, x: Tensor, start: int, stop: int) -> Tensor:
    """Rows start…stop of [before | x] along dimension 2, copied only where both are needed."""
    prefix = before.shape[2]
    if start >= prefix:
        return x[:, :, start - prefix : stop - prefix]
    return torch.cat([before[:, :, start:stop], x[:, :, : max(stop - prefix, 0)]], dim=2)


class RowGradients:
    """The gradient of [before | x] along dimension 2, met super-chunk by super-chunk from the last one to the first.

    A super-chunk gives to the rows start … start + prefix + tokens of [before | x], so all but the first `prefix` of
    them are finished after it. Only these few are kept in the compute dtype: in another one x would need a copy of its
    whole length.
    """

    def __init__(self, before: Tensor, x: Tensor, span: int, compute: torch.dtype) -> None:
        self.prefix, self.dtype = before.shape[2], before.dtype
        self.of_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        self.rows = x.new_zeros(*x.shape[:2], self.prefix + min(span, x.shape[2]), x.shape[3], dtype=compute)

    def add(self, gradient: Tensor) -> None:
        """Adds `gradient` (B, G, T, d) to the rows from the super-chunk's start on."""
        self.rows[:, :, : gradient.shape[2]] += gradient

    def finish(self, start: int, tokens: int, next_tokens: int) -> None:
        """Stores the finished rows of a super-chunk of `tokens`; the one before it has `next_tokens`, 0 if none."""
        self.of_x[:, :, start : start + tokens] = self.rows[:, :, self.prefix : self.prefix + tokens]
        if next_tokens:
            unfinished = self.rows[:, :, : self.prefix].clone()
            self.rows.zero_()
            self.rows[:, :, next_tokens : next_tokens + self.prefix] = unfinished

    @property
    def of_before(self) -> Tensor:
        return self.rows[:, :, : self.prefix].to(self.dtype)


class SuperChunks:
    """Loads one super-chunk after the other; the attributes below describe the current one."""

    q: Tensor  # (P, N·R·C, d) scaled queries
    k: Tensor  # (P, N·C, d) scaled far keys: those `prefix` places back
    v: Tensor  # (P, N·C, d_v)
    key_features: Features
    ek: Tensor  # (P·N, C, m)
    scale: Tensor  # (P, N, m) running maximum μ of ℓ_k up to and including the chunk
    before: Tensor  # (P, N, m) the same before the chunk
    after_values: Tensor  # (P, N, m, d_v) sums after each chunk, scaled by 2^-μ
    after_total: Tensor  # (P, N, m)
    past_values: Tensor  # (P·N, m, d_v) sums before each chunk, scaled by its own 2^-μ
    past_total: Tensor  # (P·N, 1, m)

    def __init__(self, tensors: Tensors, frame: Frame, query_form: Form, key_form: Form) -> None:
        self.tensors, self.frame = Tensors(*(x.detach() for x in tensors)), frame
        self.batch, self.groups, self.heads, self.length, self.dim = tensors.query.shape
        self.value_dim, self.m = tensors.value.shape[-1], tensors.total.shape[-1]
        self.pairs, self.prefix = self.batch * self.groups, tensors.key_before.shape[2]
        self.root, self.chunk = frame.scaling**0.5, frame.chunk
        self.buffer = Scratch.borrow(frame.compute, tensors.query.device)
        self.query_side = Side(query_form, frame.parameters, self.batch, "query", self.buffer)
        self.key_side = Side(key_form, frame.parameters, self.batch, "key", self.buffer)
        if not frame.row_matters:
            self.query_side.drop_row()
        self.key_const = self.key_side.constant(self.buffer("none", 0))
        # Empty sums keep LOG_ZERO itself: masked keys have it too, so nothing decays.
        scale = frame.scale.flatten(0, 1)
        self.start_scale = torch.where(scale < LOG_ZERO / 2, scale, scale * LOG2E)
        self.far_clean, self.sinks_clean = self._clean(frame.far_valid), self._clean(frame.sink_valid.all(-1))
        self.near_clean = self._clean(frame.near_valid, self.prefix)
        self.all_see = self._clean(frame.visible)
        self.sink_key, self.sink_value = self._sinks()
        self.band = self._band_bias() if frame.window > frame.nearest else None

    def starts(self) -> range:
        return range(0, self.length, self.frame.span)

    def _clean(self, valid: Tensor, before: int = 0) -> list[bool]:
        """For each super-chunk whether its slots, and `before` more, are valid in every row; never for a short one."""
        every, span = valid.all(0), self.frame.span
        full = [start for start in self.starts() if start + span <= self.length]
        found = torch.stack([every[i : i + span + before].all() for i in full]).tolist() if full else []
        return found + [False] * (len(self.starts()) - len(full))

    def _sinks(self) -> tuple[Tensor, Tensor]:
        """Keys (P, sinks, d), scaled, and values: the state's, or this call's first tokens."""
        frame, found = self.frame, []
        fresh = frame.sink_fresh[:, None, :, None]
        for old, new in (("sink_key", "key"), ("sink_value", "value")):
            stored, x = getattr(self.tensors, old), getattr(self.tensors, new)
            if stored.shape[2]:
                stored = torch.where(fresh, gather_tokens(x, frame.sink_slot), stored.to(x.dtype))
            found.append(stored.to(frame.compute).flatten(0, 1))
        return found[0] * self.root, found[1]

    def _band_bias(self) -> Tensor:
        """(C, prefix + C): 0 where the window's band is, -inf elsewhere."""
        width = self.prefix + self.chunk
        bias = self.buffer("band bias", self.chunk, width).zero_()
        slot = torch.arange(width, device=bias.device)
        offset = self.prefix + slot[: self.chunk, None] - slot
        return bias.masked_fill_((offset < self.frame.nearest) | (offset >= self.frame.window), -torch.inf)

    def begin(self, index: int, start: int) -> None:
        """Sets the sizes of super-chunk `index`."""
        self.index, self.start = index, start
        self.real = min(self.frame.span, self.length - start)
        self.count = -(-self.real // self.chunk)  # N
        self.tokens = self.count * self.chunk

    def load(self, name: str, source: Tensor, heads: int = 1) -> Tensor:
        """source (B, G, [R,] T', d) in the compute dtype, as (P, N·R·C, d)."""
        out = self.buffer(name, self.pairs, self.count * heads * self.chunk, source.shape[-1])
        shape = (self.batch, self.groups, self.count, heads, self.chunk, source.shape[-1])
        fill(out.view(shape), source if source.dim() == 5 else source[:, :, None])
        return out

    def load_query(self) -> None:
        self.q = self.load("q", self.tensors.query[..., self.start : self.start + self.real, :], self.heads)
        self.q.mul_(self.root)

    def positions(self, positions: Tensor, heads: int) -> Tensor:
        """(B, L) → (B, N·R·C) of this super-chunk; untouched where no feature looks at positions."""
        if self.query_side.omega is not None:
            return positions
        here = torch.nn.functional.pad(positions[:, self.start : self.start + self.real], (0, self.tokens - self.real))
        return here.unflatten(1, (self.count, 1, self.chunk)).expand(-1, -1, heads, -1).flatten(1)

    def flags(self, valid: Tensor, width: int) -> Tensor:
        """(B, width) of this super-chunk's slots from (B, …), False after the end."""
        here = valid[:, self.start : self.start + min(width, valid.shape[1] - self.start)]
        return torch.nn.functional.pad(here, (0, width - here.shape[1]))

    def load_far(self, values: Tensor, total: Tensor, scale: Tensor) -> None:
        """Far keys, their features and the sums; `values`, `total`, `scale` are the sums before the super-chunk."""
        t, stop, N, C = self.tensors, self.start + self.real, self.count, self.chunk
        self.k = self.load("k", rows(t.key_before, t.key, self.start, stop)).mul_(self.root)
        self.v = self.load("v", rows(t.value_before, t.value, self.start, stop))
        found = self.key_side.values(self.k, self.positions(self.frame.key_position, 1))
        hidden = None
        if not self.far_clean[self.index]:
            seen = self.flags(self.frame.far_valid, self.tokens)
            hidden = ~seen[:, None, :, None].expand(-1, self.groups, -1, -1).flatten(0, 1)  # (P, T, 1)
            found.row.masked_fill_(hidden, LOG_ZERO)
        self.key_features = found
        weight = found.weight.add_(found.row).view(self.pairs, N, C, self.m)
        highest = weight.amax(2)
        every = torch.cat([scale[:, None], highest + self.key_const], dim=1).cummax(1).values
        self.before, self.scale = every[:, :-1], every[:, 1:]
        # `weight` holds no constant, so neither may what is taken off it.
        ek = weight.sub_((self.scale - self.key_const)[:, :, None]).exp2_()
        if hidden is not None:
            ek.masked_fill_(hidden.view(self.pairs, N, C, 1), 0)
        self.ek = ek.view(-1, C, self.m)
        self._sum_up(values, total)

    def _sum_up(self, values: Tensor, total: Tensor) -> None:
        N, C = self.count, self.chunk
        decay = (self.before - self.scale).exp2_()
        after = self.buffer("after", self.pairs, N, self.m, self.value_dim)
        torch.bmm(self.ek.mT, self.v.view(-1, C, self.value_dim), out=after.view(-1, self.m, self.value_dim))
        after_total = self.ek.sum(1).view(self.pairs, N, self.m)
        earlier, earlier_total = values, total
        for here, here_total, fading in zip(after.unbind(1), after_total.unbind(1), decay.unbind(1), strict=True):
            earlier = here.addcmul_(earlier, fading[..., None])
            earlier_total = here_total.addcmul_(earlier_total, fading)
        past = self.buffer("past", self.pairs, N, self.m, self.value_dim)
        past_total = torch.cat([total[:, None], after_total[:, :-1]], dim=1).mul_(decay)
        torch.mul(values, decay[:, 0, :, None], out=past[:, 0])
        if N > 1:
            torch.mul(after[:, :-1], decay[:, 1:, :, None], out=past[:, 1:])
        self.after_values, self.after_total, self.decay = after, after_total, decay
        self.past_values = past.view(-1, self.m, self.value_dim)
        self.past_total = past_total.view(-1, 1, self.m)

    def query_features(self) -> Features:
        """Log-features of the queries with the keys' scale and both constants, without `row`."""
        found = self.query_side.values(self.q, self.positions(self.frame.query_position, self.heads))
        weight = found.weight.view(self.pairs, self.count, -1, self.m)
        weight.add_((self.scale + self.query_side.constant(self.scale))[:, :, None])
        return Features(weight.view(self.pairs * self.count, -1, self.m), found.row, found.mapped)

    def exact_terms(self) -> Iterator[Exact]:
        """The window's band and the sinks of this super-chunk."""
        t, C, P, width = self.tensors, self.chunk, self.prefix, self.prefix + self.chunk
        if self.band is not None:
            both = []
            for name, before, x in (("band k", t.key_before, t.key), ("band v", t.value_before, t.value)):
                flat = self.buffer("band flat", self.pairs, self.tokens + P, x.shape[-1])
                source = rows(before, x, self.start, self.start + self.real + P)
                split = flat.unflatten(0, (self.batch, self.groups))
                split[:, :, : self.real + P].copy_(source)
                split[:, :, self.real + P :].zero_()
                if x is t.key:
                    flat.mul_(self.root)
                out = self.buffer(name, self.pairs, self.count, width, x.shape[-1])
                both.append(out.copy_(flat.unfold(1, width, C).mT).view(-1, width, x.shape[-1]))
            hidden = None
            if not self.near_clean[self.index]:
                valid = self.flags(self.frame.near_valid, self.tokens + P).unfold(1, width, C)
                hidden = ~valid[:, None, :, None, None]
            yield Exact("band", both[0], both[1], self.band, hidden)
        if self.sink_key.shape[1]:
            hidden = None
            if not self.sinks_clean[self.index]:
                here = self.frame.sink_valid[:, self.start : self.start + self.real]
                valid = torch.nn.functional.pad(here, (0, 0, 0, self.tokens - self.real))
                hidden = ~valid.view(self.batch, 1, self.count, 1, C, -1)
            yield Exact("sinks", self.sink_key, self.sink_value, None, hidden)

    def logits(self, exact: Exact, suffix: str = "") -> Tensor:
        """q·k, capped, to base 2, -inf where masked: (batches, R·…, J)."""
        J, batches, cap = exact.key.shape[1], len(exact.key), self.frame.softcap
        q = self.q.view(batches, -1, self.dim)
        out = self.buffer(exact.name + suffix, batches, q.shape[1], J)
        out.baddbmm_(q, exact.key.mT, beta=0, alpha=LOG2E if cap is None else 1 / cap)
        if cap is not None:
            out.tanh_().mul_(cap * LOG2E)
        if exact.bias is not None:
            out.view(batches, self.heads, self.chunk, J).add_(exact.bias)
        if exact.hidden is not None:
            split = out.view(self.batch, self.groups, self.count, self.heads, self.chunk, J)
            split.masked_fill_(exact.hidden, -torch.inf)
        return out

    def cap_slope(self, exact: Exact, logits: Tensor) -> Tensor | None:
        """1 - tanh², the derivative of capped by uncapped logits; 0 where masked, None without a cap."""
        if self.frame.softcap is None:
            return None
        out = self.buffer(exact.name + " slope", *logits.shape)
        torch.mul(logits, 1 / (self.frame.softcap * LOG2E), out=out)
        return out.square_().neg_().add_(1).clamp_min_(0)

    def chunk_terms(self, at: Tensor, values: Tensor, total: Tensor) -> ChunkTerms:
        """What the log domain needs of the chunks `at` (K,) of P·N; `values`, `total` are before the super-chunk."""
        N, C = self.count, self.chunk
        query = self.query_side.values(self.q, self.positions(self.frame.query_position, self.heads), " again")
        key = self.key_side.values(self.k, self.positions(self.frame.key_position, 1), " again")
        lq = query.weight + query.row + self.query_side.constant(query.row)
        lk = key.weight + self.key_features.row + self.key_const  # its row knows the masked keys
        pair, chunk = at // N, at % N
        first = chunk == 0
        earlier = self.after_values[pair, (chunk - 1).clamp_min(0)]
        earlier_total = self.after_total[pair, (chunk - 1).clamp_min(0)]
        return ChunkTerms(
            query=lq.view(self.pairs * N, -1, self.m)[at],
            key=lk.view(-1, C, self.m)[at],
            value=self.v.view(-1, C, self.value_dim)[at],
            values=torch.where(first[:, None, None], values[pair], earlier),
            total=torch.where(first[:, None], total[pair], earlier_total),
            scale=self.before[pair, chunk],
        )
