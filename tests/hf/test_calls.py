"""A call's state is passed along with the call: threads, several attentions a forward pass, caches that travel."""

import copy
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers as tf
from tolerances import STREAM, relative_error
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import DynamicCache, PreTrainedModel

from darkformer import DarkConfig, attention, convert, dark_layers, feature_map
from darkformer.errors import ConversionError
from darkformer.hf.interface import observing
from darkformer.hf.layers import converted_modules, layer_of
from darkformer.hf.stream import Stream
from hf.families import DARK, disturb, left_mask, linear, logits, tiny, tokens

SMALL = dict(vocab_size=99, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, initializer_range=0.15, pad_token_id=0, bos_token_id=1,
             eos_token_id=None)  # fmt: skip


@torch.no_grad()
def in_steps(model: PreTrainedModel, ids: Tensor, sizes: list[int]) -> Tensor:
    """Logits of the pieces of `ids`, through the cache that the model makes."""
    cache, parts = None, []
    for part in ids.split(sizes, dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    return torch.cat(parts, dim=1)


class TestThreads:
    def test_generations_at_once_are_those_one_after_the_other(self) -> None:
        model = linear("llama")
        prompts = [tokens(1, 12 + 5 * i) for i in range(6)]

        def run(ids: Tensor) -> Tensor:
            return model.generate(ids, max_new_tokens=16, do_sample=False)

        alone = [run(ids) for ids in prompts]
        with ThreadPoolExecutor(4) as pool:
            for found, wanted in zip(pool.map(run, prompts * 4), alone * 4, strict=True):
                assert torch.equal(found, wanted)

    def test_a_thread_is_not_observed_by_another(self) -> None:
        model, ids = linear("llama"), tokens(1, 30)
        wanted, seen, entered, done = logits(model, ids), [], threading.Event(), threading.Event()

        def observe() -> None:
            with observing(model, lambda *call: seen.append(threading.get_ident()), softmax=True):
                entered.set()
                done.wait()
                model(ids)

        other = threading.Thread(target=observe)
        other.start()
        entered.wait()
        found = logits(model, ids)  # while the other thread observes softmax attention
        done.set()
        other.join()
        assert torch.equal(found, wanted)
        assert len(seen) == 3 and set(seen) == {other.ident}


class TestSlots:
    def test_differential_attention_has_two(self) -> None:
        torch.manual_seed(0)
        model = tf.DiffLlamaForCausalLM(tf.DiffLlamaConfig(**SMALL)).eval()
        disturb(convert(model, DARK))
        ids = tokens(2, 24)
        whole = logits(model, ids)
        assert relative_error(in_steps(model, ids, [1] * 24), whole) <= STREAM
        assert relative_error(in_steps(model, ids, [9, 7, 1, 1, 6]), whole) <= STREAM
        cache = model(ids[:, :10], use_cache=True).past_key_values
        cache.reorder_cache(torch.tensor([1, 0]))
        moved = model(ids.flip(0)[:, 10:], past_key_values=cache).logits
        assert relative_error(moved, whole.flip(0)[:, 10:]) <= STREAM

    def test_differential_attention_takes_tokens_back(self) -> None:
        model = tf.DiffLlamaForCausalLM(tf.DiffLlamaConfig(**SMALL)).eval()
        disturb(convert(model, DARK))
        ids, cache = tokens(1, 24), DynamicCache(config=model.config)
        cache.activate_past_recording()
        with torch.no_grad():
            model(ids, past_key_values=cache)
            cache.crop(-6)
            again = model(ids[:, 18:], past_key_values=cache).logits
        assert relative_error(again, logits(model, ids)[:, 18:]) <= STREAM

    def test_attention_beside_a_mixer(self) -> None:
        torch.manual_seed(0)
        model = tf.FalconH1ForCausalLM(
            tf.FalconH1Config(**SMALL, head_dim=12, mamba_d_state=8, mamba_n_heads=8, mamba_d_head=12, mamba_d_ssm=96,
                              mamba_n_groups=1, mamba_chunk_size=8)
        ).eval()  # fmt: skip
        disturb(convert(model, DARK))
        ids = tokens(2, 20)
        assert relative_error(in_steps(model, ids, [8, *[1] * 12]), logits(model, ids)) <= STREAM
        cache = model(ids[:, :12], use_cache=True).past_key_values
        cache.reorder_cache(torch.tensor([1, 1]))  # both halves of a layer move
        with torch.no_grad():
            moved = model(ids[1:, 12:].repeat(2, 1), past_key_values=cache).logits
        assert relative_error(moved, logits(model, ids)[1:, 12:].repeat(2, 1, 1)) <= STREAM
        assert model.generate(ids, max_new_tokens=4, num_beams=2).shape == (2, 24)

    def test_one_attention_for_several_layers(self) -> None:
        torch.manual_seed(0)
        model = tf.HrmTextForCausalLM(
            tf.HrmTextConfig(**{**SMALL, "num_key_value_heads": 4, "num_hidden_layers": 3}, head_dim=12)
        ).eval()
        convert(model, DARK)
        assert any(len(layer_of(m).slots) > 1 for m in converted_modules(model))
        ids = tokens(2, 20)
        assert relative_error(in_steps(model, ids, [8, *[1] * 12]), logits(model, ids)) <= STREAM


class TestTravel:
    """A cache is pickled, saved by torch and copied, with its model or without."""

    def test_a_pickle_goes_on_with_the_same_model(self) -> None:
        model, ids = linear("llama"), tokens(2, 24)
        with torch.no_grad():
            cache = model(ids[:, :14], use_cache=True).past_key_values
            model(ids[:, 14:15], past_key_values=cache)  # the state is in a step's hands
            other = pickle.loads(pickle.dumps(cache))
            file = io.BytesIO()
            torch.save(cache, file)
            file.seek(0)
            third = torch.load(file, weights_only=False)
            wanted = logits(model, ids)[:, 15:]
            for one in (cache, other, third):
                assert relative_error(model(ids[:, 15:], past_key_values=one).logits, wanted) <= STREAM

    def test_a_copy_of_model_and_cache(self) -> None:
        model, ids = linear("llama"), tokens(2, 24)
        with torch.no_grad():
            cache = model(ids[:, :14], use_cache=True).past_key_values
            for order in ((model, cache), (cache, model)):
                pair = copy.deepcopy(order)
                twin, own = pair if isinstance(pair[1], DynamicCache) else pair[::-1]
                found = twin(ids[:, 14:], past_key_values=own).logits
                assert relative_error(found, logits(model, ids)[:, 14:]) <= STREAM

    def test_a_copy_under_other_features_is_refused(self) -> None:
        model, ids = linear("llama"), tokens(1, 24)
        cache = copy.deepcopy(model(ids[:, :14], use_cache=True).past_key_values)
        with torch.no_grad():
            next(dark_layers(model)).projection.mul_(1.1)
        with pytest.raises(ConversionError, match="filled by another converted model"):
            model(ids[:, 14:], past_key_values=cache)


class TestInjectedKeys:
    """Keys and values that came without queries: a softmax model's cache, or the prefix of prefix tuning."""

    def test_they_are_read_as_the_first_tokens(self) -> None:
        torch.manual_seed(0)
        made = disturb(feature_map(DARK, num_heads=6, num_kv_heads=2, head_dim=8))
        q, k, v = torch.randn(2, 6, 20, 8), torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8)
        k, v = k.requires_grad_(), v.requires_grad_()
        options: dict[str, Any] = dict(scaling=8**-0.5, softcap=None, is_causal=True)
        mask = left_mask([0, 3], 20).bool()
        wanted = attention(q, k, v, made, key_mask=mask, scaling=options["scaling"])[:, :, 9:]
        weight = torch.randn_like(wanted)
        expected = torch.autograd.grad((wanted * weight).sum(), (k, v))
        stream = Stream()
        stream.absorb(k[:, :, :9], v[:, :, :9], mask[:, :9], made, **options)
        found = stream.extend(q[:, :, 9:], k[:, :, 9:], v[:, :, 9:], mask[:, 9:], made, **options)
        assert relative_error(found, wanted) <= STREAM
        for a, b in zip(torch.autograd.grad((found * weight).sum(), (k, v)), expected, strict=True):
            assert relative_error(a, b) <= STREAM

    def test_a_cache_of_softmax_keys(self) -> None:
        config = copy.deepcopy(tiny("llama").config)
        config.num_hidden_layers = 1  # whose keys do not depend on how attention is computed
        model, ids, mask = tf.LlamaForCausalLM(config).eval(), tokens(2, 24), left_mask([0, 4], 24)
        with torch.no_grad():
            cache = model(ids[:, :15], attention_mask=mask[:, :15], use_cache=True).past_key_values
            disturb(convert(model, DARK))
            found = model(ids[:, 15:], attention_mask=mask, past_key_values=cache).logits
            wanted = model(ids, attention_mask=mask, use_cache=False).logits[:, 15:]
        assert relative_error(found, wanted) <= STREAM

    def test_prefix_tuning_trains(self) -> None:
        peft = pytest.importorskip("peft")
        prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
        tuned = peft.get_peft_model(linear("llama"), prefix)
        ids, mask = tokens(2, 20), left_mask([0, 4], 20)
        tuned(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        gradients = [p.grad.abs().max() for p in tuned.parameters() if p.grad is not None]
        assert gradients and all(0 < g < float("inf") for g in gradients)
        assert tuned.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3).shape == (2, 23)


def test_local_attention_needs_no_features_to_stream() -> None:
    model = convert(tiny("llama"), DarkConfig(method="local", window=4))
    ids = tokens(2, 20)
    assert relative_error(in_steps(model, ids, [6, *[1] * 14]), logits(model, ids)) <= STREAM


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class TestParametrized:
    """What `torch.nn.utils.parametrize` and peft put in a tensor's place counts, and a state knows when it changes."""

    @pytest.mark.parametrize("name", ["geometry", "geometry_offset"])
    def test_a_cache_follows(self, name: str) -> None:
        model, ids = linear("llama"), tokens(1, 20)
        factors = [Scaled() for _ in dark_layers(model)]
        for fm, scaled in zip(dark_layers(model), factors, strict=True):
            parametrize.register_parametrization(fm, name, scaled)
        before = logits(model, ids)
        for scaled in factors:
            scaled.factor.data.fill_(1.5)
        wanted = logits(model, ids)
        assert relative_error(wanted, before) > 1e-4
        assert relative_error(in_steps(model, ids, [12, 1, 1, 1, 5]), wanted) <= STREAM
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
            model(ids[:, :1], past_key_values=cache, use_cache=True)
            factors[0].factor.data.fill_(2)  # leaves no trace but the numbers
            for other in (cache, copy.deepcopy(cache)):
                with pytest.raises(ConversionError, match="layer 0 of past_key_values was filled"):
                    model(ids[:, :1], past_key_values=other, use_cache=True)

    def test_peft_targets_an_offset(self) -> None:
        peft = pytest.importorskip("peft")
        model, ids = linear("llama"), tokens(1, 20)
        plain = logits(model, ids)
        settings = peft.LoraConfig(
            r=2, target_modules=[], target_parameters=["dark.geometry_offset"], init_lora_weights=False
        )
        adapted = peft.get_peft_model(model, settings)
        wanted = logits(adapted, ids)
        assert relative_error(wanted, plain) > 1e-4
        assert relative_error(in_steps(adapted, ids, [12, 1, 1, 1, 5]), wanted) <= STREAM
        learned = [p for p in adapted.parameters() if p.requires_grad]
        for use_cache in (False, True):
            adapted.zero_grad()
            adapted(ids, labels=ids, use_cache=use_cache).loss.backward()
            assert all(p.grad is not None and p.grad.any() for p in learned)
        with torch.no_grad():
            cache = adapted(ids, use_cache=True).past_key_values
            adapted(ids[:, :1], past_key_values=copy.deepcopy(cache), use_cache=True)
            with adapted.disable_adapter(), pytest.raises(ConversionError, match="filled before its feature map"):
                adapted(ids[:, :1], past_key_values=cache, use_cache=True)
            with adapted.disable_adapter(), pytest.raises(ConversionError, match="filled by another"):
                adapted(ids[:, :1], past_key_values=copy.deepcopy(cache), use_cache=True)
            learned[0].data.mul_(1.5)
            with pytest.raises(ConversionError, match="filled before its feature map"):
                adapted(ids[:, :1], past_key_values=cache, use_cache=True)
