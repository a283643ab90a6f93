"""Tiny random models, one row a family, and what every test does with them: pad, number, run, disturb."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from darkformer import DarkConfig, convert, dark_layers

VOCABULARY = 99
#: Small enough that a sequence of 40 tokens has sinks, a far part and a window. The library's own form otherwise.
DARK = DarkConfig(num_features=16, window=4, sinks=2)
PAPER = DarkConfig.paper(num_features=16)
# An initialisation this wide gives attention logits of standard deviation around 1; with the default of 0.02 all
# attention is a plain mean and no test could tell one kernel from another.
WIDE = dict(initializer_range=0.15, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=None)
SIZES = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=3, **WIDE)


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=6, num_key_value_heads=2, head_dim=8, **SIZES))


def _gemma3() -> PreTrainedModel:
    layer_types = ["sliding_attention", "sliding_attention", "full_attention"]
    # query_pre_attn_scalar is not head_dim, so a scaling of head_dim^-0.5 anywhere would show.
    config = Gemma3TextConfig(
        num_attention_heads=4, num_key_value_heads=1, head_dim=16, layer_types=layer_types, sliding_window=8,
        query_pre_attn_scalar=10, **SIZES,
    )  # fmt: skip
    return Gemma3ForCausalLM(config)


def _qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(num_attention_heads=4, num_key_value_heads=2, head_dim=8, **SIZES))


def _mistral() -> PreTrainedModel:
    config = MistralConfig(num_attention_heads=4, num_key_value_heads=4, head_dim=8, sliding_window=None, **SIZES)
    return MistralForCausalLM(config)


#: Constructor and the numbers of the layers that `convert` takes by default.
FAMILIES: dict[str, tuple[Callable[[], PreTrainedModel], list[int]]] = {
    "llama": (_llama, [0, 1, 2]),
    "gemma3": (_gemma3, [2]),
    "qwen3": (_qwen3, [0, 1, 2]),
    "mistral": (_mistral, [0, 1, 2]),
}


def tiny(family: str, seed: int = 0) -> PreTrainedModel:
    """The family's model with weights drawn from `seed`, in evaluation mode, whatever was drawn before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FAMILIES[family][0]().eval()


def disturb(model: PreTrainedModel) -> PreTrainedModel:
    """Moves every parameter that conversion added off its start, as calibration and training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in dark_layers(model):
            for p in layer.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def linear(family: str, config: DarkConfig = DARK) -> PreTrainedModel:
    """The family's model, converted and disturbed."""
    return disturb(convert(tiny(family), config))


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
