"""What each layer of a converted model keeps for a request, and how large the pages must be that hold it.

vLLM gives out memory in pages of one size, for states and for keys alike. A page holds the states of a few layers, or
the keys and values of so many tokens for a few heads that keep softmax. States differ in size (windows differ from
layer to layer), so several small ones share a page where each would waste most of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..config import DarkConfig
from ..errors import ConversionError
from ..ops.slots import slot_words

#: Tokens of a block of keys are a multiple of this, the largest that vLLM's attention kernels ask for.
TOKENS = 32
#: Entries of a saved model's config.json, and where they are kept while vLLM has the config: darkformer's own loading
#: of transformers models acts where it finds the first of them.
SAVED = {"darkformer": "darkformer_saved", "darkformer_layers": "darkformer_saved_layers"}


@dataclass(frozen=True)
class LayerHeads:
    """One converted layer.

    Attributes:
        index: of the decoder layer. number: what its draws and its configuration are found by.
        exact: key/value heads that keep softmax.
        parts: configuration and key/value heads of each part with constant state.
    """

    index: int
    number: int
    exact: tuple[int, ...]
    parts: list[tuple[DarkConfig, tuple[int, ...]]]


class Place(NamedTuple):
    """Where the state of one part of a layer lies."""

    page: int  # among the pages of a sequence
    begin: int  # in float32 words


@dataclass(frozen=True)
class Layout:
    """A converted model as vLLM's memory sees it.

    Attributes:
        layers: the converted ones, by index; those of method `exact` among them have no constant state.
        places: of each of `LayerHeads.parts`, by (index of the layer, number of the part).
        together: key/value heads that share one attention of vLLM in converted layers.
        page: bytes of a page.
        block: tokens of a block, the fewest that any attention has in a page; None without attention.
    """

    layers: dict[int, LayerHeads]
    places: dict[tuple[int, int], Place]
    together: int
    page: int
    block: int | None


def kinds_before(text_config: Any) -> list[str] | None:
    """The kind of each layer as transformers names it, where the model has several; also once ours are in their place.

    Raises:
        ConversionError: kinds that are no attention to all earlier tokens or to a sliding window of them.
    """
    kinds = getattr(text_config, "darkformer_layer_types", None) or getattr(text_config, "layer_types", None)
    # Models of Mamba layers compute theirs from other entries.
    mixers = isinstance(getattr(type(text_config), "layers_block_type", None), property)
    present = set(text_config.layers_block_type if mixers else kinds or ())
    if mixers or present - {"full_attention", "sliding_attention"}:
        raise ConversionError(
            f"{text_config.model_type} has layers of the kinds {', '.join(sorted(present))}: vLLM would lose what such "
            "layers keep. Serve it with `darkformer serve`."
        )
    return kinds


def _described(text_config: Any) -> dict[int, int]:
    """Number of each converted decoder layer by its index.

    Raises:
        ConversionError: a layer that vLLM's layers cannot stand for.
    """
    config = DarkConfig.from_dict(text_config.darkformer_saved)
    described = getattr(text_config, SAVED["darkformer_layers"], None)
    if described is None:  # saved by 0.1.0
        kinds = kinds_before(text_config) or ["full_attention"] * text_config.num_hidden_layers
        return {i: i for i, kind in enumerate(kinds) if kind == "full_attention" or config.convert_sliding}
    layers = {}
    for layer in described:
        if len(layer["slots"]) != 1 or layer.get("calls", 1) != 1:
            raise ConversionError(
                f"layer {layer['layer']} of this model attends more than once in a forward pass or is shared by "
                "several layers, which vLLM cannot follow: serve it with `darkformer serve`."
            )
        layers[layer["slots"][0]] = layer["layer"]
    return layers


def converted_layers(text_config: Any, num_kv_heads: int) -> dict[int, LayerHeads]:
    """The converted layers by their index among all.

    Args:
        text_config: transformers' configuration of the language model, its entries renamed as `SAVED` says.

    Raises:
        ConversionError: see `_described`.
    """
    config = DarkConfig.from_dict(text_config.darkformer_saved)
    return {
        index: LayerHeads(
            index, number, config.head_kinds(number, num_kv_heads).exact, config.constant_parts(number, num_kv_heads)
        )
        for index, number in _described(text_config).items()
    }


def layout_of(
    text_config: Any, *, dtype: torch.dtype, cache_dtype: torch.dtype, num_kv_heads: int, head_dim: int
) -> Layout:
    """The layout of a converted model.

    Args:
        text_config: as for `converted_layers`.
        dtype: of the model. cache_dtype: of keys and values of heads that keep softmax.

    Raises:
        ConversionError: nothing in it has constant state, or see `_described`.
    """
    layers = converted_layers(text_config, num_kv_heads)
    words = {
        (layer.index, part): slot_words(config, num_kv_heads=len(heads), head_dim=head_dim, dtype=dtype)
        for layer in layers.values()
        for part, (config, heads) in enumerate(layer.parts)
    }
    if not words:
        raise ConversionError(
            "every head of this model computes softmax attention: there is nothing to serve that the model before its "
            "conversion has not (darkformer.revert)."
        )
    largest = 4 * max(words.values())
    exact = [len(layer.exact) for layer in layers.values() if layer.exact]
    whole = len(layers) < text_config.num_hidden_layers  # layers that were not converted keep all their heads together
    together = math.gcd(*exact, *([num_kv_heads] if whole else []))
    if not (widest := num_kv_heads if whole else together):
        return Layout(layers, _packed(words, largest // 4), 0, largest, None)
    per_token = 2 * head_dim * widest * cache_dtype.itemsize
    block = -(-largest // (TOKENS * per_token)) * TOKENS
    page = block * per_token
    return Layout(layers, _packed(words, page // 4), together, page, block)


def _packed(words: dict[tuple[int, int], int], capacity: int) -> dict[tuple[int, int], Place]:
    """A place for each part, given its size: the largest first, each in the first page with room for it."""
    used: list[int] = []
    places = {}
    for part in sorted(words, key=lambda part: (-words[part], part)):
        page = next((i for i, taken in enumerate(used) if taken + words[part] <= capacity), len(used))
        used += [0] * (page == len(used))
        places[part] = Place(page, used[page])
        used[page] += words[part]
    return places


def kinds_of(layers: dict[int, LayerHeads], previous: Sequence[str]) -> list[str]:
    """The kind of each layer as vLLM's configuration names it: `linear_attention` where any head has constant state."""
    constant = {index for index, layer in layers.items() if layer.parts}
    return ["linear_attention" if i in constant else kind for i, kind in enumerate(previous)]
