"""What must change nothing: pads (any amount, side and content), other rows of the batch, the future."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import INVARIANT, relative_error
from torch import Tensor

from darkformer import FeatureMap, attention
from darkformer.config import METHODS
from darkformer.ops.attention import problem_of
from darkformer.ops.exact import exact
from darkformer.ops.state import next_buffers, reorder

from .cases import Case, Way, make_inputs, make_map
from .test_recurrent import state_errors

#: In float32 `auto` is the compiled backend wherever there is one and it takes the problem.
WAYS = (Way("auto"), Way("reference"), Way("auto", torch.float32))
CONFIGS = [
    Case(length=12, window=0, sinks=0),
    Case(length=12, window=5, sinks=3, tied=False),
    *(Case(length=12, window=2, sinks=1, method=method) for method in METHODS if method != "dark"),
]


def spread(x: Tensor, mask: Tensor, filling: float) -> Tensor:
    """x (1, heads, n, d) at the n True places of mask (B, L), `filling` elsewhere."""
    wide = torch.full((mask.shape[0], x.shape[1], mask.shape[1], x.shape[3]), filling, dtype=x.dtype)
    for row, real in zip(wide, mask, strict=True):
        row[:, real] = x[0, :, : int(real.sum())]
    return wide


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("case", CONFIGS, ids=str)
def test_pads_may_hold_anything(case: Case, causal: bool, way: Way) -> None:
    made = make_map(case, way.dtype)
    mask = torch.rand(case.batch, case.length) > 0.4
    mask[:, 3] = True
    found = []
    for filling in (0.0, float("nan"), float("inf"), -1e30):
        made.zero_grad()
        pads = ~mask[:, None, :, None]
        inputs = [x.masked_fill(pads, filling).requires_grad_() for x in make_inputs(case, dtype=way.dtype)]
        output = attention(*inputs, made, key_mask=mask, is_causal=causal, backend=way.backend)
        assert output.masked_select(pads).eq(0).all()
        (output * torch.linspace(-1, 1, output.numel(), dtype=way.dtype).view(output.shape)).sum().backward()
        for x in inputs:
            assert x.grad.masked_select(pads).eq(0).all()
            assert x.grad.isfinite().all()
        gradients = [p.grad for p in made.parameters() if p.grad is not None]
        found.append([output.detach(), *(x.grad for x in inputs), *(g.clone() for g in gradients)])
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("case", CONFIGS, ids=str)
@settings(max_examples=6)
@given(places=st.lists(st.booleans(), min_size=1, max_size=90), side=st.sampled_from(["left", "right", "anywhere"]))
def test_amount_and_side_of_padding(case: Case, causal: bool, way: Way, places: list[bool], side: str) -> None:
    real = torch.tensor(places)
    if side != "anywhere":
        real = real.sort(stable=True, descending=side == "right").values
    made, count = make_map(case, way.dtype), int(real.sum())
    inputs = [x[:1] for x in make_inputs(case, count, way.dtype)]
    options = {"is_causal": causal, "return_state": causal, "backend": way.backend}
    want = attention(*inputs, made, **options)
    found = attention(*(spread(x, real[None], 7.0) for x in inputs), made, key_mask=real[None], **options)
    if causal:
        (found, state), (want, want_state) = found, want
        if case.method != "exact" and count:
            assert max(state_errors(state, want_state).values()) <= INVARIANT[way.dtype]
    assert relative_error(found[:, :, real], want) <= INVARIANT[way.dtype]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("case", CONFIGS, ids=str)
def test_rows_do_not_see_each_other(case: Case, causal: bool, way: Way) -> None:
    """Batch 1 is no special case: each row of a ragged batch equals that row alone, and alone without its pads."""
    case = Case(**vars(case) | {"batch": 4, "length": 70})
    made, inputs = make_map(case, way.dtype), make_inputs(case, dtype=way.dtype)
    mask = torch.ones(4, 70, dtype=torch.bool)
    mask[1, :30] = mask[2, 5:] = mask[3, 10:60] = False
    options = {"is_causal": causal, "backend": way.backend}
    together = attention(*inputs, made, key_mask=mask, **options)
    for b, real in enumerate(mask):
        row = [x[b : b + 1] for x in inputs]
        assert (
            relative_error(attention(*row, made, key_mask=mask[b : b + 1], **options)[0], together[b])
            <= INVARIANT[way.dtype]
        )
        alone = attention(*(x[:, :, real] for x in row), made, **options)
        assert relative_error(alone[0], together[b][:, real]) <= INVARIANT[way.dtype]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("case", CONFIGS, ids=str)
def test_a_fully_masked_row(case: Case, causal: bool, way: Way) -> None:
    made = make_map(case, way.dtype)
    mask = torch.tensor([[True] * case.length, [False] * case.length])
    inputs = [x.requires_grad_() for x in make_inputs(case, dtype=way.dtype)]
    result = attention(*inputs, made, key_mask=mask, is_causal=causal, return_state=causal, backend=way.backend)
    output = result[0] if causal else result
    assert output[1].eq(0).all()
    output.square().sum().backward()
    for x in inputs:
        assert x.grad[1].eq(0).all() and x.grad[0].ne(0).any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())
    if causal and case.method != "exact":  # the row's state is that of no tokens
        empty = attention(*(x[:, :, :0] for x in inputs), made, return_state=True)[1]
        assert not max(state_errors(result[1].select(torch.tensor([1])), empty.select(torch.tensor([1]))).values())


def future_changed(inputs: list[Tensor], start: int, kind: str) -> list[Tensor]:
    query, key, value = (x.clone() for x in inputs)
    query[:, :, start:] = torch.randn_like(query[:, :, start:])
    value[:, :, start:] = 1e6 * torch.randn_like(value[:, :, start:])
    key[:, :, start:] *= {"other": -1.0, "huge": 1e3, "zero": 0.0}[kind]
    return [query, key, value]


def make_hard(made: FeatureMap) -> None:
    """A large query centre b: a key's log-feature holds bᵀk, so a future key may dwarf every past one."""
    with torch.no_grad():
        if made.query_center is not None:
            made.query_center.mul_(30)


CAUSAL = [Case(length=130, window=window, sinks=sinks) for window in (0, 1, 16) for sinks in (0, 4)]
CAUSAL += [Case(length=130, window=16, sinks=4, method=m) for m in METHODS if m != "dark"]
STARTS = (1, 40, 64, 129)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("kind", ["other", "huge", "zero"])
@pytest.mark.parametrize("case", CAUSAL, ids=str)
def test_the_future_changes_nothing(case: Case, kind: str, way: Way) -> None:
    """Neither its keys and values nor the stabiliser, which may hold a maximum over keys of the future."""
    made, inputs = make_map(case, way.dtype), [3.0 * x for x in make_inputs(case, dtype=way.dtype)]
    make_hard(made)
    with torch.no_grad():
        want = attention(*inputs, made, backend=way.backend)
        for start in STARTS:
            found = attention(*future_changed(inputs, start, kind), made, backend=way.backend)
            assert relative_error(found[:, :, :start], want[:, :, :start]) <= INVARIANT[way.dtype]
            assert relative_error(found[:, :, start:], want[:, :, start:]) > 1e-3


@pytest.mark.parametrize("case", CAUSAL, ids=str)
def test_the_past_has_no_gradient_to_the_future(case: Case) -> None:
    made, start = make_map(case), 40
    make_hard(made)
    inputs = [(3.0 * x).requires_grad_() for x in make_inputs(case)]
    attention(*inputs, made)[:, :, :start].square().sum().backward()
    for x in inputs:
        assert x.grad[:, :, start:].eq(0).all() and x.grad[:, :, :start].ne(0).any()


@pytest.mark.parametrize("case", CAUSAL, ids=str)
def test_bidirectional_sees_the_future(case: Case) -> None:
    """Negative control of the causality tests. A window sees `window - 1` tokens ahead, features see all."""
    made, inputs, start = make_map(case), make_inputs(case), 40
    with torch.no_grad():
        want = attention(*inputs, made, is_causal=False)
        found = attention(*future_changed(inputs, start, "other"), made, is_causal=False)
    changed = (found - want)[:, :, :start].abs().amax((0, 1, 3)) > 1e-6
    reach = case.window - 1 if case.method == "local" else start
    assert changed[start - reach :].all() and not changed[: start - reach].any()


def test_reordering_tokens_and_its_gradients() -> None:
    """By rows what `torch.gather` gives, once and twice differentiable, whatever the strides."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, generator=generator).transpose(1, 2).requires_grad_()
    order = torch.stack([torch.randperm(5, generator=generator) for _ in range(2)])
    inverse = torch.argsort(order, dim=1)
    found = reorder(x, order, inverse)
    assert torch.equal(found, x.gather(2, order[:, None, :, None].expand_as(x)))
    assert torch.equal(reorder(found, inverse, order), x)
    assert torch.autograd.gradcheck(lambda x: reorder(x, order, inverse), x)
    assert torch.autograd.gradgradcheck(lambda x: reorder(x, order, inverse).square(), x)


@pytest.mark.parametrize("tokens", [1, 4, 5, 9])
@pytest.mark.parametrize("method, window", [("dark", 0), ("dark", 5), ("exact", 5)])
def test_buffers_without_pads_are_those_of_the_general_way(method: str, window: int, tokens: int) -> None:
    case = Case(length=tokens + 3, window=window, sinks=2, method=method)
    made, inputs = make_map(case), make_inputs(case)
    _, state = attention(*(x[:, :, :3] for x in inputs), made, return_state=True)
    for before in (None, state):
        parameters = made.parameters_for(torch.float64)
        problem, _ = problem_of(*(x[:, :, 3:] for x in inputs), parameters, scaling=0.3, initial_state=before)
        buffers = next_buffers if method == "dark" else lambda problem: vars(exact(problem)[1])
        fast, general = buffers(problem), buffers(problem._replace(padded=True))
        assert fast.keys() == general.keys()
        assert all(torch.equal(fast[name], general[name]) for name in fast)
        kept = [fast[f"recent_{name}" if method == "dark" else name] for name in ("key", "value")]
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in kept)  # no view of the whole sequence
