"""The backward pass of `chunked` over the super-chunks of one direction.

With eq = exp(ℓ_q + μ - log n), ek = exp(ℓ_k - μ) as in the forward pass: dL/da_tj = w_tj (dO_t·v_j - D_t),
D_t = Σ_j w_tj dO_t·v_j - dL/d(log n_t), so with U = Σ_later eq dOᵀ and y = Σ_later eq D
dℓ_q = eq (G ek + S dO - D z), dℓ_k = ek (Gᵀ eq + U v - y), dv = tril(eq ekᵀ)ᵀ dO + U ek, G = tril(dO vᵀ - D).
All of it is computed again from inputs, log-normaliser and the sums that were kept, D_t too: rounding to bfloat16 would
show in a difference from the output.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .chunk_features import LOG2E, Features
from .chunk_forward import Kept, Sums
from .log_domain import log_domain_gradients
from .state import LOG_ZERO
from .super_chunks import Exact, RowGradients, SuperChunks, Tensors, drain


class FarWeights(NamedTuple):
    """The far part of a super-chunk, relative to the log-normaliser."""

    query: Features
    eq: Tensor  # (P·N, R·C, m)
    inside: Tensor  # (P·N, R·C, C) weights of the chunk's own keys
    gap: Tensor  # dO·v of these keys, above the diagonal too
    past: Tensor  # (P·N, R·C, m) dO times the sums before the chunk
    at: Tensor | None  # the chunks that took the log domain, whose weights here are 0


class ExactWeights(NamedTuple):
    """An exact term of a super-chunk."""

    term: Exact
    weight: Tensor  # (batches, R·…, J)
    gap: Tensor  # dO·v
    slope: Tensor | None  # of capped logits


class Backward(SuperChunks):
    """All super-chunks in reverse order."""

    def run(self, kept: Kept, change: Tensor | None, log_change: Tensor | None, sums: list[Tensor | None]) -> Tensors:
        """Gradients of `Tensors`; those of the forms stay in the two sides.

        Args:
            change: dL/d output. log_change: dL/d log-normaliser (to base 2). sums: dL/d (values, total) at the end.
        """
        t, frame = self.tensors, self.frame
        self.kept, self.change, self.log_change = kept, change, log_change
        self.dq = torch.empty_like(t.query, memory_format=torch.contiguous_format)
        self.dk, self.dv = (
            RowGradients(before, x, frame.span, frame.compute)
            for before, x in ((t.key_before, t.key), (t.value_before, t.value))
        )
        self.d_sink_key, self.d_sink_value = torch.zeros_like(self.sink_key), torch.zeros_like(self.sink_value)
        shape = (self.pairs, self.m, self.value_dim)
        self.later = t.total.new_zeros(shape) if sums[0] is None else sums[0].reshape(shape).clone()  # U
        # y, whose sign in a sum's own gradient is the other one
        self.later_total = t.total.new_zeros(shape[:2]) if sums[1] is None else -sums[1].reshape(shape[:2])
        every = list(enumerate(self.starts()))
        for first in reversed(range(0, len(every), kept.stride)):
            group = every[first : first + kept.stride]
            before = self._sums_before(group)
            for index, start in reversed(group):
                self.begin(index, start)
                self.sums = before.pop()
                self._step()
                for found in (self.dk, self.dv):
                    found.finish(start, self.real, frame.span if start else 0)
        self._finish_sinks()
        self.buffer.give_back()
        return Tensors(
            self.dq, self.dk.of_x, self.dv.of_x, self.dk.of_before, self.dv.of_before,
            self.d_old_key.to(t.sink_key.dtype), self.d_old_value.to(t.sink_value.dtype),
            self.later.view_as(t.values), self.later_total.neg_().view_as(t.total),
        )  # fmt: skip

    def _sums_before(self, group: list[tuple[int, int]]) -> list[Sums]:
        """The sums before each super-chunk of a group, of which the first was kept."""
        found = [self.kept.starts[group[0][0] // self.kept.stride]]
        for index, start in group[:-1]:
            if self.m:
                self.begin(index, start)
                self.load_far(*found[-1])
                after = (self.after_values[:, -1], self.after_total[:, -1], self.scale[:, -1])
                found.append(Sums(*(x.clone() for x in after)))
            else:
                found.append(found[0])
        return found

    def _finish_sinks(self) -> None:
        """Sinks are tokens of this call or of the state."""
        split, frame = (self.batch, self.groups), self.frame
        fresh, old = frame.sink_fresh[:, None, :, None], []
        for found, gradient in ((self.d_sink_key.mul_(self.root), self.dk.of_x), (self.d_sink_value, self.dv.of_x)):
            found = found.unflatten(0, split)
            if found.shape[2]:
                slot = frame.sink_slot[:, None, :, None].expand_as(found)
                gradient.scatter_add_(2, slot, found.masked_fill(~fresh, 0).to(gradient.dtype))
            old.append(found.masked_fill(fresh, 0))
        self.d_old_key, self.d_old_value = old

    def _rows(self, x: Tensor, name: str) -> Tensor:
        """(B, G, R, L, …) → (P·N, R·C, …) of this super-chunk."""
        loaded = self.load(name, x[..., self.start : self.start + self.real, :], self.heads)
        return loaded.view(self.pairs * self.count, -1, x.shape[-1])

    def _step(self) -> None:
        kept, chunks = self.kept, self.pairs * self.count
        self.load_query()
        log_normaliser = self._rows(kept.log_normaliser[..., None], "log normaliser")
        ended = self.tokens - self.real
        if ended:  # `load` fills with zeros
            split = log_normaliser.view(self.batch, self.groups, self.count, self.heads, self.chunk)
            split[:, :, -1, :, self.chunk - ended :] = LOG_ZERO
        log_normaliser.masked_fill_(log_normaliser < LOG_ZERO / 2, -LOG_ZERO)  # weights of rows that see nothing: 0
        dq = self.buffer("dq", self.pairs, chunks // self.pairs * self.heads * self.chunk, self.dim).zero_()
        if self.change is None:
            change = self.buffer("change", chunks, self.heads * self.chunk, self.value_dim).zero_()
        else:
            change = self._rows(self.change, "change")
        shift = torch.zeros_like(log_normaliser)  # D
        far = self._far_weights(change, shift, log_normaliser) if self.m else None
        near = [self._exact_weights(exact, change, shift, log_normaliser) for exact in self.exact_terms()]
        if self.index in kept.underflowed:
            at, output = kept.underflowed[self.index]
            shift[at] = output.mul(change[at]).sum(-1, keepdim=True)
        if self.log_change is not None:
            shift.sub_(LOG2E * self._rows(self.log_change[..., None], "log change"))
        if far is not None:
            self._far(far, change, shift, log_normaliser, dq)
        for weights in near:
            self._exact(weights, change, shift, dq)
        dq.mul_(self.root)
        split = dq.view(self.batch, self.groups, self.count, self.heads, self.chunk, self.dim)
        drain(self.dq[:, :, :, self.start : self.start + self.real], split)

    def _exact_weights(self, exact: Exact, change: Tensor, shift: Tensor, log_normaliser: Tensor) -> ExactWeights:
        """Weights of an exact term, whose share of D joins `shift`."""
        logits, batches = self.logits(exact), len(exact.key)
        slope = self.cap_slope(exact, logits)
        weight = logits.sub_(log_normaliser.view(batches, -1, 1)).exp2_()
        dO = change.view(batches, -1, self.value_dim)
        gap = torch.bmm(dO, exact.value.mT, out=self.buffer(exact.name + " gap", *logits.shape))
        # The values' own memory, here and below: they have done their work.
        product = torch.mul(weight, gap, out=self.buffer(exact.name + " v", *gap.shape))
        shift.view(batches, -1, 1).add_(product.sum(-1, keepdim=True))
        return ExactWeights(exact, weight, gap, slope)

    def _exact(self, weights: ExactWeights, change: Tensor, shift: Tensor, dq: Tensor) -> None:
        exact, weight, gap, slope = weights
        batches, J = len(exact.key), exact.key.shape[1]
        dO, q = change.view(batches, -1, self.value_dim), self.q.view(batches, -1, self.dim)
        dv = torch.bmm(weight.mT, dO, out=self.buffer(exact.name + " v", batches, J, self.value_dim))
        if exact.name == "sinks":
            self.d_sink_value.add_(dv)
        else:
            self._add_band(self.dv, dv)
        gap.sub_(shift.view(batches, -1, 1)).mul_(weight)
        if slope is not None:
            gap.mul_(slope)
        dq.view(batches, -1, self.dim).baddbmm_(gap, exact.key)
        dk = torch.bmm(gap.mT, q, out=self.buffer(exact.name + " v", batches, J, self.dim))
        if exact.name == "sinks":
            self.d_sink_key.add_(dk)
        else:
            self._add_band(self.dk, dk.mul_(self.root))

    def _add_band(self, gradient: RowGradients, found: Tensor) -> None:
        """Adds what each chunk gives to its band, `found` (P·N, prefix + C, …), to the keys or values it lies over."""
        N, C, P = self.count, self.chunk, self.prefix
        # Every block of C columns of the band touches each key once.
        flat = self.buffer("band flat", self.pairs, self.tokens + P + C, found.shape[-1]).zero_()
        split = found.view(self.pairs, N, P + C, -1)
        for low in range(0, P + C, C):
            high = min(low + C, P + C)
            target = flat[:, low : low + N * C].unflatten(1, (N, C))
            target[:, :, : high - low].add_(split[:, :, low:high])
        gradient.add(flat[:, : self.real + P].unflatten(0, (self.batch, self.groups)))

    def _far_weights(self, change: Tensor, shift: Tensor, log_normaliser: Tensor) -> FarWeights:
        """Features and weights of the far part, whose share of D joins `shift`."""
        chunks, width, C, m = self.pairs * self.count, self.heads * self.chunk, self.chunk, self.m
        self.load_far(*self.sums)
        query = self.query_features()
        at, _ = self.kept.underflowed.get(self.index, (None, None))
        limit = log_normaliser if at is None else log_normaliser.index_fill(0, at, -LOG_ZERO)
        eq = query.weight.sub_(limit - query.row.view(chunks, width, 1)).exp2_()
        inside = torch.bmm(eq, self.ek.mT, out=self.buffer("inside", chunks, width, C))
        inside.view(chunks, self.heads, C, C).tril_()
        # Memory of the forward pass, and of sums that are not there yet.
        gap = torch.bmm(change, self.v.view(chunks, C, -1).mT, out=self.buffer("numerator", chunks, width, C))
        past = torch.bmm(change, self.past_values.mT, out=self.buffer("dlq", chunks, width, m))
        for weight, of in ((inside, gap), (eq, past)):
            shift.add_(torch.mul(weight, of, out=self.buffer("own", *weight.shape)).sum(-1, keepdim=True))
        return FarWeights(query, eq, inside, gap, past, at)

    def _far(self, far: FarWeights, change: Tensor, shift: Tensor, log_normaliser: Tensor, dq: Tensor) -> None:
        """Adds the far part's gradients; `later` and `later_total` move to before this super-chunk.

        Gradients take the memory of what is not looked at any more.
        """
        chunks, C, m = self.pairs * self.count, self.chunk, self.m
        query, eq, inside, gap, past, at = far
        start = self.sums
        v = self.v.view(chunks, C, -1)
        slow = None
        if at is not None:
            terms = self.chunk_terms(at, start.values, start.total)
            slow = log_domain_gradients(terms, log_normaliser[at], change[at], shift[at])
        later, later_total = self._sum_later(eq, change, shift, at, slow)

        dv = torch.bmm(inside.mT, change, out=self.buffer("past", chunks, C, self.value_dim))
        dv.baddbmm_(self.ek, later)
        gap.sub_(shift).view(chunks, self.heads, C, C).tril_()
        dlq = past.baddbmm_(gap, self.ek).addcmul_(shift, self.past_total, value=-1).mul_(eq)
        dlk = torch.bmm(gap.mT, eq, out=self.buffer("own", chunks, C, m))
        dlk.baddbmm_(v, later.mT).sub_(later_total[:, None]).mul_(self.ek)
        if at is not None and slow is not None:
            for fast, addition in ((dlq, slow.query), (dlk, slow.key), (dv, slow.value)):
                fast[at] += addition
        self._put_far(dlq, dlk, dv, dq, query.mapped)

    def _put_far(self, dlq: Tensor, dlk: Tensor, dv: Tensor, dq: Tensor, mapped: Tensor) -> None:
        split = (self.batch, self.groups)
        self.query_side.backward(dlq.view(self.pairs, -1, self.m), self.q, mapped, dq)
        dk = self.buffer("inside", *self.k.shape).zero_()
        self.key_side.backward(dlk.view(self.pairs, -1, self.m), self.k, self.key_features.mapped, dk)
        dk = dk.mul_(self.root).unflatten(0, split)[:, :, : self.real]
        self.dk.add(dk)
        self.dv.add(dv.view(self.pairs, -1, self.value_dim).unflatten(0, split)[:, :, : self.real])

    def _sum_later(
        self, eq: Tensor, change: Tensor, shift: Tensor, at: Tensor | None, slow: object
    ) -> tuple[Tensor, Tensor]:
        """U (P·N, m, d_v) and y (P·N, m) of the queries after each chunk, at the chunk's scale."""
        P, N, m = self.pairs, self.count, self.m
        own = torch.bmm(eq.mT, change, out=self.buffer("own", P * N, m, self.value_dim))
        scaled = torch.mul(eq, shift, out=self.buffer("later", *eq.shape))  # which is filled below
        own_total = scaled.sum(1).view(P, N, m)
        own = own.view(P, N, m, self.value_dim)
        later = self.buffer("later", P, N, m, self.value_dim)
        later_total = torch.empty_like(own_total)
        later[:, -1].copy_(self.later)
        later_total[:, -1].copy_(self.later_total)
        extra, extra_total = self._extra(at, slow)
        for n in range(N - 1, -1, -1):
            value, total = (later[:, n - 1], later_total[:, n - 1]) if n else (self.later, self.later_total)
            own[:, n].add_(later[:, n])
            torch.mul(own[:, n], self.decay[:, n, :, None], out=value)
            torch.mul(own_total[:, n].add_(later_total[:, n]), self.decay[:, n], out=total)
            if extra is not None and extra_total is not None:
                value.add_(extra[:, n])
                total.sub_(extra_total[:, n])
        return later.view(P * N, m, -1), later_total.view(P * N, m)

    def _extra(self, at: Tensor | None, slow: object) -> tuple[Tensor | None, Tensor | None]:
        """What chunks in the log domain give to the sums before them."""
        if at is None or slow is None:
            return None, None
        shape = (self.pairs * self.count, self.m, self.value_dim)
        extra = self.buffer("extra", *shape).zero_()
        extra_total = torch.zeros_like(extra[..., 0])
        extra[at], extra_total[at] = slow.values, slow.total  # type: ignore[attr-defined]
        return extra.view(self.pairs, self.count, *shape[1:]), extra_total.view(self.pairs, self.count, -1)
