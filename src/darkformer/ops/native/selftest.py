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
from .load import Inputs, Options
from .maps import TRIANGULAR_TOKENS, pack

#: Largest relative error of output and gradients that passes; the inputs' own rounding is part of neither.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 3e-2}


def _problem(dtype: torch.dtype, compute: torch.dtype, draw: str) -> Problem:
    """78 tokens: more than a chunk, not a multiple of anything, two heads a group, every size odd for a vector."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:  # numbers that are exact in `dtype`
        return torch.randn(*shape, generator=generator).to(dtype).to(dtype if compute == torch.float32 else compute)

    feature_map = FeatureMap(
        DarkConfig(num_features=20, window=5, sinks=2, draw=draw), num_heads=4, num_kv_heads=2, head_dim=18
    )
    query, key, value = random(1, 2, 2, 78, 18), random(1, 2, 78, 18), random(1, 2, 78, 12)
    state = AttentionState.empty(feature_map.config, key, value, batch=1, compute=compute)
    parameters = feature_map.parameters_for(compute)
    return Problem(query, key, value, torch.tensor([78]), 0.25, parameters, state, True, False)


def _native(problem: Problem, grad_output: Tensor, tokens: int) -> list[Tensor]:
    maps = [x.detach() for x in pack(problem.parameters, 2, 18, problem.scaling, tokens=tokens)]
    state, nothing = problem.state, torch.empty(0)
    tensors = [problem.query, problem.key, problem.value, *maps[:4], nothing, nothing, nothing]
    tensors += [state.recent_key, state.recent_value, state.sink_key, state.sink_value]
    inputs = Inputs._make([*tensors, problem.lengths, state.count, *maps[4:]])
    options = Options(problem.config.feature_count, problem.scaling, wants_state=True)
    output, log_normalizer, values, total, log_scale = load.forward(inputs, options)
    gradients = load.backward(
        inputs, options, log_scale, log_normalizer, grad_output.to(output.dtype),
        torch.zeros_like(values), torch.zeros_like(total),
    )  # fmt: skip
    return [output, *(x for x in gradients[:3] if x is not None)]


def selftest() -> None:
    """Forward and backward in float32 and bfloat16 against the quadratic reference in float64.

    Raises:
        BuildError: names the tensor and the error.
    """
    # Maps with folds, without, and with a triangular N.
    for (dtype, tolerance), (draw, tokens) in product(
        TOLERANCE.items(), (("orthogonal", 1), ("iid", 1), ("iid", TRIANGULAR_TOKENS))
    ):
        exact = _problem(dtype, torch.float64, draw)
        leaves = [x.requires_grad_() for x in (exact.query, exact.key, exact.value)]
        with torch.enable_grad():
            output, _ = reference(exact)
            grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype).double()
            expected = [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]
        with torch.no_grad():
            results = _native(_problem(dtype, torch.float32, draw), grad_output, tokens)
        for name, x, want in zip(("output", "dq", "dk", "dv"), results, expected, strict=True):
            error = ((x.double() - want).abs().max() / want.abs().max()).item()
            if not error <= tolerance:
                raise BuildError(f"the self-test failed: {name} in {dtype} has a relative error of {error:.1e}")
