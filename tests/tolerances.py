"""The tolerances of the tests, in one place, and the measure they belong to."""

import torch
from torch import Tensor

#: Two float64 ways to compute the same numbers.
PARITY = 1e-9
#: Output, state and gradients of a float32 backend, and of one whose products take bfloat16 factors, against float64 on
#: the same inputs: the worst entry against the largest.
AGAINST_FLOAT64 = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
#: What must not change at all, up to the order of additions.
INVARIANT = {torch.float64: 1e-12, torch.float32: 1e-6}
#: A float32 stream (prefill and steps) against the float32 full forward.
STREAM = 1e-5
#: Output against float64 on the same inputs, by their dtype: everything inside is float32, so it is the output's own
#: rounding (half a unit in the last place: 2^-12 and 2^-9), with a margin of 4.
OUTPUT = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def float32_error(std: float, dim: int = 64) -> float:
    """Error of a float32 output whose logits have standard deviation `std`.

    Queries and keys then have ½‖x‖² = ½·std·√dim. A log-feature of that size carries an absolute error of its size
    times 2^-23, the exponential of the sum of two log-features carries it as a relative one; 8 is for everything else.
    """
    return 2 * 2**-23 * (8 + 0.5 * std * dim**0.5)


def relative_error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """max |actual - expected| / max(max |expected|, floor). Shapes must agree; NaN anywhere gives NaN."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} against {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max().item()
    scale = max(expected.double().abs().max().item(), floor)
    return difference / scale if scale or difference != difference else (0.0 if difference == 0 else float("inf"))
