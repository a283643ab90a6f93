"""The cache layer of a converted attention: constant size, whatever was generated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from ..config import ConversionError
from ..ops.problem import AttentionState


class DarkCacheLayer(CacheLayerMixin):
    """Holds an `AttentionState` where other layers hold all keys and values.

    `update` hands the new keys and values through; the attention function reads `state` and puts the next one back.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.state: AttentionState | None = None
        self.seen = 0  # tokens, padding included: what transformers counts positions by

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.is_initialized = True
        self.seen += key_states.shape[-2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state, self.seen, self.is_initialized = None, 0, False

    def offload(self) -> None:
        """A few kilobytes per head: not worth moving."""

    def prefetch(self) -> None:
        """See `offload`."""

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = torch.arange(self.state.count.shape[0], device=self.state.count.device)
            self._select(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def _select(self, rows: Tensor) -> None:
        if self.state is not None:
            rows = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
            self.state = self.state.select(rows.to(self.state.count.device))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ConversionError(
                f"crop({tokens_to_remove}): a linear-attention state cannot forget tokens it has summed. "
                "Assisted decoding is not available in linear mode; use darkformer.revert(model) for it."
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the state; 0 before the first token."""
        return 0 if self.state is None else self.state.nbytes


def own_layer(cache: Cache, layer_idx: int) -> DarkCacheLayer:
    """The cache's layer `layer_idx` as a `DarkCacheLayer`, put in place of an empty standard one.

    Raises:
        ConversionError: that layer already holds keys of the softmax model.
    """
    while len(cache.layers) <= layer_idx:
        cache.layers.append((cache.layer_class_to_replicate or DynamicLayer)())
    layer: Any = cache.layers[layer_idx]
    if isinstance(layer, DarkCacheLayer):
        return layer
    if layer.get_seq_length() > 0:
        raise ConversionError(
            f"layer {layer_idx} of past_key_values holds {layer.get_seq_length()} tokens of softmax attention: "
            "a converted model needs a cache of its own. Start with an empty cache."
        )
    own = DarkCacheLayer()
    cache.layers[layer_idx] = own
    return own


def cache_bytes(cache: Cache) -> int:
    """Bytes of all layers: states of converted layers, keys and values of the others."""

    def one(layer: Any) -> int:
        if isinstance(layer, DarkCacheLayer):
            return layer.nbytes
        return 0 if getattr(layer, "keys", None) is None else layer.keys.nbytes + layer.values.nbytes

    return sum(map(one, cache.layers))
