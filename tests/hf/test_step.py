"""Generation takes the compiled one-token step where it can, and what is seen of a cache is as it was without it."""

import copy
from collections.abc import Iterator

import pytest
import torch
from tolerances import STREAM, relative_error
from transformers import DynamicCache, PreTrainedModel

from darkformer.hf.cache import DarkCacheLayer, cache_bytes
from darkformer.ops import native
from darkformer.ops.native.step import Step
from hf.families import left_mask, linear, logits, positions, tokens

LENGTH = 20
pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=f"native: {native.unavailable()}")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One entry for each token that a step took."""
    taken: list[int] = []
    call = Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda self, *x: taken.append(1) or call(self, *x))
    yield taken


@torch.no_grad()
def _feed(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, start: int, stop: int, cache: object):
    place = positions(mask)[:, start:stop]
    return model(
        ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=place, past_key_values=cache, use_cache=True
    ).logits


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_steps_are_the_full_forward(family: str, steps: list[int]) -> None:
    """Left padding, grouped heads, a cap (gemma2); prefill, steps, a piece in between, steps again."""
    model, ids, mask = linear(family), tokens(2, LENGTH), left_mask([0, 5], LENGTH)
    steps.clear()  # of the trial in `convert`
    cache, parts = DynamicCache(config=model.config), []
    for start, stop in [
        (0, 7),
        *((t, t + 1) for t in range(7, 12)),
        (12, 15),
        *((t, t + 1) for t in range(15, LENGTH)),
    ]:
        parts.append(_feed(model, ids, mask, start, stop, cache))
    real = mask.bool()
    assert relative_error(torch.cat(parts, 1)[real], logits(model, ids, mask)[real]) <= STREAM
    converted = sum(isinstance(layer, DarkCacheLayer) for layer in cache.layers)
    assert len(steps) == 10 * converted > 0


def test_a_copy_goes_its_own_way(steps: list[int]) -> None:
    model, ids, mask = linear("llama"), tokens(1, LENGTH), left_mask([0], LENGTH)
    steps.clear()  # of the trial in `convert`
    cache = DynamicCache(config=model.config)
    _feed(model, ids, mask, 0, 8, cache)
    _feed(model, ids, mask, 8, 9, cache)
    other, state = copy.deepcopy(cache), cache.layers[0].state
    size = cache_bytes(cache)
    wanted = [_feed(model, ids, mask, t, t + 1, cache) for t in range(9, LENGTH)]
    found = [_feed(model, ids, mask, t, t + 1, other) for t in range(9, LENGTH)]
    assert relative_error(torch.cat(found), torch.cat(wanted)) <= STREAM
    assert int(state.count) == 9 and int(cache.layers[0].state.count) == LENGTH  # what was looked at stays
    assert cache_bytes(cache) == size == cache_bytes(other) and steps


def test_rows_are_chosen_between_steps(steps: list[int]) -> None:
    """Beam search: rows change places, and the next step starts from them."""
    model, ids, mask = linear("llama"), tokens(2, LENGTH), left_mask([0, 5], LENGTH)
    steps.clear()  # of the trial in `convert`
    cache, rows = DynamicCache(config=model.config), torch.tensor([1, 1, 0])
    _feed(model, ids, mask, 0, 11, cache)
    _feed(model, ids, mask, 11, 12, cache)
    cache.batch_select_indices(rows)
    found = [_feed(model, ids[rows], mask[rows], t, t + 1, cache) for t in range(12, LENGTH)]
    assert relative_error(torch.cat(found, 1), logits(model, ids, mask)[rows, 12:]) <= STREAM and steps


def test_where_it_is_not_taken(steps: list[int]) -> None:
    """While tokens can be taken back, where a gradient is wanted, where a row's token is a pad."""
    model, ids, mask = linear("llama"), tokens(2, LENGTH), left_mask([0, LENGTH - 3], LENGTH)
    steps.clear()  # of the trial in `convert`
    recording = DynamicCache(config=model.config)
    recording.activate_past_recording()
    padded, graded = (DynamicCache(config=model.config) for _ in range(2))
    for cache in (recording, padded, graded):
        _feed(model, ids, mask, 0, 8, cache)
    _feed(model, ids, mask, 8, 9, recording)
    _feed(model, ids, mask, 8, 9, padded)
    out = model(ids[:, 8:9], position_ids=positions(mask)[:, 8:9], past_key_values=graded, use_cache=True).logits
    out.sum().backward()
    assert not steps and all(p.grad is not None for p in model.model.layers[0].self_attn.q_proj.parameters())
