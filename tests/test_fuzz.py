"""The fuzz of the operator: 300 of its cases, and whether it would notice."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from darkformer.ops import native
from darkformer.ops.attention import BACKENDS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def fuzz() -> SimpleNamespace:
    sys.modules.setdefault("fuzz", sys.modules[__name__])  # its dataclass looks its module up
    return SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "fuzz.py"), run_name="fuzz"))


@pytest.fixture
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("part", range(3))
@pytest.mark.usefixtures("one_thread")
def test_random_problems_have_no_silent_faults(part: int, fuzz: SimpleNamespace) -> None:
    """The first of `python benchmarks/fuzz.py --seed 1`."""
    record = fuzz.new_record(1)
    numbers = range(100 * part, 100 * part + 100)
    available = native.unavailable() is None
    fuzz.run(1, [n for n in numbers if available or fuzz.make_case(1, n).backend not in ("native", "step")], record)
    assert record["cases"] >= 40 and not record["faults"], json.dumps(record["faults"], indent=1)
    assert record["refused"] <= record["cases"] // 5


@pytest.mark.usefixtures("one_thread")
def test_it_notices(fuzz: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output or a gradient that is off by a thousandth, a NaN, an error that is none of ours."""
    original = BACKENDS["chunked"]

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 1.01 * grad

    def install(change: Callable[[Tensor], Tensor]) -> None:
        def function(problem: Any) -> Any:
            output, state = original.function(problem)
            return change(output), state

        monkeypatch.setitem(BACKENDS, "chunked", original._replace(function=function))

    cases = [fuzz.make_case(0, n) for n in range(300)]
    cases = [c for c in cases if c.backend == "chunked" and c.huge == "none" and c.scale <= 3 and c.length > 2][:8]
    assert {fuzz.run_case(case) for case in cases} == {"right"}

    def fail(x: Tensor) -> Tensor:
        raise IndexError("out of range")

    for change, words in (
        (lambda x: 1.001 * x, "the output is wrong"),
        (Scaled.apply, "the gradient of "),
        (lambda x: x.masked_fill(torch.ones_like(x, dtype=torch.bool), torch.nan), "refused with logits"),
        (fail, "IndexError"),
    ):
        install(change)
        answers = [fuzz.run_case(case) for case in cases]
        assert all(words in answer for answer in answers), (words, answers)
