"""Tiny random models, one row a family, and what every test does with them: pad, number, run, disturb."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from darkformer import DarkConfig, convert, dark_layers

VOCABULARY = 99
#: Small enough that a sequence of 40 tokens has sinks, a far part and a window. The library's own form otherwise.
DARK = DarkConfig(num_features=16, window=4, sinks=2)
PAPER = DarkConfig.paper(num_features=16)
# An initialisation this wide gives attention logits of standard deviation around 1; with the default of 0.02 all
# attention is a plain mean and no test could tell one kernel from another.
WIDE = dict(initializer_range=0.15, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=None)
SIZES = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=3, **WIDE)


class Family(NamedTuple):
    """One row: how to build the tiny model and what is special about it. docs/families.md has the table."""

    title: str  # as users know it
    model: str  # transformers' classes, and the configuration's, without their endings
    build: Callable[[], PreTrainedModel]
    layers: list[int]  # what `convert` takes with this row's configuration
    special: str  # what it exercises
    convert_sliding: bool = False
    encoder: bool = False
    tokens: int = 40  # up to here exact mode is the original (a converted sliding layer sees more from its window on)
    keep_exact: tuple[str, ...] = ()  # heads of mixed layers
    no_features: tuple[str, ...] = ()

    @property
    def config(self) -> DarkConfig:
        """The row's configuration of the linear mode."""
        return DarkConfig(
            num_features=16, window=4, sinks=2, convert_sliding=self.convert_sliding, keep_exact=self.keep_exact,
            no_features=self.no_features,
        )  # fmt: skip


def _make(name: str, kind: str = "ForCausalLM", config: str = "Config", **settings: Any) -> PreTrainedModel:
    made = getattr(transformers, name + config)(**settings)
    return getattr(transformers, name + kind)(made)


def _plain(name: str, heads: int, kv_heads: int, head_dim: int = 8, **more: Any) -> Callable[[], PreTrainedModel]:
    """A family whose configuration speaks as Llama's does."""
    settings = dict(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, **SIZES) | more
    return lambda: _make(name, **settings)


#: The two sliding layers and the one with full attention, for families that mix.
MIXED = ["sliding_attention", "sliding_attention", "full_attention"]
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
GPT2 = dict(n_embd=48, n_layer=3, n_head=4, n_positions=256, initializer_range=0.3, vocab_size=VOCABULARY,
            attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, bos_token_id=1, eos_token_id=None,
            pad_token_id=0)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama 2, 3, SmolLM2", "Llama", _plain("Llama", 6, 2), [0, 1, 2], "grouped queries"),
    "mistral": Family("Mistral 0.3", "Mistral", _plain("Mistral", 4, 4, sliding_window=None), [0, 1, 2], "no window"),
    "mistral-sliding": Family(
        "Mistral 0.1", "Mistral", _plain("Mistral", 4, 2, sliding_window=8), [0, 1, 2],
        "sliding window in every layer: needs `convert_sliding=True`", convert_sliding=True, tokens=8,
    ),
    "qwen2": Family("Qwen2, 2.5", "Qwen2", _plain("Qwen2", 6, 2), [0, 1, 2], "biases of q, k, v"),
    "qwen3": Family("Qwen3", "Qwen3", _plain("Qwen3", 4, 2), [0, 1, 2], "query/key norm"),
    "gemma": Family("Gemma 1", "Gemma", _plain("Gemma", 4, 1, 16), [0, 1, 2], "head_dim ≠ hidden/heads"),
    "gemma2": Family(
        "Gemma 2", "Gemma2",
        _plain("Gemma2", 4, 2, 16, layer_types=MIXED, sliding_window=8, query_pre_attn_scalar=10,
               attn_logit_softcapping=0.8),
        [2], "capped logits (the exact part only), sliding layers stay",
    ),
    # query_pre_attn_scalar is not head_dim, so a scaling of head_dim^-0.5 anywhere would show.
    "gemma3": Family(
        "Gemma 3", "Gemma3",
        lambda: _make("Gemma3", config="TextConfig", num_attention_heads=4, num_key_value_heads=1, head_dim=16,
                      layer_types=MIXED, sliding_window=8, query_pre_attn_scalar=10, **SIZES),
        [2], "query/key norm, sliding layers stay, own scaling",
    ),
    "phi3": Family("Phi-3, Phi-4", "Phi3", _plain("Phi3", 4, 2, 12), [0, 1, 2], "fused q, k, v projection"),
    "gpt-neox": Family(
        "GPT-NeoX, Pythia", "GPTNeoX",
        lambda: _make("GPTNeoX", num_attention_heads=4, rotary_pct=0.5, attention_dropout=0.0, **SIZES),
        [0, 1, 2], "partial rotary, parallel residual, `layer_past`",
    ),
    "gpt2": Family("GPT-2", "GPT2", lambda: _make("GPT2", kind="LMHeadModel", **GPT2), [0, 1, 2],
                   "absolute positions, no rotary"),
    "olmo2": Family("OLMo 2", "Olmo2", _plain("Olmo2", 4, 2, 12), [0, 1, 2], "norms after the sublayers"),
    "smollm3": Family("SmolLM3", "SmolLM3", _plain("SmolLM3", 4, 2, 12, no_rope_layers=[1, 0, 1]), [0, 1, 2],
                      "a layer without rotary"),
    "mixtral": Family("Mixtral", "Mixtral", _plain("Mixtral", 4, 2, 12, sliding_window=None, **EXPERTS), [0, 1, 2],
                      "mixture of experts"),
    "qwen3-moe": Family(
        "Qwen3-MoE", "Qwen3Moe",
        _plain("Qwen3Moe", 4, 2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32), [0, 1, 2],
        "mixture of experts, query/key norm",
    ),
    "bert": Family(
        "BERT, MiniLM encoders", "Bert",
        lambda: _make("Bert", kind="ForMaskedLM", num_attention_heads=4, attention_probs_dropout_prob=0.0,
                      hidden_dropout_prob=0.0, **SIZES),
        [0, 1, 2], "bidirectional, absolute positions", encoder=True,
    ),
    "modernbert": Family(
        "ModernBERT", "ModernBert",
        lambda: _make("ModernBert", kind="ForMaskedLM", num_attention_heads=4, layer_types=MIXED, local_attention=16,
                      cls_token_id=1, sep_token_id=2, **SIZES),
        [2], "bidirectional, sliding layers stay", encoder=True,
    ),
}  # fmt: skip


def _mixed(family: str, keep_exact: tuple[str, ...], no_features: tuple[str, ...]) -> Family:
    """A family whose layers hold exact heads, heads with features and heads without, beside each other."""
    return FAMILIES[family]._replace(keep_exact=keep_exact, no_features=no_features)


FAMILIES |= {
    "llama-mixed": _mixed("llama", ("0.0", "1.1"), ("1.0", "2.0")),
    "gpt2-mixed": _mixed("gpt2", ("0.1", "2.0", "2.3"), ("0.3", "1.2", "2.1")),
    "gemma2-mixed": _mixed("gemma2", ("2.1",), ()),
    "qwen3-mixed": _mixed("qwen3", ("1.0", "2.1"), ("0.1", "2.0")),
    "bert-mixed": _mixed("bert", ("0.0", "1.3"), ("0.2", "1")),
}
DECODERS = [name for name, row in FAMILIES.items() if not row.encoder]
#: Rows between which the operator itself is called differently, for the tests of every method and configuration.
CORE = ["llama", "gemma3", "qwen3", "mistral"]


def table() -> str:
    """The families as a markdown table, for docs/families.md and the README."""
    lines = ["| family | transformers' model | what the tests' model has | layers converted |", "|---|---|---|---|"]
    for row in FAMILIES.values():
        if row.keep_exact:
            continue
        model = row.build()
        count = f"{len(row.layers)} of {model.config.num_hidden_layers}"
        lines.append(f"| {row.title} | `{type(model).__name__}` | {row.special} | {count} |")
    return "\n".join(lines)


def tiny(family: str, seed: int = 0) -> PreTrainedModel:
    """The family's model with weights drawn from `seed`, in evaluation mode, whatever was drawn before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FAMILIES[family].build().eval()


def disturb(model: PreTrainedModel) -> PreTrainedModel:
    """Moves every parameter that conversion added off its start, as calibration and training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in dark_layers(model):
            for p in layer.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def converted(model: PreTrainedModel, config: DarkConfig) -> PreTrainedModel:
    """`convert` without the warning that Gemma 2 gives, which has a test of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*caps its attention logits")
        return convert(model, config)


def linear(family: str, config: DarkConfig | None = None) -> PreTrainedModel:
    """The family's model, converted and disturbed."""
    return disturb(converted(tiny(family), config or FAMILIES[family].config))


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random ids (batch, length) without the special ones."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_mask(pads: list[int], length: int) -> Tensor:
    """(B, length) with the first pads[b] tokens of row b off."""
    return (torch.arange(length) >= torch.tensor(pads)[:, None]).long()


def positions(mask: Tensor) -> Tensor:
    """Position ids that count real tokens, as `generate` makes them."""
    return (mask.cumsum(1) - 1).clamp_min(0)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, L, V) of one full forward without a cache."""
    if mask is None:
        return model(input_ids=ids, use_cache=False).logits
    return model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits


class Whole(nn.Module):
    """A model as `torch.export` takes it: ids and mask (B, L) to the logits of one forward pass without a cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        place = (mask.cumsum(1) - 1).clamp(min=0)
        return self.model(ids, attention_mask=mask, position_ids=place, use_cache=False).logits


@torch.no_grad()
def streamed(model: PreTrainedModel, ids: Tensor, mask: Tensor, cuts: list[int]) -> Tensor:
    """The same logits from one forward per piece [0, cuts[0]), [cuts[0], cuts[1]), … with a cache."""
    cache, pieces, place = None, [], positions(mask)
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        out = model(
            input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=place[:, start:stop],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        cache = out.past_key_values
        pieces.append(out.logits)
    return torch.cat(pieces, dim=1)
