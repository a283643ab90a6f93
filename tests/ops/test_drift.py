"""Streams of millions of tokens: a total takes up what joins it as exactly as at its start.

A stream of 2^25 equal tokens is not run but begun at: its sums are known. From 2^24 equal summands on a float32 total
that is rounded to nearest does not grow at all.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from darkformer import AttentionState, DarkConfig, FeatureMap, attention, feature_map
from darkformer.ops import assembled
from darkformer.ops.native import Step
from darkformer.ops.state import join

from .cases import needs_native
from .test_assembled import install

BEFORE, TOKENS = 1 << 25, 2048
Advance = Callable[[list[Tensor], FeatureMap, AttentionState, int], AttentionState]


def pieces(backend: str, size: int) -> Advance:
    """So many tokens, `size` a call."""

    def advance(token: list[Tensor], fm: FeatureMap, state: AttentionState, count: int) -> AttentionState:
        inputs = [x.expand(-1, -1, size, -1).contiguous() for x in token]
        for _ in range(count // size):
            _, state = attention(*inputs, fm, initial_state=state, return_state=True, backend=backend)
        return state

    return advance


def steps(token: list[Tensor], fm: FeatureMap, state: AttentionState, count: int) -> AttentionState:
    """The same by the compiled step."""
    step = Step(state, fm, scaling=token[0].shape[-1] ** -0.5, softcap=None)
    for _ in range(count):
        step(*token)
    return step.state()


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize(
    "advance",
    [
        pytest.param(steps, id="step", marks=needs_native),
        pytest.param(pieces("native", TOKENS), id="native", marks=needs_native),
        pytest.param(pieces("native", 64), id="native in pieces", marks=needs_native),
        pytest.param(pieces("chunked", TOKENS), id="chunked"),
        pytest.param(pieces("chunked", 64), id="chunked in pieces"),
        pytest.param(pieces("recurrent", 1), id="recurrent"),
        pytest.param(pieces("assembled", TOKENS), id="assembled"),
    ],
)
@torch.no_grad()
def test_a_long_stream_is_summed_to_its_last_token(
    advance: Advance, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    monkeypatch.setattr(assembled, "PIECE", 256)
    fm = feature_map(DarkConfig(num_features=12, window=window, sinks=0), num_heads=1, num_kv_heads=1, head_dim=8)
    token = [torch.randn(1, 1, 1, n) for n in (8, 8, 20)]
    first = pieces("recurrent", 1)(token, fm, attention(*token, fm, return_state=True)[1], window)
    assert first.feature_sum.eq(1).all()  # one key, which has left the window
    state = replace(
        first, count=torch.tensor([BEFORE + window]), feature_values=BEFORE * first.feature_values,
        feature_sum=BEFORE * first.feature_sum,
    )  # fmt: skip
    after = advance(token, fm, state, TOKENS)
    assert after.count.item() == BEFORE + window + TOKENS
    for name in ("feature_values", "feature_sum"):
        growth = (getattr(after, name).double() - getattr(state, name)) / getattr(first, name)
        assert (growth / TOKENS - 1).abs().max() <= 2e-2, name  # a unit in the last place is 4 tokens


def test_joins_are_right_on_average() -> None:
    """Ten million equal summands, and ten million different ones, in eight totals: relative to the true sums."""
    generator, block, worst = torch.Generator().manual_seed(0), 1 << 12, 0.0
    equal, random = torch.rand(2, 4, generator=generator) + 0.3
    for summands in (equal.expand(block, -1), random * torch.randn(block, 4, generator=generator).exp()):
        start = BEFORE // block * summands.double().sum(0)
        total = start.float()
        for i in range(block):
            total = join(total[None], torch.ones(()), summands[i], torch.tensor([i]))[0]
        growth = (total.double() - start.float().double()) / summands.double().sum(0)
        worst = max(worst, (growth - 1).abs().max().item())
    assert worst <= 2e-2


@pytest.mark.parametrize("backend", ["chunked", pytest.param("native", marks=needs_native)])
@torch.no_grad()
def test_equal_tokens_give_their_value(backend: str) -> None:
    """A constant stream in one call: the mean of equal values is the value, to a few units in the last place."""
    fm = feature_map(DarkConfig(num_features=16), num_heads=1, num_kv_heads=1, head_dim=16)
    query, key, value = (torch.randn(1, 1, 1, 16).expand(-1, -1, 30_000, -1).contiguous() for _ in range(3))
    output = attention(query, key, value, fm, backend=backend)
    assert ((output - value).norm(dim=-1) / value.norm(dim=-1)).max() <= 2e-6


@needs_native
def test_gradients_of_a_long_stream() -> None:
    """The gradient of the state is such a sum as well, over the queries: of equal ones each takes its share."""
    config = DarkConfig.paper(16)
    fm = feature_map(config, num_heads=1, num_kv_heads=1, head_dim=8).requires_grad_(False)
    query, key, value = (torch.randn(1, 1, 1, 8).expand(-1, -1, 20_000, -1).contiguous() for _ in range(3))
    value.requires_grad_()
    attention(query, key, value, fm, backend="native").sum().backward()
    assert value.grad is not None
    # Row t gives 1/(t+1) to each of its keys, so key j has Σ_{t≥j} 1/(t+1).
    expected = (1 / torch.arange(1, 20_001).double()).flip(0).cumsum(0).flip(0)
    assert (value.grad[0, 0].double() / expected[:, None] - 1).abs().max() <= 1e-5
