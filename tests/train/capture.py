"""What the softmax model's attention receives, layer by layer, for comparison with what calibration made of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from darkformer import FeatureMap
from darkformer.hf.interface import observing


class Call(NamedTuple):
    """One attention call: query (B, H, L, d), key, value (B, G, L, d), mask (B, L) or None, softmax output."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    output: Tensor


def captured(model: PreTrainedModel, batches: list[Any]) -> dict[int, list[Call]]:
    """The calls of every converted layer under softmax attention, one a batch."""
    calls: dict[int, list[Call]] = {}

    def observer(fm: FeatureMap, *arguments: Any) -> None:
        calls.setdefault(fm.layer, []).append(Call(*arguments))

    with observing(model, observer, softmax=True):
        for batch in batches:
            model(**(batch if isinstance(batch, dict) else {"input_ids": batch}), use_cache=False)
    return calls


def queries_of(call: Call) -> Tensor:
    """(G, N, d) scaled queries of a batch without padding, in float64; the heads of a group are one sample."""
    grouped = (call.query * call.scaling**0.5).unflatten(1, (call.key.shape[1], -1))
    return torch.stack([grouped[:, g].reshape(-1, grouped.shape[-1]) for g in range(grouped.shape[1])]).double()


def keys_of(call: Call, sinks: int) -> Tensor:
    """(G, N, d) scaled keys of a batch without padding, in float64, without each row's first `sinks`."""
    return (call.key * call.scaling**0.5)[:, :, sinks:].movedim(1, 0).flatten(1, 2).double()
