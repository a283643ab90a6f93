"""The library as an operator, `darkformer::attention`, for code that is traced or whose operators are intercepted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import load
from .load import Inputs, Options, Outputs

_TENSORS = ", ".join(f"Tensor {name}" for name in Inputs._fields)
_OPTIONS = "int features, float scaling, bool wants_state"
_INPUTS, _ARGUMENTS = len(Inputs._fields), len(Inputs._fields) + len(Options._fields)
#: Places of the maps among the inputs, and of all inputs that have a gradient, in the order of `load.backward`.
MAPS = tuple(map(Inputs._fields.index, load.MAPS))
DIFFERENTIABLE = tuple(map(Inputs._fields.index, load.GRADIENTS))


def _split(arguments: Sequence[Any]) -> tuple[Inputs, Options]:
    return Inputs(*arguments[:_INPUTS]), Options(*arguments[_INPUTS:_ARGUMENTS])


@torch.library.custom_op(
    "darkformer::attention",
    mutates_args=(),
    device_types="cpu",
    schema=f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def attention_op(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return load.forward(*_split(arguments))


@attention_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return load.empty_outputs(*_split(arguments))


@torch.library.custom_op(
    "darkformer::attention_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"({_TENSORS}, {_OPTIONS}, Tensor log_scale_out, Tensor log_normalizer, "
    "Tensor grad_output, Tensor grad_values, Tensor grad_sum) -> Tensor[]",
)
def backward_op(*arguments: Any) -> list[Tensor]:
    return [x for x in load.backward(*_split(arguments), *arguments[_ARGUMENTS:]) if x is not None]


@backward_op.register_fake
def _(*arguments: Any) -> list[Tensor]:
    return [arguments[i].new_empty(arguments[i].shape) for i in DIFFERENTIABLE]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    _, log_normalizer, _, _, log_scale = output
    ctx.save_for_backward(*inputs[:_INPUTS], log_scale, log_normalizer)
    ctx.options = inputs[_INPUTS:]
    ctx.mark_non_differentiable(log_normalizer, log_scale)


def _by_argument(values: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients at the places of their arguments."""
    gradients: list[Tensor | None] = [None] * _ARGUMENTS
    for i, gradient in zip(DIFFERENTIABLE, values, strict=True):
        gradients[i] = gradient
    return tuple(gradients)


def _backward(ctx: Any, grad_output: Tensor, _: Any, grad_values: Tensor, grad_sum: Tensor, __: Any) -> tuple[Any, ...]:
    *inputs, log_scale, log_normalizer = ctx.saved_tensors
    gradients = backward_op(*inputs, *ctx.options, log_scale, log_normalizer, grad_output, grad_values, grad_sum)
    return _by_argument(gradients)


attention_op.register_autograd(_backward, setup_context=_save)


class _Eager(torch.autograd.Function):
    """`attention_op` without its dispatcher, whose 0.15 ms are a seventh of a short call.

    `forward` has the context: with a `setup_context` torch looks at its signature in each call, 0.03 ms. `torch_func`
    hides it from torch.func.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Outputs:
        output = load.forward(*_split(arguments))
        _save(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # create_graph=True: the operator says that there is no second derivative
            return _backward(ctx, *grads)
        *inputs, log_scale, log_normalizer = ctx.saved_tensors
        grad_output, _, grad_values, grad_sum, _ = grads
        maps = any(ctx.needs_input_grad[i] for i in MAPS)
        return _by_argument(
            load.backward(
                Inputs(*inputs), Options(*ctx.options), log_scale, log_normalizer, grad_output, grad_values, grad_sum,
                maps=maps,
            )
        )  # fmt: skip


def attend(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`load.forward` of the fields of `Inputs` and `Options`, with gradients.

    Through `attention_op` where code is traced, tensors are of a subclass or a mode intercepts operators.
    """
    plain_tensors = all(type(x) is Tensor for x in arguments[:3])
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if not plain_tensors or traced or is_in_torch_dispatch_mode():
        return attention_op(*arguments)
    if torch.is_grad_enabled():
        return _Eager.apply(*arguments)
    return load.forward(*_split(arguments))
