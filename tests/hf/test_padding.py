"""Padding of any amount, on either side, changes nothing; its gradient is exactly zero."""

import pytest
import torch
from tolerances import STREAM, relative_error

from darkformer import DarkConfig
from hf.families import DARK, PAPER, left_mask, linear, logits, positions, tokens

SLIDING = DarkConfig(num_features=16, window=4, sinks=2, convert_sliding=True)


@pytest.mark.parametrize("config", [DARK, PAPER, SLIDING], ids=["default", "paper", "sliding too"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_any_amount_changes_nothing(family: str, config: DarkConfig, side: str) -> None:
    model, real = linear(family, config), tokens(1, 20)
    alone = logits(model, real)
    for pads in (1, 5, 64):  # 64 is a chunk of the operator
        noise = tokens(1, pads, seed=pads)
        if side == "left":
            ids, mask = torch.cat([noise, real], dim=1), left_mask([pads], 20 + pads)
        else:
            ids, mask = torch.cat([real, noise], dim=1), left_mask([pads], 20 + pads).flip(1)
        assert relative_error(logits(model, ids, mask)[mask.bool()][None], alone) <= STREAM


def test_rows_do_not_touch_each_other(family: str) -> None:
    model, ids, mask = linear(family), tokens(3, 25), left_mask([0, 4, 19], 25)
    together = logits(model, ids, mask)
    for row in range(3):
        alone = logits(model, ids[row : row + 1], mask[row : row + 1])
        assert relative_error(together[row][mask[row].bool()], alone[0][mask[row].bool()]) <= STREAM


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_at_pads_are_zero(family: str, side: str) -> None:
    model, mask = linear(family), left_mask([0, 7], 25)
    mask = mask if side == "left" else mask.flip(1)
    embedded = torch.randn(2, 25, 48, requires_grad=True)
    out = model(inputs_embeds=embedded, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
    out[mask.bool()].square().sum().backward()
    assert embedded.grad is not None
    norms = embedded.grad.norm(dim=-1)
    assert norms[~mask.bool()].max() == 0
    assert norms[mask.bool()].min() > 0


def test_a_mask_of_ones_is_no_mask(family: str) -> None:
    model, ids = linear(family), tokens(2, 25)
    assert torch.equal(logits(model, ids, torch.ones_like(ids)), logits(model, ids))
