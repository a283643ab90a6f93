"""Lower precision stays near float32, and recomputing activations changes nothing."""

import pytest
import torch
from tolerances import relative_error
from transformers import PreTrainedModel

from darkformer import dark_layers
from hf.families import left_mask, linear, logits, tokens

#: bfloat16 rounds to 2^-9 and three layers of matrix products add their roundings up: the same model with softmax
#: attention is off by as much (see the control).
BFLOAT16 = 0.05
IDS, MASK = tokens(2, 80), left_mask([0, 11], 80)


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return relative_error(got.float()[MASK.bool()], expected[MASK.bool()])


def test_bfloat16_autocast(family: str) -> None:
    model = linear(family)
    expected = logits(model, IDS, MASK)
    with torch.autocast("cpu", torch.bfloat16):
        got = logits(model, IDS, MASK)
    assert got.dtype == torch.bfloat16
    assert 0 < _error(got, expected) <= BFLOAT16


def test_bfloat16_model(family: str) -> None:
    model = linear(family)
    expected = logits(model, IDS, MASK)
    got = logits(model.to(torch.bfloat16), IDS, MASK)
    assert got.dtype == torch.bfloat16
    assert 0 < _error(got, expected) <= BFLOAT16
    for layer in dark_layers(model):
        assert {x.dtype for x in layer.values().values()} == {torch.float32}
        assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}  # one dtype in whatever shards the model


def test_control_softmax_in_bfloat16(model: PreTrainedModel) -> None:
    expected = logits(model, IDS, MASK)
    assert 0 < _error(logits(model.to(torch.bfloat16), IDS, MASK), expected) <= BFLOAT16


def test_bfloat16_training_step(family: str) -> None:
    model = linear(family).train()
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS, attention_mask=MASK, labels=IDS, use_cache=False).loss.backward()
    # Only M, the balance and the centres of keys that were far get a gradient, and every layer has such keys.
    for layer in dark_layers(model):
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in layer.parameters())
        assert layer.geometry_offset.grad.abs().max() > 0


def _gradients(model: PreTrainedModel, use_cache: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(IDS, attention_mask=MASK, labels=IDS, use_cache=use_cache).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_cache", [False, True])
def test_gradient_checkpointing_changes_nothing(family: str, use_cache: bool) -> None:
    model = linear(family).train()
    loss, gradients = _gradients(model, use_cache=False)
    model.gradient_checkpointing_enable()
    again, recomputed = _gradients(model, use_cache=use_cache)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    assert recomputed.keys() == gradients.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        assert relative_error(recomputed[name], gradient) <= 1e-5, name
