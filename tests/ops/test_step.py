"""The compiled one-token step: the numbers of the reference, in place, and nothing allocated but the output."""

import copy
from dataclasses import fields

import pytest
import torch
from tolerances import AGAINST_FLOAT64, OUTPUT, relative_error
from torch import Tensor

from darkformer import AttentionState, FeatureMap, NonFiniteError, attention
from darkformer.ops.native import stepper
from darkformer.ops.native.step import Step
from darkformer.ops.state import LOG_ZERO

from .cases import ODD_SIZES, Case, make_inputs, make_map, make_state, needs_native
from .test_linear import Count
from .test_native import threads
from .test_recurrent import state_errors

pytestmark = needs_native

CASES = [
    Case(window=window, sinks=sinks, kv_heads=kv_heads, softcap=softcap, method=method, **sizes)
    for window, sinks, kv_heads, softcap, method, sizes in [
        (0, 0, 2, None, "dark", {}),
        (0, 4, 1, None, "dark", ODD_SIZES),
        (1, 0, 6, None, "lfk", {}),
        (1, 4, 2, 0.7, "dark", ODD_SIZES),
        (16, 0, 1, None, "performer", ODD_SIZES),
        (16, 4, 2, 0.7, "dark", {"dim": 64, "value_dim": 64, "features": 33}),
        (5, 2, 2, None, "local", {}),
        (3, 2, 1, None, "dark", {"dim": 256, "value_dim": 72, "features": 130, "heads": 2}),
    ]
]


def start(case: Case, dtype: torch.dtype) -> tuple[FeatureMap, AttentionState]:
    """A feature map, and a state of ragged rows whose numbers are exact in `dtype`."""
    made = make_map(case).float()
    state = make_state(case, make_map(case))
    kept = {}
    for f in fields(state):
        x = getattr(state, f.name)
        if f.name != "count":
            x = x.masked_fill(x < LOG_ZERO / 2, LOG_ZERO).to(dtype if f.name[:4] in ("rece", "sink") else torch.float32)
        kept[f.name] = x
    return made, AttentionState(**kept)


def tokens(case: Case, dtype: torch.dtype, length: int) -> list[list[Tensor]]:
    """One list [query, key, value] a token, contiguous or not in turns."""
    inputs = make_inputs(case, length, dtype)
    made = [[x[:, :, t : t + 1] for x in inputs] for t in range(length)]
    return [[x.contiguous() for x in token] if t % 2 else token for t, token in enumerate(made)]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_are_the_reference(case: Case, dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 tokens, more than window and sinks: output of each, and the state after the last."""
    monkeypatch.setattr("darkformer.ops.native.step.THREADED", 0)
    made, state = start(case, dtype)
    given = tokens(case, dtype, 40)
    with torch.no_grad(), threads(count):
        step = Step(state, made, scaling=case.dim**-0.5, softcap=case.softcap)
        found = torch.cat([step(*token) for token in given], dim=2)
        whole = [torch.cat(x, dim=2).double() for x in zip(*given, strict=True)]
        want, after = attention(
            *whole, made.double(), initial_state=state, return_state=True, softcap=case.softcap, backend="reference"
        )
    assert found.dtype == dtype
    assert relative_error(found, want) <= (AGAINST_FLOAT64 if dtype == torch.float32 else OUTPUT)[dtype]
    assert max(state_errors(step.state(), after).values()) <= AGAINST_FLOAT64[torch.float32]
    assert step.state().nbytes == step.nbytes


def test_it_goes_on_from_its_own_state() -> None:
    """State out, state in: the ring is put in order, and nothing is shared."""
    case = CASES[3]
    made, state = start(case, torch.float32)
    options = {"scaling": 0.3, "softcap": case.softcap}
    step, given = Step(state, made, **options), tokens(case, torch.float32, 20)
    for token in given[:9]:
        step(*token)
    others = [Step(step.state(), made, **options), copy.deepcopy(step)]
    before = step.state()
    want = [step(*token) for token in given[9:]]
    assert not torch.equal(before.recent_key, step.state().recent_key)
    for other in others:
        assert not max(state_errors(other.state(), before).values())
        assert all(relative_error(other(*token), x) <= 1e-6 for token, x in zip(given[9:], want, strict=True))


def test_nothing_is_allocated_but_the_output() -> None:
    case = CASES[5]
    made, state = start(case, torch.float32)
    (token,) = tokens(case, torch.float32, 1)
    step = Step(state, made, scaling=0.3, softcap=None)
    with Count() as count:
        output = step(*token)
    assert count.elements == output.numel()


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_token_is_not_taken(which: int, poison: float) -> None:
    case = CASES[3]
    made, state = start(case, torch.float32)
    (token,) = tokens(case, torch.float32, 1)
    step = Step(state, made, scaling=0.3, softcap=None)
    before = step.state()
    token[which] = token[which].clone()
    token[which][-1, -1, 0, -1] = poison
    with pytest.raises(NonFiniteError, match="the token was not taken"):
        step(*token)
    assert all(torch.equal(getattr(before, f.name), getattr(step.state(), f.name)) for f in fields(before))


def test_an_output_that_is_not_finite_is_said() -> None:
    case = CASES[3]
    made, state = start(case, torch.float32)
    (token,) = tokens(case, torch.float32, 1)
    step = Step(state, made, scaling=0.3, softcap=None)
    step._tensors["feature_values"].fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="the output holds NaN or infinity"):
        step(*token)


def test_what_it_does_not_take() -> None:
    case = CASES[3]
    made, state = start(case, torch.float32)
    ((query, key, _),) = tokens(case, torch.float32, 1)
    options = {"scaling": 0.3, "softcap": None}
    assert stepper(state, query, key, made, **options) is not None
    assert stepper(None, query, key, made, **options) is None
    assert stepper(state, query.double(), key.double(), made, **options) is None
    assert stepper(state, query.bfloat16(), key.bfloat16(), made, **options) is None  # the state is float32
    assert stepper(state, query[:1], key[:1], made, **options) is None
    with torch.no_grad():
        made.query_center.view(-1)[0] = float("nan")
    assert stepper(state, query, key, made, **options) is None
