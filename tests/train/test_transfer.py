"""Attention transfer: layers come nearer to softmax, alone, within their best; it goes on where it stopped."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf.families import DARK, PAPER, converted, left_mask, tiny, tokens
from torch import Tensor
from transformers import PreTrainedModel

import darkformer
from darkformer import ConfigError, ConversionError, DarkConfig, InputError, RunFolderError, calibrate, dark_layers
from darkformer.hf.interface import observing
from darkformer.train import transfer as module
from darkformer.train.transfer import CHECKPOINT, LayerTransfer, transfer

CONFIG = replace(DARK, num_features=32, window=8, sinks=2, drop_features=False)
BATCHES = list(tokens(5, 48).split(1))
FEW = dict(steps=16, lr=3e-2, dtype="float32")


def calibrated(config: DarkConfig = CONFIG, family: str = "llama") -> PreTrainedModel:
    model = converted(tiny(family), config)
    calibrate(model, BATCHES[:2])
    return model


def nearer(report: LayerTransfer) -> bool:
    now, before = (sum(x * x for x in errors) for errors in (report.error, report.error_before))
    return now < before


def errors(model: torch.nn.Module, batch: Tensor) -> dict[int, float]:
    """Relative error of each layer's attention output on softmax's own inputs, before the output projection."""
    found: dict[int, float] = {}

    def observer(fm, query, key, value, mask, scaling, target) -> None:  # type: ignore[no-untyped-def]
        output = darkformer.attention(query, key, value, fm, scaling=scaling, backend="reference")
        found[fm.layer] = float((output - target).norm() / target.norm())

    with observing(model, observer, softmax=True):
        model(batch)
    return found


def test_every_layer_comes_nearer_to_softmax_on_text_held_back() -> None:
    model = calibrated()
    own = {name: x.clone() for name, x in model.state_dict().items() if ".dark." not in name}
    before = errors(model, BATCHES[-1])
    reports = transfer(model, BATCHES, **FEW)
    after = errors(model, BATCHES[-1])
    assert [report.layer for report in reports] == sorted(before)
    for report in reports:
        assert nearer(report) and after[report.layer] < before[report.layer]
    assert all(torch.equal(model.state_dict()[name], x) for name, x in own.items())  # the model's weights stay
    assert all(p.grad is None for p in model.parameters())


def test_the_errors_are_those_after_the_output_projection() -> None:
    model = calibrated()
    report = transfer(model, BATCHES, steps=1, lr=1e-9, dtype="float32")[0]
    layer = model.model.layers[report.layer].self_attn
    found: list[Tensor] = []

    def observer(fm, query, key, value, mask, scaling, target) -> None:  # type: ignore[no-untyped-def]
        if fm.layer == report.layer:
            found.extend((darkformer.attention(query, key, value, fm, scaling=scaling, backend="reference"), target))

    with observing(model, observer, softmax=True):
        model(BATCHES[-1])
    output, target = found
    per_head = layer.num_key_value_groups * layer.head_dim
    for head, error in enumerate(report.error):
        columns = layer.o_proj.weight[:, head * per_head : (head + 1) * per_head]
        heads = slice(head * layer.num_key_value_groups, (head + 1) * layer.num_key_value_groups)
        ours, theirs = (columns @ x[0, heads].transpose(1, 2).flatten(0, 1) for x in (output, target))
        assert error == pytest.approx(float(((ours - theirs).norm() / theirs.norm()).detach()), rel=1e-4)


def test_padding_does_not_count() -> None:
    plain, padded = calibrated(), calibrated()
    transfer(plain, BATCHES, **FEW)
    mask = left_mask([5], 53)
    batches = [{"input_ids": torch.cat([torch.zeros(1, 5).long(), b], 1), "attention_mask": mask} for b in BATCHES]
    for batch in batches:
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    reports = transfer(padded, batches, **FEW)
    assert all(math.isfinite(e) and e < b for r in reports for e, b in zip(r.error, r.error_before, strict=True))


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole, killed = calibrated(), calibrated()
    expected = transfer(whole, BATCHES, **FEW)

    class Killed(Exception):
        pass

    def kill(step: int, steps: int, loss: float) -> None:
        if step == 11:
            raise Killed

    with pytest.raises(Killed):
        transfer(killed, BATCHES, **FEW, folder=tmp_path, progress=kill)
    assert (tmp_path / CHECKPOINT).is_file()
    again = calibrated()  # a new process
    seen: list[int] = []
    reports = transfer(again, BATCHES, **FEW, folder=tmp_path, progress=lambda step, *_: seen.append(step))
    assert seen == [11, 12, 13, 14, 15, 16] and reports == expected and not (tmp_path / CHECKPOINT).exists()
    for mine, theirs in zip(dark_layers(again), dark_layers(whole), strict=True):
        assert all(torch.equal(x, theirs.values()[name]) for name, x in mine.values().items())


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    def stop(step: int, steps: int, loss: float) -> None:
        if step == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        transfer(calibrated(), BATCHES, **FEW, folder=tmp_path, progress=stop)
    with pytest.raises(RunFolderError, match="another transfer"):
        transfer(calibrated(), BATCHES, steps=8, dtype="float32", folder=tmp_path)


def test_a_layer_that_diverges_stops_and_keeps_its_best() -> None:
    model = calibrated()
    before = errors(model, BATCHES[-1])
    reports = transfer(model, BATCHES, steps=16, lr=1e4, dtype="float32")
    assert all(report.stopped and sum(report.error) <= sum(report.error_before) for report in reports)
    assert any("diverged" in report.stopped for report in reports)
    after = errors(model, BATCHES[-1])
    assert all(after[layer] <= before[layer] * 1.001 for layer in before)


def test_a_layer_that_no_longer_improves_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 1)
    reports = transfer(calibrated(), BATCHES, steps=16, lr=1e-12, dtype="float32")
    assert all("no improvement" in report.stopped or report.kept_step == 16 for report in reports)
    assert any("no improvement" in report.stopped for report in reports)


def test_heads_whose_features_do_not_pay_lose_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = calibrated(replace(CONFIG, drop_features=True))
    monkeypatch.setattr("darkformer.calibration.calibrate.MARGIN", 0.9)  # hardly any feature saves so much
    model.train()
    reports = transfer(model, BATCHES, **FEW)
    dropped = {f"{r.layer}.{head}" for r in reports for head, keep in zip(r.heads, r.features, strict=True) if not keep}
    assert dropped == {str(name) for name in model.config.darkformer["no_features"]} and dropped and model.training


@pytest.mark.parametrize("family", ["gemma3", "qwen3", "gpt2"])
def test_other_families(family: str) -> None:
    for report in transfer(calibrated(CONFIG, family), BATCHES, steps=24, lr=3e-3, dtype="float32"):
        assert nearer(report)


def test_exact_heads_take_no_part() -> None:
    model = converted(tiny("llama"), replace(CONFIG, keep_exact=("0.1", 1)))
    calibrate(model, BATCHES[:2])
    reports = transfer(model, BATCHES, **FEW)
    assert [(r.layer, r.heads) for r in reports if r.layer in (0, 1)] == [(0, [0])]


def test_bad_input() -> None:
    with pytest.raises(ConversionError, match="not converted"):
        transfer(tiny("llama"), BATCHES)
    with pytest.raises(InputError, match="1 batches"):
        transfer(calibrated(), BATCHES[:1])
    with pytest.raises(ConfigError, match="no head has features that learn"):
        transfer(converted(tiny("llama"), DarkConfig(method="local", window=8)), BATCHES)
    for steps in (0, True, 1.5):
        with pytest.raises(ConfigError, match="steps="):
            transfer(calibrated(PAPER), BATCHES, steps=steps)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="lr="):
        transfer(calibrated(PAPER), BATCHES, lr=-1)


def test_the_paper_form_learns_its_geometry() -> None:
    reports: list[LayerTransfer] = transfer(calibrated(PAPER), BATCHES, **FEW)
    assert all(map(nearer, reports))
