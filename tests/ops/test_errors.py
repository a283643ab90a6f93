"""Every refusal of the public door, and the inputs that are small but not wrong."""

import inspect
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from tolerances import INVARIANT, relative_error
from torch import Tensor

from darkformer import AttentionState, ConfigError, InputError, NonFiniteError, attention
from darkformer.ops.attention import BACKENDS

from .cases import NATIVE, NATIVE_BFLOAT16, Case, Way, make_inputs, make_map, needs_native

CASE = Case(length=5, window=2, sinks=1)


def call(query: Tensor | None = None, key: Tensor | None = None, value: Tensor | None = None, **options: Any) -> Any:
    """`attention` on the usual inputs, some of them replaced; `case` picks another feature map."""
    case = options.pop("case", CASE)
    usual = make_inputs(case)
    inputs = [old if new is None else new for old, new in zip(usual, (query, key, value), strict=True)]
    return attention(*inputs, make_map(case), **options)


def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def test_the_usual_call_works() -> None:
    """Else every test below would pass for the wrong reason."""
    assert call().shape == (2, 6, 5, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": zeros(6, 5, 8)}, r"query \(6, 5, 8\).*must be \(batch, heads, tokens, dim\)"),
        ({"value": zeros(2, 2, 5)}, r"must be \(batch, heads, tokens, dim\)"),
        ({"query": zeros(2, 6, 5, 4)}, "head_dim=8"),
        ({"key": zeros(2, 2, 5, 7)}, "head_dim=8"),
        ({"query": zeros(2, 4, 5, 8)}, "6 query and 2 kv heads"),
        ({"key": zeros(2, 6, 5, 8), "value": zeros(2, 6, 5, 8)}, "6 query and 2 kv heads"),
        ({"value": zeros(2, 1, 5, 5)}, "same batch and tokens"),
        ({"value": zeros(2, 2, 4, 5)}, "same batch and tokens"),
        ({"query": zeros(2, 6, 1, 8)}, "past keys are in the state"),
        ({"query": zeros(1, 6, 5, 8)}, "same batch and tokens"),
        ({"query": zeros(2, 6, 5, 8, dtype=torch.float32)}, "one floating dtype"),
        ({"value": zeros(2, 2, 5, 5, dtype=torch.bfloat16)}, "one floating dtype"),
        (
            {name: zeros(2, heads, 5, 8).long() for name, heads in (("query", 6), ("key", 2), ("value", 2))},
            "one floating dtype",
        ),
        ({"key_mask": torch.ones(2, 6, dtype=torch.bool)}, r"key_mask \(2, 6\): must be .* \(2, 5\)"),
        ({"key_mask": torch.ones(2, 1, 1, 5, dtype=torch.bool)}, "key_mask"),
        ({"key_mask": torch.ones(5, dtype=torch.bool)}, "key_mask"),
        ({"key_mask": torch.zeros(2, 5)}, "key_mask has dtype torch.float32"),
        ({"scaling": 0.0}, "scaling=0.0"),
        ({"scaling": -1.0}, "scaling=-1.0"),
        ({"scaling": float("nan")}, "scaling=nan"),
        ({"is_causal": False, "return_state": True}, "causal attention only"),
        ({"initial_state": (1, 2)}, "initial_state is a tuple"),
    ],
)
def test_inputs_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(**changes)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("names", [("query",), ("key",), ("value",), ("query", "value")])
@pytest.mark.parametrize("masked", [False, True], ids=["", "with a mask"])
def test_non_finite_inputs_are_named(names: tuple[str, ...], poison: float, masked: bool) -> None:
    inputs = dict(zip(("query", "key", "value"), make_inputs(CASE), strict=True))
    for name in names:
        inputs[name][1, -1, 3, 2] = poison
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 0] = False
    with pytest.raises(NonFiniteError, match=f"^{' and '.join(names)} hold NaN or infinity"):
        call(**inputs, key_mask=mask if masked else None)


def test_infinities_that_cancel_are_found() -> None:
    query, _, _ = make_inputs(CASE)
    query[0, 0, 0, 0], query[0, 0, 0, 1] = float("inf"), -float("inf")
    with pytest.raises(NonFiniteError, match="query"):
        call(query=query)


def test_finite_values_whose_sum_overflows_are_accepted() -> None:
    value = torch.full((2, 2, 5, 5), 1e39, dtype=torch.float64)  # the sum is taken in float32
    assert call(value=value).isfinite().all()


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_logits_beyond_the_range_are_an_error_and_not_nan(backend: str) -> None:
    inputs = [x.float() for x in make_inputs(CASE)]
    made = make_map(CASE).float()
    with pytest.raises(NonFiniteError, match=r"the output.*range of torch\.float32"):
        attention(1e20 * inputs[0], 1e20 * inputs[1], inputs[2], made, backend=backend)


def test_a_diverged_feature_map_is_an_error_and_not_nan() -> None:
    made = make_map(CASE)
    with torch.no_grad():
        made.geometry[1, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="feature map's parameters"):
        attention(*make_inputs(CASE), made)


@pytest.mark.parametrize("length", [0, 5])
def test_unknown_backend(length: int) -> None:
    with pytest.raises(ConfigError, match=r"backend='flash' is unknown: choose auto, .*chunked"):
        call(case=replace(CASE, length=length), backend="flash")


@pytest.mark.parametrize(
    ("backend", "changes", "reason"),
    [
        ("exact", {}, "method='dark' is not exact attention"),
        ("chunked", {"case": Case(length=5, method="exact")}, "exact attention is not linear"),
        ("recurrent", {"case": Case(length=1, method="exact")}, "no constant-size state"),
        ("recurrent", {}, "this call has 5"),
        ("recurrent", {"case": Case(length=1), "is_causal": False}, "causal only"),
        ("recurrent", {"case": Case(length=1), "key_mask": torch.tensor([[True], [False]])}, "padding=True"),
    ],
)
def test_impossible_backend_gives_its_reason(backend: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"backend='{backend}' cannot be used here: .*{reason}"):
        call(backend=backend, **changes)


def state_of(case: Case) -> AttentionState:
    return attention(*make_inputs(case), make_map(case), return_state=True)[1]


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (replace(CASE, batch=3), "count"),
        (replace(CASE, features=9), "feature_values"),
        (replace(CASE, kv_heads=1), "feature_values"),
        (replace(CASE, value_dim=4), "feature_values"),
        (replace(CASE, window=3), "recent_key"),
        (replace(CASE, sinks=2), "sink_key"),
    ],
    ids=str,
)
def test_state_of_another_layer(other: Case, field: str) -> None:
    with pytest.raises(InputError, match=rf"initial_state\.{field} has shape .*another batch, layer or configuration"):
        call(initial_state=state_of(other))


def test_a_windows_keys_are_not_dropped_by_a_map_without_one() -> None:
    with pytest.raises(InputError, match=r"initial_state\.recent_key"):
        call(case=replace(CASE, window=0), initial_state=state_of(replace(CASE, window=4)))


def test_exact_and_constant_size_states_are_not_exchanged() -> None:
    other = replace(CASE, method="exact")
    for case, state in ((other, state_of(CASE)), (CASE, state_of(other))):
        with pytest.raises(InputError, match=r"initial_state is a .*State, this call needs a .*State"):
            call(case=case, initial_state=state)


def test_state_with_bidirectional_attention() -> None:
    with pytest.raises(InputError, match="causal attention only"):
        call(initial_state=state_of(CASE), is_causal=False)


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
@pytest.mark.parametrize(("before", "after"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_state_of_another_precision_is_taken(before: torch.dtype, after: torch.dtype, backend: str) -> None:
    made = make_map(CASE)
    _, state = attention(*make_inputs(CASE, dtype=before), made, return_state=True)
    for length in (1, 3):
        inputs = make_inputs(CASE, length, dtype=after)
        output, later = attention(*inputs, made, initial_state=state, return_state=True, backend=backend)
        assert output.dtype == later.feature_sum.dtype == later.recent_key.dtype == after


@pytest.mark.parametrize("method", ["dark", "exact", "local", "random"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_tokens(method: str, backend: str) -> None:
    case = replace(CASE, method=method)
    made, state = make_map(case), state_of(case)
    for before in (None, state):
        output, after = attention(
            *make_inputs(case, 0), made, initial_state=before, return_state=True, backend=backend,
            key_mask=torch.ones(2, 0, dtype=torch.bool),
        )  # fmt: skip
        assert output.shape == (2, 6, 0, 5)
        assert after.count.tolist() == ([0, 0] if before is None else [5, 5])
    assert all(torch.equal(getattr(after, f.name), getattr(state, f.name)) for f in fields(state))


@pytest.mark.parametrize("method", ["dark", "exact"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_no_rows(method: str, causal: bool) -> None:
    case = replace(CASE, method=method)
    inputs = [x[:0] for x in make_inputs(case)]
    result = attention(*inputs, make_map(case), is_causal=causal, return_state=causal)
    output = result[0] if causal else result
    assert output.shape == (0, 6, 5, 5)


def test_a_mask_of_integers_means_the_same() -> None:
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert torch.equal(call(key_mask=mask), call(key_mask=mask.bool()))
    assert torch.equal(call(key_mask=torch.ones(2, 5, dtype=torch.int32)), call())


STRIDED = {
    "token major": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last dimension strided": lambda x: x.mT.contiguous().mT,
    "a slice of more": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
    "expanded": lambda x: x[:1, :1, :, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize(
    "way",
    [
        *(Way(name) for name in ("chunked", "recurrent", "exact", "reference")),
        *(pytest.param(way, marks=needs_native) for way in (NATIVE, NATIVE_BFLOAT16)),
    ],
    ids=str,
)
def test_any_strides(way: Way, layout: str) -> None:
    """Non-contiguous and expanded tensors, forward and backward, are what their copies are."""
    case = replace(
        CASE, length=1 if way.backend == "recurrent" else 70, method="exact" if way.backend == "exact" else "dark"
    )
    made = make_map(case).to(way.dtype if way.dtype == torch.float64 else torch.float32)
    found = []
    for copied in (False, True):
        leaves = [STRIDED[layout](x) for x in make_inputs(case, dtype=way.dtype)]
        leaves = [(x.clone(memory_format=torch.contiguous_format) if copied else x).requires_grad_() for x in leaves]
        output = attention(*leaves, made, backend=way.backend)
        output.sum().backward()  # an expanded cotangent
        found.append([output.detach(), *(x.grad for x in leaves)])
    assert all(relative_error(x, y) <= INVARIANT[torch.float64] for x, y in zip(*found, strict=True))


def test_backends_have_one_signature() -> None:
    signatures = {name: inspect.signature(backend.function) for name, backend in BACKENDS.items()}
    assert len(set(map(str, signatures.values()))) == 1, signatures
    assert all(name == backend.name for name, backend in BACKENDS.items())


def test_auto_always_finds_a_backend() -> None:
    """`reference` takes everything, and stands last."""
    assert list(BACKENDS)[-1] == "reference"
    for method in ("dark", "exact", "local"):
        for causal in (True, False):
            assert call(case=replace(CASE, method=method), is_causal=causal).isfinite().all()


def test_scaling_is_the_logits_factor() -> None:
    """The default is d^-½; another one is the same as scaled queries and keys."""
    query, key, _ = make_inputs(CASE)
    assert torch.equal(call(), call(scaling=8**-0.5))
    torch.testing.assert_close(call(scaling=0.3), call(query=query * 0.3**0.5, key=key * 0.3**0.5, scaling=1.0))
    assert not torch.allclose(call(scaling=0.3), call())
