"""What a head's output is worth to the residual stream: its columns of the layer's output projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..features.feature_map import FeatureMap
from ..hf.interface import observing
from ..hf.layers import converted_modules, layer_of
from .rows import inputs_of, run

#: Tokens of the pass that finds the output projections.
_TRIAL_TOKENS = 8


def _linear_weight(module: nn.Module, inputs: int) -> Tensor | None:
    """The weight (out, inputs) of a linear layer; None if it is quantized, offloaded, sharded, or no such layer."""
    if not isinstance(module, nn.Linear | Conv1D):
        return None
    weight = module.weight.detach()
    weight = weight.T if isinstance(module, Conv1D) else weight
    plain = weight.is_floating_point() and not weight.is_meta and weight.dim() == 2 and weight.shape[1] == inputs
    return weight if plain else None


def output_grams(model: nn.Module, batch: Any) -> dict[int, Tensor]:
    """WᵀW (G, R·d_v, R·d_v) of the output projections' columns of each kv head, by the feature map's id.

    The output projection of a layer is the linear module inside it whose input is exactly the attention's output.
    Where there is none (gated attention), or its weight cannot be read, the layer is absent.
    """
    outputs: dict[int, Tensor] = {}
    grams: dict[int, Tensor] = {}

    def observer(fm: FeatureMap, *captured: Any) -> None:
        outputs[id(fm)] = captured[-1].transpose(1, 2)  # (B, L, H, d_v)

    def hook_for(attention: Any) -> Any:
        fm, layer = attention.dark, layer_of(attention)

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            output = outputs.get(id(fm))
            if output is None or not args or not isinstance(args[0], Tensor):
                return
            x, width = args[0], layer.num_heads * output.shape[-1]
            if x.shape != (*output.shape[:2], width):
                return
            own = x.detach().unflatten(-1, (layer.num_kv_heads, -1))[:, :, list(fm.heads)]
            weight = _linear_weight(module, width)
            if weight is None or not torch.equal(own.flatten(2), output.flatten(2).to(x.dtype)):
                return
            columns = weight.float().unflatten(1, (layer.num_kv_heads, -1))[:, list(fm.heads)].transpose(0, 1)
            grams[id(fm)] = columns.mT @ columns

        return hook

    handles = []
    try:
        for attention in converted_modules(model):
            for module in attention.modules():
                if isinstance(module, nn.Linear | Conv1D):
                    handles.append(module.register_forward_pre_hook(hook_for(attention)))
        with observing(model, observer, softmax=True):
            run(model, {"input_ids": inputs_of(batch)["input_ids"][:1, :_TRIAL_TOKENS]})
    finally:
        for handle in handles:
            handle.remove()
    return grams


def squared_lengths(output: Tensor, gram: Tensor | None) -> Tensor:
    """(B, G, L) squared length of outputs (B, G, R, L, d_v), after the output projection where its gram is known."""
    if gram is None:
        return output.square().sum((2, 4))
    joined = output.transpose(2, 3).flatten(3)  # the query heads of a group add up in the residual stream
    return ((joined @ gram) * joined).sum(-1)
