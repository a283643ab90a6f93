"""A layer's key/value heads, grouped by what they compute: features, window and sinks alone, or softmax."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import DarkConfig
from ..features.feature_map import FeatureMap
from .layers import Layer


@dataclass(frozen=True)
class Part:
    """Key/value heads of a layer that compute the same kind of attention.

    Attributes:
        heads: their numbers in the layer, ascending.
        group: query heads of each.
        feature_map: of these heads (one without features for window and sinks alone); None for softmax.
    """

    heads: tuple[int, ...]
    group: int
    feature_map: FeatureMap | None

    @property
    def query_heads(self) -> list[int]:
        """Numbers of the query heads that these key/value heads serve."""
        return [g * self.group + r for g in self.heads for r in range(self.group)]

    def of_keys(self, x: Tensor) -> Tensor:
        """This part's heads of keys or values (B, G, L, d)."""
        return _take(x, self.heads)

    def of_queries(self, x: Tensor) -> Tensor:
        """This part's heads of queries or outputs (B, H, L, d)."""
        return _take(x, self.query_heads)


def _take(x: Tensor, heads: Sequence[int]) -> Tensor:
    """Heads (dimension 1) of x; a view where they are consecutive."""
    first, last = heads[0], heads[-1]
    if last - first + 1 == len(heads):
        return x if len(heads) == x.shape[1] else x[:, first : last + 1]
    return x.index_select(1, torch.tensor(heads, device=x.device))


def joined(parts: Sequence[Part], outputs: Sequence[Tensor]) -> Tensor:
    """Outputs (B, H of the part, L, d_v) of all parts as one (B, H, L, d_v), heads in the layer's order."""
    if len(outputs) == 1:
        return outputs[0]
    places = _places(tuple(head for part in parts for head in part.query_heads))
    return torch.cat(list(outputs), dim=1).index_select(1, torch.tensor(places, device=outputs[0].device))


@functools.lru_cache(maxsize=1024)
def _places(order: tuple[int, ...]) -> list[int]:
    """The position of each head in `order`; cached, as it is the same for every token of a layer."""
    return sorted(range(len(order)), key=order.__getitem__)


@functools.lru_cache(maxsize=1024)
def _local_map(config: DarkConfig, layer: Layer, heads: tuple[int, ...]) -> FeatureMap:
    """The map of heads with window and sinks alone. It owns no tensor, so all calls share it."""
    return FeatureMap(
        replace(config, method="local"), num_heads=len(heads) * layer.group, num_kv_heads=len(heads),
        head_dim=layer.head_dim, layer=layer.layer, heads=heads,
    )  # fmt: skip


def parts_of(layer: Layer, feature_map: FeatureMap) -> tuple[Part, ...]:
    """The parts of a converted layer that have heads, `feature_map` being its module's own; softmax comes last."""
    parts = [Part(feature_map.heads, layer.group, None if feature_map.config.method == "exact" else feature_map)]
    if layer.local_heads and feature_map.config.method not in ("local", "exact"):
        local = _local_map(feature_map.config, layer, layer.local_heads)
        parts.append(Part(layer.local_heads, layer.group, local))
    if layer.exact_heads and feature_map.config.method != "exact":
        parts.append(Part(layer.exact_heads, layer.group, None))
    return tuple(parts)
