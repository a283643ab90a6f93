"""A function of ordinary tensors as one operator for torch.func: its transforms see the operator, never what is inside.

Inside, backends look at numbers, write in place and hand memory to C++, which no wrapped tensor allows. The backward
pass computes the function again, with gradients, and is an operator itself, so `vmap(grad)` and `jacrev` compose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import DerivativeError

Arguments = Sequence[Tensor | None]
#: Dimensions that `vmap` maps over, None for a tensor that all samples share.
Dims = Sequence[int | None]


@dataclass(frozen=True)
class Operator:
    """A function of unwrapped tensors. A dataclass, not a tuple, which torch.func would flatten."""

    function: Callable[..., tuple[Tensor, ...]]
    rows: int  # the first so many arguments, and every result, hold one row of a batch each: more rows are more samples
    constants: tuple[int, ...] = ()  # results without a gradient


def apply(operator: Operator, *arguments: Tensor | None) -> tuple[Tensor, ...]:
    """`operator.function(*arguments)` that `torch.func.grad`, `vjp`, `jacrev` and `vmap` may transform.

    Raises:
        DerivativeError: forward mode (`jvp`, `jacfwd`, dual numbers), or a derivative of the derivative.
    """
    return _Forward.apply(operator, *arguments)


def _refuse_forward_mode(ctx: Any, *tangents: Any) -> Any:
    raise DerivativeError(
        "darkformer.attention has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, "
        "torch.autograd.forward_ad): use reverse mode, torch.func.vjp or jacrev."
    )


def _refuse_second(ctx: Any, *grads: Any) -> Any:
    raise DerivativeError(
        "darkformer.attention has no second derivative under torch.func (grad of grad, hessian): take first "
        "derivatives, or differentiate backend='reference' twice by torch.autograd.grad(…, create_graph=True)."
    )


def _fold(x: Tensor | None, dim: int | None, samples: int) -> Tensor | None:
    """Samples and rows as one dimension."""
    if x is None:
        return None
    x = x.expand(samples, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _folded(
    call: Callable[..., tuple[Tensor, ...]], rows: Sequence[bool], in_dims: Dims, arguments: Arguments, samples: int
) -> tuple[Tensor, ...]:
    """All samples as rows of one call; `rows` says which arguments have rows."""
    folded = [_fold(x, dim, samples) if has else x for x, dim, has in zip(arguments, in_dims, rows, strict=True)]
    return tuple(x.unflatten(0, (samples, -1)) for x in call(*folded))


def _looped(
    call: Callable[..., tuple[Tensor, ...]], in_dims: Dims, arguments: Arguments, samples: int
) -> tuple[Tensor, ...]:
    """A call a sample."""
    results = [
        call(*(x if x is None or dim is None else x.select(dim, i) for x, dim in zip(arguments, in_dims, strict=True)))
        for i in range(samples)
    ]
    return tuple(map(torch.stack, zip(*results, strict=True)))


class _Forward(torch.autograd.Function):
    """The function itself."""

    @staticmethod
    def forward(operator: Operator, *arguments: Tensor | None) -> tuple[Tensor, ...]:
        identities = {id(x) for x in arguments}  # an operator may not return its arguments
        return tuple(x.clone() if id(x) in identities else x for x in operator.function(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.operator = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.mark_non_differentiable(*(output[i] for i in ctx.operator.constants))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = tuple(ctx.needs_input_grad[1:])
        gradients = iter(_Backward.apply(ctx.operator, needed, *ctx.saved_tensors, *grads))
        return None, *(next(gradients) if need else None for need in needed)

    @staticmethod
    def vmap(info: Any, in_dims: Any, operator: Operator, *arguments: Tensor | None) -> tuple[Any, Any]:
        def call(*tensors: Tensor | None) -> tuple[Tensor, ...]:
            return _Forward.apply(operator, *tensors)

        dims = in_dims[1:]
        if all(dim is None for dim in dims[operator.rows :]):
            rows = [i < operator.rows for i in range(len(dims))]
            results = _folded(call, rows, dims, arguments, info.batch_size)
        else:
            results = _looped(call, dims, arguments, info.batch_size)
        return results, (0,) * len(results)

    jvp = staticmethod(_refuse_forward_mode)


class _Backward(torch.autograd.Function):
    """Gradients of the needed arguments, from all arguments and the gradient of every result."""

    @staticmethod
    def forward(operator: Operator, needed: tuple[bool, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        grads = [x for x in tensors[len(needed) :] if x is not None]
        with torch.enable_grad():
            leaves = [
                None if x is None else x.detach().requires_grad_(need)
                for x, need in zip(tensors[: len(needed)], needed, strict=True)
            ]
            results = operator.function(*leaves)
        ends = [(x, grad) for x, grad in zip(results, grads, strict=True) if x.requires_grad]
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        return torch.autograd.grad(
            [x for x, _ in ends], wanted, [grad for _, grad in ends], allow_unused=True, materialize_grads=True
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    backward = staticmethod(_refuse_second)
    jvp = staticmethod(_refuse_second)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, operator: Operator, needed: tuple[bool, ...], *tensors: Tensor | None
    ) -> tuple[Any, Any]:
        def call(*arguments: Tensor | None) -> tuple[Tensor, ...]:
            return _Backward.apply(operator, needed, *arguments)

        dims, count = in_dims[2:], len(needed)
        # What samples share has a gradient a sample: the sum over rows would mix them.
        shared = range(operator.rows, count)
        if all(dims[i] is None and not needed[i] for i in shared):
            rows = [i not in shared for i in range(len(tensors))]
            results = _folded(call, rows, dims, tensors, info.batch_size)
        else:
            results = _looped(call, dims, tensors, info.batch_size)
        return results, (0,) * len(results)
