"""One direction as an autograd function: super-chunks one after the other, each computed again for its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...errors import NonFiniteError
from ...features.affine import Affine
from ..state import OVERFLOW, gather_tokens, non_finite
from .log_domain import add_to_counts
from .scan import Sums
from .span import Masks, Operands, Result, Rules, attend_span, far_sums

#: Super-chunks before which the sums are kept, of all: those of 512 tokens take as much memory as 64 of the tokens.
STRIDE = 4
#: Tensors of `Inputs` and of a span's `Operands` before the two forms, and tensors of a form.
PLAIN: Final = 8
SPAN_PLAIN: Final = 5
FORM: Final = 3


class Inputs(NamedTuple):
    """The differentiable inputs of one direction, whole and in their own dtypes."""

    query: Tensor  # (B, G, R, L, d)
    key: Tensor  # (B, G, L, d)
    value: Tensor  # (B, G, L, d_v)
    key_before: Tensor  # (B, G, prefix, d): those before the first token that the window reaches
    value_before: Tensor  # (B, G, prefix, d_v)
    sink_key: Tensor  # (B, G, sinks, d) the state's
    sink_value: Tensor
    sums: Tensor  # (B, G, m, d_v + 1) the state's, scaled by exp(-log_scale)
    query_form: Affine
    key_form: Affine

    def flat(self) -> tuple[Tensor | None, ...]:
        """All tensors."""
        return (*self[:PLAIN], *self.query_form[:FORM], *self.key_form[:FORM])

    def with_tensors(self, tensors: Any) -> Inputs:
        """The same with other tensors, in the order of `flat`."""
        return Inputs._make([*tensors[:PLAIN], *_forms(tensors[PLAIN:], self.query_form, self.key_form)])

    def span(self, start: int, stop: int, sinks: tuple[Tensor, Tensor]) -> Operands:
        """The tokens start…stop."""
        key, value = (
            _rows(before, x, start, stop + before.shape[2])
            for before, x in ((self.key_before, self.key), (self.value_before, self.value))
        )
        query, key, value = (x.to(self.sums.dtype) for x in (self.query[:, :, :, start:stop], key, value))
        return Operands(query, key, F.pad(value, (0, 1), value=1.0), *sinks, self.query_form, self.key_form)


class Direction(NamedTuple):
    """One direction, except for its differentiable inputs."""

    rules: Rules
    masks: Masks
    log_scale: Tensor  # (B, G, m) of the state's sums
    sink_slot: Tensor  # (B, sinks) token of this call that is the sink, if it is not the state's
    sink_new: Tensor  # (B, sinks) whether it is this call's
    output: torch.dtype

    def sinks(self, t: Inputs) -> tuple[Tensor, Tensor]:
        """Keys and values of the sinks, as in `Operands`: the state's, or tokens of this call."""
        compute, new = t.sums.dtype, self.sink_new[:, None, :, None]
        key, value = t.sink_key, t.sink_value
        if key.shape[2]:
            key, value = (
                torch.where(new, gather_tokens(x, self.sink_slot), stored.to(x.dtype))
                for stored, x in ((key, t.key), (value, t.value))
            )
        return key.to(compute), F.pad(value.to(compute), (0, 1), value=1.0)

    def spans(self) -> list[tuple[int, int, bool]]:
        """Start and stop of each super-chunk, and whether its masks hide nothing; a short one hides its end."""
        masks, span = self.masks, self.rules.sizes.span
        length = masks.rows.shape[1]
        prefix = masks.window.shape[1] - length
        every, window = masks.rows.all(0) & masks.far.all(0) & masks.sinks.all(-1).all(0), masks.window.all(0)
        bounds = [(start, min(start + span, length)) for start in range(0, length, span)]
        flags = torch.stack([every[a:b].all() & window[a : b + prefix].all() for a, b in bounds]).tolist()
        chunk = self.rules.sizes.chunk
        return [(a, b, flag and (b - a) % chunk == 0) for (a, b), flag in zip(bounds, flags, strict=True)]


def _forms(tensors: Any, query_form: Affine, key_form: Affine) -> tuple[Affine, Affine]:
    """The two forms with other tensors, three each."""
    return Affine._make([*tensors[:3], *query_form[3:]]), Affine._make([*tensors[3:], *key_form[3:]])


def _rows(before: Tensor, x: Tensor, start: int, stop: int) -> Tensor:
    """Rows start…stop of [before | x] along dimension 2, copied only where both are needed."""
    prefix = before.shape[2]
    if start >= prefix:
        return x[:, :, start - prefix : stop - prefix]
    return torch.cat([before[:, :, start:stop].to(x.dtype), x[:, :, : max(stop - prefix, 0)]], dim=2)


class ChunkedAttention(torch.autograd.Function):
    """Keeps the inputs and the sums before every `STRIDE`-th super-chunk.

    `forward` has the context, as what it keeps is no output; `torch_func` hides it from torch.func.
    """

    @staticmethod
    def forward(ctx: Any, p: Direction, inputs: Inputs, keep: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        t = inputs.with_tensors(tensors)
        output = t.query.new_empty(*t.query.shape[:-1], t.value.shape[-1], dtype=p.output)
        log_normalizer = t.query.new_empty(t.query.shape[:-1], dtype=t.sums.dtype)
        sinks, sums = p.sinks(t), Sums(t.sums.clone(), p.log_scale.clone())
        spans = p.spans()
        count = -(-len(spans) // STRIDE) if keep else 0
        # One block of memory: small ones that stay would lie scattered between the large ones that go.
        kept = ctx.kept = Sums(*(x.new_empty(count, *x.shape) for x in sums))
        for i, (start, stop, complete) in enumerate(spans):
            if keep and i % STRIDE == 0:
                kept.values[i // STRIDE], kept.log_scale[i // STRIDE] = sums
            result = attend_span(t.span(start, stop, sinks), p.masks.span(start, stop, complete), sums, p.rules)
            add_to_counts(result.log_normalizer.numel(), result.underflowed)
            output[:, :, :, start:stop], log_normalizer[:, :, :, start:stop] = result.output, result.log_normalizer
            sums = result.sums
        if keep:
            ctx.save_for_backward(*tensors)
        ctx.p, ctx.inputs = p, inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(sums.log_scale)
        return output, log_normalizer, *sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        do, d_log_normalizer, d_sums, _ = grads
        t, p = ctx.inputs.with_tensors(ctx.saved_tensors), ctx.p
        prefix, compute, sinks = t.key_before.shape[2], t.sums.dtype, p.sinks(t)
        needed = (*(True,) * SPAN_PLAIN, *ctx.needs_input_grad[-2 * FORM :])
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (t.query, t.key, t.value))
        # Gradients of the keys that the windows of later super-chunks reach: only these need the compute dtype.
        dk_before, dv_before = (torch.zeros_like(x, dtype=compute) for x in (t.key_before, t.value_before))
        # Of the two of the sinks and the forms, which all super-chunks use.
        d_shared: list[Tensor | None] = [None] * (2 + 2 * FORM)
        for (start, stop, complete), sums in _in_reverse(t, p, sinks, ctx.kept):
            x = t.span(start, stop, sinks)
            flat = [*x[:SPAN_PLAIN], *x.query_form[:FORM], *x.key_form[:FORM]]
            leaves = [y if y is None else y.detach().requires_grad_(n) for y, n in zip(flat, needed, strict=True)]
            before = Sums(sums.values.detach().requires_grad_(), sums.log_scale)
            with torch.enable_grad():
                masks = p.masks.span(start, stop, complete)
                forms = _forms(leaves[SPAN_PLAIN:], x.query_form, x.key_form)
                operands = Operands._make([*leaves[:SPAN_PLAIN], *forms])
                result = attend_span(operands, masks, before, p.rules)
            here = slice(start, stop)
            outputs = [
                (result.output, None if do is None else do[:, :, :, here].to(compute)),
                (result.log_normalizer, None if d_log_normalizer is None else d_log_normalizer[:, :, :, here]),
                (result.sums.values, d_sums),
            ]
            d_query, d_key, d_value, *rest, d_sums = _gradients(outputs, [*leaves, before.values])
            dq[:, :, :, here] = d_query
            for grad, whole, unfinished in ((d_key, dk, dk_before), (d_value[..., :-1], dv, dv_before)):
                grad[:, :, stop - start :] += unfinished
                whole[:, :, here] = grad[:, :, prefix:]
                unfinished.copy_(grad[:, :, :prefix])
            d_shared = [a if b is None else b if a is None else a + b for a, b in zip(d_shared, rest, strict=True)]
        d_sinks = zip(d_shared[:2], (dk, dv), (t.sink_key, t.sink_value), strict=True)
        d_stored = [_to_sinks(p, grad, whole).to(stored.dtype) for grad, whole, stored in d_sinks]
        # Scaled losses overflow by design, and whoever scaled them looks at the gradients.
        if non_finite(dq=dq, dk=dk, dv=dv) and not non_finite(
            **{str(i): x for i, x in enumerate(grads) if x is not None}
        ):
            raise NonFiniteError(OVERFLOW.format(compute))
        d_before = dk_before.to(t.key_before.dtype), dv_before.to(t.value_before.dtype)
        return None, None, None, dq, dk, dv, *d_before, *d_stored, d_sums, *d_shared[2:]


def _to_sinks(p: Direction, grad: Tensor | None, whole: Tensor) -> Tensor:
    """Adds the gradient of the sinks' keys or values to those of this call that they are, and returns the state's."""
    assert grad is not None
    new, slot, grad = p.sink_new[:, None, :, None], p.sink_slot[:, None, :, None], grad[..., : whole.shape[3]]
    if grad.shape[2]:  # of this call only the first tokens can be sinks
        first = whole[:, :, : grad.shape[2]]
        first.scatter_add_(2, slot.expand_as(grad), grad.masked_fill(~new, 0).to(whole.dtype))
    return grad.masked_fill(new, 0)


def _in_reverse(
    t: Inputs, p: Direction, sinks: tuple[Tensor, Tensor], kept: Sums
) -> Iterator[tuple[tuple[int, int, bool], Sums]]:
    """The super-chunks from the last one, each with the sums before it; those that were not kept are added again."""
    spans = p.spans()
    for i in reversed(range(len(kept.values))):
        sums, group = Sums(kept.values[i], kept.log_scale[i]), spans[i * STRIDE : (i + 1) * STRIDE]
        before = [sums]
        for start, stop, complete in group[:-1]:
            if sums.values.shape[2]:
                x, masks = t.span(start, stop, sinks), p.masks.span(start, stop, complete)
                sums = far_sums(x, masks, sums, p.rules).after
            before.append(sums)
        yield from reversed(list(zip(group, before, strict=True)))


def _gradients(outputs: list[tuple[Tensor, Tensor | None]], leaves: list[Tensor | None]) -> list[Any]:
    """dL/d leaf from pairs of an output and its gradient; None for a leaf that needs none."""
    pairs = [(y, grad) for y, grad in outputs if grad is not None and y.requires_grad]
    wanted = [y for y in leaves if y is not None and y.requires_grad]
    if not pairs:
        return [None if y is None else torch.zeros_like(y) for y in leaves]
    ends, grads = zip(*pairs, strict=True)
    gradients = iter(torch.autograd.grad(ends, wanted, grads, allow_unused=True, materialize_grads=True))
    return [next(gradients) if y is not None and y.requires_grad else None for y in leaves]


def attend(t: Inputs, p: Direction) -> Result:
    """One direction: output (B, G, R, L, d_v) in `p.output`, log-normalizer (B, G, R, L), sums after the last token."""
    if p.rules.traced:
        x = t.span(0, t.query.shape[3], p.sinks(t))
        result = attend_span(x, p.masks, Sums(t.sums, p.log_scale), p.rules)
        return result._replace(output=result.output.to(p.output))
    tensors = t.flat()
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    output, log_normalizer, *sums = ChunkedAttention.apply(
        p, t.with_tensors((None,) * (PLAIN + 2 * FORM)), keep, *tensors
    )
    return Result(output, log_normalizer, Sums(*sums), None)
