"""Whether a tensor still holds the same numbers: what is derived from weights is kept until they change."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor, nn

#: Other subclasses (distributed, fake) may have no memory of their own.
DENSE_TYPES = (Tensor, nn.Parameter)


@functools.cache
def _memcmp() -> Any:
    """The C library's comparison of memory, None where ctypes cannot find it."""
    try:
        function = ctypes.CDLL(None).memcmp
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_int
    return function


def same_numbers(before: Tensor, now: Tensor) -> bool:
    """Whether two tensors are equal: shape, dtype, device, numbers; on the CPU bit for bit, at memory's speed."""
    if before.shape != now.shape or before.dtype != now.dtype:
        return False
    dense = type(before) in DENSE_TYPES and type(now) in DENSE_TYPES and before.is_cpu and now.is_cpu
    dense = dense and before.is_contiguous() and now.is_contiguous() and before.is_neg() == now.is_neg()
    if dense and before.data_ptr() and now.data_ptr() and (compare := _memcmp()):
        return compare(before.data_ptr(), now.data_ptr(), now.nbytes) == 0
    return before.device == now.device and torch.equal(before, now)


def rounds(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether `dtype` cannot hold the numbers of x exactly; True for subclasses, whose numbers are not read."""
    if x.is_meta or x.dtype == dtype:
        return False
    return type(x) not in DENSE_TYPES or not torch.equal(x.to(dtype).to(x.dtype), x)
