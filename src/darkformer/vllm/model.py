"""Converted models of any family on vLLM's Transformers backend."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.utils import extract_layer_index

from ..config import DarkConfig
from ..errors import InputError
from ..features.feature_map import FeatureMap
from ..ops.slots import SlotAttention
from .layers import DarkAttention, ExactAttention, StateHeads, StatePage
from .layout import LayerHeads, Layout
from .settings import layout_for

#: The part of a weight's name that says it was added by conversion.
MARK = ".dark."


class DarkformerForCausalLM(TransformersForCausalLM, HasInnerState, IsHybrid):
    """transformers' own modules with vLLM's layers in them, and our attention where the model is converted."""

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        # By this size vLLM would enlarge blocks after a rule of its own; `DarkSettings` has chosen them already.
        return ((0,),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return (torch.float32,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        return (get_temporal_copy_spec,)

    def _patch_config(self) -> None:
        """transformers' model gets a config of its own, with the layer types that it was saved with."""
        config: Any = copy.deepcopy(self.vllm_config.model_config.hf_config)
        self.config, self.text_config = config, config.get_text_config()
        if kinds := getattr(self.text_config, "darkformer_layer_types", None):
            self.text_config.layer_types = kinds
        super()._patch_config()

    def _get_attn_cls(self) -> Callable[..., nn.Module]:
        """What vLLM calls for each layer, with the arguments of its `Attention`."""
        layout = layout_for(self.vllm_config)
        self.feature_maps: dict[str, FeatureMap] = {}
        pages: dict[int, StatePage] = {}

        def make(**options: Any) -> nn.Module:
            layer = layout.layers.get(extract_layer_index(options["prefix"]))
            return ExactAttention(**options) if layer is None else self._converted(layout, layer, pages, **options)

        return make

    def _converted(
        self, layout: Layout, layer: LayerHeads, pages: dict[int, StatePage], *, num_heads: int, num_kv_heads: int,
        head_size: int, scale: float, prefix: str, logits_soft_cap: float | None = None,
        per_layer_sliding_window: int | None = None, **options: Any,
    ) -> DarkAttention:  # fmt: skip
        """The attention of a converted layer. A sliding window is what its softmax had.

        Args:
            pages: those of earlier layers, by their numbers in the layout; new ones are added.
        """
        group, together = num_heads // num_kv_heads, layout.together or 1
        parts = []
        for number, (config, heads) in enumerate(layer.parts):
            feature_map = _empty_map(config, heads, group, head_size, layer.number)
            if config.feature_count:
                self.feature_maps[prefix.rpartition(".")[0]] = feature_map
            page, begin = layout.places[layer.index, number]
            if page not in pages:
                pages[page] = StatePage(f"{prefix}.page{page}")
            attention = SlotAttention(
                feature_map, dtype=self.model_config.dtype, scaling=scale, softcap=logits_soft_cap, begin=begin
            )
            parts.append((attention, heads, pages[page]))
        state = StateHeads(parts, group=group, prefix=f"{prefix}.state") if parts else None
        exact = []
        for i in range(0, len(layer.exact), together):
            heads = layer.exact[i : i + together]
            attention = ExactAttention(
                num_heads=len(heads) * group, num_kv_heads=len(heads), head_size=head_size, scale=scale,
                logits_soft_cap=logits_soft_cap, prefix=f"{prefix}.exact{i}", **options,
            )  # fmt: skip
            exact.append((attention, heads))
        return DarkAttention(state, exact, group=group, head_size=head_size)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """vLLM's loading, but for the tensors that conversion added.

        Raises:
            InputError: a feature map's tensor is missing, or one is there that it has not.
        """
        loaded: dict[str, set[str]] = {name: set() for name in self.feature_maps}

        def own() -> Iterable[tuple[str, Tensor]]:
            for name, weight in weights:
                if MARK not in name:
                    yield name, weight
                    continue
                # vLLM calls every model's body `model`.
                module, _, tensor = (self.hf_to_vllm_mapper.map_name(name) or name).rpartition(MARK)
                if module in self.feature_maps:  # others belong to another stage of the pipeline
                    _load(self.feature_maps[module], tensor, weight, name)
                    loaded[module].add(tensor)

        others = super().load_weights(own())
        for name, feature_map in self.feature_maps.items():
            needed = {tensor for tensor, _ in feature_map.named_buffers()}
            if missing := sorted(needed - loaded[name]):
                raise InputError(
                    f"the model lacks {len(missing)} tensors of what conversion added to {name} "
                    f"({', '.join(missing[:3])}): save it again with model.save_pretrained."
                )
        return others


def _empty_map(config: DarkConfig, heads: tuple[int, ...], group: int, head_dim: int, number: int) -> FeatureMap:
    """A feature map to receive saved weights: nothing is drawn for it."""
    device = torch.get_default_device()
    with torch.device("meta"):
        feature_map = FeatureMap(
            config, num_heads=len(heads) * group, num_kv_heads=len(heads), head_dim=head_dim, layer=number,
            dtype=torch.float32, heads=heads,
        )  # fmt: skip
    feature_map = feature_map.to_empty(device=device).requires_grad_(False)
    for offset in feature_map.parameters():
        offset.zero_()  # version 0.1.0 saved none
    return feature_map


def _load(feature_map: FeatureMap, tensor: str, weight: Tensor, name: str) -> None:
    own = dict((*feature_map.named_parameters(), *feature_map.named_buffers())).get(tensor)
    if own is None or own.shape != weight.shape:
        here = "none" if own is None else tuple(own.shape)
        raise InputError(f"{name} is {tuple(weight.shape)}, the model's configuration has {here}: save it again.")
    own.copy_(weight)
