"""Fresh draws of Ω: a function of (seed, step, layer, head) and nothing else, in place, on a schedule that resumes."""

import copy
from pathlib import Path

import pytest
import torch
from hf.families import DARK, linear, logits, tiny, tokens
from torch import Tensor
from transformers import PreTrainedModel

from darkformer import ConfigError, ConversionError, DarkConfig, Redraw, TrainConfig, dark_layers, finetune, redraw
from darkformer.features.draws import draw_projection

BLOCKS = tokens(12, 24)
LFK = DarkConfig(method="lfk", num_features=16, window=4, sinks=2)


def _omegas(model: PreTrainedModel) -> list[Tensor]:
    return [layer.projection.clone() for layer in dark_layers(model)]


def _budget(**changes: object) -> TrainConfig:
    options: dict[str, object] = dict(
        steps=7, warmup=2, seq_len=24, batch_size=2, dtype="float32", lr=3e-3, geometry_lr=3e-3, redraw_every=2
    )
    return TrainConfig(**{**options, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("draw", ["orthogonal", "iid", "simplex", "sobol"])
def test_the_draw_is_that_of_seed_step_layer_and_head(draw: str) -> None:
    model = linear("llama", DarkConfig(num_features=16, window=4, sinks=2, draw=draw, seed=5))
    tensors = [layer.projection for layer in dark_layers(model)]
    torch.manual_seed(1)  # the global generator has no say
    redraw(model, 30)
    for layer, held in zip(dark_layers(model), tensors, strict=True):
        assert layer.projection is held  # in place
        expected = draw_projection(draw, 16, 8, heads=range(2), seed=5, layer=layer.layer, step=30)
        assert torch.equal(held, expected.float())


def test_every_step_layer_and_head_is_another_draw() -> None:
    model, seen = linear("llama"), []
    for step in (0, 1, 2, 200):
        redraw(model, step)
        seen += [tuple(head.flatten().tolist()) for omega in _omegas(model) for head in omega]
    assert len(set(seen)) == len(seen) == 4 * 3 * 2


def test_step_zero_gives_the_first_draw_back() -> None:
    model = linear("llama")
    before, first = logits(model, BLOCKS), _omegas(model)
    redraw(model, 3)
    assert (logits(model, BLOCKS) - before).abs().max() > 1e-4
    redraw(model, 0)
    assert all(torch.equal(a, b) for a, b in zip(_omegas(model), first, strict=True))
    assert torch.equal(logits(model, BLOCKS), before)


def test_rows_stay_standard_gaussian() -> None:
    rows = torch.cat([draw_projection("iid", 64, 8, heads=range(2), step=step).flatten(0, 1) for step in range(1, 51)])
    count = rows.numel()
    assert abs(rows.mean().item()) < 4 / count**0.5
    assert abs(rows.var().item() - 1) < 4 * (2 / count) ** 0.5


def test_a_proposal_stays() -> None:
    model = linear("llama", DarkConfig(num_features=16, window=4, sinks=2, proposal="optimal"))
    layer = next(dark_layers(model))
    layer.propose_(2 * torch.eye(8).expand(2, -1, -1))
    root = layer.proposal_root.clone()
    redraw(model, 4)
    assert torch.equal(layer.proposal_root, root)


class TestSchedule:
    def test_draws_on_the_steps_of_the_schedule(self, tmp_path: Path) -> None:
        model = linear("llama")
        seen: dict[int, list[Tensor]] = {0: _omegas(model)}
        after = {step: lambda step=step: seen.__setitem__(step, _omegas(model)) for step in range(1, 8)}
        finetune(model, BLOCKS, _budget(), tmp_path, after_step=after)  # type: ignore[arg-type]
        expected = linear("llama")
        for step in range(8):
            redraw(expected, step // 2 * 2)
            assert all(torch.equal(a, b) for a, b in zip(seen[step], _omegas(expected), strict=True)), step

    def test_resume_is_the_uninterrupted_run(self, tmp_path: Path) -> None:
        whole, cut = linear("llama"), linear("llama")
        expected = finetune(whole, BLOCKS, _budget(), tmp_path / "whole")

        def die(step: int, loss: float) -> None:
            if step == 6:
                raise MemoryError

        with pytest.raises(MemoryError):
            finetune(cut, BLOCKS, _budget(save_every=5), tmp_path / "cut", on_step=die)
        resumed = linear("llama")  # as a new process would build it
        assert finetune(resumed, BLOCKS, _budget(save_every=5), tmp_path / "cut", resume=True) == expected
        state = whole.state_dict()
        assert all(torch.equal(x, state[name]) for name, x in resumed.state_dict().items())
        fixed = finetune(linear("llama"), BLOCKS, _budget(redraw_every=0), tmp_path / "fixed")
        assert fixed[:2] == expected[:2] and fixed[2] != expected[2]

    def test_a_checkpoint_without_omega_gets_the_draw_of_its_step(self) -> None:
        class State:
            global_step = 9

        model, expected = linear("llama"), linear("llama")
        Redraw(4).on_train_begin(None, State(), None, model=model)
        redraw(expected, 8)
        assert all(torch.equal(a, b) for a, b in zip(_omegas(model), _omegas(expected), strict=True))


class TestRefusals:
    def test_not_converted(self) -> None:
        with pytest.raises(ConversionError, match="not converted"):
            redraw(tiny("llama"), 1)

    @pytest.mark.parametrize("method", ["lfk", "random", "constant", "local"])
    def test_nothing_to_draw(self, method: str) -> None:
        model = linear("llama", DarkConfig(method=method, num_features=16, window=4, sinks=2))
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ConfigError, match=rf"method='{method}' has no random projection to draw anew"):
            redraw(model, 1)
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())

    def test_numbers(self) -> None:
        with pytest.raises(ConfigError, match="step=-1"):
            redraw(linear("llama", DARK), -1)
        with pytest.raises(ConfigError, match="every=0"):
            Redraw(0)
        with pytest.raises(ConfigError, match="redraw_every=-1"):
            TrainConfig(redraw_every=-1)
