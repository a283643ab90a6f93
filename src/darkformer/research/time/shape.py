"""The numbers that a decoder's cost depends on, read from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from ...errors import InputError

#: What a configuration has to say, by transformers' names.
NEEDED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class Shape:
    """A dense decoder.

    Attributes:
        layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary: as in its configuration.
        mlp_matrices: 3 with a gate, 2 without.
        tied: one matrix embeds tokens and gives logits.
        norms: over the hidden size, in a layer. head_norms: whether queries and keys are normalised too.
        vectors: numbers in norms, biases and learned positions.
        sliding: numbers of the layers that attend through a sliding window already. sliding_window: its tokens.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    mlp_matrices: int = 3
    tied: bool = True
    norms: int = 2
    head_norms: bool = False
    vectors: int = 0
    sliding: tuple[int, ...] = ()
    sliding_window: int | None = None

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of one layer: queries and output, keys and values, MLP."""
        attention = 2 * self.heads * self.head_dim + 2 * self.kv_heads * self.head_dim
        return self.hidden * (attention + self.mlp_matrices * self.intermediate)

    @property
    def parameters(self) -> int:
        """All numbers of the model."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * self.layer_weights + embeddings + self.vectors

    def config(self, positions: int) -> LlamaConfig:
        """A model of this shape in Llama's form, for sequences of up to `positions` tokens."""
        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim, tie_word_embeddings=self.tied, max_position_embeddings=positions,
            bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )  # fmt: skip


def llama_shape(layers: int, hidden: int, *, vocabulary: int, head_dim: int = 64, kv_heads: int | None = None) -> Shape:
    """A shape in Llama's proportions: an MLP of 8/3 the width, rounded up to a multiple of 32.

    >>> llama_shape(2, 96, vocabulary=1024, head_dim=32).intermediate
    256
    """
    heads = hidden // head_dim
    return Shape(
        layers, hidden, -(-8 * hidden // 96) * 32, heads, kv_heads or heads, head_dim, vocabulary,
        vectors=hidden * (2 * layers + 1),
    )  # fmt: skip


def shape_of(config: Any, name: str) -> Shape:
    """The shape of the model that a configuration of transformers describes; nothing is loaded or allocated.

    Args:
        name: of the model, for messages.

    Raises:
        InputError: the configuration lacks a number, no model can be built from it, or the model is not a dense decoder
            whose layers are attention and an MLP.
    """
    settings = config.get_text_config(decoder=True)
    for field in NEEDED:
        value = getattr(settings, field, None)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(
                f"{name}: its configuration has {field}={value!r}, and the cost of a step depends on it: give a model "
                "whose config.json has a positive number there."
            )
    hidden, heads = settings.hidden_size, settings.num_attention_heads
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings)
    except Exception as error:  # whatever a model's constructor raises on numbers that do not fit together
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{name}: no decoder can be built from its configuration ({reason}).") from error
    embedding = model.get_input_embeddings()
    output = model.get_output_embeddings()
    tied = output is None or bool(settings.tie_word_embeddings)
    total = sum(p.numel() for p in model.parameters())
    if tied and output is not None and output.weight is not embedding.weight:  # not tied yet on the meta device
        total -= output.weight.numel()
    embeddings_and_logits = [x.weight for x in (embedding, output) if x is not None]
    embeddings_and_logits += [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    inside = sum(
        p.numel() for p in model.parameters() if p.dim() >= 2 and not any(p is x for x in embeddings_and_logits)
    )
    norms = [m.weight for m in model.modules() if "norm" in type(m).__name__.lower() and hasattr(m, "weight")]
    kinds = getattr(settings, "layer_types", None) or []
    shape = Shape(
        layers=settings.num_hidden_layers,
        hidden=hidden,
        intermediate=getattr(settings, "intermediate_size", None) or getattr(settings, "n_inner", None) or 4 * hidden,
        heads=heads,
        kv_heads=getattr(settings, "num_key_value_heads", None) or heads,
        head_dim=getattr(settings, "head_dim", None) or hidden // heads,
        vocabulary=settings.vocab_size,
        tied=tied,
        norms=(sum(w.numel() == hidden for w in norms) - 1) // settings.num_hidden_layers,  # but for the last one
        head_norms=any(w.numel() != hidden for w in norms),
        sliding=tuple(i for i, kind in enumerate(kinds) if kind != "full_attention"),
        sliding_window=getattr(settings, "sliding_window", None) if kinds else None,
    )  # fmt: skip
    for matrices in (3, 2):
        candidate = Shape(**{**vars(shape), "mlp_matrices": matrices})
        if candidate.layers * candidate.layer_weights == inside:
            return Shape(**{**vars(candidate), "vectors": total - candidate.parameters})
    raise InputError(
        f"{name} ({type(model).__name__}): {inside:,} numbers in the matrices of its layers, where a dense decoder of "
        f"this width, depth and heads has {shape.layers * shape.layer_weights:,}. `plan` counts attention and one MLP "
        "a layer; experts, other mixers and cross-attention are not counted."
    )
