"""Exact mode is the original model, revert gives it back to the bit, and linear mode is something else."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from darkformer import (
    ConversionError,
    DarkConfig,
    FeatureMap,
    attention,
    convert,
    dark_layers,
    revert,
    save_cache,
)
from darkformer.hf.interface import observing
from hf.families import DARK, FAMILIES, PAPER, converted, left_mask, linear, logits, tiny, tokens

EXACT = DarkConfig(method="exact")
MASKS = {"no padding": None, "left padding": left_mask([0, 11], 40)}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_exact_mode_equals_the_original(model: PreTrainedModel, mask: torch.Tensor | None) -> None:
    ids = tokens(2, 40)
    before = logits(model, ids, mask)
    after = logits(convert(model, EXACT), ids, mask)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    assert (after - before)[real].abs().max() <= 1e-4


def test_exact_mode_generates_as_the_original(model: PreTrainedModel) -> None:
    ids, mask = tokens(2, 20), left_mask([0, 7], 20)
    options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False)
    before = model.generate(ids, **options)
    assert torch.equal(convert(model, EXACT).generate(ids, **options), before)


@pytest.mark.parametrize("config", [DARK, PAPER, EXACT], ids=["dark", "paper", "exact"])
def test_revert_is_bit_identical(model: PreTrainedModel, config: DarkConfig) -> None:
    ids, mask = tokens(2, 40), left_mask([0, 11], 40)
    before, keys, settings = logits(model, ids, mask), list(model.state_dict()), model.config.to_dict()
    implementation = model.config._attn_implementation
    convert(model, config)
    logits(model, ids, mask)
    assert revert(model) is model
    assert torch.equal(logits(model, ids, mask), before)
    assert list(model.state_dict()) == keys
    assert model.config.to_dict() == settings
    assert model.config._attn_implementation == implementation
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_linear_model_can_be_watched() -> None:
    model, ids, seen = linear("llama"), tokens(2, 40), []
    before = logits(model, ids)

    def watch(fm: FeatureMap, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: object) -> None:
        expected = attention(query, key, value, fm, scaling=rest[1], is_causal=True)
        seen.append((fm.layer, float((expected - rest[2]).abs().max())))

    with observing(model, watch, softmax=False):
        watched = logits(model, ids)
    assert torch.equal(watched, before)  # it stays linear, and watching changes nothing
    assert [layer for layer, _ in seen] == [0, 1, 2] and max(error for _, error in seen) < 1e-5
    logits(model, ids)
    assert len(seen) == 3  # and ends with the block


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_revert_restores_the_implementation(implementation: str) -> None:
    model = tiny("llama")
    model.set_attn_implementation(implementation)
    revert(convert(model, DARK))
    assert model.config._attn_implementation == implementation


def test_linear_mode_differs(model: PreTrainedModel) -> None:
    ids = tokens(2, 40)
    before = logits(model, ids)
    after = logits(convert(model, DARK), ids)
    # Up to the first far key (sinks + window tokens) even linear mode is softmax: the difference is the features'.
    assert (after - before)[:, :6].abs().max() <= 1e-4
    assert (after - before)[:, 20:].abs().max() > 1e-2


def test_convert_takes_the_layers_it_should(family: str, model: PreTrainedModel) -> None:
    weights = {name: p.clone() for name, p in model.named_parameters()}
    assert convert(model, DARK) is model
    assert [layer.layer for layer in dark_layers(model)] == FAMILIES[family].layers
    kept = dict(model.named_parameters())
    assert all(torch.equal(kept[name], p) for name, p in weights.items())


def test_a_cache_without_states_is_not_saved(tmp_path: Path) -> None:
    model = converted(tiny("llama"), replace(DARK, method="exact"))
    with torch.no_grad():
        cache = model(tokens(1, 8), use_cache=True).past_key_values
    with pytest.raises(ConversionError, match="keeps softmax in every head"):
        save_cache(cache, model, tmp_path / "state.safetensors")


def test_a_copy_is_a_model_of_its_own() -> None:
    model, ids = linear("llama"), tokens(1, 40)
    before = logits(model, ids)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, ids), before)
    revert(other)
    assert torch.equal(logits(model, ids), before)
    assert not torch.equal(logits(other, ids), before)


class TestSlidingLayers:
    """Gemma 3: two of three layers attend through a sliding window already."""

    def test_they_stay(self) -> None:
        model = convert(tiny("gemma3"), DARK)
        has_map = [hasattr(layer.self_attn, "dark") for layer in model.model.layers]
        assert has_map == [False, False, True]

    def test_unless_told_otherwise(self) -> None:
        model = convert(tiny("gemma3"), DarkConfig(num_features=16, window=4, sinks=2, convert_sliding=True))
        assert [layer.layer for layer in dark_layers(model)] == [0, 1, 2]

    def test_they_keep_their_window(self) -> None:
        # Only layer 2 is full attention, and exact mode leaves all of them as they were: with the last layer's
        # values silenced nothing reaches further back than the two sliding layers do, 2 x (8 - 1) tokens.
        model = convert(tiny("gemma3"), EXACT)
        with torch.no_grad():
            model.model.layers[2].self_attn.v_proj.weight.zero_()
        ids = tokens(1, 40)
        changed = ids.clone()
        changed[0, 10] = 3 + (ids[0, 10] - 2) % 90
        difference = (logits(model, changed) - logits(model, ids)).abs().amax(-1)[0]
        assert difference[24] > 0
        assert difference[25:].max() == 0
