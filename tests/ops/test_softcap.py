"""A soft cap on the exact part's logits: the same numbers from every backend that can, the reason from the others."""

import pytest
import torch
from tolerances import PARITY, relative_error
from torch import Tensor

from darkformer import ConfigError, InputError, attention
from darkformer.ops import streamed
from darkformer.ops.attention import BACKENDS

from .cases import Case, make_inputs, make_map, make_mask, make_state
from .test_linear import SMALL, elements

CAP = 0.7  # small enough to bend logits of standard deviation 1 clearly


def _run(case: Case, backend: str, **options: object) -> dict[str, Tensor]:
    """Output, state, and gradients of inputs and parameters for a fixed cotangent."""
    made, inputs = make_map(case), [x.requires_grad_() for x in make_inputs(case)]
    causal = case.mode != "bidirectional"
    state = make_state(case, made) if case.mode == "warm" else None
    result = attention(
        *inputs, made, key_mask=make_mask(case.padding, case.batch, case.length), is_causal=causal,
        initial_state=state, return_state=causal, backend=backend, **options,
    )  # fmt: skip
    output, after = result if causal else (result, None)
    found = {"output": output}
    if after is not None:
        found |= {"values": after.feature_values, "sum": after.feature_sum, "recent": after.recent_key}
    total = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in found.values())
    total.backward()
    found |= {name: x.grad for name, x in zip("qkv", inputs, strict=True)}
    found |= {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
    return {name: x.detach() for name, x in found.items()}


def _close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    errors = {name: relative_error(found[name], wanted[name], 1e-3) for name in wanted}
    assert max(errors.values()) <= PARITY, errors


@pytest.mark.parametrize("softcap", [CAP, None])
@pytest.mark.parametrize("padding", ["none", "left", "interior"])
@pytest.mark.parametrize("mode", ["cold", "warm"])
def test_streamed_is_the_reference(
    mode: str, padding: str, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "PIECE", 5)
    case = Case(length=17, window=3, sinks=2, mode=mode, padding=padding)
    _close(_run(case, "streamed", softcap=softcap), _run(case, "reference", softcap=softcap))


def test_one_step_is_the_reference() -> None:
    case = Case(length=1, window=3, sinks=2, mode="warm")
    _close(_run(case, "recurrent", softcap=CAP), _run(case, "reference", softcap=CAP))


@pytest.mark.parametrize("mode", ["cold", "warm", "bidirectional"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_softmax_with_a_cap(mode: str, padding: str) -> None:
    case = Case(length=9, method="exact", mode=mode, padding=padding)
    _close(_run(case, "exact", softcap=CAP), _run(case, "reference", softcap=CAP))


def test_a_window_over_everything_is_capped_softmax() -> None:
    # The definition itself, written out, for the oracle: no features, every key in the window.
    case = Case(length=9, method="local", window=9, kv_heads=6)
    query, key, value = make_inputs(case)
    logits = CAP * torch.tanh(query @ key.mT * 0.3 / CAP)
    logits = logits.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf)
    found = attention(query, key, value, make_map(case), scaling=0.3, softcap=CAP, backend="reference")
    assert relative_error(found, logits.softmax(-1) @ value) <= PARITY


def test_a_wide_cap_is_none_and_a_narrow_one_is_not() -> None:
    case = Case(length=17, window=3, sinks=2)
    without = _run(case, "reference")["output"]
    assert relative_error(_run(case, "reference", softcap=1e6)["output"], without) <= 1e-9
    assert relative_error(_run(case, "reference", softcap=CAP)["output"], without) > 1e-2


def test_features_are_not_capped() -> None:
    case = Case(length=17)  # no window, no sinks: nothing exact
    assert torch.equal(_run(case, "reference", softcap=CAP)["output"], _run(case, "reference")["output"])


def test_auto_takes_one_that_can() -> None:
    case = Case(length=17, window=3, sinks=2)
    found, wanted = (_run(case, backend, softcap=CAP) for backend in ("auto", "streamed"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("backend", sorted(name for name, backend in BACKENDS.items() if not backend.softcap))
def test_the_others_say_why_not(backend: str) -> None:
    with pytest.raises(ConfigError, match="it cannot cap logits"):
        _run(Case(length=17, window=3), backend, softcap=CAP)


@pytest.mark.parametrize("softcap", [0.0, -1.0, float("nan"), float("inf")])
def test_a_cap_is_a_positive_number(softcap: float) -> None:
    with pytest.raises(InputError, match=r"softcap=.*above 0"):
        _run(Case(length=17, window=3), "auto", softcap=softcap)


def test_streamed_is_linear() -> None:
    # Cap or no cap is the same work here, and `elements` gives none.
    few, many = (elements(Case(window=3, sinks=2, length=n, **SMALL), "streamed") for n in (1024, 2048))
    assert many / few < 2.05
