"""The forward and the backward pass of `chunked` over the super-chunks of one direction.

Forward, with eq = exp(ℓ_q + μ - top), ek = exp(ℓ_k - μ), μ the running maximum of ℓ_k up to and including the chunk:
out = (tril(eq ekᵀ) v + eq S + exact part) / (the same with 1 for v). Backward, with eq = exp(ℓ_q + μ - log n):
dL/da_tj = w_tj (dO_t·v_j - D_t), D_t = dO_t·O_t - dL/d(log n_t), so with U = Σ_later eq dOᵀ and y = Σ_later eq D
dℓ_q = eq (G ek + S dO - D z), dℓ_k = ek (Gᵀ eq + U v - y), dv = tril(eq ekᵀ)ᵀ dO + U ek, G = tril(dO vᵀ - D).
Only inputs, output, log-normaliser and the sums before at most `STARTS` super-chunks are kept for it: all else is
computed again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .chunk_features import LOG2E
from .log_domain import log_domain_chunks, log_domain_gradients, note
from .problem import LOG_ZERO
from .super_chunks import SuperChunks, Tensors, add_rows, drain

#: Normalisers below this are recomputed in the log domain. Far above the smallest number, so that what a row does see
#: has kept all its digits when it is larger.
UNDERFLOW = {torch.float32: 1e-18, torch.float64: 1e-150}
#: Super-chunks before which the sums are kept for the backward pass, evenly spread; those between are summed again.
STARTS = 32


class Sums(NamedTuple):
    """Sums over far keys, each feature scaled by 2^-scale."""

    values: Tensor  # (P, m, d_v)
    total: Tensor  # (P, m)
    scale: Tensor  # (P, m)


class Kept(NamedTuple):
    """What the backward pass needs besides the inputs."""

    output: Tensor  # (B, G, R, L, d_v)
    log_normaliser: Tensor  # (B, G, R, L), to base 2; LOG_ZERO where a query sees nothing
    starts: list[Sums]  # before every `stride`-th super-chunk; empty unless asked for
    stride: int
    underflowed: dict[int, Tensor]  # super-chunk → its chunks (of P·N) that took the log domain


class Forward(SuperChunks):
    """All super-chunks in order."""

    def run(self, keep: bool) -> tuple[Kept, Sums]:
        """The results, and the sums after the last token; `keep` says whether a backward pass may follow."""
        t, frame = self.tensors, self.frame
        output = t.query.new_empty(*t.query.shape[:-1], self.value_dim, dtype=frame.output)
        log_normaliser = t.query.new_empty(t.query.shape[:-1], dtype=frame.compute)
        kept = Kept(output, log_normaliser, [], -(-len(self.starts()) // STARTS), {})
        sums = Sums(t.values.flatten(0, 1).clone(), t.total.flatten(0, 1).clone(), self.start_scale)
        for index, start in enumerate(self.starts()):
            if keep and index % kept.stride == 0:
                kept.starts.append(Sums(*(x.clone() for x in sums)))
            self.begin(index, start)
            self.load_query()
            if self.m:
                self.load_far(*sums)
            self._step(kept, sums)
            if self.m:
                sums.values.copy_(self.after_values[:, -1])
                sums.total.copy_(self.after_total[:, -1])
                sums = sums._replace(scale=self.scale[:, -1].clone())
        self.buffer.give_back()
        return kept, sums

    def _step(self, kept: Kept, sums: Sums) -> None:
        numerator, normaliser, top = self._fast()
        dead, rows = None, self.heads * self.pairs * self.real
        if self.all_see[self.index] and normaliser.amin() >= UNDERFLOW[top.dtype]:
            note(rows, None)
        else:
            dead = self._rescue(kept, sums, (numerator, normaliser, top), rows)
            normaliser.masked_fill_(dead, 1)
        numerator.div_(normaliser)
        top.add_(normaliser.log2_())
        if dead is not None:
            numerator.masked_fill_(dead, 0)
            top.masked_fill_(dead, LOG_ZERO)
        here = slice(self.start, self.start + self.real)
        split = (self.batch, self.groups, self.count, self.heads, self.chunk, -1)
        drain(kept.output[:, :, :, here], numerator.view(split))
        drain(kept.log_normaliser[:, :, :, here, None], top.view(split))

    def _rescue(self, kept: Kept, sums: Sums, fast: tuple[Tensor, Tensor, Tensor], rows: int) -> Tensor:
        """Recomputes chunks with underflowed rows into `fast`; which rows (P·N, R·C, 1) see nothing."""
        normaliser = fast[1]
        seen = self.flags(self.frame.visible, self.tokens).view(self.batch, 1, self.count, 1, self.chunk, 1)
        seen = seen.expand(-1, self.groups, -1, self.heads, -1, -1).reshape(normaliser.shape)
        bad = (normaliser < UNDERFLOW[normaliser.dtype]) & seen
        found = bool(self.m) and bool(bad.any())
        note(rows, bad.squeeze(-1) if found else None)
        if found:
            at = bad.flatten(1).any(-1).nonzero().squeeze(1)
            kept.underflowed[self.index] = at
            terms = self.chunk_terms(at, sums.values, sums.total)
            slow = log_domain_chunks(bad.squeeze(-1)[at], terms, self._exact_of(at))
            for old, new in zip(fast, slow, strict=True):
                old[at] = new
        return ~seen | (normaliser == 0)  # a NaN is not dead: the public door reports it

    def _exact_of(self, at: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Logits and values of the exact terms of chunks `at`, computed again."""
        found = []
        for exact in self.exact_terms():
            logits = self.logits(exact).view(self.pairs * self.count, -1, exact.key.shape[1])[at]
            found.append((logits, exact.value[at if exact.name == "band" else at // self.count]))
        return found

    def _fast(self) -> tuple[Tensor, Tensor, Tensor]:
        """Numerator (P·N, R·C, d_v), normaliser and subtracted maximum (P·N, R·C, 1)."""
        chunks, width = self.pairs * self.count, self.heads * self.chunk
        numerator = self.buffer("numerator", chunks, width, self.value_dim)
        exact = [(term, self.logits(term)) for term in self.exact_terms()]
        tops = [logits.amax(-1, keepdim=True).view(chunks, width, 1) for _, logits in exact]
        if self.m:
            query = self.query_features()
            row = query.row.view(chunks, width, 1)
            tops.append(query.weight.amax(-1, keepdim=True).add_(row))
        top = tops[0]
        for other in tops[1:]:
            top = torch.maximum(top, other)
        top = top.clamp_min(LOG_ZERO)
        normaliser = torch.zeros_like(top)
        if self.m:
            eq = query.weight.sub_(top - row).exp2_()
            self._far(eq, numerator, normaliser)
        else:
            numerator.zero_()
        for term, logits in exact:
            batches = len(term.key)
            logits.sub_(top.view(batches, -1, 1)).exp2_()
            normaliser.view(batches, -1, 1).add_(logits.sum(-1, keepdim=True))
            numerator.view(batches, -1, self.value_dim).baddbmm_(logits, term.value)
        return numerator, normaliser, top

    def _far(self, eq: Tensor, numerator: Tensor, normaliser: Tensor) -> None:
        chunks, width, C = *eq.shape[:2], self.chunk
        inside = torch.bmm(eq, self.ek.mT, out=self.buffer("inside", chunks, width, C))
        inside.view(chunks, self.heads, C, C).tril_()
        torch.bmm(inside, self.v.view(chunks, C, -1), out=numerator)
        numerator.baddbmm_(eq, self.past_values)
        torch.sum(inside, -1, keepdim=True, out=normaliser)
        normaliser.add_(eq.mul_(self.past_total).sum(-1, keepdim=True))


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
        self.dk, self.dv, self.dk_before, self.dv_before = (
            torch.zeros(x.shape, dtype=frame.compute, device=x.device)
            for x in (t.key, t.value, t.key_before, t.value_before)
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
        self._finish_sinks()
        self.buffer.give_back()
        return Tensors(
            self.dq, self.dk.to(t.key.dtype), self.dv.to(t.value.dtype),
            self.dk_before.to(t.key_before.dtype), self.dv_before.to(t.value_before.dtype),
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
        for found, gradient in ((self.d_sink_key.mul_(self.root), self.dk), (self.d_sink_value, self.dv)):
            found = found.unflatten(0, split)
            if found.shape[2]:
                slot = frame.sink_slot[:, None, :, None].expand_as(found)
                gradient.scatter_add_(2, slot, found.masked_fill(~fresh, 0))
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
            shift = torch.zeros_like(log_normaliser)
        else:
            change = self._rows(self.change, "change")
            output = self._rows(kept.output, "output")
            shift = output.mul_(change).sum(-1, keepdim=True)
        if self.log_change is not None:
            shift = shift - LOG2E * self._rows(self.log_change[..., None], "log change")
        if self.m:
            self._far(change, shift, log_normaliser, dq)
        for exact in self.exact_terms():
            logits = self.logits(exact)
            J, batches = exact.key.shape[1], len(exact.key)
            slope = self.cap_slope(exact, logits)
            weight = logits.sub_(log_normaliser.view(batches, -1, 1)).exp2_()
            dO = change.view(batches, -1, self.value_dim)
            gap = torch.bmm(dO, exact.value.mT, out=self.buffer(exact.name + " gap", *logits.shape))
            dv = torch.bmm(weight.mT, dO, out=self.buffer(exact.name + " dv", batches, J, self.value_dim))
            gap.sub_(shift.view(batches, -1, 1)).mul_(weight)
            if slope is not None:
                gap.mul_(slope)
            dq.view(batches, -1, self.dim).baddbmm_(gap, exact.key)
            q = self.q.view(batches, -1, self.dim)
            dk = torch.bmm(gap.mT, q, out=self.buffer(exact.name + " dk", batches, J, self.dim))
            self._put_exact(exact.name, dk, dv)
        dq.mul_(self.root)
        split = dq.view(self.batch, self.groups, self.count, self.heads, self.chunk, self.dim)
        drain(self.dq[:, :, :, self.start : self.start + self.real], split)

    def _put_exact(self, name: str, dk: Tensor, dv: Tensor) -> None:
        if name == "sinks":
            self.d_sink_key.add_(dk)
            self.d_sink_value.add_(dv)
            return
        N, C, P = self.count, self.chunk, self.prefix
        for before, whole, found in (
            (self.dk_before, self.dk, dk.mul_(self.root)),
            (self.dv_before, self.dv, dv),
        ):
            # Every block of C columns of the band touches each key once.
            flat = self.buffer("band flat", self.pairs, self.tokens + P + C, found.shape[-1]).zero_()
            split = found.view(self.pairs, N, P + C, -1)
            for low in range(0, P + C, C):
                high = min(low + C, P + C)
                target = flat[:, low : low + N * C].unflatten(1, (N, C))
                target[:, :, : high - low].add_(split[:, :, low:high])
            gradient = flat[:, : self.real + P].unflatten(0, (self.batch, self.groups))
            add_rows(before, whole, self.start, gradient)

    def _far(self, change: Tensor, shift: Tensor, log_normaliser: Tensor, dq: Tensor) -> None:
        """Adds the far part's gradients; `later` and `later_total` move to before this super-chunk."""
        chunks, width, C, m = self.pairs * self.count, self.heads * self.chunk, self.chunk, self.m
        start = self.sums
        self.load_far(*start)
        query = self.query_features()
        at = self.kept.underflowed.get(self.index)
        limit = log_normaliser if at is None else log_normaliser.index_fill(0, at, -LOG_ZERO)
        eq = query.weight.sub_(limit - query.row.view(chunks, width, 1)).exp2_()
        v = self.v.view(chunks, C, -1)
        slow = None
        if at is not None:
            terms = self.chunk_terms(at, start.values, start.total)
            slow = log_domain_gradients(terms, log_normaliser[at], change[at], shift[at])
        later, later_total = self._sum_later(eq, change, shift, at, slow)

        inside = torch.bmm(eq, self.ek.mT, out=self.buffer("inside", chunks, width, C))
        inside.view(chunks, self.heads, C, C).tril_()
        dv = torch.bmm(inside.mT, change, out=self.buffer("dv", chunks, C, self.value_dim))
        dv.baddbmm_(self.ek, later)
        gap = torch.bmm(change, v.mT, out=inside).sub_(shift)
        gap.view(chunks, self.heads, C, C).tril_()
        dlq = torch.bmm(gap, self.ek, out=self.buffer("dlq", chunks, width, m))
        dlq.baddbmm_(change, self.past_values.mT).addcmul_(shift, self.past_total, value=-1).mul_(eq)
        dlk = torch.bmm(gap.mT, eq, out=self.buffer("dlk", chunks, C, m))
        dlk.baddbmm_(v, later.mT).sub_(later_total[:, None]).mul_(self.ek)
        if at is not None and slow is not None:
            for fast, addition in ((dlq, slow.query), (dlk, slow.key), (dv, slow.value)):
                fast[at] += addition
        self._put_far(dlq, dlk, dv, dq, query.mapped)

    def _put_far(self, dlq: Tensor, dlk: Tensor, dv: Tensor, dq: Tensor, mapped: Tensor) -> None:
        split = (self.batch, self.groups)
        self.query_side.backward(dlq.view(self.pairs, -1, self.m), self.q, mapped, dq)
        dk = self.buffer("dk", *self.k.shape).zero_()
        self.key_side.backward(dlk.view(self.pairs, -1, self.m), self.k, self.key_features.mapped, dk)
        dk = dk.mul_(self.root).unflatten(0, split)[:, :, : self.real]
        add_rows(self.dk_before, self.dk, self.start, dk)
        dv = dv.view(self.pairs, -1, self.value_dim).unflatten(0, split)[:, :, : self.real]
        add_rows(self.dv_before, self.dv, self.start, dv)

    def _sum_later(
        self, eq: Tensor, change: Tensor, shift: Tensor, at: Tensor | None, slow: object
    ) -> tuple[Tensor, Tensor]:
        """U (P·N, m, d_v) and y (P·N, m) of the queries after each chunk, at the chunk's scale."""
        P, N, m = self.pairs, self.count, self.m
        own = torch.bmm(eq.mT, change, out=self.buffer("own", P * N, m, self.value_dim))
        scaled = torch.mul(eq, shift, out=self.buffer("dlq", *eq.shape))
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
