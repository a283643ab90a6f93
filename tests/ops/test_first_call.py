"""The compiled backend builds and tests itself at the first call, whatever that call is in the middle of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from darkformer import DarkConfig, attention, feature_map
from darkformer.ops import native

SITUATIONS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "plain": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "anomaly mode": torch.autograd.detect_anomaly,
}


@pytest.fixture(autouse=True)
def untested() -> Iterator[None]:
    """As in a new process: nothing is known of the library yet."""
    if reason := native.unavailable():
        pytest.skip(reason)
    native._library_reason.cache_clear()
    yield
    assert native._library_reason.cache_info().currsize == 1, "the library was never asked for"
    assert native.unavailable() is None


def _inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(1, 4, 70, 8, requires_grad=True), torch.randn(1, 2, 70, 8, requires_grad=True)


def _map() -> torch.nn.Module:
    return feature_map(DarkConfig(num_features=16, window=4, sinks=2), num_heads=4, num_kv_heads=2, head_dim=8)


@pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anywhere(situation: Callable[[], AbstractContextManager[object]]) -> None:
    (query, key), fm = _inputs(), _map()
    with situation():
        first = attention(query, key, key, fm)
    assert torch.equal(first, attention(query, key, key, fm))


def test_nothing_of_it_is_saved_for_the_callers_backward() -> None:
    (query, key), fm, counts = _inputs(), _map(), []
    for _ in range(2):  # the first one tests the library
        saved: list[Tensor] = []
        with saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x):
            attention(query, key, key, fm)
        counts.append(len(saved))
    assert counts[0] == counts[1] > 0


def test_inside_a_checkpoint() -> None:
    # What Trainer's first step with gradient checkpointing is; it counts the tensors of forward and recomputation.
    (query, key), fm = _inputs(), _map()
    checkpoint(attention, query, key, key, fm, use_reentrant=False).sum().backward()
    again = query.grad.clone()
    query.grad = None
    attention(query, key, key, fm).sum().backward()
    torch.testing.assert_close(again, query.grad)
