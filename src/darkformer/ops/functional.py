"""A function of plain tensors as one operator for torch.func: its transforms see the operator, never what is inside.

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
class Plain:
    """A function of plain tensors. A dataclass, not a tuple: torch.func would take a tuple apart."""

    function: Callable[..., tuple[Tensor, ...]]
    rows: int  # the first so many arguments, and every result, hold one row of a batch each: more rows are more samples
    constants: tuple[int, ...] = ()  # results without a gradient


def apply(plain: Plain, *arguments: Tensor | None) -> tuple[Tensor, ...]:
    """`plain.function(*arguments)` that `torch.func.grad`, `vjp`, `jacrev` and `vmap` may transform.

    Raises:
        DerivativeError: forward mode (`jvp`, `jacfwd`, dual numbers), or a derivative of the derivative.
    """
    return _Operator.apply(plain, *arguments)


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
    """All samples as rows of one call; `rows` tells which arguments have rows."""
    given = [
        _fold(x, dim, samples) if has else x for x, dim, has in zip(arguments, in_dims, rows, strict=True)
    ]  # fmt: skip
    return tuple(x.unflatten(0, (samples, -1)) for x in call(*given))


def _looped(
    call: Callable[..., tuple[Tensor, ...]], in_dims: Dims, arguments: Arguments, samples: int
) -> tuple[Tensor, ...]:
    """A call a sample."""
    found = [
        call(*(x if x is None or dim is None else x.select(dim, i) for x, dim in zip(arguments, in_dims, strict=True)))
        for i in range(samples)
    ]
    return tuple(map(torch.stack, zip(*found, strict=True)))


class _Operator(torch.autograd.Function):
    """The function itself."""

    @staticmethod
    def forward(plain: Plain, *arguments: Tensor | None) -> tuple[Tensor, ...]:
        given = {id(x) for x in arguments}
        return tuple(x.clone() if id(x) in given else x for x in plain.function(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.plain = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.mark_non_differentiable(*(output[i] for i in ctx.plain.constants))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = tuple(ctx.needs_input_grad[1:])
        found = iter(_Backward.apply(ctx.plain, needed, *ctx.saved_tensors, *grads))
        return None, *(next(found) if need else None for need in needed)

    @staticmethod
    def vmap(info: Any, in_dims: Any, plain: Plain, *arguments: Tensor | None) -> tuple[Any, Any]:
        def call(*given: Tensor | None) -> tuple[Tensor, ...]:
            return _Operator.apply(plain, *given)

        dims = in_dims[1:]
        if all(dim is None for dim in dims[plain.rows :]):
            rows = [i < plain.rows for i in range(len(dims))]
            return (found := _folded(call, rows, dims, arguments, info.batch_size)), (0,) * len(found)
        return (found := _looped(call, dims, arguments, info.batch_size)), (0,) * len(found)

    jvp = staticmethod(_refuse_forward_mode)


class _Backward(torch.autograd.Function):
    """Gradients of the needed arguments, given all arguments and the gradient of every result."""

    @staticmethod
    def forward(plain: Plain, needed: tuple[bool, ...], *given: Tensor | None) -> tuple[Tensor, ...]:
        grads = [x for x in given[len(needed) :] if x is not None]
        with torch.enable_grad():
            leaves = [
                None if x is None else x.detach().requires_grad_(need)
                for x, need in zip(given[: len(needed)], needed, strict=True)
            ]
            results = plain.function(*leaves)
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
    def vmap(info: Any, in_dims: Any, plain: Plain, needed: tuple[bool, ...], *given: Tensor | None) -> tuple[Any, Any]:
        def call(*arguments: Tensor | None) -> tuple[Tensor, ...]:
            return _Backward.apply(plain, needed, *arguments)

        dims, count = in_dims[2:], len(needed)
        # What samples share has a gradient a sample: the sum over rows would mix them.
        shared = range(plain.rows, count)
        if all(dims[i] is None and not needed[i] for i in shared):
            rows = [i not in shared for i in range(len(given))]
            return (found := _folded(call, rows, dims, given, info.batch_size)), (0,) * len(found)
        return (found := _looped(call, dims, given, info.batch_size)), (0,) * len(found)
