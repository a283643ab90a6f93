"""Calibration over a whole context: which queries it looks at, what it measures there, and heads without features."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hf.families import DARK, DECODERS, FAMILIES, left_mask, logits, tiny, tokens
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from darkformer import DarkConfig, FeatureMap, calibrate, convert, dark_layers
from darkformer.calibration.calibrate import _search_layer, _split_queries
from darkformer.calibration.probe import FarField, Probe, SpreadProbe, spread_queries
from darkformer.calibration.projections import output_grams
from darkformer.hf.interface import observing
from darkformer.hf.layers import converted_modules, layer_of
from train.capture import captured

WINDOW, SINKS = 16, 4
FORM = DarkConfig(num_features=32, window=WINDOW, sinks=SINKS)


def _tensors(length: int, *, batch: int = 2, heads: int = 4, groups: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(batch, h, length, 8, generator=generator) for h in (heads, groups, groups))  # type: ignore[return-value]


def _map(**changes: Any) -> FeatureMap:
    return FeatureMap(replace(FORM, **changes), num_heads=4, num_kv_heads=2, head_dim=8)


class TestQueries:
    def test_short_rows_are_seen_whole(self) -> None:
        real = torch.ones(2, 60, dtype=torch.bool)
        assert torch.equal(spread_queries(real, 6, 128), torch.arange(60).expand(2, -1))

    @pytest.mark.parametrize("length", [300, 2048])
    def test_they_cover_the_context(self, length: int) -> None:
        index = spread_queries(torch.ones(1, length, dtype=torch.bool), 68, 128)[0]
        assert index.shape == (128,)
        assert int(index[0]) == 68 and int(index[-1]) == length - 1
        assert torch.equal(index, index.sort().values)
        assert int(index.diff().max()) <= 2 * (length - 68) / 64  # no gap wider than twice the even spacing
        if length == 2048:
            assert 20 < int((index < 512).sum()) < 80  # the near part is not drowned by the far one

    def test_pads_are_never_asked_for(self) -> None:
        real = left_mask([0, 50, 180], 200).bool()
        index = spread_queries(real, 20, 64)
        assert real.gather(1, index).all()
        assert torch.equal(index[:, -1], torch.tensor([199] * 3))
        assert torch.equal(spread_queries(real.flip(1), 20, 64)[:, -1], torch.tensor([199, 149, 19]))
        assert spread_queries(torch.zeros(1, 200, dtype=torch.bool), 20, 64).shape == (1, 64)


class TestProbe:
    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("weights", [SpreadProbe.WEIGHTS, 1, 5000])
    def test_it_is_the_quadratic_one_at_these_queries(self, padded: bool, weights: int, monkeypatch: Any) -> None:
        monkeypatch.setattr(SpreadProbe, "WEIGHTS", weights)
        captured = *_tensors(150), (left_mask([0, 37], 150) if padded else None), 0.4
        probe = SpreadProbe(*captured, config=FORM, queries=40)
        whole = Probe(*captured, config=FORM, tokens=150)
        parameters = _map().parameters_for(torch.float32).scaled(0.5)
        where = probe.index[:, None, None, :, None].expand(-1, 2, 2, -1, 8)

        def close(ours: FarField, theirs: FarField, ours_far: Any, theirs_far: Any) -> None:
            expected = theirs.output(theirs_far).gather(3, where)
            torch.testing.assert_close(ours.output(ours_far), expected, rtol=1e-4, atol=1e-5)

        close(probe, whole, probe.far, whole.far)
        close(probe, whole, probe.features(parameters), whole.features(parameters))
        torch.testing.assert_close(probe.target, whole.target.gather(3, where), rtol=1e-4, atol=1e-5)

    def test_no_tensor_is_as_large_as_the_square_of_the_length(self) -> None:
        length, largest = 6000, 0

        class Largest(TorchDispatchMode):
            def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                nonlocal largest
                out = function(*args, **(kwargs or {}))
                if isinstance(out, Tensor):
                    largest = max(largest, out.numel())
                return out

        fm = _map()
        with torch.no_grad(), Largest():
            probe = SpreadProbe(*_tensors(length, batch=1), None, 0.4, config=FORM, queries=128)
            probe.features(fm.parameters_for(torch.float32))
        assert 0 < largest <= SpreadProbe.WEIGHTS < length**2

    def test_a_far_field_that_matters_late_is_seen(self) -> None:
        # The values of the first 512 tokens are all alike, so there the far field does not matter; later ones differ.
        query, key, value = _tensors(1024)
        value[:, :, :512] = 1.0
        early = SpreadProbe(
            query[..., :512, :], key[..., :512, :], value[..., :512, :], None, 0.1, config=FORM, queries=96
        )
        late = SpreadProbe(query, key, value, None, 0.1, config=FORM, queries=96)
        assert float(early.error_exact_part().max()) < 1e-6
        assert float(late.error_exact_part().min()) > 0.05
        assert _search_layer(_map(), late, None, 64).features == [True, True]


#: No token comes twice, so that a query that looks for its own token finds it nowhere else.
BATCHES = [torch.stack([torch.randperm(98, generator=torch.Generator().manual_seed(4 * i + j)) + 1 for j in range(4)])
           for i in range(2)]  # fmt: skip
SMALL = replace(DARK, num_features=8)


class _Alone(nn.Module):
    """An output projection of an unknown class, such as a quantized one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = [linear]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear[0](x)


class TestOutputProjection:
    @pytest.mark.parametrize("family", DECODERS)
    def test_it_is_found_in_every_family(self, family: str) -> None:
        model = convert(tiny(family), FAMILIES[family].config)
        grams, ids = output_grams(model, tokens(2, 20)), tokens(1, 8)
        assert set(grams) == {id(fm) for fm in dark_layers(model)}
        outputs: dict[int, Tensor] = {}

        def observer(fm: FeatureMap, *captured: Any) -> None:
            outputs[id(fm)] = captured[-1]

        for module in converted_modules(model):
            fm: FeatureMap = module.dark
            received: list[tuple[Tensor, Tensor]] = []
            names = {"o_proj", "c_proj", "dense", "out_proj"}
            (projection,) = [m for name, m in module.named_children() if name in names]
            handle = projection.register_forward_hook(lambda m, args, out, to=received: to.append((args[0], out)))
            with observing(model, observer, softmax=True):
                model(ids, use_cache=False)
            handle.remove()
            (x, _), size = received[0], received[0][0].shape[-1] // layer_of(module).num_kv_heads
            for i, g in enumerate(fm.heads):
                alone = torch.zeros_like(x)
                alone[..., g * size : (g + 1) * size] = x[..., g * size : (g + 1) * size]
                added = projection(alone) - projection(torch.zeros_like(x))
                part = alone[..., g * size : (g + 1) * size]
                expected = ((part @ grams[id(fm)][i]) * part).sum(-1)
                torch.testing.assert_close(expected, added.square().sum(-1), rtol=1e-3, atol=1e-4)

    def test_of_a_layer_in_parts_only_the_columns_of_its_heads_count(self) -> None:
        whole, part = _converted(DARK), _converted(replace(DARK, no_features=("1.0",), keep_exact=("2.1",)))
        for full, some in zip(dark_layers(whole), dark_layers(part), strict=True):
            expected = output_grams(whole, tokens(1, 20))[id(full)][list(some.heads)]
            torch.testing.assert_close(output_grams(part, tokens(1, 20))[id(some)], expected)

    def test_without_one_that_can_be_read_the_attention_output_counts(self) -> None:
        model, other = _converted(DARK), _converted(DARK)
        attention = model.model.layers[1].self_attn
        attention.o_proj = _Alone(attention.o_proj)
        first, _, third = dark_layers(model)
        assert set(output_grams(model, tokens(1, 20))) == {id(first), id(third)}
        choices, expected = (calibrate(m, [tokens(2, 60)]) for m in (model, other))
        assert choices[0] == expected[0] and choices[1].error != expected[1].error

    def test_a_gated_output_is_not_taken_for_the_projections_input(self) -> None:
        model = _converted(DARK)
        for layer in model.model.layers[:1]:
            layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args: (args[0] * 0.5,))
        assert len(output_grams(model, tokens(1, 20))) == 2

    def test_no_hook_stays(self) -> None:
        model = _converted(DARK)
        calibrate(model, [tokens(2, 60)])
        assert not any(layer.self_attn.o_proj._forward_pre_hooks for layer in model.model.layers)


def _converted(config: DarkConfig) -> PreTrainedModel:
    return convert(tiny("llama"), config)


def _uneven(config: DarkConfig) -> PreTrainedModel:
    """kv head 0 of every layer attends evenly, as features can, and head 1 to the query's own token."""
    model = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            query = layer.self_attn.q_proj.weight.view(2, -1, 48)
            query[0] *= 0.02
            query[1] = 40 * layer.self_attn.k_proj.weight.view(2, -1, 48)[1].repeat(3, 1)
    return convert(model, config)


class TestSwitchingOff:
    def test_heads_whose_features_do_not_pay(self) -> None:
        model = _uneven(SMALL)
        choices = calibrate(model, BATCHES)
        assert [choice.heads for choice in choices] == [[0, 1]] * 3
        assert [choice.features for choice in choices] == [[True, False]] * 3
        assert [fm.heads for fm in dark_layers(model)] == [(0,)] * 3
        assert model.config.darkformer["no_features"] == ["0.1", "1.1", "2.1"]
        for choice in choices:
            assert choice.error[0] < choice.error_exact_part[0]
        again = calibrate(model, BATCHES)  # what was switched off stays off
        assert [choice.heads for choice in again] == [[0]] * 3
        for before, after in zip(choices, again, strict=True):
            assert after.scale == before.scale[:1] and after.error == pytest.approx(before.error[:1], rel=1e-3)

    def test_not_unless_asked_for(self) -> None:
        model = _uneven(replace(SMALL, drop_features=False))
        choices = calibrate(model, BATCHES)
        assert [choice.features for choice in choices] == [[True, True]] * 3  # they are left on
        assert [fm.heads for fm in dark_layers(model)] == [(0, 1)] * 3
        assert model.config.darkformer["no_features"] == []

    def test_all_heads_of_a_model_off_are_window_and_sinks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("darkformer.calibration.calibrate.MARGIN", 2.0)  # nothing can save as much
        model, local = _converted(SMALL), _converted(replace(SMALL, method="local"))
        choices = calibrate(model, BATCHES)
        assert not any(pays for choice in choices for pays in choice.features)
        torch.testing.assert_close(logits(model, tokens(2, 60)), logits(local, tokens(2, 60)), rtol=1e-4, atol=1e-4)

    def test_a_text_within_the_window_switches_nothing_off(self) -> None:
        model = _converted(DarkConfig(num_features=16, window=60, sinks=2))
        assert all(all(choice.features) for choice in calibrate(model, [tokens(2, 40)]))

    def test_without_a_window_there_is_nothing_to_fall_back_on(self) -> None:
        model = _uneven(DarkConfig(num_features=8, window=0, sinks=2))
        calibrate(model, BATCHES)
        assert [fm.heads for fm in dark_layers(model)] == [(0, 1)] * 3

    def test_what_checks_the_choice_did_not_make_it(self) -> None:
        for rows in (torch.ones(4, 30, dtype=torch.bool), torch.ones(1, 64, dtype=torch.bool)):
            choosing, checking = _split_queries(rows)
            assert not (choosing & checking).any() and (choosing | checking).all()
            assert int(choosing.sum()) == int(checking.sum())
        (first, *_) = calibrate(_uneven(SMALL), [BATCHES[0][:1]])
        assert first.features[0]

    def test_mixed_layers(self) -> None:
        model = convert(tiny("llama"), replace(DARK, no_features=("1.0",), keep_exact=("2.1", 0), drop_features=False))
        calls = captured(model, [tokens(2, 60)])
        assert [choice.heads for choice in calibrate(model, [tokens(2, 60)])] == [[1], [0]]
        assert calls[1][0].key.shape[1] == calls[2][0].key.shape[1] == 1
