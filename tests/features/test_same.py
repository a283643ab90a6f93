"""Numbers compared bit for bit."""

import pytest
import torch

from darkformer.features.same import same_numbers


@pytest.mark.parametrize("layout", ["contiguous", "strided", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_one_number_is_enough(dtype: torch.dtype, layout: str) -> None:
    now = torch.arange(24).reshape(4, 6).to(dtype)
    if layout == "strided":
        now = now.mT
    elif layout == "expanded":
        now = now[:, :1].expand(4, 6)
    before = now.clone()
    assert same_numbers(before, now)
    changed = now.clone(memory_format=torch.preserve_format)
    changed[-1, -1] += 1
    assert not same_numbers(before, changed)


def test_shape_and_dtype_count() -> None:
    x = torch.zeros(6)
    assert not same_numbers(x, x.view(2, 3))
    assert not same_numbers(x, x.double())
    assert not same_numbers(x[:0], x)
    assert same_numbers(x[:0], x[:0].clone())


def test_nan_is_itself() -> None:
    """A diverged map is not made again in every call."""
    x = torch.full((5,), float("nan"))
    assert same_numbers(x.clone(), x)
