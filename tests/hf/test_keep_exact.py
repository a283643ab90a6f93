"""Layers that stay softmax within a converted model: same numbers as softmax there, linear elsewhere, one cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from darkformer import ConfigError, ConversionError, DarkConfig, calibrate, convert, dark_layers, revert
from darkformer.hf.load import load_model
from hf.families import DARK, converted, left_mask, linear, logits, streamed, tiny, tokens

MIXED = replace(DARK, keep_exact=(1,))


def test_every_layer_kept_is_the_original() -> None:
    ids, model = tokens(2, 40), tiny("llama")
    before = logits(model, ids)
    layers = tuple(range(model.config.num_hidden_layers))
    assert (logits(convert(model, replace(DARK, keep_exact=layers)), ids) - before).abs().max() <= 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt-neox", "gpt2", "mixtral"])
def test_one_layer_kept_lies_between_and_differs_from_both(family: str) -> None:
    ids = tokens(2, 40)
    softmax, mixed, all_linear = logits(tiny(family), ids), logits(_mixed(family), ids), logits(linear(family), ids)
    assert (mixed - softmax).abs().max() > 1e-3
    assert (mixed - all_linear).abs().max() > 1e-3


def _mixed(family: str):
    model = tiny(family)
    layers = [fm.layer for fm in dark_layers(convert(model, DARK))]
    revert(model)
    return converted(model, replace(DARK, keep_exact=layers[-1:]))


def test_the_kept_layer_has_no_features_and_calibration_leaves_it() -> None:
    model = _mixed("llama")
    methods = {fm.layer: fm.config.method for fm in dark_layers(model)}
    assert set(methods.values()) == {"dark", "exact"}
    kept = [fm for fm in dark_layers(model) if fm.config.method == "exact"]
    assert not any(list(fm.parameters()) + list(fm.buffers()) for fm in kept)
    choices = calibrate(model, [tokens(4, 64), tokens(2, 64, seed=1)])
    assert [c.layer for c in choices] == [layer for layer, method in methods.items() if method == "dark"]


@pytest.mark.parametrize("cuts", [[], [17], [1, 2, 3]])
def test_prefill_and_decode_are_the_full_forward(cuts: list[int]) -> None:
    model, ids, mask = _mixed("llama"), tokens(2, 40), left_mask([0, 7], 40)
    full = logits(model, ids, mask)
    found = streamed(model, ids, mask, cuts)
    assert ((found - full) * mask[..., None]).abs().max() <= 1e-3


def test_generates_and_only_the_kept_layers_grow() -> None:
    model = _mixed("llama")
    sizes = []
    for length in (20, 60):
        out = model.generate(tokens(1, length), max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        sizes.append([type(layer).__name__ for layer in out.past_key_values.layers])
        assert out.sequences.shape == (1, length + 8)
    assert set(sizes[0]) == {"DarkCacheLayer", "DynamicLayer"}


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, ids = _mixed("llama"), tokens(1, 40)
    model.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert [fm.config.method for fm in dark_layers(again)] == [fm.config.method for fm in dark_layers(model)]


def test_configuration() -> None:
    assert DarkConfig(keep_exact=(3, 1, 3)).keep_exact == (1, 3)
    assert DarkConfig.from_dict({**MIXED.to_dict(), "keep_exact": [1]}) == MIXED
    with pytest.raises(ConfigError, match="keep_exact=-1"):
        DarkConfig(keep_exact=(-1,))
    with pytest.raises(ConversionError, match=r"keep_exact names layer 99.*choose from 0-2"):
        convert(tiny("llama"), replace(DARK, keep_exact=(99,)))
