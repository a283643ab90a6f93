"""Streams: one-token steps and any split into prefills give the full forward's numbers (issue 2, point 5)."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import PARITY, STREAM, relative_error
from torch import Tensor

from darkformer import FeatureMap, attention
from darkformer.config import METHODS
from darkformer.ops.state import LOG_ZERO, KeyValueState, State

from .cases import Case, above, differences, make_inputs, make_map, make_mask, make_state, solve

TOLERANCE = {torch.float64: PARITY, torch.float32: STREAM}
WINDOWS = (0, 1, 16)


def stream(
    inputs: tuple[Tensor, ...],
    made: FeatureMap,
    pieces: list[int],
    mask: Tensor | None = None,
    state: State | None = None,
    step: str = "auto",
) -> tuple[Tensor, State]:
    """The same tokens in pieces of the given lengths; pieces of one token through backend `step`."""
    assert sum(pieces) == inputs[0].shape[2]
    outputs, start = [], 0
    for length in pieces:
        span = slice(start, start + length)
        real = None if mask is None else mask[:, span]
        backend = step if length == 1 else "auto"
        part = (x[:, :, span] for x in inputs)
        output, state = attention(
            *part, made, key_mask=real, initial_state=state, return_state=True, backend=backend
        )  # fmt: skip
        outputs.append(output)
        start += length
    assert state is not None
    return torch.cat(outputs, dim=2), state


def state_errors(actual: State, expected: State) -> dict[str, float]:
    """Relative error of each tensor; sums are compared at one common scale (it is only a choice of unit)."""
    assert type(actual) is type(expected) and torch.equal(actual.count, expected.count)
    got, want = ({f.name: getattr(state, f.name) for f in fields(state)} for state in (actual, expected))
    if isinstance(expected, KeyValueState):
        return {name: relative_error(got[name], want[name]) for name in ("key", "value")}
    empty = want["log_scale"] < LOG_ZERO / 2
    assert torch.equal(empty, got["log_scale"] < LOG_ZERO / 2)
    errors = {}
    for name in set(want) - {"count"}:
        x, y = got[name], want[name]
        if name == "log_scale":
            x, y = x.masked_fill(empty, 0), y.masked_fill(empty, 0)
        errors[name] = relative_error(x, y)
    return errors


def check_stream(case: Case, pieces: list[int], dtype: torch.dtype, mask: Tensor | None = None) -> None:
    made, inputs = make_map(case, dtype), make_inputs(case, dtype=dtype)
    state = make_state(case, made, dtype) if case.mode == "warm" else None
    with torch.no_grad():
        found, after = stream(inputs, made, pieces, mask, state)
        for backend in ("reference", case.fast):
            want, want_after = attention(
                *inputs, made, key_mask=mask, initial_state=state, return_state=True, backend=backend
            )
            assert relative_error(found, want) <= TOLERANCE[dtype], backend
            assert not above(state_errors(after, want_after), TOLERANCE[dtype]), backend


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("prefill", [0, 2, 33], ids=["steps only", "sinks still filling", "window full"])
def test_prefill_and_steps(window: int, sinks: int, prefill: int, dtype: torch.dtype) -> None:
    case = Case(length=48, window=window, sinks=sinks, tied=False)
    check_stream(case, [n for n in (prefill,) if n] + [1] * (48 - prefill), dtype)


@pytest.mark.parametrize("mode", ["cold", "warm"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, mode: str) -> None:
    case = Case(length=40, window=16, sinks=4, method=method, tied=method != "dark", mode=mode)
    check_stream(case, [21, 9] + [1] * 10, torch.float64)
    check_stream(case, [21, 9] + [1] * 10, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("prefill", [20, 30], ids=["a row starts with a step", "all rows started"])
def test_ragged_left_padding(window: int, prefill: int, dtype: torch.dtype) -> None:
    """Batched generation: rows start at 0, 17 and 25. With a prefill of 20 the last row's first calls see only pads."""
    case = Case(length=60, window=window, sinks=4, batch=3)
    mask = torch.ones(3, 60, dtype=torch.bool)
    mask[1, :17] = mask[2, :25] = False
    check_stream(case, [prefill] + [1] * (60 - prefill), dtype, mask)


@settings(max_examples=30)
@given(
    pieces=st.lists(st.sampled_from([1, 1, 2, 5, 17, 40, 70]), min_size=1, max_size=6),
    window=st.sampled_from([0, 1, 3, 16, 64]),
    sinks=st.sampled_from([0, 1, 4]),
    kv_heads=st.sampled_from([1, 2, 6]),
    padding=st.sampled_from(["none", "left", "right", "interior"]),
    method=st.sampled_from(sorted(set(METHODS) - {"local"})),
)
def test_any_split(pieces: list[int], window: int, sinks: int, kv_heads: int, padding: str, method: str) -> None:
    length = sum(pieces)
    case = Case(length=length, window=window, sinks=sinks, kv_heads=kv_heads, method=method)
    check_stream(case, pieces, torch.float64, make_mask(padding, case.batch, length))


STEPS = [(m, w) for m in ("dark", "lfk", "random", "constant", "local") for w in WINDOWS if m != "local" or w]


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize(("method", "window"), STEPS)
def test_one_step_has_the_gradients_of_the_reference(method: str, window: int, sinks: int) -> None:
    case = Case(length=1, window=window, sinks=sinks, method=method, mode="warm", tied=method != "dark")
    assert not above(differences(solve(case, "recurrent"), solve(case, "reference")), PARITY)


def test_auto_takes_the_one_token_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from darkformer.ops.attention import BACKENDS

    used = []

    def spy(name: str, function: object) -> object:
        return lambda problem: used.append(name) or function(problem)  # type: ignore[operator]

    for name, backend in list(BACKENDS.items()):
        monkeypatch.setitem(BACKENDS, name, backend._replace(function=spy(name, backend.function)))
    case = Case(length=3, window=2, sinks=1)
    stream(make_inputs(case), make_map(case), [2, 1])
    assert used == ["chunked", "recurrent"]


def test_a_lost_state_is_noticed() -> None:
    """Negative control: a step whose state forgot one key is outside the tolerance."""
    case = Case(length=30, window=4, sinks=2)
    made, inputs = make_map(case), make_inputs(case)
    want = attention(*inputs, made)
    _, state = attention(*(x[:, :, :28] for x in inputs), made, return_state=True)
    found, _ = attention(*(x[:, :, 29:] for x in inputs), made, initial_state=state, return_state=True)
    assert relative_error(found, want[:, :, 29:]) > 1e-4


def test_the_state_has_constant_size() -> None:
    case = Case(length=1, window=16, sinks=4)
    made, sizes = make_map(case), []
    for length in (1, 20, 200):
        _, state = attention(*make_inputs(case, length), made, return_state=True)
        sizes.append(state.nbytes)
    assert len(set(sizes)) == 1
    sums = case.features * (case.value_dim + 2)  # values, total, scale
    buffers = (case.window + case.sinks) * (case.dim + case.value_dim)
    assert sizes[0] == 8 * case.batch * (case.kv_heads * (sums + buffers) + 1)


def test_select_reorders_repeats_and_drops_rows() -> None:
    """Beam search: rows of the state are independent of each other."""
    case = Case(length=9, window=3, sinks=2, batch=3)
    made, inputs = make_map(case), make_inputs(case)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, :5] = False
    _, state = attention(*(x[:, :, :8] for x in inputs), made, key_mask=mask, return_state=True)
    last = [x[:, :, 8:] for x in inputs]
    want, _ = attention(*last, made, initial_state=state, return_state=True)
    rows = torch.tensor([2, 1, 1, 0])
    found, _ = attention(*(x[rows] for x in last), made, initial_state=state.select(rows), return_state=True)
    assert relative_error(found, want[rows]) <= PARITY
    assert not state.detach().feature_sum.requires_grad and state.feature_sum.requires_grad
