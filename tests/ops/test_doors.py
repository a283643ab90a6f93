"""Every way into the compiled library refuses what it would read or write beyond its tensors."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from darkformer import InputError, NonFiniteError, attention
from darkformer.ops.native import op
from darkformer.ops.native.step import Step
from darkformer.ops.state import AttentionState

from .cases import Case, make_inputs, make_map, make_state, needs_native

FIELDS = [field.name for field in dataclasses.fields(AttentionState)]
CASE = Case(length=9, window=4, sinks=2)
ALONE = dataclasses.replace(CASE, length=1)

Edit = Callable[[Tensor], Tensor]
#: What a crafted file or a mistaken program may put in place of a state's tensors.
WRONG: dict[str, tuple[str, Edit]] = {
    "keys one number wide": ("recent_key", lambda x: x[..., :1]),
    "a row less": ("feature_values", lambda x: x[:1]),
    "a dimension less": ("feature_values", lambda x: x[0]),
    "sums cut": ("feature_sum", lambda x: x[..., :1]),
    "no scales": ("log_scale", lambda x: x[..., :0]),
    "no sinks": ("sink_key", lambda x: x[..., :0]),
    "counts below 0": ("count", lambda x: x - 2**40),
    "counts beyond int64": ("count", lambda x: x + (2**63 - 100)),
    "counts as floats": ("count", lambda x: x.float()),
    "sums as integers": ("feature_sum", lambda x: x.long()),
    "on another device": ("sink_value", lambda x: x.to("meta")),
}
BACKENDS = ["auto", "chunked", "recurrent", "reference", pytest.param("native", marks=needs_native)]


def state_with(name: str, edit: Edit) -> AttentionState:
    state = make_state(CASE, make_map(CASE).float(), torch.float32)
    return dataclasses.replace(state, **{name: edit(getattr(state, name))})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_state_that_does_not_fit(wrong: str, backend: str) -> None:
    state, name = state_with(*WRONG[wrong]), WRONG[wrong][0]
    with pytest.raises(InputError, match=rf"initial_state\.{name}"), torch.no_grad():
        attention(
            *make_inputs(ALONE, dtype=torch.float32), make_map(CASE).float(), initial_state=state, backend=backend
        )


@needs_native
@pytest.mark.parametrize("wrong", WRONG)
def test_a_step_from_a_state_that_does_not_fit(wrong: str) -> None:
    state = state_with(*WRONG[wrong])
    with pytest.raises(InputError, match=rf"initial_state\.{WRONG[wrong][0]}"):
        Step(state, make_map(CASE).float(), scaling=0.3, softcap=None)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [name for name in FIELDS if name != "count"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_refuses_a_diverged_state(backend: str, name: str, poison: float) -> None:
    """Alike, also where the number would not reach the output: in slots that are not filled, or through a maximum."""

    def put(x: Tensor) -> Tensor:
        x = x.clone()
        x[(-1,) * x.dim()] = poison
        return x

    state = state_with(name, put)
    with pytest.raises(NonFiniteError, match=rf"initial_state\.{name} hold NaN or infinity"), torch.no_grad():
        attention(
            *make_inputs(ALONE, dtype=torch.float32), make_map(CASE).float(), initial_state=state, backend=backend
        )
    if backend == "native":
        with pytest.raises(NonFiniteError, match=rf"initial_state\.{name}"):
            Step(state, make_map(CASE).float(), scaling=0.3, softcap=None)


@needs_native
@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q[..., :1], k, v),
        lambda q, k, v: (q, k[:1], v),
        lambda q, k, v: (q, k, v[..., :1]),
        lambda q, k, v: (q, k, v.bfloat16()),
        lambda q, k, v: (q, k, v.to("meta")),
        lambda q, k, v: (q, torch._efficientzerotensor(k.shape), v),
    ],
)
def test_a_token_that_does_not_fit(change: Callable[..., tuple[Tensor, ...]]) -> None:
    made = make_map(CASE).float()
    step = Step(make_state(CASE, made, torch.float32), made, scaling=0.3, softcap=None)
    before = step.state()
    with pytest.raises(InputError, match="native attention was passed"):
        step(*change(*make_inputs(ALONE, dtype=torch.float32)))
    assert all(torch.equal(getattr(before, name), getattr(step.state(), name)) for name in FIELDS)


def arguments(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Those of the operator `darkformer::attention`, 5 features, window 3, 2 sinks."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return dict(
        query=draw(2, 2, 3, 6, 4, dtype=dtype), key=draw(2, 2, 6, 4, dtype=dtype), value=draw(2, 2, 6, 3, dtype=dtype),
        map_q=draw(2, 9, 4), offset_q=draw(2, 9), map_k=draw(2, 9, 4), offset_k=draw(2, 9),
        feature_values=draw(2, 2, 5, 3), feature_sum=draw(2, 2, 5).abs(), log_scale=draw(2, 2, 5),
        recent_k=draw(2, 2, 3, 4, dtype=dtype), recent_v=draw(2, 2, 3, 3, dtype=dtype),
        sink_k=draw(2, 2, 2, 4, dtype=dtype), sink_v=draw(2, 2, 2, 3, dtype=dtype),
        lengths=torch.tensor([6, 4]), counts=torch.tensor([7, 9]), fold_q=draw(2, 0, 4), fold_k=draw(2, 0, 4),
        features=5, scaling=0.5, wants_state=True,
    )  # fmt: skip


def run(given: dict[str, Any]) -> list[Tensor]:
    """The results of the operator and of its backward pass."""
    results = op.attention_op(*given.values())
    output, log_normalizer, values, total, log_scale = results
    grads = torch.ones_like(output), torch.ones_like(values), torch.ones_like(total)
    return [*results, *op.backward_op(*given.values(), log_scale, log_normalizer, *grads)]


@needs_native
@pytest.mark.parametrize(
    ("name", "edit"),
    [
        *(
            (name, lambda x: x[..., :1].clone())
            for name, x in arguments().items()
            if isinstance(x, Tensor) and x.numel()
        ),
        *((name, lambda x: x.double()) for name, x in arguments().items() if isinstance(x, Tensor) and x.numel()),
        ("query", lambda x: x[0]),
        ("lengths", lambda x: x + 1),
        ("lengths", lambda x: x - 5),
        ("counts", lambda x: x - 8),
        ("counts", lambda x: x + 2**62),
        ("feature_values", lambda x: x[:0]),
        ("fold_q", lambda x: torch.ones(2, 3, 4)),
        ("features", lambda m: 10),
        ("features", lambda m: -1),
    ],
)
def test_the_operator_checks_what_it_is_passed(name: str, edit: Callable[[Any], Any]) -> None:
    given = arguments()
    changed = edit(given[name])
    if isinstance(changed, Tensor) and changed.shape == given[name].shape and changed.dtype == given[name].dtype:
        assert not torch.equal(changed, given[name])
    with pytest.raises(InputError, match="native attention was passed"):
        run(given | {name: changed})


@needs_native
def test_the_backward_operator_checks_what_it_is_passed() -> None:
    given = arguments()
    output, log_normalizer, values, total, log_scale = op.attention_op(*given.values())
    right = [log_scale, log_normalizer, torch.ones_like(output), torch.ones_like(values), torch.ones_like(total)]
    for place in range(len(right)):
        wrong = [x[..., :1].clone() if i == place else x for i, x in enumerate(right)]
        with pytest.raises(InputError, match="native attention was passed"):
            op.backward_op(*given.values(), *wrong)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_signs_that_torch_keeps_beside_the_memory(dtype: torch.dtype) -> None:
    """Views such as the imaginary part of a conjugate; and views with gaps, in every place."""
    given = arguments(dtype)
    wanted = run(given)

    def hidden(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        x = torch._neg_view(-torch.stack([x, x], dim=-1))
        return x[..., 1]

    found = run({name: hidden(x) for name, x in given.items()})
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@needs_native
def test_signs_in_a_step_and_in_a_feature_map() -> None:
    made = make_map(CASE).float()
    state = make_state(CASE, made, torch.float32)
    token = make_inputs(ALONE, dtype=torch.float32)
    hidden = [torch._neg_view(-x) for x in token]
    kept = dataclasses.replace(state, recent_value=torch._neg_view(-state.recent_value))
    with torch.no_grad():
        wanted = Step(state, made, scaling=0.3, softcap=None)(*token)
        assert torch.equal(Step(kept, made, scaling=0.3, softcap=None)(*hidden), wanted)
        made.geometry = torch._neg_view(made.geometry)
        assert not torch.equal(Step(state, made, scaling=0.3, softcap=None)(*token), wanted)
