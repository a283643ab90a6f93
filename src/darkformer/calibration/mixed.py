"""Gives kv heads of a softmax model windows of their own, without converting it.

Every kv head has a window: 0 for softmax over everything, W > 0 for the last W keys and the first `sinks`. A gate
between two windows makes the choice differentiable: output = o + gate·(o_other − o). Its derivative is the first-order
change of a loss when the head goes over to the other window, for all heads from one backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import DarkConfig
from ..errors import ConversionError
from ..features.feature_map import FeatureMap
from ..hf.interface import Received, attend_as_before, attending, receive, softmax_of
from ..hf.layers import Layer, converted_modules
from ..hf.masks import read_mask
from ..hf.plan import plan_conversion
from ..hf.trial import implementation
from ..ops.attention import attention

#: The window that stands for softmax attention over everything.
EXACT = 0


@dataclass
class LayerState:
    """The windows and gates of one layer.

    Attributes:
        windows: of each kv head (G); EXACT for softmax.
        others: window → kv heads that have a gate to it.
        gates: window → the gates of those heads, (heads,) or (B, heads): booleans, or numbers to interpolate.
    """

    windows: list[int]
    others: dict[int, list[int]] = field(default_factory=dict)
    gates: dict[int, Tensor] = field(default_factory=dict)


def _kv_heads(x: Tensor, heads: list[int], groups: int) -> Tensor:
    """x (B, H or G, L, d) of some kv heads; x itself if these are all."""
    if len(heads) == groups:
        return x
    return x.unflatten(1, (groups, -1))[:, heads].flatten(1, 2)


class MixedAttention:
    """The attention of a softmax model's full layers with a window per kv head.

    Attributes:
        layers: those that would be converted, first layer first.
        states: windows and gates of each layer; at first everything is exact.

    Raises:
        ConversionError: the model is converted already, has no layer of this kind, or is an encoder.
    """

    def __init__(self, model: Any, sinks: int) -> None:
        if converted_modules(model):
            raise ConversionError(
                "the model is converted already, and sensitivity is a property of its softmax attention: call "
                "darkformer.revert(model) first, or load the softmax model."
            )
        plan = plan_conversion(model, DarkConfig(method="local", window=1, sinks=sinks))
        self.model, self.sinks = model, sinks
        self.names = [name for name, *_ in plan.layers]
        self.modules: list[Any] = [module for _, module, _ in plan.layers]
        self.layers: list[Layer] = [layer for *_, layer in plan.layers]
        self._index = {id(module): i for i, module in enumerate(self.modules)}
        self._maps: dict[tuple[int, int, int, int], FeatureMap] = {}
        self.states = [LayerState([EXACT] * layer.num_kv_heads) for layer in self.layers]

    @property
    def heads(self) -> list[tuple[int, int]]:
        """(index of the layer, kv head) of every head."""
        return [(i, g) for i, layer in enumerate(self.layers) for g in range(layer.num_kv_heads)]

    def reset(self, windows: Sequence[Sequence[int]] | None = None) -> None:
        """Removes all gates and sets the windows (layers × kv heads), by default to exact."""
        if windows is None:
            windows = [[EXACT] * layer.num_kv_heads for layer in self.layers]
        self.states = [LayerState(list(row)) for row in windows]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within the block, and in this thread alone, the model attends by `states`."""
        with implementation(self.model), attending(self):
            yield

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        index = self._index.get(id(module))
        if index is None:
            return attend_as_before(module, query, key, value, mask, **kwargs)
        extra = {name: x for name, x in kwargs.items() if name not in ("scaling", "dropout")}
        received = receive(
            module, query, key, value, mask, kwargs.get("scaling"), extra,
            causal_by_mask=self.layers[index].causal_by_mask,
        )  # fmt: skip
        if not received.is_causal:
            raise ConversionError(
                f"layer {self.layers[index].layer} is bidirectional, an encoder's: it has no far field behind a query."
            )
        output = self._mixed(index, received)
        return output.transpose(1, 2).to(value.dtype).contiguous(), None

    def _attend(self, window: int, heads: list[int], received: Received, masks: tuple[Any, Any]) -> Tensor:
        """The output of some kv heads under one window: (B, heads, R, L, d_v)."""
        groups = received.key.shape[1]
        query, key, value = (_kv_heads(x, heads, groups) for x in (received.query, received.key, received.value))
        if window == EXACT:
            output = softmax_of(replace(received, query=query, key=key, value=value))[0]
        else:
            sizes = (window, query.shape[1], key.shape[1], query.shape[3])
            if sizes not in self._maps:
                config = DarkConfig(method="local", window=window, sinks=self.sinks)
                self._maps[sizes] = FeatureMap(config, num_heads=sizes[1], num_kv_heads=sizes[2], head_dim=sizes[3])
            local = attention(
                query, key, value, self._maps[sizes], key_mask=masks[0], documents=masks[1], scaling=received.scaling,
                softcap=received.softcap,
            )  # fmt: skip
            assert isinstance(local, Tensor)
            output = local
        return output.unflatten(1, (len(heads), -1))

    def _mixed(self, index: int, received: Received) -> Tensor:
        state, query = self.states[index], received.query
        masks = read_mask(received.mask, received.kwargs, query.shape[0], query.shape[2], cached=False)
        outputs: dict[int, tuple[list[int], Tensor]] = {}
        for window in sorted({*state.windows, *state.others}):
            own = {g for g, w in enumerate(state.windows) if w == window}
            heads = sorted(own | set(state.others.get(window, ())))
            if heads:
                outputs[window] = heads, self._attend(window, heads, received, masks)
        if not state.others and len(outputs) == 1:
            return next(iter(outputs.values()))[1].flatten(1, 2)
        parts = []
        for g, window in enumerate(state.windows):
            output = mixed = _output_of(outputs[window], g)
            for other, gated in state.others.items():
                if g in gated:
                    there = _output_of(outputs[other], g)
                    gate = state.gates[other][..., gated.index(g)].reshape(-1, 1, 1, 1)
                    if gate.dtype == torch.bool:
                        mixed = torch.where(gate, there, mixed)
                    else:
                        mixed = mixed + gate.to(output.dtype) * (there - output)
            parts.append(mixed)
        return torch.stack(parts, dim=1).flatten(1, 2)


def _output_of(computed: tuple[list[int], Tensor], head: int) -> Tensor:
    """(B, R, L, d_v) of one kv head, from the heads that were computed and their outputs."""
    heads, outputs = computed
    return outputs[:, heads.index(head)]


def decoder_layers(model: nn.Module, attentions: Sequence[nn.Module]) -> list[Any] | None:
    """The blocks of the ModuleList that holds all attention modules, one a block at most; None if there is none."""
    wanted = {id(module) for module in attentions}
    for candidate in model.modules():
        if not isinstance(candidate, nn.ModuleList):
            continue
        inside = [{id(m) for m in block.modules()} & wanted for block in candidate]
        if set().union(*inside) == wanted and sum(map(len, inside)) == len(wanted) and max(map(len, inside)) == 1:
            return list(candidate)
    return None


@contextlib.contextmanager
def replaced_forward(modules: Sequence[Any], wrap: Callable[[int, Any], Any]) -> Iterator[None]:
    """Within the block the forward of each module is `wrap(i, forward)`, with i its place in the sequence."""
    before = [vars(module).get("forward") for module in modules]
    try:
        for i, module in enumerate(modules):
            module.forward = wrap(i, module.forward)
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


@contextlib.contextmanager
def checkpointed(mixed: MixedAttention, blocks: Sequence[Any]) -> Iterator[None]:
    """Within the block the decoder layers keep only their inputs, and are computed again in the backward pass."""

    def wrap(_: int, forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with attending(mixed):  # the backward pass may run in another thread
                return forward(*args, **kwargs)

        return lambda *args, **kwargs: checkpoint(run, *args, use_reentrant=False, **kwargs)

    with replaced_forward(blocks, wrap):
        yield
