"""The forward pass of `chunked` over the super-chunks of one direction, and what the backward pass needs of it.

With eq = exp(ℓ_q + μ - top), ek = exp(ℓ_k - μ), μ the running maximum of ℓ_k up to and including the chunk:
out = (tril(eq ekᵀ) v + eq S + exact part) / (the same with 1 for v).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .log_domain import log_domain_chunks, note
from .state import LOG_ZERO
from .super_chunks import SuperChunks, drain

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

    log_normaliser: Tensor  # (B, G, R, L), to base 2; LOG_ZERO where a query sees nothing
    starts: list[Sums]  # before every `stride`-th super-chunk; empty unless asked for
    stride: int
    underflowed: dict[int, tuple[Tensor, Tensor]]  # super-chunk → its chunks (of P·N) that took the log domain, outputs


class Forward(SuperChunks):
    """All super-chunks in order."""

    def run(self, keep: bool) -> tuple[Tensor, Kept, Sums]:
        """Output (B, G, R, L, d_v), what the backward pass needs, and the sums after the last token.

        Args:
            keep: whether a backward pass may follow; else nothing but the log-normaliser is kept.
        """
        t, frame = self.tensors, self.frame
        output = t.query.new_empty(*t.query.shape[:-1], self.value_dim, dtype=frame.output)
        log_normaliser = t.query.new_empty(t.query.shape[:-1], dtype=frame.compute)
        kept = Kept(log_normaliser, [], -(-len(self.starts()) // STARTS), {})
        sums = Sums(t.values.flatten(0, 1).clone(), t.total.flatten(0, 1).clone(), self.start_scale)
        for index, start in enumerate(self.starts()):
            if keep and index % kept.stride == 0:
                kept.starts.append(Sums(*(x.clone() for x in sums)))
            self.begin(index, start)
            self.load_query()
            if self.m:
                self.load_far(*sums)
            self._step(output, kept, sums, keep)
            if self.m:
                sums.values.copy_(self.after_values[:, -1])
                sums.total.copy_(self.after_total[:, -1])
                sums = sums._replace(scale=self.scale[:, -1].clone())
        self.buffer.give_back()
        return output, kept, sums

    def _step(self, output: Tensor, kept: Kept, sums: Sums, keep: bool) -> None:
        numerator, normaliser, top = self._fast()
        dead, at, rows = None, None, self.heads * self.pairs * self.real
        if self.all_see[self.index] and normaliser.amin() >= UNDERFLOW[top.dtype]:
            note(rows, None)
        else:
            dead, at = self._rescue(sums, (numerator, normaliser, top), rows)
            normaliser.masked_fill_(dead, 1)
        numerator.div_(normaliser)
        top.add_(normaliser.log2_())
        if dead is not None:
            numerator.masked_fill_(dead, 0)
            top.masked_fill_(dead, LOG_ZERO)
        if at is not None and keep:
            kept.underflowed[self.index] = at, numerator[at]
        here = slice(self.start, self.start + self.real)
        split = (self.batch, self.groups, self.count, self.heads, self.chunk, -1)
        drain(output[:, :, :, here], numerator.view(split))
        drain(kept.log_normaliser[:, :, :, here, None], top.view(split))

    def _rescue(self, sums: Sums, fast: tuple[Tensor, Tensor, Tensor], rows: int) -> tuple[Tensor, Tensor | None]:
        """Recomputes chunks with underflowed rows into `fast`.

        Returns:
            which rows (P·N, R·C, 1) see nothing, and which chunks (of P·N) were recomputed, None for none.
        """
        normaliser, at = fast[1], None
        seen = self.flags(self.frame.visible, self.tokens).view(self.batch, 1, self.count, 1, self.chunk, 1)
        seen = seen.expand(-1, self.groups, -1, self.heads, -1, -1).reshape(normaliser.shape)
        bad = (normaliser < UNDERFLOW[normaliser.dtype]) & seen
        found = bool(self.m) and bool(bad.any())
        note(rows, bad.squeeze(-1) if found else None)
        if found:
            at = bad.flatten(1).any(-1).nonzero().squeeze(1)
            terms = self.chunk_terms(at, sums.values, sums.total)
            slow = log_domain_chunks(bad.squeeze(-1)[at], terms, self._exact_of(at))
            for old, new in zip(fast, slow, strict=True):
                old[at] = new
        return ~seen | (normaliser == 0), at  # a NaN is not dead: the public door reports it

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
