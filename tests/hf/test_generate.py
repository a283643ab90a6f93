"""`generate` works unchanged: greedy, sampling, beams, several sequences, left padding."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from darkformer import DarkConfig, convert
from darkformer.hf.cache import DarkCacheLayer
from hf.families import CORE, DARK, left_mask, linear, logits, tiny, tokens

PADS = [0, 3, 9]
NEW = 16  # crosses the window (4) and the sinks (2) several times over
SLIDING = DarkConfig(num_features=16, window=4, sinks=2, convert_sliding=True)


@pytest.fixture(params=[*CORE, "gemma3, sliding too"])
def converted(request: pytest.FixtureRequest) -> PreTrainedModel:
    family, _, sliding = request.param.partition(", ")
    return linear(family, SLIDING if sliding else DARK)


def _prompt() -> tuple[Tensor, Tensor]:
    return tokens(len(PADS), 12), left_mask(PADS, 12)


def test_greedy_is_the_argmax_of_full_forwards(converted: PreTrainedModel) -> None:
    ids, mask = _prompt()
    generated = converted.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    for _ in range(NEW):
        best = logits(converted, ids, mask)[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, best], dim=1), torch.cat([mask, mask.new_ones(len(PADS), 1)], dim=1)
    assert torch.equal(generated, ids)


def test_a_padded_batch_is_each_row_alone(converted: PreTrainedModel) -> None:
    ids, mask = _prompt()
    together = converted.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    for row, pads in enumerate(PADS):
        alone = converted.generate(ids[row : row + 1, pads:], max_new_tokens=NEW, do_sample=False)
        assert torch.equal(together[row : row + 1, pads:], alone)


def test_sampling_repeats_with_its_seed(converted: PreTrainedModel) -> None:
    ids, mask = _prompt()

    def sample(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return converted.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=True, top_k=0)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


def test_several_sequences_of_one_prompt(converted: PreTrainedModel) -> None:
    ids, mask = _prompt()
    greedy = converted.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    # Sampling from the single best token is greedy, so every copy of a prompt must give the greedy sequence.
    several = converted.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=True, top_k=1, num_return_sequences=2
    )
    assert torch.equal(several, greedy.repeat_interleave(2, dim=0))


def _beams(model: PreTrainedModel, use_cache: bool) -> tuple[Tensor, Tensor]:
    ids, mask = _prompt()
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, num_beams=4, num_return_sequences=2, do_sample=False,
        use_cache=use_cache, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    return out.sequences, out.sequences_scores


def test_beams_equal_those_without_a_cache(converted: PreTrainedModel) -> None:
    sequences, scores = _beams(converted, use_cache=True)
    expected, expected_scores = _beams(converted, use_cache=False)
    assert torch.equal(sequences, expected)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-5, atol=1e-5)


def test_beams_need_the_reordering(monkeypatch: pytest.MonkeyPatch) -> None:
    # The control of the test above: with states left where they are, beams go wrong.
    model = linear("llama")
    monkeypatch.setattr(DarkCacheLayer, "reorder_cache", lambda self, beam_idx: None)
    _, scores = _beams(model, use_cache=True)
    assert (scores - _beams(model, use_cache=False)[1]).abs().max() > 1e-3


def test_generation_can_go_on_from_its_cache(converted: PreTrainedModel) -> None:
    ids, mask = _prompt()
    options = dict(do_sample=False, return_dict_in_generate=True)
    whole = converted.generate(ids, attention_mask=mask, max_new_tokens=NEW, **options).sequences
    first = converted.generate(ids, attention_mask=mask, max_new_tokens=6, **options)
    mask = torch.cat([mask, mask.new_ones(len(PADS), 6)], dim=1)
    rest = converted.generate(
        first.sequences, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=NEW - 6, **options
    )
    assert torch.equal(rest.sequences, whole)


def test_a_static_cache_is_replaced() -> None:
    model, ids = linear("llama"), tokens(1, 12)
    usual = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    static = model.generate(ids, max_new_tokens=NEW, do_sample=False, cache_implementation="static")
    assert torch.equal(static, usual)


def test_gradients_flow_while_a_cache_is_filled() -> None:
    # A training loop that forgets use_cache=False: the states must not keep the graph, the loss must.
    model, ids = linear("llama"), tokens(2, 30)
    model(ids, labels=ids, use_cache=True).loss.backward()
    with_cache = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    torch.testing.assert_close(with_cache, model.model.layers[0].self_attn.q_proj.weight.grad)


def test_exact_layers_use_the_cache_of_softmax() -> None:
    model = convert(tiny("llama"), DarkConfig(method="exact"))
    cache = model(tokens(1, 12), use_cache=True).past_key_values
    assert cache.layers[0].keys.shape[-2] == 12
