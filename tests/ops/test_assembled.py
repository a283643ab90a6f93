"""The GPU backend's algebra, with CPU stand-ins for its two parts; nothing here says how fast or exact those are."""

from collections.abc import Callable

import pytest
import torch
from tolerances import PARITY, relative_error
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from darkformer import ConfigError, attention
from darkformer.ops.assembled import NearPart, assemble, flex_near
from darkformer.ops.attention import BACKENDS, Backend

from .cases import ODD_SIZES, Case, Way, make_inputs, make_map, make_mask


def far_stand_in(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Tensor:
    """The recurrence that `chunk_gla` computes, a token at a time."""
    outputs = []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, :, None].exp() + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append((q[:, t, :, :, None] * state).sum(-2))
    return torch.stack(outputs, dim=1)


def near_stand_in(
    q: Tensor, k: Tensor, v: Tensor, seen: Callable[..., Tensor], scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """What FlexAttention computes, whole: it has no backward pass on CPUs."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = q @ k.mT * scaling
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    b, t, j = (torch.arange(n, device=q.device) for n in (len(q), q.shape[2], k.shape[2]))
    mask = seen(b[:, None, None], b[:0], t[:, None], j)[:, None]
    logits = torch.where(mask, logits, -1e30)
    return logits.softmax(-1) * mask @ v, torch.where(mask.any(-1), logits.logsumexp(-1), -1e30)


def install(patch: pytest.MonkeyPatch, near: NearPart = near_stand_in) -> None:
    """Makes the backend `assembled` run with stand-ins, here."""
    backend = Backend("assembled", lambda problem: None, lambda problem: assemble(problem, far_stand_in, near))
    patch.setitem(BACKENDS, "assembled", backend)


CASES = [
    Case(length=length, window=window, sinks=sinks, kv_heads=kv_heads, padding=padding, mode=mode, **more)
    for length, window, sinks, kv_heads, padding, mode, more in [
        (1, 0, 0, 2, "none", "cold", {}),
        (9, 0, 0, 1, "left", "warm", {}),
        (40, 16, 4, 2, "interior", "warm", {}),
        (40, 16, 4, 1, "right", "cold", ODD_SIZES),
        (30, 64, 0, 6, "none", "warm", {}),
        (30, 1, 4, 2, "left", "cold", {"tied": False}),
        (25, 0, 4, 2, "none", "warm", {"softcap": 0.7}),
        (25, 5, 2, 2, "none", "cold", {"softcap": 0.7, "method": "lfk"}),
        (25, 5, 2, 2, "left", "warm", {"method": "local"}),
        (25, 5, 2, 2, "left", "warm", {"method": "random"}),
    ]
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_algebra(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys shifted by W, decays of the running maximum, one normaliser: output, state and all gradients."""
    install(monkeypatch)
    assert not Way("assembled").wrong(case)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", [case for case in CASES if case.window + case.sinks], ids=str)
def test_flex_attention_is_its_stand_in(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one, not compiled, forward: masks, ragged rows, grouped heads, cap, log-sum-exp."""
    made, inputs, found = make_map(case), make_inputs(case), []
    for near in (near_stand_in, lambda *x: flex_near(*x, function=flex_attention)):
        install(monkeypatch, near)
        mask = make_mask(case.padding, case.batch, case.length)
        with torch.no_grad():
            found.append(attention(*inputs, made, key_mask=mask, softcap=case.softcap, backend="assembled"))
    assert relative_error(*found) <= PARITY


def test_large_keys_leave_no_row_without_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """The running maximum holds no key of the future: early rows survive where a chunk's maximum would underflow."""
    install(monkeypatch)
    assert not Way("assembled").wrong(Case(length=60, scale=16.0))


def test_it_says_why_it_is_not_used() -> None:
    case = Case(length=5, window=2)
    with pytest.raises(ConfigError, match="it needs CUDA, the tensors are on cpu"):
        attention(*make_inputs(case), make_map(case), backend="assembled")
    assert list(BACKENDS).index("assembled") > list(BACKENDS).index("chunked")  # so `auto` never takes it
