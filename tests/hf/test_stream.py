"""Prefill and steps give the full forward's numbers, at a cache size that does not grow."""

import itertools

import pytest
import torch
from tolerances import STREAM, relative_error
from transformers import PreTrainedModel

from darkformer import DarkConfig, convert, dark_layers
from darkformer.hf.cache import DarkCacheLayer, cache_bytes
from hf.families import DARK, PAPER, disturb, left_mask, linear, logits, streamed, tiny, tokens

CONFIGS = {
    "default": DARK,
    "paper": PAPER,
    "lfk": DarkConfig(method="lfk", num_features=16, window=4, sinks=2),
    "random": DarkConfig(method="random", num_features=16, window=4, sinks=2),
    "constant": DarkConfig(method="constant", num_features=16, window=4, sinks=2),
    "local": DarkConfig(method="local", window=4, sinks=2),
    "sliding too": DarkConfig(num_features=16, window=4, sinks=2, convert_sliding=True),
}
LENGTH = 15  # sinks, nine keys that become far, and a window


def _error(model: PreTrainedModel, pads: list[int], cuts: list[int], length: int = LENGTH) -> float:
    ids, mask = tokens(len(pads), length), left_mask(pads, length)
    full, parts = logits(model, ids, mask), streamed(model, ids, mask, cuts)
    return relative_error(parts[mask.bool()], full[mask.bool()])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_prefill_and_steps(family: str, config: DarkConfig) -> None:
    model = linear(family, config)
    assert _error(model, [0, 5], list(range(12, 40)), length=40) <= STREAM


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("config", [DARK, PAPER], ids=["default", "paper"])
def test_every_split_into_two_prefills_and_steps(family: str, config: DarkConfig) -> None:
    model, ids, mask = linear(family, config), tokens(2, LENGTH), left_mask([0, 3], LENGTH)
    full = logits(model, ids, mask)[mask.bool()]
    errors = {}
    for first, second in itertools.combinations(range(1, LENGTH), 2):  # then two steps, and the rest in one piece
        cuts = [first, second, *range(second + 1, min(second + 3, LENGTH))]
        errors[first, second] = relative_error(streamed(model, ids, mask, cuts)[mask.bool()], full)
    assert max(errors.values()) <= STREAM, errors


def test_rows_that_begin_inside_a_later_piece() -> None:
    # The first prefill of row 1 holds nothing but pads: its state must stay empty.
    assert _error(linear("llama"), [0, 9], [6, 7, 12]) <= STREAM


def test_the_first_token_alone() -> None:
    assert _error(linear("llama"), [0, 0], list(range(1, LENGTH))) <= STREAM


def _state_bytes(model: PreTrainedModel, batch: int, itemsize: int = 4) -> int:
    """Bytes of the converted layers' states, from shapes alone."""
    total = 0
    for fm in dark_layers(model):
        config, groups, d = fm.config, fm.num_kv_heads, fm.head_dim
        sums = groups * config.feature_count * (d + 2) * 4  # values, their normaliser and the running maximum
        kept = groups * (config.window + config.sinks) * 2 * d * itemsize
        total += batch * (sums + kept + 8)  # and the 64-bit count of tokens
    return total


def _sliding_bytes(model: PreTrainedModel, batch: int) -> int:
    """Keys and values of the layers that stay: transformers keeps sliding_window - 1 of them."""
    config = model.config
    layers = sum(kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or [])
    return layers * batch * config.num_key_value_heads * (config.sliding_window - 1) * 2 * config.head_dim * 4


@pytest.mark.parametrize(("family", "length"), [("llama", 2000), ("gemma3", 400)])
def test_two_thousand_tokens_cost_the_bytes_of_two_hundred(family: str, length: int) -> None:
    model = linear(family)
    ids, mask = tokens(2, 9), left_mask([0, 4], 9)
    options = dict(do_sample=False, return_dict_in_generate=True, use_cache=True)
    first = model.generate(ids, attention_mask=mask, max_new_tokens=200, **options)
    expected = _state_bytes(model, batch=2) + (_sliding_bytes(model, 2) if family == "gemma3" else 0)
    assert cache_bytes(first.past_key_values) == expected
    assert first.past_key_values.get_seq_length() == 9 + 200 - 1  # the last token was never fed
    mask = torch.cat([mask, mask.new_ones(2, 200)], dim=1)
    rest = model.generate(
        first.sequences,
        attention_mask=mask,
        past_key_values=first.past_key_values,
        max_new_tokens=length - 200,
        **options,
    )
    assert rest.sequences.shape == (2, 9 + length)
    assert cache_bytes(rest.past_key_values) == expected


def test_bytes_of_a_bfloat16_model() -> None:
    # Sums stay in float32, keys and values that are kept exactly have the model's own precision.
    model = linear("llama").to(torch.bfloat16)
    out = model(tokens(1, 30), use_cache=True)
    assert cache_bytes(out.past_key_values) == _state_bytes(model, batch=1, itemsize=2)


class TestCacheLayer:
    """What transformers asks of a cache layer."""

    @staticmethod
    def _prefilled(family: str = "llama") -> tuple[PreTrainedModel, torch.Tensor, object]:
        model, ids = linear(family), tokens(3, 25)
        with torch.no_grad():
            return model, ids, model(ids[:, :24], use_cache=True).past_key_values

    @torch.no_grad()
    def _next(self, model: PreTrainedModel, ids: torch.Tensor, cache: object) -> torch.Tensor:
        return model(ids[:, 24:], past_key_values=cache, use_cache=True).logits

    @pytest.mark.parametrize("family", ["llama", "gemma3"])
    @pytest.mark.parametrize(
        ("method", "argument", "rows"),
        [
            ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
            ("batch_select_indices", torch.tensor([1, 2]), [1, 2]),
            ("batch_select_indices", torch.tensor([True, False, True]), [0, 2]),
            ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
        ],
        ids=["reorder", "select", "select by mask", "repeat"],
    )
    def test_rows_move(self, family: str, method: str, argument: object, rows: list[int]) -> None:
        model, ids, cache = self._prefilled(family)
        full = logits(model, ids)[:, 24:]
        getattr(cache, method)(argument)
        assert relative_error(self._next(model, ids[rows], cache), full[rows]) <= STREAM

    def test_reset_forgets(self) -> None:
        model, ids, cache = self._prefilled()
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache_bytes(cache) == 0
        with torch.no_grad():
            again = model(ids, past_key_values=cache, use_cache=True).logits
        assert relative_error(again, logits(model, ids)) <= STREAM

    def test_converted_layers_only(self) -> None:
        _, _, cache = self._prefilled("gemma3")
        assert [isinstance(layer, DarkCacheLayer) for layer in cache.layers] == [False, False, True]

    def test_the_state_holds_no_graph(self) -> None:
        model = disturb(convert(tiny("llama"), DARK))
        cache = model(tokens(1, 30), use_cache=True).past_key_values
        assert not any(layer.state.feature_values.requires_grad for layer in cache.layers)
