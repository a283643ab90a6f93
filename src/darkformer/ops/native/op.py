"""The library as an operator, `darkformer::attention`, for traced and watched code; eager code takes a shorter way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import load
from .load import Inputs, Sizes

_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor wq, Tensor offq, Tensor wk, Tensor offk, Tensor values, "
    "Tensor total, Tensor scale, Tensor recent_k, Tensor recent_v, Tensor sink_k, Tensor sink_v, Tensor lengths, "
    "Tensor count, Tensor foldq, Tensor foldk"
)
_SIZES = "int features, float scaling, bool keeps"
COUNT, SIZES = len(Inputs._fields), len(Sizes._fields)
#: Places of the maps among the inputs, and of all inputs that have a gradient, in the order of `load.backward`.
MAPS = tuple(map(Inputs._fields.index, load.MAPS))
DIFFERENTIABLE = tuple(map(Inputs._fields.index, load.GRADIENTS))


@torch.library.custom_op(
    "darkformer::attention",
    mutates_args=(),
    device_types="cpu",
    schema=f"({_TENSORS}, {_SIZES}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def attention_op(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return load.forward(Inputs(*arguments[:COUNT]), Sizes(*arguments[COUNT:]))


@attention_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return load.empty_results(Inputs(*arguments[:COUNT]), Sizes(*arguments[COUNT:]))


@torch.library.custom_op(
    "darkformer::attention_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"({_TENSORS}, {_SIZES}, Tensor scale_after, Tensor log_normaliser, "
    "Tensor grad_output, Tensor grad_values, Tensor grad_total) -> Tensor[]",
)
def backward_op(*arguments: Any) -> list[Tensor]:
    inputs, sizes = Inputs(*arguments[:COUNT]), Sizes(*arguments[COUNT : COUNT + SIZES])
    return [x for x in load.backward(inputs, sizes, *arguments[COUNT + SIZES :]) if x is not None]


@backward_op.register_fake
def _(*arguments: Any) -> list[Tensor]:
    return [arguments[i].new_empty(arguments[i].shape) for i in DIFFERENTIABLE]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, lse, _, _, scale = output
    ctx.save_for_backward(*inputs[:COUNT], scale, lse)
    ctx.sizes = inputs[COUNT:]
    ctx.mark_non_differentiable(lse, scale)


def _in_place(found: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * (COUNT + SIZES)
    for i, gradient in zip(DIFFERENTIABLE, found, strict=True):
        gradients[i] = gradient
    return tuple(gradients)


def _backward(
    ctx: Any, grad_output: Tensor, _: Any, grad_values: Tensor, grad_total: Tensor, __: Any
) -> tuple[Any, ...]:
    *saved, scale, lse = ctx.saved_tensors
    return _in_place(backward_op(*saved, *ctx.sizes, scale, lse, grad_output, grad_values, grad_total))


attention_op.register_autograd(_backward, setup_context=_save)


class _Eager(torch.autograd.Function):
    """`attention_op` without its dispatcher, whose 0.15 ms are a seventh of a short call.

    `forward` has the context: with a `setup_context` torch looks at its signature in each call, 0.03 ms. `functional`
    hides it from torch.func.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        output = load.forward(Inputs(*arguments[:COUNT]), Sizes(*arguments[COUNT:]))
        _save(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # create_graph=True: the operator says that there is no second derivative
            return _backward(ctx, *grads)
        *saved, scale, lse = ctx.saved_tensors
        grad_output, _, grad_values, grad_total, _ = grads
        inputs, sizes, maps = Inputs(*saved), Sizes(*ctx.sizes), any(ctx.needs_input_grad[i] for i in MAPS)
        return _in_place(load.backward(inputs, sizes, scale, lse, grad_output, grad_values, grad_total, maps=maps))


def attend(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`attention_op` where code is traced, tensors are of a subclass or a mode watches operators; else its parts."""
    plain = all(type(x) is Tensor for x in arguments[:3])
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if not plain or traced or is_in_torch_dispatch_mode():
        return attention_op(*arguments)
    if torch.is_grad_enabled():
        return _Eager.apply(*arguments)
    return load.forward(Inputs(*arguments[:COUNT]), Sizes(*arguments[COUNT:]))
