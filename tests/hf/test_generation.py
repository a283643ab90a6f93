"""The cases of transformers' own `GenerationTesterMixin` on a converted tiny Llama, and what users build on `generate`.

The mixin is in transformers' repository, not in its wheel, so its cases are written out here, with the numbers checked
and not only the shapes. Which do not apply, and why, is in docs/generate.md.
"""

import inspect
from pathlib import Path
from threading import Thread

import pytest
import torch
from hang import HANG_SECONDS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.generation import GenerationMixin

from darkformer.hf.cache import DarkCacheLayer, cache_bytes
from hf.families import DARK, VOCABULARY, left_mask, linear, logits, tiny, tokens

NEW = 14
GREEDY = dict(do_sample=False, max_new_tokens=NEW)
DICT = dict(return_dict_in_generate=True, output_scores=True, output_logits=True)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return linear("llama")


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return tokens(1, 12)


@pytest.fixture(scope="module")
def greedy(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model.generate(ids, **GREEDY)


class TestMixin:
    """Named as there."""

    def test_inherits_generation_mixin(self, model: PreTrainedModel) -> None:
        assert isinstance(model, GenerationMixin)
        assert model.can_generate()

    @pytest.mark.parametrize("use_cache", [True, False])
    def test_greedy_generate_dict_outputs(
        self, model: PreTrainedModel, ids: Tensor, greedy: Tensor, use_cache: bool
    ) -> None:
        out = model.generate(ids, **GREEDY, **DICT, output_hidden_states=True, use_cache=use_cache)
        assert torch.equal(out.sequences, greedy)
        assert len(out.scores) == len(out.logits) == len(out.hidden_states) == NEW
        assert [h[-1].shape[1] for h in out.hidden_states] == [12] + [1 if use_cache else 12 + i for i in range(1, NEW)]
        full = logits(model, greedy)[:, 11:-1]
        torch.testing.assert_close(torch.stack(out.logits, dim=1), full, rtol=0, atol=2e-5)

    def test_sample_generate_dict_output(self, model: PreTrainedModel, ids: Tensor) -> None:
        torch.manual_seed(0)
        out = model.generate(ids, do_sample=True, top_k=0, max_new_tokens=NEW, num_return_sequences=3, **DICT)
        assert out.sequences.shape == (3, 12 + NEW)
        full = logits(model, out.sequences)[:, 11:-1]  # the distribution that each token was drawn from
        torch.testing.assert_close(torch.stack(out.logits, dim=1), full, rtol=0, atol=2e-5)

    @pytest.mark.parametrize("use_cache", [True, False])
    def test_beam_search_generate_dict_output(self, model: PreTrainedModel, ids: Tensor, use_cache: bool) -> None:
        options = dict(do_sample=False, max_new_tokens=NEW, num_beams=3, num_return_sequences=2)
        out = model.generate(ids, **options, **DICT, use_cache=use_cache)
        likely = logits(model, out.sequences)[:, 11:-1].log_softmax(-1)
        total = likely.gather(2, out.sequences[:, 12:, None]).sum((1, 2)) / NEW
        torch.testing.assert_close(out.sequences_scores, total, rtol=0, atol=2e-5)

    def test_beam_sample_generate(self, model: PreTrainedModel, ids: Tensor) -> None:
        def sample(use_cache: bool) -> Tensor:
            torch.manual_seed(3)
            return model.generate(ids, do_sample=True, num_beams=2, max_new_tokens=NEW, use_cache=use_cache)

        assert torch.equal(sample(True), sample(False))

    def test_generate_without_input_ids(self, model: PreTrainedModel) -> None:
        begun = model.generate(do_sample=False, max_new_tokens=NEW, remove_invalid_values=True)
        assert torch.equal(begun, model.generate(torch.tensor([[1]]), **GREEDY))  # from the first token of all

    @pytest.mark.parametrize("num_beams", [1, 2], ids=["greedy", "beams"])
    def test_generate_from_inputs_embeds(self, model: PreTrainedModel, ids: Tensor, num_beams: int) -> None:
        options = dict(GREEDY, num_beams=num_beams)
        embedded = model.get_input_embeddings()(ids)
        expected = model.generate(ids, **options)
        assert torch.equal(model.generate(inputs_embeds=embedded, **options), expected[:, 12:])
        assert torch.equal(model.generate(ids, inputs_embeds=embedded, **options), expected)

    def test_generate_from_inputs_embeds_with_static_cache(
        self, model: PreTrainedModel, ids: Tensor, greedy: Tensor
    ) -> None:
        embedded = model.get_input_embeddings()(ids)
        out = model.generate(inputs_embeds=embedded, cache_implementation="static", **GREEDY)
        assert torch.equal(out, greedy[:, 12:])

    def test_generate_from_random_inputs_embeds(self, model: PreTrainedModel) -> None:
        embedded = torch.randn(2, 12, 48)
        found, wanted = (model.generate(inputs_embeds=embedded, use_cache=use, **GREEDY) for use in (True, False))
        assert torch.equal(found, wanted) and not torch.equal(found[0], found[1])

    def test_generate_continue_from_past_key_values(self, model: PreTrainedModel, ids: Tensor, greedy: Tensor) -> None:
        first = model.generate(ids, do_sample=False, max_new_tokens=5, return_dict_in_generate=True)
        rest = model.generate(
            first.sequences, past_key_values=first.past_key_values, do_sample=False, max_new_tokens=NEW - 5
        )
        assert torch.equal(rest, greedy)

    def test_generate_continue_from_inputs_embeds(self, model: PreTrainedModel, ids: Tensor, greedy: Tensor) -> None:
        embedded = model.get_input_embeddings()(ids)
        options = dict(do_sample=False, return_dict_in_generate=True)
        first = model.generate(inputs_embeds=embedded, max_new_tokens=5, **options)
        whole = torch.cat([embedded, model.get_input_embeddings()(first.sequences)], dim=1)
        rest = model.generate(
            inputs_embeds=whole, past_key_values=first.past_key_values, max_new_tokens=NEW - 5, **options
        )
        assert torch.equal(torch.cat([first.sequences, rest.sequences], dim=1), greedy[:, 12:])

    def test_generate_with_and_without_position_ids(self, model: PreTrainedModel, ids: Tensor, greedy: Tensor) -> None:
        assert torch.equal(model.generate(ids, position_ids=torch.arange(12)[None], **GREEDY), greedy)

    def test_left_padding_compatibility(self, model: PreTrainedModel, ids: Tensor) -> None:
        padded = torch.cat([torch.zeros(1, 7, dtype=torch.int64), ids], dim=1)
        last = logits(model, padded, left_mask([7], 19))[:, -1]
        torch.testing.assert_close(last, logits(model, ids)[:, -1], rtol=0, atol=1e-5)

    def test_past_key_values_format(self, model: PreTrainedModel, ids: Tensor) -> None:
        cache = model.generate(ids, **GREEDY, return_dict_in_generate=True).past_key_values
        assert isinstance(cache, DynamicCache)
        assert len(cache) == 3
        assert all(isinstance(layer, DarkCacheLayer) for layer in cache.layers)
        assert cache.get_seq_length() == 12 + NEW - 1
        assert {tuple(layer.state.feature_values.shape) for layer in cache.layers} == {(1, 2, 16, 8)}

    @pytest.mark.parametrize("kind", ["static", "dynamic"])
    def test_generate_with_cache_implementations(
        self, model: PreTrainedModel, ids: Tensor, greedy: Tensor, kind: str
    ) -> None:
        assert torch.equal(model.generate(ids, cache_implementation=kind, **GREEDY), greedy)

    def test_generate_methods_with_logits_to_keep(self, model: PreTrainedModel, ids: Tensor, greedy: Tensor) -> None:
        assert "logits_to_keep" in inspect.signature(model.forward).parameters
        assert torch.equal(model.generate(ids, logits_to_keep=0, **GREEDY), greedy)

    def test_prefill_in_pieces(self, model: PreTrainedModel, ids: Tensor, greedy: Tensor) -> None:
        assert torch.equal(model.generate(ids, prefill_chunk_size=5, **GREEDY), greedy)

    def test_resize_tokens_embeddings(self, ids: Tensor) -> None:
        model = linear("llama")
        wanted = logits(model, ids)
        model.resize_token_embeddings(VOCABULARY + 8)
        torch.testing.assert_close(logits(model, ids)[..., :VOCABULARY], wanted)


class TestAssisted:
    """Assisted decoding takes rejected candidates back and gives greedy's tokens."""

    @pytest.mark.parametrize("assistant", ["itself", "another", "softmax"])
    def test_assisted_decoding_matches_greedy_search(
        self, model: PreTrainedModel, ids: Tensor, greedy: Tensor, assistant: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        removed: list[int] = []
        crop = DarkCacheLayer.crop
        monkeypatch.setattr(DarkCacheLayer, "crop", lambda self, n: removed.append(-n) or crop(self, n))
        if assistant == "itself":
            draft = linear("llama")
        else:  # a draft that is often right: the softmax model, or the converted model with a little noise
            draft = tiny("llama") if assistant == "softmax" else linear("llama")
            with torch.no_grad():
                draft.lm_head.weight.add_(0.05 * torch.randn(draft.lm_head.weight.shape))
        draft.generation_config.num_assistant_tokens = 4
        draft.generation_config.assistant_confidence_threshold = 0.0
        out = model.generate(ids, assistant_model=draft, **GREEDY, return_dict_in_generate=True)
        assert torch.equal(out.sequences, greedy)
        assert removed and (max(removed) > 0 or assistant == "itself")
        assert out.past_key_values.get_seq_length() == 12 + NEW - 1
        assert cache_bytes(out.past_key_values) == cache_bytes(
            model.generate(ids, **GREEDY, return_dict_in_generate=True).past_key_values
        )

    def test_a_converted_draft_of_a_softmax_model(self, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        removed: list[int] = []
        crop = DarkCacheLayer.crop
        monkeypatch.setattr(DarkCacheLayer, "crop", lambda self, n: removed.append(-n) or crop(self, n))
        target, draft = tiny("llama"), linear("llama")
        draft.generation_config.num_assistant_tokens = 4
        draft.generation_config.assistant_confidence_threshold = 0.0
        assert torch.equal(target.generate(ids, assistant_model=draft, **GREEDY), target.generate(ids, **GREEDY))
        assert max(removed) > 0  # the draft's own states were taken back

    def test_with_sliding_layers_and_a_cap(self) -> None:
        for family in ("gemma3", "gemma2"):
            model, draft, ids = linear(family), linear(family), tokens(1, 12)
            with torch.no_grad():
                draft.get_input_embeddings().weight.mul_(1.1)
            draft.generation_config.num_assistant_tokens = 4
            assert torch.equal(model.generate(ids, assistant_model=draft, **GREEDY), model.generate(ids, **GREEDY))

    def test_assisted_decoding_sample(self, model: PreTrainedModel, ids: Tensor) -> None:
        def sample() -> Tensor:
            torch.manual_seed(0)
            return model.generate(ids, assistant_model=linear("llama"), do_sample=True, top_k=0, max_new_tokens=NEW)

        assert sample().shape == (1, 12 + NEW)
        assert torch.equal(sample(), sample())

    def test_prompt_lookup_decoding_matches_greedy_search(self, model: PreTrainedModel) -> None:
        ids = tokens(1, 8).repeat(1, 3)  # repetition, so that the lookup has candidates, which are rejected
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), model.generate(ids, **GREEDY))

    def test_prompt_lookup_decoding_stops_at_eos(self, model: PreTrainedModel) -> None:
        ids = tokens(1, 8).repeat(1, 3)
        eos = int(model.generate(ids, **GREEDY)[0, 28])
        plain = model.generate(ids, eos_token_id=eos, **GREEDY)
        assert plain.shape[1] < 24 + NEW
        assert torch.equal(model.generate(ids, eos_token_id=eos, prompt_lookup_num_tokens=3, **GREEDY), plain)


TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<begin>", "<end>", "user", "assistant", *(f"w{i}" for i in range(VOCABULARY - 5))]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    inner.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<begin>", padding_side="left")
    made.chat_template = TEMPLATE
    return made


class TestAround:
    """Streaming, pipelines, chat templates, stopping."""

    def test_streaming(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, ids: Tensor, greedy: Tensor,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        wanted = tokenizer.decode(greedy[0, 12:])
        model.generate(ids, streamer=TextStreamer(tokenizer, skip_prompt=True), **GREEDY)
        assert capsys.readouterr().out.strip() == wanted
        pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=HANG_SECONDS)
        thread = Thread(target=model.generate, args=(ids,), kwargs=dict(streamer=pieces, **GREEDY))
        thread.start()
        found = list(pieces)
        thread.join()
        assert len(found) > 3
        assert "".join(found) == wanted

    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_pipeline(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch_size: int) -> None:
        prompts = ["w5 w7 w9 w11 w2 w3 w8", "w1", "w20 w21 w22"]  # batched: padded on the left
        write = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu")
        found = [out[0]["generated_text"] for out in write(prompts, return_full_text=False, **GREEDY)]
        for prompt, text in zip(prompts, found, strict=True):
            given = tokenizer(prompt, return_tensors="pt").input_ids
            wanted = model.generate(given, **GREEDY)[0, given.shape[1] :]
            assert text.split() == tokenizer.decode(wanted, skip_special_tokens=True).split()

    def test_pipeline_from_a_folder(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        prompt, options = "w5 w7 w9 w11 w2 w3 w8", dict(return_full_text=False, **GREEDY)
        write = pipeline("text-generation", model=str(tmp_path), device="cpu")
        ours = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        softmax = pipeline("text-generation", model=tiny("llama"), tokenizer=tokenizer, device="cpu")
        assert write(prompt, **options) == ours(prompt, **options) != softmax(prompt, **options)

    def test_chat(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        chat = [{"role": "user", "content": "w5 w7 w9"}]
        write = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        answer = write(chat, **GREEDY)[0]["generated_text"][-1]
        assert answer["role"] == "assistant"
        given = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        assert tokenizer.decode(given["input_ids"][0]) == "user w5 w7 w9 <end> assistant"
        out = model.generate(**given, **GREEDY)
        wanted = tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer["content"].split() == wanted.split()

    def test_a_chat_goes_on_from_its_cache(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        chat, cache = [{"role": "user", "content": "w5 w7 w9"}], DynamicCache(config=model.config)
        for turn in range(3):
            given = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
            given = given["input_ids"] if not isinstance(given, Tensor) else given
            with_cache = model.generate(given, past_key_values=cache, do_sample=False, max_new_tokens=4)
            assert torch.equal(with_cache, model.generate(given, do_sample=False, max_new_tokens=4))
            text = tokenizer.decode(with_cache[0, given.shape[1] :])
            chat += [{"role": "assistant", "content": text}, {"role": "user", "content": f"w{30 + turn}"}]

    def test_stopping_criteria_and_processors(self, model: PreTrainedModel, ids: Tensor, greedy: Tensor) -> None:
        class Five(StoppingCriteria):
            def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
                return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 17)

        assert torch.equal(model.generate(ids, stopping_criteria=[Five()], **GREEDY), greedy[:, :17])
        banned = int(greedy[0, 12])
        assert banned not in model.generate(ids, bad_words_ids=[[banned]], **GREEDY)[0, 12:].tolist()


def test_the_state_is_what_is_generated_with() -> None:
    # Control of this whole file: with states that forget, generation goes another way.
    model, ids = linear("llama", DARK), tokens(1, 30)
    wanted = model.generate(ids, **GREEDY)
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    for layer in cache.layers:
        layer.state.feature_values.zero_()
    assert not torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), wanted)
