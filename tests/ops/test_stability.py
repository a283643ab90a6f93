"""Large logits and low precision: no NaN, errors as stated, gradients finite."""

import pytest
import torch
from tolerances import OUTPUT, float32_error, relative_error
from torch import Tensor

from darkformer import DarkConfig, FeatureMap, NonFiniteError, attention, feature_map
from darkformer.ops import native
from darkformer.ops.chunked import count_log_domain
from darkformer.ops.native import Step
from darkformer.ops.state import LOG_ZERO

from .cases import Case, make_inputs, make_map, needs_native, use_chunked
from .test_assembled import install

DIM, LENGTH = 64, 256


def solve(inputs: list[Tensor], made: torch.nn.Module, backend: str) -> list[Tensor]:
    """Output and the gradients of q, k, v for fixed cotangents."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    output = attention(*leaves, made, backend=backend)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (output * cotangent.to(output.dtype)).sum().backward()
    return [output.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("backend", ["chunked", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (0, 4), (16, 0), (64, 4)])
@pytest.mark.parametrize("std", [1, 4, 16, 64, 128, 256])
def test_large_logits(std: int, window: int, sinks: int, backend: str) -> None:
    """Logits s·qᵀk of standard deviation `std` in float32 against float64."""
    config = DarkConfig(num_features=64, window=window, sinks=sinks)
    made = feature_map(config, num_heads=2, num_kv_heads=1, head_dim=DIM)
    query, key, value = (torch.randn(1, heads, LENGTH, DIM) for heads in (2, 1, 1))
    query, key = query * std**0.5, key * std**0.5  # s·qᵀk is a sum of 64 products, divided by 8
    assert (query[:, :1] @ key.mT).std().item() * DIM**-0.5 == pytest.approx(std, rel=0.1)
    splits = native.splits()
    with count_log_domain() as count:
        found = solve([query, key, value], made, backend)
    rescued = count.underflowed_rows if backend == "chunked" else native.splits() - splits
    # Without window and sinks early rows live below the chunk's maximum: from some logits on, below float32.
    if window or sinks or std <= 4:
        assert not rescued
    elif std >= 64:
        assert rescued >= (10 if backend == "chunked" else 1)
    expected = solve([query.double(), key.double(), value.double()], made, "reference")
    assert all(x.isfinite().all() for x in found)
    assert relative_error(found[0], expected[0]) <= float32_error(std)
    for got, want in zip(found[1:], expected[1:], strict=True):
        assert relative_error(got, want) <= 4 * float32_error(std)  # a product of three rounded factors


def test_without_the_log_domain_these_rows_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the path is needed, not only taken."""
    config = DarkConfig(num_features=64, window=0, sinks=0)
    made = feature_map(config, num_heads=1, num_kv_heads=1, head_dim=DIM)
    inputs = [16 * torch.randn(1, 1, LENGTH, DIM) for _ in range(2)] + [torch.randn(1, 1, LENGTH, DIM)]
    want = attention(*(x.double() for x in inputs), made, backend="reference")
    assert relative_error(attention(*inputs, made, backend="chunked"), want) <= float32_error(256)
    use_chunked(monkeypatch, underflow=0.0)
    with pytest.raises(NonFiniteError):  # not 0
        attention(*inputs, made, backend="chunked")


@pytest.mark.parametrize("window", [0, 16])
def test_large_logits_in_a_stream(window: int) -> None:
    """One-token steps share no maximum with the future at all."""
    std = 64
    config = DarkConfig(num_features=64, window=window, sinks=0)
    made = feature_map(config, num_heads=2, num_kv_heads=1, head_dim=DIM)
    query, key, value = (torch.randn(1, heads, 80, DIM) for heads in (2, 1, 1))
    inputs = (query * std**0.5, key * std**0.5, value)
    want = attention(*(x.double() for x in inputs), made, backend="reference")
    state, outputs = None, []
    for t in range(80):
        step = (x[:, :, t : t + 1] for x in inputs)
        output, state = attention(*step, made, initial_state=state, return_state=True, backend="recurrent")
        outputs.append(output)
    assert relative_error(torch.cat(outputs, 2), want) <= float32_error(std)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_inputs(dtype: torch.dtype, window: int, causal: bool) -> None:
    case = Case(length=100, window=window, sinks=2, dim=16, features=32)
    made, inputs = make_map(case).float(), make_inputs(case, dtype=dtype)
    want = attention(*(x.double() for x in inputs), made, is_causal=causal, backend="reference")
    found = attention(*inputs, made, is_causal=causal, return_state=causal)
    if causal:
        found, state = found
        for name in ("feature_values", "feature_sum", "log_scale"):
            assert getattr(state, name).dtype == torch.float32
        for name in ("recent_key", "recent_value", "sink_key", "sink_value"):
            assert getattr(state, name).dtype == dtype
        step = attention(*(x[:, :, :1] for x in inputs), made, initial_state=state, return_state=True)
        assert step[0].dtype == dtype and step[1].feature_sum.dtype == torch.float32
    assert found.dtype == dtype
    assert relative_error(found, want) <= OUTPUT[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_gradients(dtype: torch.dtype) -> None:
    """Gradients come back in the inputs' dtype, those of the parameters in float32."""
    case = Case(length=100, window=16, sinks=2, dim=16, features=32)
    made = make_map(case).float()
    inputs = make_inputs(case, dtype=dtype)
    found, want = solve(inputs, made, "chunked"), solve([x.double() for x in inputs], made, "reference")
    for got, expected in zip(found[1:], want[1:], strict=True):
        assert got.dtype == dtype
        assert relative_error(got, expected) <= 4 * OUTPUT[dtype]  # the cotangent is rounded as well
    assert made.geometry_offset.grad.dtype == torch.float32


def test_autocast_changes_nothing() -> None:
    case = Case(length=100, window=16, sinks=2)
    made, inputs = make_map(case).float(), make_inputs(case, dtype=torch.float32)
    want = attention(*inputs, made)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(*inputs, made)
    assert torch.equal(found, want)


@pytest.mark.parametrize("window", [4, 16])
def test_an_empty_sum_has_log_scale_zero_weight(window: int) -> None:
    """Tokens that are all in the window or the sinks leave the sums empty, finite and without effect."""
    case = Case(length=4, window=window, sinks=2)
    made, inputs = make_map(case), make_inputs(case)
    output, state = attention(*inputs, made, return_state=True)
    assert state.log_scale.eq(LOG_ZERO).all() and state.feature_sum.eq(0).all() and state.feature_values.eq(0).all()
    empty = attention(*(x[:, :, :0] for x in inputs), made, return_state=True)[1]
    assert empty.log_scale.eq(LOG_ZERO).all() and empty.count.eq(0).all()
    assert torch.equal(attention(*inputs, made, initial_state=empty), output)


def test_values_of_any_size() -> None:
    """The output is a mean of values, so it scales with them."""
    case = Case(length=70, window=0)
    made, (query, key, value) = make_map(case).float(), make_inputs(case, dtype=torch.float32)
    want = attention(query, key, value, made)
    for factor in (2.0**-60, 2.0**60):
        assert relative_error(attention(query, key, factor * value, made) / factor, want) <= 1e-6


def test_underflow_is_counted() -> None:
    made = feature_map(DarkConfig(num_features=64, window=0, sinks=0), num_heads=2, num_kv_heads=1, head_dim=DIM)
    key = torch.randn(1, 1, 100, DIM)
    for factor in (1, 16):
        with count_log_domain() as outer, count_log_domain() as count:
            attention(factor * torch.randn(1, 2, 100, DIM), factor * key, key, made, backend="chunked")
        assert count == outer and count.rows == 200
        if factor == 1:
            assert count.underflowed_rows == count.recomputed_rows == 0
        else:
            assert 10 <= count.underflowed_rows <= count.recomputed_rows <= 256  # two chunks of 64, two heads


BACKENDS = [*(pytest.param(name, marks=needs_native) for name in ("native", "native-bfloat16", "step")), "chunked"]


def _stream(inputs: list[Tensor], made: FeatureMap, backend: str) -> Tensor:
    """The output by one call, or a token at a time."""
    if backend not in ("step", "recurrent"):
        return attention(*inputs, made, backend=backend)
    state, outputs = None, []
    step: Step | None = None
    for t in range(inputs[0].shape[2]):
        token = [x[:, :, t : t + 1] for x in inputs]
        if step is not None:
            outputs.append(step(*token))
            continue
        output, state = attention(*token, made, initial_state=state, return_state=True, backend="recurrent")
        outputs.append(output)
        if backend == "step":
            step = Step(state, made, scaling=inputs[0].shape[-1] ** -0.5, softcap=None)
    return torch.cat(outputs, 2)


@pytest.mark.parametrize("backend", [*BACKENDS, "recurrent", "reference", "assembled"])
@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (0, 2), (4, 0), (4, 2)])
@pytest.mark.parametrize("place", ["query", "key", "first key", "both"])
def test_huge_finite_inputs(place: str, window: int, sinks: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the end of float32's range: a mean of the values seen, near the float64 one, or an error; never 0 or NaN."""
    install(monkeypatch)
    dtype = torch.bfloat16 if backend == "native-bfloat16" else torch.float32
    config = DarkConfig(num_features=16, window=window, sinks=sinks, center=False, balance=False)
    made = feature_map(config, num_heads=2, num_kv_heads=1, head_dim=8)
    right = 0
    for power in (3, 5, 6, 8, 12, 16, 19, 25, 38):
        generator = torch.Generator().manual_seed(power)
        query, key, value = (torch.randn(1, n, 20, 8, generator=generator) for n in (2, 1, 1))
        for name, x in (("query", query), ("key", key)):
            if place in (name, "both"):
                x[:, :, 11] *= 10.0**power / x[:, :, 11].abs().max()
        if place == "first key":
            key[:, :, 0] *= 10.0**power / key[:, :, 0].abs().max()
        inputs = [
            x.to(dtype).requires_grad_(backend not in ("step", "recurrent")) for x in (query, key, 3 + value.sigmoid())
        ]
        try:
            with torch.set_grad_enabled(inputs[0].requires_grad):
                output = _stream(inputs, made, backend.removesuffix("-bfloat16"))
                if output.requires_grad:
                    gradients = torch.autograd.grad(output.sum(), inputs)
                    assert all(x.isfinite().all() for x in gradients), power
        except NonFiniteError:
            assert power >= (3 if place in ("first key", "both") else 5)
            continue
        right += 1
        want = attention(*(x.detach().double() for x in inputs), made, backend="reference")
        assert relative_error(output, want) <= 2e-2, power
    assert right >= (2 if place == "query" else 1)


@pytest.mark.parametrize("backend", ["chunked", pytest.param("native", marks=needs_native)])
def test_gradients_beyond_the_range_are_an_error(backend: str) -> None:
    """Values near the end of the range, and gradients that leave it; an infinite gradient of the output passes on."""
    made = feature_map(DarkConfig(num_features=16, window=4), num_heads=1, num_kv_heads=1, head_dim=8)
    query, key = (torch.randn(1, 1, 40, 8, requires_grad=True) for _ in range(2))
    value = 1e37 * torch.randn(1, 1, 40, 8)
    output = attention(query, key, value, made, backend=backend)
    assert output.isfinite().all()
    with pytest.raises(NonFiniteError, match="a gradient exceeds the range"):
        torch.autograd.grad(output, [query, key], torch.full_like(output, 1e10), retain_graph=True)
    grads = torch.autograd.grad(output, [query, key], torch.full_like(output, torch.inf))
    assert not all(x.isfinite().all() for x in grads)  # what a loss scaler looks for
