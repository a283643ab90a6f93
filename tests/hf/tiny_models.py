"""Any causal language model of transformers as a tiny random one, from its configuration class alone.

A configuration's fields are read and every size among them is made small by its name; `OVERRIDES` has what names do not
say. A class of a newer transformers version is built by the same rules without being named here.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from functools import cache
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

#: Every model_type that AutoModelForCausalLM knows; asking for these imports no model.
MODEL_TYPES = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 128
#: Ids from here on are left to tokens that stand for images, sounds and the like; inputs are drawn below.
SPECIAL = 100
LAYERS = 4  # patterns of layers mostly repeat after two to four

#: The first pattern that matches a whole field name gives the value. None: the field keeps its default.
RULES: list[tuple[str, Any]] = [
    # Tokens. `_token` sorts out which of them may be None.
    (r"vocab_size|vocab_size_per_layer_input|unpadded_vocab_size|ngram_vocab_size_base", VOCABULARY),
    # An initialisation this wide gives attention logits of standard deviation around 1 (see families.py).
    (r"initializer_range|init_std|initializer_factor|embed_init_std|embedding_initializer_range", 0.15),
    (r".*(dropout|dropout_prob|pdrop|layerdrop|dropout_p|jitter_noise)", 0.0),
    # Depth.
    (r"num_hidden_layers|n_layers?|num_layers|(num_)?(en|de)coder_layers|num_blocks", LAYERS),
    (r"num_(mtp|nextn_predict)_layers|num_kv_shared_layers", 0),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"max_window_layers", 2),
    (r"attn_layer_period", 2),
    (r"attn_layer_offset", 1),
    (r".*_layer_(period|offset|interval)|.*_layers?_step|.*_every_n_layers|.*_pattern", None),
    (r"layer_group_size|n_layers_per_attn_res_block", 2),
    # Width. Where head_dim is a field of its own it is not hidden_size / heads.
    (r"hidden_size|d_model|n_embd|emb_dim|embedding_size|(input|output)_embedding_size|word_embed_proj_dim", 64),
    (r"lru_width|mamba_d_ssm|attention_hidden_size|d_inner|moe_latent_size|embedding_dim|dim_model_base", 64),
    (r".*num_attention_heads|n_heads?|num_heads|(encoder_|decoder_)?attention_heads", 4),
    (r"num_(en|de)coder_attention_heads", 4),
    (r".*num_(key_value|kv|global_key_value)_heads", 2),
    (r"head_dim|swa_head_dim|kv_channels|dim_head|d_head|attention_head_size", 24),
    (r"rotary_dim", 8),
    (r".*intermediate_size.*|(en|de)coder_ffn_dim|ffn_dim|ffn_hidden_size|.*_ffn_hidden_size|dff|dim_ff|n_inner", 64),
    (r"feed_forward_size", 64),
    # Latent attention and its indexers.
    (r"q_lora_rank|o_lora_rank", 24),
    (r"kv_lora_rank", 16),
    (r"qk_nope_head_dim|v_head_dim|index_head_dim|qk_head_dim", 16),
    (r"qk_rope_head_dim", 8),
    (r"index_n_heads|indexer_.*heads", 2),
    (r"index_topk", 64),
    # Mixtures of experts.
    (r"num_experts_per_tok|moe_k|moe_topk|top_k_experts", 2),
    (r"num_(local_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"(n|num|moe_num)_shared_experts", 1),
    (r"zero_expert_num", 1),
    (r"n_group|topk_group", 1),
    # Recurrent layers.
    (r".*state_size|mamba_d_state", 8),
    (r"(mamba_|linear_|linear_key_|linear_value_)(d_head|head_dim)", 16),
    (r"mamba_(n_heads|num_heads)", 8),
    (r"n_mamba_heads|linear_num_(key_)?heads", 2),
    (r"linear_num_value_heads", 4),
    (r"n_groups|mamba_n_?groups", 1),
    (r"(mamba_)?chunk_size|block_size|.*attn_chunk_length|index_block_size", 8),
    # Windows and lengths.
    (r"sliding_window(_size)?|attention_chunk_size|local_attention|window_size|attention_window_size", 8),
    (r"local_attention_window_len|keep_window_size", 8),
    (r"(original_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_target_positions", 256),
    (r"max_source_positions", 64),
    (r".*(multiple_of|chunk_size_feed_forward|chunk_size_lm_head)", None),
]  # fmt: skip
#: Anything else that is larger than this is a size nobody has named yet.
LARGEST = 64
#: Fields that are None by default and are given a value all the same.
LATENT = {"num_key_value_heads": "num_attention_heads", "head_dim": "qk_rope_head_dim"}
FROM_NONE = re.compile(
    r"num_key_value_heads|num_kv_heads|head_dim|n_routed_experts|n_shared_experts|num_experts_per_tok"
)

DRAFT = dict(hidden_size_per_layer_input=0, vocab_size_per_layer_input=0, num_kv_shared_layers=LAYERS)
#: What the rules cannot know, by model_type, and why. Values of fields; a dict for a sub-configuration.
OVERRIDES: dict[str, dict[str, Any]] = {
    # Which layers attend is said by a list that has no default, or one that knows only one kind.
    "bamba": dict(attn_layer_indices=[1, 3]),
    "granitemoehybrid": dict(layer_types=["linear_attention", "full_attention"] * 2),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
    # Heads have to fill the width exactly.
    "helium": dict(head_dim=16),
    "mamba2": dict(num_heads=8, head_dim=16),
    # One codebook of sound is one sequence of tokens.
    "musicgen_decoder": dict(num_codebooks=1),
    "musicgen_melody_decoder": dict(num_codebooks=1),
    # Two axes of positions that make up the width, and the length that is allowed; hashes that are drawn once.
    "reformer": dict(axial_pos_embds_dim=(16, 48), axial_pos_shape=(8, 32), hash_seed=0),
    # transformers 5.23 asks its attention for a rope_theta that the configuration keeps elsewhere.
    "dbrx": dict(
        attn_config=dict(rope_theta=10000.0, kv_n_heads=2, clip_qkv=8.0),
        ffn_config=dict(moe_num_experts=4, moe_top_k=2),
    ),
    # Settings of an indexer that its attention needs and the configuration leaves open.
    "qwen4_exp_text": dict(
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=24, indexer_budget=64, indexer_compress_ratio=4
    ),
    # Its chunkwise kernel mixes up the two sizes where keys are narrower than values.
    "xlstm": dict(qk_dim_factor=1.0),
    # Refused by its configuration otherwise; transformers 5.23 cannot build what it asks for either.
    "gemma4_assistant": dict(text_config=dict(model_type="gemma4_text", **DRAFT)),
    # Rotary settings have to be given by kind of layer.
    "cohere_compass_text": dict(
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            kind: dict(rope_type="default", rope_theta=1e4) for kind in ("sliding_attention", "full_attention")
        },
    ),
    # Sliding layers have sizes of their own, in arguments that are not fields.
    "dots3_note_text": dict(
        swa_num_attention_heads=4,
        swa_num_key_value_heads=4,
        swa_head_dim=24,
        swa_qk_nope_head_dim=16,
        swa_v_head_dim=16,
        swa_q_lora_rank=24,
        swa_kv_lora_rank=16,
        sliding_window=8,
    ),
    # An adapter is chosen by language.
    "xmod": dict(default_language="en_XX"),
    # Refused by its configuration otherwise.
    "zaya": dict(num_experts_per_tok=1),
}


@cache
def pair(model_type: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """The model class of `model_type` and the configuration class it is built from.

    That is a part of a composite configuration where the model takes a part, as in `AutoModelForCausalLM.from_config`.
    """
    config: type[PreTrainedConfig] = CONFIG_MAPPING[model_type]
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config]
    return (model.config_class if model.config_class in config.sub_configs.values() else config), model


def label(model_type: str) -> str:
    """How the tables call it: the class, and the model_type where that is another family's class."""
    config, model = pair(model_type)
    return model.__name__ if model.config_class is config else f"{model.__name__} ({model_type})"


def _patterns(config: type[PreTrainedConfig], names: set[str]) -> dict[str, list[str]]:
    """Every kind of layer that the default configuration has, in turn; full attention comes last."""
    found: dict[str, list[str]] = {}
    for name in sorted(names & {"layer_types", "layers_block_type", "mlp_layer_types"}):
        kinds = sorted(dict.fromkeys(getattr(config(), name) or []), key=lambda kind: kind == "full_attention")
        if len(kinds) > 1:
            found[name] = list(itertools.islice(itertools.cycle(kinds), LAYERS))
    return found


def _part(config: type[PreTrainedConfig], name: str, more: dict[str, Any]) -> PreTrainedConfig | None:
    """A tiny sub-configuration, or None where the default has none."""
    part = CONFIG_MAPPING[more.pop("model_type")] if "model_type" in more else type(getattr(config(), name, None))
    return tiny_config(part, **more) if issubclass(part, PreTrainedConfig) else None


def _token(name: str, default: Any, none: bool, taken: list[str]) -> Any:
    """An id for a special token: pads 0, begin 1, no end where that may be, any other one above the inputs'."""
    if not isinstance(default, int | None):
        return default
    if name == "pad_token_id":
        return 0
    if name == "bos_token_id":
        return 1
    if name == "eos_token_id":
        return None if none else 2
    if default is None:
        return None
    taken.append(name)
    return SPECIAL + len(taken)


def settings(config: type[PreTrainedConfig], **more: Any) -> dict[str, Any]:
    """The arguments that make `config` tiny."""
    base = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    fields = [field for field in dataclasses.fields(config) if field.name not in base]
    names = {field.name for field in fields}
    found: dict[str, Any] = {}
    special: list[str] = []
    for field in fields:
        name, default, kind = field.name, field.default, str(field.type)
        if re.search(r"token_(id|index)$", name):
            found[name] = _token(name, default, "None" in kind, special)
            continue
        if name == "is_decoder":
            found[name] = True
            continue
        if name in more:
            continue
        number = isinstance(default, int | float) and not isinstance(default, bool)
        if not number and not (default is None and FROM_NONE.fullmatch(name)):
            continue
        if name == "sliding_window" and "layer_types" not in names and "None" in kind:
            found[name] = None  # one window for all layers can be switched off
            continue
        rule = next((value for pattern, value in RULES if re.fullmatch(pattern, name)), LARGEST)
        if rule is LARGEST and not (isinstance(default, int) and default > LARGEST):
            continue
        if rule is not None:
            found[name] = int(rule) if isinstance(default, int) and kind == "<class 'int'>" else rule
    if "qk_rope_head_dim" in names:  # latent attention: every head has its key, and head_dim is the rotated part's
        found |= {name: found[other] for name, other in LATENT.items() if name in found}
    found |= _patterns(config, names)
    parts = {name: _part(config, name, more.pop(name, {})) for name in config.sub_configs}
    found |= {name: part for name, part in parts.items() if part is not None}
    return found | more


def tiny_config(config: type[PreTrainedConfig], **more: Any) -> PreTrainedConfig:
    """A tiny configuration of the class `config`."""
    return config(**settings(config, **copy.deepcopy(OVERRIDES.get(config.model_type, {})), **more))


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """The causal language model of `model_type`, its weights drawn from `seed`, in evaluation mode."""
    config, model = pair(model_type)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = model(tiny_config(config)).eval()
        with torch.no_grad():  # what is initialised to zero (biases, learned sinks) would hide that it was lost
            for parameter in made.parameters():
                if parameter.is_floating_point():
                    parameter.add_(0.02 * torch.randn_like(parameter))
    return made
