"""`convert` looks at what the model's attention receives, and converts it right or refuses at once."""

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from tolerances import STREAM, relative_error
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from darkformer import ConversionError, DarkConfig, InputError, convert, dark_layers, revert
from darkformer.hf.layers import attachment_of, converted_modules
from darkformer.hf.plan import plan_conversion
from hf.families import DARK, disturb, left_mask, linear, logits, positions, tiny, tokens

EXACT = DarkConfig(method="exact")
TEXT = dict(vocab_size=99, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.15, pad_token_id=0)  # fmt: skip
ENDS = dict(bos_token_id=1, eos_token_id=None)
DECODER = dict(vocab_size=99, d_model=48, encoder_attention_heads=4, decoder_layers=2, decoder_attention_heads=4,
               decoder_ffn_dim=64, max_position_embeddings=64, init_std=0.15, is_decoder=True)  # fmt: skip


def built(model: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    return model().eval()


def converted_names(model: PreTrainedModel) -> list[str]:
    ours = {id(module) for module in converted_modules(model)}
    return [name for name, module in model.named_modules() if id(module) in ours]


class TestCausality:
    @staticmethod
    def bigbird() -> PreTrainedModel:
        return tf.BigBirdPegasusForCausalLM(tf.BigBirdPegasusConfig(**DECODER, add_cross_attention=False))

    @pytest.mark.parametrize("config", [EXACT, DARK], ids=["exact", "linear"])
    def test_it_follows_the_mask_and_not_a_flag(self, config: DarkConfig, tmp_path: Path) -> None:
        model, original = built(self.bigbird), built(self.bigbird)
        assert not any(getattr(m, "is_causal", False) for m in model.modules())
        convert(model, config)
        ids = tokens(1, 20)
        other = ids.clone()
        other[:, -1] += 1
        assert torch.equal(logits(model, ids)[:, :-1], logits(model, other)[:, :-1])
        if config is EXACT:
            assert relative_error(logits(model, ids), logits(original, ids)) <= STREAM
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(logits(loaded, ids), logits(model, ids))

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_a_decoder_made_bidirectional_by_its_flags(self, implementation: str) -> None:
        """Eager attention goes by the mask alone; torch's goes by the flag until there are pads, which is neither."""
        model, original = tiny("llama"), tiny("llama")
        for one in (model, original):
            one.set_attn_implementation(implementation)
            for layer in one.model.layers:
                layer.self_attn.is_causal = False
        ids, mask = tokens(2, 20), left_mask([0, 5], 20)
        if implementation == "sdpa":
            with pytest.raises(ConversionError, match="causal with padding and bidirectional without"):
                convert(model, EXACT)
            assert torch.equal(logits(model, ids), logits(original, ids))
        else:
            convert(model, EXACT)
            assert relative_error(logits(model, ids), logits(original, ids)) <= STREAM
            real = mask.bool()
            assert relative_error(logits(model, ids, mask)[real], logits(original, ids, mask)[real]) <= STREAM


class TestCrossAttention:
    """A decoder alone may attend to another sequence, whatever its config says of encoders."""

    @staticmethod
    def bert() -> PreTrainedModel:
        return tf.BertLMHeadModel(
            tf.BertConfig(vocab_size=99, num_attention_heads=4, hidden_size=48, num_hidden_layers=2, pad_token_id=0,
                          initializer_range=0.15, is_decoder=True, add_cross_attention=True)
        )  # fmt: skip

    @staticmethod
    def gpt2() -> PreTrainedModel:
        config = tf.GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=99, initializer_range=0.3)
        config.add_cross_attention = True
        return tf.GPT2LMHeadModel(config)

    @staticmethod
    def mbart() -> PreTrainedModel:
        return tf.MBartForCausalLM(tf.MBartConfig(**DECODER, add_cross_attention=True, scale_embedding=False))

    @pytest.mark.parametrize("build", [bert, gpt2, mbart], ids=["BERT", "GPT-2", "mBART"])
    def test_it_stays_as_it_is(self, build: Callable[[], PreTrainedModel]) -> None:
        model, original = built(build), built(build)
        ids, states, mask = tokens(2, 20), torch.randn(2, 13, 48), left_mask([0, 4], 20)
        given: dict[str, Any] = dict(encoder_hidden_states=states, encoder_attention_mask=torch.ones(2, 13))
        given["encoder_attention_mask"][1, 9:] = 0
        convert(model, EXACT)
        assert not any("cross" in name or "encoder_attn" in name for name in converted_names(model))
        with torch.no_grad():
            wanted = original(ids, attention_mask=mask, use_cache=False, **given).logits[mask.bool()]
            found = model(ids, attention_mask=mask, use_cache=False, **given).logits[mask.bool()]
            assert relative_error(found, wanted) <= STREAM
            disturb(convert(revert(model), DARK))
            whole = model(ids, use_cache=False, **given).logits
            first = model(ids[:, :12], use_cache=True, **given)
            second = model(ids[:, 12:], past_key_values=first.past_key_values, use_cache=True, **given)
        assert relative_error(torch.cat([first.logits, second.logits], 1), whole) <= STREAM


class TestTowers:
    @staticmethod
    def voxtral() -> PreTrainedModel:
        audio = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128, num_mel_bins=16,
                     max_source_positions=20)  # fmt: skip
        text = dict(TEXT, model_type="llama")
        return tf.VoxtralForConditionalGeneration(
            tf.VoxtralConfig(text_config=text, audio_token_id=98, audio_config=audio)
        )

    @staticmethod
    def idefics2() -> PreTrainedModel:
        vision = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16,
                      patch_size=8)  # fmt: skip
        perceiver = dict(resampler_n_latents=2, resampler_depth=1, resampler_n_heads=2, resampler_head_dim=16,
                         num_key_value_heads=1, hidden_size=48)  # fmt: skip
        text = dict(TEXT, model_type="mistral", sliding_window=None)
        return tf.Idefics2ForConditionalGeneration(
            tf.Idefics2Config(image_token_id=98, text_config=text, vision_config=vision, perceiver_config=perceiver)
        )

    def test_they_stay_and_are_named(self, caplog: pytest.LogCaptureFixture) -> None:
        for build, kept in ((self.voxtral, "audio_tower"), (self.idefics2, "vision_model")):
            model = built(build)
            caplog.clear()
            with caplog.at_level(logging.INFO, "darkformer"):
                convert(model, DARK)
            names = converted_names(model)
            assert len(names) == 2 and not any("audio" in n or "vision" in n or "perceiver" in n for n in names)
            assert "2 attention layers are converted: 0-1." in caplog.text
            assert kept in caplog.text and "not part of the language model's self-attention" in caplog.text


class TestHeads:
    """As they arrive, whatever the configuration says."""

    @staticmethod
    def gemma4() -> PreTrainedModel:
        return tf.Gemma4ForCausalLM(
            tf.Gemma4TextConfig(
                **{**TEXT, "num_hidden_layers": 4}, num_global_key_value_heads=1, head_dim=12, global_head_dim=24,
                sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=0,
                vocab_size_per_layer_input=99, hidden_size_per_layer_input=8, attention_k_eq_v=True,
            )
        )  # fmt: skip

    @staticmethod
    def jetmoe() -> PreTrainedModel:
        return tf.JetMoeForCausalLM(
            tf.JetMoeConfig(vocab_size=99, hidden_size=48, num_hidden_layers=2, pad_token_id=0, num_key_value_heads=2,
                            kv_channels=12, num_experts_per_tok=2, num_local_experts=4, intermediate_size=64, **ENDS)
        )  # fmt: skip

    @pytest.mark.parametrize(("build", "heads"), [(gemma4, (4, 1, 24)), (jetmoe, (4, 4, 12))], ids=["Gemma4", "JetMoE"])
    def test_they_may_differ(
        self, build: Callable[[], PreTrainedModel], heads: tuple[int, int, int], tmp_path: Path
    ) -> None:
        model, ids, mask = built(build), tokens(2, 20), left_mask([0, 5], 20)
        disturb(convert(model, DARK))
        assert {(x.num_heads, x.num_kv_heads, x.head_dim) for x in dark_layers(model)} == {heads}
        assert logits(model, ids, mask).isfinite().all()
        model.save_pretrained(
            tmp_path
        )  # what was found out is saved: no trial is possible before the weights are there
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(logits(loaded, ids), logits(model, ids))


class TestWhatAConvertedLayerCannotFollow:
    def test_chunks_stay(self) -> None:
        model = built(
            lambda: tf.Llama4ForCausalLM(
                tf.Llama4TextConfig(
                    **{**TEXT, "num_hidden_layers": 4}, intermediate_size_mlp=64, head_dim=12, num_local_experts=2,
                    num_experts_per_tok=1, attention_chunk_size=16, no_rope_layers=[1, 1, 1, 0], **ENDS,
                )
            )
        )  # fmt: skip
        original, ids = copy.deepcopy(model), tokens(2, 30)
        convert(model, DARK)
        assert [x.layer for x in dark_layers(model)] == [3]
        assert model.generate(ids[:, :10], max_new_tokens=10).shape == (2, 20)
        assert relative_error(logits(convert(revert(model), EXACT), ids), logits(original, ids)) <= STREAM

    def test_a_mask_of_the_models_own_is_refused(self) -> None:
        model = built(lambda: tf.DogeForCausalLM(tf.DogeConfig(**TEXT, **ENDS)))
        before = logits(model, tokens(1, 20))
        with pytest.raises(ConversionError, match="DogeForCausalLM cannot run through another attention function"):
            convert(model, DARK)
        assert torch.equal(logits(model, tokens(1, 20)), before)

    def test_a_prefix_is_refused_before_generation(self) -> None:
        vision = dict(model_type="siglip_vision_model", hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                      intermediate_size=32, image_size=16, patch_size=8)  # fmt: skip
        text = dict(TEXT, head_dim=12, model_type="gemma")
        config = tf.PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=48, hidden_size=48,
                                    image_token_id=98)  # fmt: skip
        with pytest.raises(ConversionError, match="causal with padding and bidirectional without"):
            convert(built(lambda: tf.PaliGemmaForConditionalGeneration(config)), DARK)

    def test_weights_tied_to_another_layer(self) -> None:
        config = tf.ZambaConfig(
            **{**TEXT, "num_hidden_layers": 8}, attention_hidden_size=96, attention_head_dim=24, attn_layer_period=3,
            attn_layer_offset=2, mamba_d_state=8, n_mamba_heads=2, **ENDS,
        )  # fmt: skip
        with pytest.raises(ConversionError, match=r"has its weights from another layer"):
            convert(built(lambda: tf.ZambaForCausalLM(config)), DARK)

    def test_attention_that_is_not_what_it_seems(self) -> None:
        """Exact attention in its place gives another output, and the model says which layer is to blame."""

        class Halved(type(tiny("llama").model.layers[0].self_attn)):  # type: ignore[misc]
            pass

        def halved(module: Any, query: Tensor, *rest: Any, **kwargs: Any) -> Any:
            output, weights = tf.integrations.sdpa_attention.sdpa_attention_forward(module, query, *rest, **kwargs)
            return (0.5 * output if isinstance(module, Halved) else output), weights

        tf.AttentionInterface.register("halved", halved)
        tf.AttentionMaskInterface.register("halved", tf.masking_utils.sdpa_mask)
        model = tiny("llama")
        model.set_attn_implementation("halved")
        model.model.layers[1].self_attn.__class__ = Halved
        before = logits(model, tokens(1, 20))
        with pytest.raises(ConversionError, match=r"model\.layers\.1\.self_attn of LlamaForCausalLM attends in a way"):
            convert(model, DARK)
        assert torch.equal(logits(model, tokens(1, 20)), before) and not converted_modules(model)


class TestTheModelIsAsBefore:
    def test_modes_and_random_numbers(self) -> None:
        model = tiny("llama").train()
        model.model.layers[1].eval()
        model.requires_grad_(True)
        state, calls = torch.random.get_rng_state(), []
        model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        convert(model, DARK)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert model.training and model.model.layers[0].training and not model.model.layers[1].training
        assert calls and not any(calls)

    def test_a_refusal_leaves_no_trace(self) -> None:
        model = tiny("llama")
        names, keys = dict(vars(model.config)), list(model.state_dict())
        hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
        with pytest.raises(ConversionError, match="keep_exact names layer 7"):
            convert(model, DarkConfig(keep_exact=(7,)))
        assert dict(vars(model.config)) == names and list(model.state_dict()) == keys
        assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks
        assert not any(attachment_of(m) for m in model.modules())


class TestWhereAModelCanRun:
    def test_the_meta_device_has_no_trial(self, caplog: pytest.LogCaptureFixture) -> None:
        with torch.device("meta"):
            model = LlamaForCausalLM(copy.deepcopy(tiny("llama").config))
        with caplog.at_level(logging.INFO, "darkformer"):
            convert(model, DARK)
        assert len(converted_modules(model)) == 3 and "no trial forward pass" in caplog.text

    def test_a_head_that_wants_more_than_tokens(self) -> None:
        config = copy.deepcopy(tiny("llama").config)
        config.pad_token_id = None  # two rows and no pad token: the head refuses, the body runs
        model = tf.LlamaForSequenceClassification(config).eval()
        assert len(converted_modules(convert(model, DARK))) == 3

    def test_a_model_that_needs_other_inputs(self) -> None:
        class Demanding(LlamaForCausalLM):
            @property
            def base_model(self) -> nn.Module:  # no way around it
                return self

            def forward(self, input_ids: Any = None, *, secret: Any = None, **kwargs: Any) -> Any:
                if secret is None:
                    raise ValueError("no secret")
                return super().forward(input_ids, **kwargs)

        model = Demanding(copy.deepcopy(tiny("llama").config)).eval()
        with pytest.raises(ConversionError, match=r"does not run on a few tokens \(ValueError: no secret\).*example="):
            convert(model, DARK)
        convert(model, DARK, example={"input_ids": tokens(1, 12), "secret": 1})
        assert len(converted_modules(model)) == 3

    def test_offloaded_weights(self) -> None:
        ids = tokens(2, 30)
        wanted = logits(convert(tiny("llama"), DARK), ids)
        assert torch.equal(logits(cpu_offload(convert(tiny("llama"), DARK), "cpu"), ids), wanted)
        assert torch.equal(logits(convert(cpu_offload(tiny("llama"), "cpu"), DARK), ids), wanted)

    def test_weights_on_disk(self, tmp_path: Path) -> None:
        model, ids = disturb(linear("llama")), tokens(1, 30)
        model.save_pretrained(tmp_path / "model")
        devices = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
        devices |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=devices, offload_folder=tmp_path / "off"
        )
        assert torch.equal(logits(loaded, ids), logits(model, ids))
        found = loaded.generate(ids, max_new_tokens=6, do_sample=False)
        assert torch.equal(found, model.generate(ids, max_new_tokens=6, do_sample=False))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        model = convert(tiny("mixtral").to(dtype), DARK)
        assert len(converted_modules(model)) == 3


class TestExamples:
    """An example may call more than the language model's self-attention, which alone is converted."""

    @staticmethod
    def llava() -> PreTrainedModel:
        vision = tf.CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                     image_size=8, patch_size=4, projection_dim=16)  # fmt: skip
        text = tf.LlamaConfig(**TEXT)
        return tf.LlavaForConditionalGeneration(
            tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=98, image_token_id=98,
                           vision_feature_layer=-1)
        )  # fmt: skip

    @staticmethod
    def image() -> dict[str, Tensor]:
        ids = tokens(1, 30).clamp(3, 90)
        ids[:, 4:8] = 98
        return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8)}

    def test_a_tower(self) -> None:
        model, image = built(self.llava), self.image()
        convert(model, DARK, example=image)
        assert converted_names(model) == [f"model.language_model.layers.{i}.self_attn" for i in range(2)]
        with torch.no_grad():
            wanted = built(self.llava)(**image).logits
            assert relative_error(convert(revert(model), EXACT, example=image)(**image).logits, wanted) <= STREAM

    @pytest.mark.parametrize("states", [12, 7])
    def test_cross_attention(self, states: int) -> None:
        model = built(TestCrossAttention.gpt2)
        convert(model, DARK, example={"input_ids": tokens(1, 12), "encoder_hidden_states": torch.randn(1, states, 48)})
        assert converted_names(model) == ["transformer.h.0.attn", "transformer.h.1.attn"]

    def test_a_cache_in_it(self) -> None:
        model = tiny("llama")
        cache = model(tokens(1, 5), use_cache=True).past_key_values
        with pytest.raises(ConversionError, match="example holds a cache"):
            convert(model, DARK, example={"input_ids": tokens(1, 12), "past_key_values": cache})

    def test_a_part_of_a_model_is_saved_like_a_model(self, tmp_path: Path) -> None:
        model, image = built(self.llava), self.image()
        disturb(convert(model, DARK)).save_pretrained(tmp_path)
        half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        loaded = type(model).from_pretrained(tmp_path).eval()
        with torch.no_grad():
            assert torch.equal(loaded(**image).logits, model(**image).logits)
        file = tmp_path / "model.safetensors"
        kept = {name: x for name, x in load_file(file).items() if not name.endswith("layers.1.self_attn.dark.geometry")}
        save_file(kept, file, metadata={"format": "pt"})
        with pytest.raises(InputError, match=r"lacks 1 tensors"):
            type(model).from_pretrained(tmp_path)

    def test_its_caches_belong_to_its_weights(self) -> None:
        model, other, image = built(self.llava), self.llava().eval(), self.image()
        convert(model, DARK), convert(other, DARK)
        with torch.no_grad():
            cache = pickle.loads(pickle.dumps(model(**image, use_cache=True).past_key_values))
            with pytest.raises(ConversionError, match="filled by another converted model"):
                other(input_ids=image["input_ids"][:, :1], past_key_values=cache)


class TestBodiesAndHeads:
    def test_an_encoder_without_a_head(self) -> None:
        config = tf.BertConfig(vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                               num_attention_heads=4)  # fmt: skip
        model = built(lambda: tf.BertModel(config))
        assert len(converted_modules(convert(model, DARK))) == 2
        assert model(tokens(2, 20)).last_hidden_state.isfinite().all()

    @pytest.mark.parametrize("labels", [1, 2, 12])
    def test_a_classifier_of_sequences(self, labels: int) -> None:
        config = copy.deepcopy(tiny("llama").config)
        config.num_labels = labels
        model = tf.LlamaForSequenceClassification(config).eval()
        assert len(converted_modules(convert(model, DARK))) == 3
        assert model(tokens(2, 20)).logits.shape == (2, labels)


def test_inference_mode_leaves_maps_that_learn() -> None:
    model = tiny("llama")
    with torch.inference_mode():
        convert(model, DARK)
    model(tokens(2, 30), labels=tokens(2, 30), use_cache=False).loss.backward()
    assert all(p.grad is not None and not p.is_inference() for p in next(dark_layers(model)).parameters())


def test_a_model_that_shares_its_config() -> None:
    config = copy.deepcopy(tiny("llama").config)
    one, other = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    convert(one, DARK)
    with pytest.raises(ConversionError, match=r"shares its config object.*copy\.deepcopy"):
        convert(other, DARK)


def test_chunks_are_known_without_a_trial() -> None:
    settings = dict(**{**TEXT, "num_hidden_layers": 4}, intermediate_size_mlp=64, head_dim=12, num_local_experts=2,
                    num_experts_per_tok=1, attention_chunk_size=16, no_rope_layers=[1, 1, 1, 0], **ENDS)  # fmt: skip
    with torch.device("meta"):
        model = tf.Llama4ForCausalLM(tf.Llama4TextConfig(**settings))
    assert len(converted_modules(convert(model, DARK))) == 1
    config = tf.GptOssConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                             num_key_value_heads=2, head_dim=8, intermediate_size=16, num_local_experts=2)  # fmt: skip
    with torch.device("meta"), pytest.raises(ConversionError, match="adds a learned sink"):
        convert(tf.GptOssForCausalLM(config), DARK)


def test_a_static_cache_of_gpt2() -> None:
    model, ids = linear("gpt2"), tokens(2, 9)
    static = model.generate(ids, max_new_tokens=5, do_sample=False, cache_implementation="static")
    assert torch.equal(static, model.generate(ids, max_new_tokens=5, do_sample=False))


def test_a_plan_changes_nothing_and_tells_what_would() -> None:
    model = tiny("gemma3")
    before = logits(model, tokens(1, 20))
    plan = plan_conversion(model, DARK)
    assert [layer.layer for *_, layer in plan.layers] == [2]
    assert sorted(plan.left) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert "sliding window" in str(plan) and "1 attention layers are converted: 2." in str(plan)
    assert not converted_modules(model) and torch.equal(logits(model, tokens(1, 20)), before)


def test_positions_that_the_model_counts_itself() -> None:
    model, ids, mask = linear("llama"), tokens(2, 20), left_mask([0, 5], 20)
    with torch.no_grad():
        placed = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
        generated = model.generate(ids, attention_mask=mask, max_new_tokens=1, output_logits=True,
                                   return_dict_in_generate=True)  # fmt: skip
    assert relative_error(generated.logits[0], placed[:, -1]) <= STREAM
