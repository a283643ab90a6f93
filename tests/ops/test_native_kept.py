"""What the compiled backend keeps: features between its two backward passes, memory between calls."""

from __future__ import annotations

import pytest
import torch
from tolerances import AGAINST_FLOAT64, float32_error

from darkformer.ops import native

from .cases import Case, above, differences, needs_native, solve
from .test_native import FOLDED, threads

pytestmark = needs_native

LONG = dict(batch=1, heads=2, kv_heads=2, dim=64, value_dim=32, features=1024)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "case",
    [
        Case(length=1500, **LONG),
        Case(length=1411, window=70, sinks=3, mode="warm", **LONG | {"heads": 4}),
        Case(length=1340, scale=6.0, **LONG),
    ],
    ids=str,
)
def test_features_that_there_is_no_room_for_are_made_again(case: Case, dtype: torch.dtype) -> None:
    """The backward pass keeps features of the last chunks only: 17 of 64 tokens here with one thread, 8 with two.

    The oracle's L × L × m numbers do not fit in memory here: `chunked` in float64 stands for it.
    """
    want = solve(case, "chunked", rounded=dtype)
    for count in (1, 2):
        with threads(count):
            before = native.splits()
            errors = differences(solve(case, "native", dtype=dtype, rounded=dtype), want, dtype)
            assert (native.splits() > before) == (case.scale > 1)  # chunks that are cut are not kept
            assert not above(errors, max(AGAINST_FLOAT64[dtype], float32_error(case.scale**2)))


def test_released_memory_is_taken_again() -> None:
    case = Case(length=150, window=16, sinks=4, **FOLDED)
    first = solve(case, "native", dtype=torch.float32).tensors
    native.release()
    native.release()
    for name, x in solve(case, "native", dtype=torch.float32).tensors.items():
        assert torch.equal(x, first[name]), name
