"""torch.autograd.gradcheck through the public door: q, k, v and every parameter, all code paths, in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from darkformer import FeatureMap, attention
from darkformer.ops.chunked import count_log_domain
from darkformer.ops.state import KeyValueState

from .cases import Case, make_inputs, make_map, make_mask, make_state, use_chunked

SMALL = {"batch": 1, "heads": 2, "kv_heads": 1, "features": 3, "dim": 3, "value_dim": 2, "scale": 0.7}


class Door(nn.Module):
    """`attention` as a module, so that `functional_call` can put other parameters into the feature map."""

    def __init__(self, feature_map: FeatureMap, case: Case, backend: str) -> None:
        super().__init__()
        self.feature_map, self.case, self.backend = feature_map, case, backend
        self.state = make_state(case, feature_map) if case.mode == "warm" else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        case, causal = self.case, self.case.mode != "bidirectional"
        result = attention(
            query, key, value, self.feature_map, key_mask=make_mask(case.padding, case.batch, case.length),
            is_causal=causal, initial_state=self.state, return_state=causal, backend=self.backend,
        )  # fmt: skip
        if not causal:
            return (result,)
        output, state = result
        if isinstance(state, KeyValueState):
            return output, state.key, state.value
        # The scale is only the unit of the sums, so it carries no gradient; what has one is sum · unit.
        unit = state.log_scale.exp()
        return output, state.feature_values * unit[..., None], state.feature_sum * unit

    def is_right(self, shift: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]] = lambda *x: x) -> bool:
        inputs = [x.requires_grad_() for x in shift(*make_inputs(self.case))]
        names = [name for name, _ in self.named_parameters()]
        parameters = [p.detach().clone().requires_grad_() for p in self.parameters()]

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            found = torch.func.functional_call(self, dict(zip(names, tensors[3:], strict=True)), tensors[:3])
            return tuple(x for x in found if x.requires_grad)

        return torch.autograd.gradcheck(function, (*inputs, *parameters), eps=1e-6, atol=1e-7, rtol=1e-5)


CONFIGS = [
    Case(length=5, window=0, sinks=0, tied=False, **SMALL),
    Case(length=5, window=2, sinks=1, tied=False, padding="interior", **SMALL),
    Case(length=4, window=1, sinks=1, mode="warm", **SMALL),
    Case(length=5, window=0, sinks=1, mode="bidirectional", **SMALL),
    Case(length=5, window=2, sinks=1, mode="bidirectional", padding="left", **SMALL),
    Case(length=5, window=2, sinks=0, method="lfk", **SMALL),
    Case(length=5, window=2, sinks=1, method="random", **SMALL),
    Case(length=5, window=2, sinks=1, method="local", **SMALL),
]


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("case", CONFIGS, ids=str)
def test_gradients(case: Case, backend: str) -> None:
    assert Door(make_map(case), case, backend).is_right()


@pytest.mark.parametrize("window", [0, 2])
def test_one_step(window: int) -> None:
    case = Case(length=1, window=window, sinks=1, mode="warm", **SMALL)
    assert Door(make_map(case), case, "recurrent").is_right()


def test_exact() -> None:
    case = Case(length=4, method="exact", mode="warm", **SMALL)
    assert Door(make_map(case), case, "exact").is_right()


@pytest.mark.parametrize("case", [CONFIGS[0], CONFIGS[1], CONFIGS[2], CONFIGS[3]], ids=str)
def test_log_domain_by_threshold(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    use_chunked(monkeypatch, underflow=float("inf"))
    with count_log_domain() as count:
        assert Door(make_map(case), case, "chunked").is_right()
    assert count.underflowed_rows


def test_log_domain_by_large_keys() -> None:
    """The first keys' features are e^400 times smaller than the next ones', which their queries do not see."""
    case = Case(length=5, tied=False, **SMALL)

    def shift(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key[:, :, :2] *= 100 / key[:, :, :2].norm(dim=-1, keepdim=True)
        return query, key, value

    with count_log_domain() as count:
        assert Door(make_map(case), case, "chunked").is_right(shift)
    assert count.underflowed_rows


@pytest.mark.parametrize("mode", ["cold", "warm", "bidirectional"])
def test_several_super_chunks(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_chunked(monkeypatch, chunk=2, span=2)
    case = Case(length=5, window=1, sinks=1, mode=mode, tied=False, **SMALL)
    assert Door(make_map(case), case, "chunked").is_right()


def test_a_wrong_gradient_is_noticed() -> None:
    """Negative control: a cut gradient path fails the check."""

    class Cut(Door):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
            return super().forward(query, key + 1e-3 * (key - key.detach()), value)

    case = CONFIGS[0]
    with pytest.raises(GradcheckError):
        Cut(make_map(case), case, "chunked").is_right()
