"""A soft cap on the exact part's logits: the same numbers from every backend that can, the reason from the others."""

from dataclasses import replace

import pytest
import torch
from tolerances import PARITY, relative_error

from darkformer import ConfigError, InputError, attention
from darkformer.ops.chunked import count_log_domain

from .cases import ODD_SIZES, Case, Way, by_way, expected, make_inputs, make_map, needs_native, solve, use_chunked

CAP = 0.7  # small enough to bend logits of standard deviation 1 clearly
CASES = [
    Case(length=length, window=window, sinks=sinks, mode=mode, padding=padding, softcap=CAP, **sizes)
    for length, window, sinks, mode, padding, sizes in [
        (17, 3, 2, "cold", "none", {}),
        (65, 16, 0, "warm", "left", {}),
        (150, 0, 4, "cold", "interior", ODD_SIZES),
        (150, 100, 4, "warm", "right", ODD_SIZES),
        (70, 5, 2, "bidirectional", "left", {}),
        (1, 3, 2, "warm", "none", {}),
        (9, 0, 0, "cold", "none", {"method": "exact"}),
        (9, 0, 0, "warm", "left", {"method": "exact"}),
        (40, 5, 2, "cold", "none", {"method": "local"}),
    ]
]


def capable(case: Case) -> list[Way]:
    if case.method == "exact":
        return [Way("exact")]
    return [Way("chunked"), *([Way("recurrent")] if case.length == 1 else [])]


@pytest.mark.parametrize(("case", "way"), by_way(CASES, capable))
def test_every_backend_that_caps(case: Case, way: Way) -> None:
    assert not way.wrong(case)


def test_in_the_log_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The safe path of chunks that underflow has the same exact part."""
    use_chunked(monkeypatch, underflow=float("inf"))
    with count_log_domain() as count:
        for case in CASES[:5]:
            assert not Way("chunked").wrong(case)
    assert count.underflowed_rows


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
    without = expected(case).tensors["output"]
    assert relative_error(expected(replace(case, softcap=1e6)).tensors["output"], without) <= 1e-9
    assert relative_error(expected(replace(case, softcap=CAP)).tensors["output"], without) > 1e-2


def test_features_are_not_capped() -> None:
    case = Case(length=17)  # no window, no sinks: nothing exact
    assert torch.equal(expected(replace(case, softcap=CAP)).tensors["output"], expected(case).tensors["output"])


def test_auto_takes_one_that_can() -> None:
    case = Case(length=17, window=3, sinks=2, softcap=CAP)
    for dtype in (torch.float64, torch.float32):
        found, wanted = (solve(case, backend, dtype=dtype).tensors for backend in ("auto", "chunked"))
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@needs_native
def test_native_says_why_not() -> None:
    with pytest.raises(ConfigError, match="it cannot cap logits"):
        solve(Case(length=17, window=3, softcap=CAP), "native", dtype=torch.float32)


@pytest.mark.parametrize("softcap", [0.0, -1.0, float("nan"), float("inf")])
def test_a_cap_is_a_positive_number(softcap: float) -> None:
    case = Case(length=17, window=3)
    with pytest.raises(InputError, match=r"softcap=.*above 0"):
        attention(*make_inputs(case), make_map(case), softcap=softcap)


@pytest.mark.parametrize(
    ("backend", "method"), [("reference", "constant"), ("chunked", "constant"), ("exact", "exact")]
)
def test_masked_logits_beyond_the_range_have_no_gradient(backend: str, method: str) -> None:
    """A query and a key it does not see exactly, whose product is infinity less infinity: the cap would make NaN."""
    case = Case(length=6, method=method)
    query, key, value = (x.float() for x in make_inputs(case))
    key[:, :, 4] = 3e30
    key[:, :, 4, ::2] *= -1
    query[:, :, 1 if method == "exact" else 4] = 3e30
    rows = slice(0, 4) if method == "exact" else slice(4, 5)  # later ones see the key, and have no value
    tokens = slice(0, 6) if method == "exact" else rows
    leaves = [x[:, :, tokens].clone().requires_grad_() for x in (query, key, value)]
    output = attention(*leaves, make_map(case).float(), softcap=5.0, backend=backend)
    output = output[:, :, rows] if method == "exact" else output
    gradients = torch.autograd.grad(output.sum(), leaves)
    assert output.isfinite().all() and all(x.isfinite().all() for x in gradients)
