"""Distillation from the softmax model, and narrower windows while a model trains."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hf.families import DARK, linear, tiny, tokens

from darkformer import ConfigError, ConversionError, TrainConfig, convert, dark_layers, finetune
from darkformer.train.distill import distillation_loss, teacher_of
from darkformer.train.window_dropout import NARROWEST, drawn_window

BLOCKS = tokens(12, 24)
QUICK = dict(steps=4, warmup=0, seq_len=24, batch_size=2, dtype="float32", lr=1e-3, geometry_lr=1e-2)


def test_the_loss_is_the_divergence_and_the_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darkformer.train.evaluate.NUMBERS_AT_ONCE", 11 * 16)
    length = 40  # more than one part
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, length, 11, requires_grad=True), torch.randn(2, length, 11)
    labels = torch.randint(11, (2, length))
    p, log_q = teacher[:, :-1].softmax(-1), logits[:, :-1].log_softmax(-1)
    divergence = (p * (p.log() - log_q)).sum(-1).mean()
    entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    for weight in (0.25, 1.0):
        loss, expected = (
            distillation_loss(logits, teacher, labels, weight),
            weight * divergence + (1 - weight) * entropy,
        )
        torch.testing.assert_close(loss, expected)
        grads = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, expected))
        torch.testing.assert_close(*grads)


def test_places_that_do_not_count_change_nothing() -> None:
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 9, 11, requires_grad=True), torch.randn(2, 9, 11)
    labels = torch.randint(11, (2, 9))
    labels[:, 6:] = -100
    spoiled = logits.detach().clone().requires_grad_()
    with torch.no_grad():
        spoiled[:, 5:] = torch.nan  # predicts what does not count
    loss = distillation_loss(spoiled, teacher, labels, 0.5)
    torch.testing.assert_close(loss, distillation_loss(logits[:, :6], teacher[:, :6], labels[:, :6], 0.5))
    (grad,) = torch.autograd.grad(loss, spoiled)
    assert bool((grad[:, 5:] == 0).all()) and bool((grad[:, :5] != 0).all())


def test_a_model_distilled_from_itself_comes_nearer_to_it(tmp_path: Path) -> None:
    model = tiny("llama")
    teacher = teacher_of(model)
    convert(model, DARK)

    def divergence() -> float:
        with torch.no_grad():
            ids = BLOCKS[:4]
            return float(distillation_loss(model(ids).logits, teacher(ids).logits, ids, 1.0))

    before = divergence()
    losses = finetune(model, BLOCKS, TrainConfig(train="all", distill=1.0, **QUICK), tmp_path, teacher=teacher)
    assert losses[0] == pytest.approx(before, rel=0.5) and divergence() < before
    assert not any(p.requires_grad for p in teacher.parameters())


def test_a_teacher_must_be_softmax_and_be_there(tmp_path: Path) -> None:
    model = linear("llama")
    with pytest.raises(ConversionError, match="converted itself"):
        teacher_of(model)
    with pytest.raises(ConfigError, match=r"distill=0.5 needs a teacher"):
        finetune(model, BLOCKS, TrainConfig(distill=0.5, **QUICK), tmp_path)


@pytest.mark.parametrize("name", ["distill", "window_dropout"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), True, "1"])
def test_shares_out_of_range(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{name}=.*from 0 to 1"):
        TrainConfig(**{name: value})


def test_windows_are_drawn_for_a_step_and_given_back(tmp_path: Path) -> None:
    model = linear("llama", replace(DARK, window=64))
    during: list[set[int]] = []
    handle = model.register_forward_pre_hook(lambda *_: during.append({fm.config.window for fm in dark_layers(model)}))
    between: list[int] = []
    after = {s: lambda: between.extend(fm.config.window for fm in dark_layers(model)) for s in (1, 2, 3, 4)}
    finetune(model, BLOCKS, TrainConfig(window_dropout=0.5, **QUICK), tmp_path, after_step=after)
    handle.remove()
    assert all(len(windows) == 1 for windows in during)
    drawn = [windows.pop() for windows in during]
    assert drawn == [drawn_window(64, 0, 0), drawn_window(64, 0, 1), 64, 64]
    assert set(between) == {64} and {fm.config.window for fm in dark_layers(model)} == {64}


def test_a_step_that_fails_gives_the_windows_back(tmp_path: Path) -> None:
    model = linear("llama", replace(DARK, window=64))
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(Exception, match="step 1"):
        finetune(model, BLOCKS, TrainConfig(window_dropout=1.0, **QUICK), tmp_path)
    assert {fm.config.window for fm in dark_layers(model)} == {64}


def test_drawn_windows_reach_from_the_narrowest_to_their_own() -> None:
    drawn = [drawn_window(256, 3, step) for step in range(400)]
    assert min(drawn) < NARROWEST * 1.2 and max(drawn) > 220 and all(NARROWEST <= w <= 256 for w in drawn)
    assert 50 < sorted(drawn)[200] < 80  # the geometric mean is 64
