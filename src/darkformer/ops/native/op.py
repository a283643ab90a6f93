"""The library registered with torch: `darkformer::attention`, with autograd, for eager code and `torch.compile`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import load
from .load import Inputs, Sizes

_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor wq, Tensor offq, Tensor wk, Tensor offk, Tensor values, "
    "Tensor total, Tensor scale, Tensor recent_k, Tensor recent_v, Tensor sink_k, Tensor sink_v, Tensor lengths, "
    "Tensor count, Tensor foldq, Tensor foldk"
)
COUNT = len(Inputs._fields)
#: Inputs that have a gradient, in order: all but the scale, the lengths and the count.
DIFFERENTIABLE = tuple(i for i, name in enumerate(Inputs._fields) if name not in ("scale", "lengths", "counts"))


@torch.library.custom_op(
    "darkformer::attention",
    mutates_args=(),
    device_types="cpu",
    schema=f"({_TENSORS}, int features, float scaling) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def attention_op(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return load.forward(Inputs(*arguments[:COUNT]), Sizes(*arguments[COUNT:]))


@attention_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(*arguments[:COUNT])
    query = inputs.query
    return (
        query.new_empty(*query.shape[:-1], inputs.value.shape[-1]),
        query.new_empty(query.shape[:-1], dtype=torch.float32),
        inputs.values.new_empty(inputs.values.shape),
        inputs.total.new_empty(inputs.total.shape),
        inputs.scale.new_empty(inputs.scale.shape),
    )


@torch.library.custom_op(
    "darkformer::attention_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"({_TENSORS}, int features, float scaling, Tensor scale_after, Tensor log_normaliser, "
    "Tensor grad_output, Tensor grad_values, Tensor grad_total) -> Tensor[]",
)
def backward_op(*arguments: Any) -> list[Tensor]:
    return load.backward(Inputs(*arguments[:COUNT]), Sizes(*arguments[COUNT : COUNT + 2]), *arguments[COUNT + 2 :])


@backward_op.register_fake
def _(*arguments: Any) -> list[Tensor]:
    return [arguments[i].new_empty(arguments[i].shape) for i in DIFFERENTIABLE]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, lse, _, _, scale = output
    ctx.save_for_backward(*inputs[:COUNT], scale, lse)
    ctx.sizes = inputs[COUNT:]
    ctx.mark_non_differentiable(lse, scale)


def _backward(
    ctx: Any, grad_output: Tensor, _: Any, grad_values: Tensor, grad_total: Tensor, __: Any
) -> tuple[Any, ...]:
    *saved, scale, lse = ctx.saved_tensors
    found = backward_op(*saved, *ctx.sizes, scale, lse, grad_output, grad_values, grad_total)
    gradients: list[Tensor | None] = [None] * (COUNT + 2)
    for i, gradient in zip(DIFFERENTIABLE, found, strict=True):
        gradients[i] = gradient
    return tuple(gradients)


attention_op.register_autograd(_backward, setup_context=_save)
