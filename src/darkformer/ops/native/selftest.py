"""Compares the library with the oracle on a small case when it is loaded: a wrong library is refused, not used."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from ...config import DarkConfig
from ...features.feature_map import FeatureMap
from ..reference import reference
from ..state import AttentionState, Problem
from . import load
from .build import BuildError
from .load import Inputs, Sizes
from .maps import TRIANGULAR_TOKENS, pack

#: Largest relative error of output and gradients that passes; the inputs' own rounding is part of neither.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 3e-2}


def _problem(dtype: torch.dtype, compute: torch.dtype, draw: str) -> Problem:
    """78 tokens: more than a chunk, not a multiple of anything, two heads a group, every size odd for a vector."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(dtype if compute == torch.float32 else compute)

    made = FeatureMap(
        DarkConfig(num_features=20, window=5, sinks=2, draw=draw), num_heads=4, num_kv_heads=2, head_dim=18
    )
    query, key, value = some(1, 2, 2, 78, 18), some(1, 2, 78, 18), some(1, 2, 78, 12)
    state = AttentionState.empty(made.config, key, value, batch=1, compute=compute)
    parameters = made.parameters_for(compute)
    return Problem(query, key, value, torch.tensor([78]), 0.25, parameters, state, True, False)


def _native(problem: Problem, grad: Tensor, tokens: int) -> list[Tensor]:
    maps = [x.detach() for x in pack(problem.parameters, 2, 18, problem.scaling, tokens=tokens)]
    s = problem.state
    tensors = [problem.query, problem.key, problem.value, *maps[:4]]
    tensors += [torch.empty(0), torch.empty(0), torch.empty(0), s.recent_key, s.recent_value, s.sink_key, s.sink_value]
    inputs = Inputs._make([*tensors, problem.lengths, s.count, *maps[4:]])
    sizes = Sizes(problem.config.feature_count, problem.scaling, True)
    output, lse, values, total, scale = load.forward(inputs, sizes)
    gradients = load.backward(
        inputs, sizes, scale, lse, grad.to(output.dtype), torch.zeros_like(values), torch.zeros_like(total)
    )
    return [output, *(x for x in gradients[:3] if x is not None)]


def selftest() -> None:
    """Forward and backward in float32 and bfloat16 against the quadratic reference in float64.

    Raises:
        BuildError: names the tensor and the error.
    """
    # Maps that are folded, as they are, and triangular.
    for (dtype, tolerance), (draw, tokens) in product(
        TOLERANCE.items(), (("orthogonal", 1), ("iid", 1), ("iid", TRIANGULAR_TOKENS))
    ):
        exact = _problem(dtype, torch.float64, draw)
        leaves = [x.requires_grad_() for x in (exact.query, exact.key, exact.value)]
        with torch.enable_grad():
            output, _ = reference(exact)
            grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype).double()
            wanted = [output.detach(), *torch.autograd.grad(output, leaves, grad)]
        with torch.no_grad():
            found = _native(_problem(dtype, torch.float32, draw), grad, tokens)
        for name, got, want in zip(("output", "dquery", "dkey", "dvalue"), found, wanted, strict=True):
            error = ((got.double() - want).abs().max() / want.abs().max()).item()
            if not error <= tolerance:
                raise BuildError(f"the self-test failed: {name} in {dtype} has a relative error of {error:.1e}")
