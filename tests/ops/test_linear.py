"""Work and memory grow linearly with the length, forward and backward: counted in elements, not timed."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from darkformer import attention

from .cases import Case, make_inputs, make_map, use_chunked


class Watch(TorchDispatchMode):
    """Meets every tensor that operators produce, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def meet(self, x: Tensor) -> None:
        raise NotImplementedError

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            for x in result if isinstance(result, tuple | list) else (result,):
                if isinstance(x, Tensor):
                    self.meet(x)
        return result


class Count(Watch):
    """Elements of everything that operators produce, views aside."""

    def meet(self, x: Tensor) -> None:
        self.elements += x.numel()


class Largest(Watch):
    """Elements of the largest float32 tensor that an operator produces, views aside."""

    def meet(self, x: Tensor) -> None:
        if x.dtype == torch.float32:
            self.elements = max(self.elements, x.numel())


def elements(case: Case, backend: str, dtype: torch.dtype = torch.float64) -> int:
    inputs = [x.requires_grad_() for x in make_inputs(case, dtype=dtype)]
    made = make_map(case, dtype)
    with Count() as count:
        attention(*inputs, made, is_causal=case.mode != "bidirectional", backend=backend).sum().backward()
    return count.elements


def growth(case: Case, backend: str) -> float:
    """Factor of the elements from 4,096 to 8,192 tokens, in 16 and 32 super-chunks (reference: 256 and 512 tokens)."""
    short = 256 if backend == "reference" else 4096
    few, many = (elements(Case(**vars(case) | {"length": n}), backend) for n in (short, 2 * short))
    return many / few


SMALL = {"batch": 1, "heads": 2, "kv_heads": 1, "features": 4, "dim": 4, "value_dim": 4}


@pytest.mark.parametrize("mode", ["cold", "bidirectional"])
@pytest.mark.parametrize("window", [0, 16, 200])
def test_chunked_is_linear(window: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_chunked(monkeypatch, span=256)
    assert growth(Case(window=window, sinks=2, mode=mode, **SMALL), "chunked") < 2.02


@pytest.mark.parametrize("window", [0, 16, 70])
def test_bfloat16_makes_no_float32_copy_of_the_sequence(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_chunked(monkeypatch, span=256)
    case = Case(length=8192, window=window, sinks=2, **SMALL | {"dim": 16, "value_dim": 16})
    inputs = [x.requires_grad_() for x in make_inputs(case, dtype=torch.bfloat16)]
    with Largest() as largest:
        output = attention(*inputs, make_map(case, torch.float32), backend="chunked")
        output.backward(torch.ones_like(output))
    assert {x.grad.dtype for x in inputs if x.grad is not None} == {torch.bfloat16}
    assert largest.elements < inputs[1].numel(), "a whole key or query in float32"


def test_the_reference_is_quadratic() -> None:
    """Negative control of the count."""
    assert growth(Case(window=0, sinks=2, **SMALL), "reference") > 3.5
