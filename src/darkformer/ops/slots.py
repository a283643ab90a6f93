"""Attention over many sequences whose states lie in the slots of one pool, for servers that schedule requests.

A slot is a row of float32 numbers that holds a sequence's `AttentionState` for some heads of a layer, but for the
count, which the server knows. The window is a ring, the key at position p in place p mod window: no key moves, and
sequences of any lengths take a token each in one call.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import DarkConfig
from ..errors import NonFiniteError
from ..features.affine import FeatureParameters
from ..features.feature_map import FeatureMap
from .chunked import chunked
from .native import METHODS, native, unavailable, why_not
from .native.step import SlotStep
from .recurrent import recurrent
from .state import LOG_ZERO, AttentionState, Problem, gather_tokens

#: Fields begin at whole cache lines.
_ALIGNMENT = 16


class _Field(NamedTuple):
    """Where a field of `AttentionState` lies in a slot."""

    begin: int  # in float32 words
    words: int
    shape: tuple[int, ...]  # without the batch
    dtype: torch.dtype


def _aligned(words: int) -> int:
    return -(-words // _ALIGNMENT) * _ALIGNMENT


def _fields(config: DarkConfig, groups: int, d: int, dtype: torch.dtype) -> dict[str, _Field]:
    m, number, begin = config.feature_count, torch.float32, 0
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "feature_values": ((groups, m, d), number), "feature_sum": ((groups, m), number),
        "log_scale": ((groups, m), number),
        "recent_key": ((groups, config.window, d), dtype), "recent_value": ((groups, config.window, d), dtype),
        "sink_key": ((groups, config.sinks, d), dtype), "sink_value": ((groups, config.sinks, d), dtype),
    }  # fmt: skip
    fields = {}
    for name, (shape, own) in shapes.items():
        numbers = torch.Size(shape).numel()
        words = -(-numbers * own.itemsize // number.itemsize)
        fields[name] = _Field(begin, words, shape, own)
        begin += _aligned(words)
    return fields


def slot_words(config: DarkConfig, *, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Float32 words that a sequence's state takes, its keys and values in `dtype`: whole cache lines."""
    return sum(_aligned(field.words) for field in _fields(config, num_kv_heads, head_dim, dtype).values())


class SlotAttention:
    """Causal attention of one feature map over sequences in slots.

    Maps are computed at the first call, so the feature map must not change afterwards.

    Args:
        feature_map: of the heads; any method but `exact`, whose state grows.
        dtype: of queries, keys and values: float32, bfloat16 or float16.
        scaling, softcap: as for `darkformer.attention`.
        begin: words of a slot before those of these heads.
    """

    def __init__(
        self, feature_map: FeatureMap, *, dtype: torch.dtype, scaling: float, softcap: float | None = None,
        begin: int = 0,
    ) -> None:  # fmt: skip
        self.feature_map, self.dtype, self.scaling, self.softcap = feature_map, dtype, scaling, softcap
        config, groups, d = feature_map.config, feature_map.num_kv_heads, feature_map.head_dim
        self.begin, self.words = begin, slot_words(config, num_kv_heads=groups, head_dim=d, dtype=dtype)
        self._fields = _fields(config, groups, d, dtype)

    @functools.cached_property
    def _parameters(self) -> FeatureParameters:
        with torch.no_grad():
            return self.feature_map.parameters_for(torch.float32)

    @functools.cached_property
    def _compiled(self) -> SlotStep | None:
        """The library's step, where there is one for this method and dtype."""
        usable = self.feature_map.config.method in METHODS and self.dtype in (torch.float32, torch.bfloat16)
        if not usable or unavailable():
            return None
        offsets = {name: 4 * (self.begin + field.begin) for name, field in self._fields.items()}
        step = SlotStep(self.feature_map, self.dtype, offsets, scaling=self.scaling, softcap=self.softcap)
        return step if step.finite else None

    def _views(self, rows: Tensor) -> dict[str, Tensor]:
        """The fields (N, G, …) of rows (N, words), in the same memory."""
        return {
            name: rows[:, x.begin : x.begin + x.words].view(x.dtype)[:, : torch.Size(x.shape).numel()]
            .unflatten(1, x.shape)
            for name, x in self._fields.items()
        }  # fmt: skip

    def step(self, pool: Tensor, slots: Tensor, positions: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One token for each of N sequences, which are added to their states in place.

        Nothing waits for a device. A row with numbers that are not finite has NaN in its output; no other row has.

        Args:
            pool: (slots, words) float32, rows any distance apart. slots: (N,) int64, all different.
            positions: (N,) int64, tokens that are in each slot; before the first one it may hold anything.
            query: (N, H, d). key, value: (N, G, d).

        Returns:
            (N, H, d).
        """
        if pool.is_cpu and (compiled := self._compiled) is not None:
            query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
            output = query.new_empty(query.shape)
            compiled(pool, slots, positions, query, key, value, output)
            return output
        return self._step_in_torch(pool, slots, positions, query, key, value)

    def _step_in_torch(
        self, pool: Tensor, slots: Tensor, positions: Tensor, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        groups, window = self.feature_map.num_kv_heads, self.feature_map.config.window
        own = pool[:, self.begin : self.begin + self.words]
        rows = own.index_select(0, slots)
        fields, new = self._views(rows), positions == 0
        for name, x in fields.items():
            x.masked_fill_(new.view(-1, *(1,) * (x.dim() - 1)), LOG_ZERO if name == "log_scale" else 0)
        before = dict(fields)
        if window:
            order = (positions[:, None] + torch.arange(window, device=pool.device)) % window
            before |= {name: gather_tokens(fields[name], order) for name in ("recent_key", "recent_value")}
        problem = Problem(
            query=query.unflatten(1, (groups, -1))[:, :, :, None], key=key[:, :, None], value=value[:, :, None],
            lengths=torch.ones_like(positions), scaling=self.scaling, parameters=self._parameters,
            state=AttentionState(count=positions, **before), is_causal=True, padded=False, softcap=self.softcap,
        )  # fmt: skip
        output, after = recurrent(problem)
        assert isinstance(after, AttentionState)
        for name, x in fields.items():
            if not name.startswith("recent"):
                x.copy_(getattr(after, name))
        if window:
            row, place = torch.arange(len(positions), device=pool.device), positions % window
            fields["recent_key"].movedim(2, 1)[row, place] = key
            fields["recent_value"].movedim(2, 1)[row, place] = value
        own.index_copy_(0, slots, rows)
        return output[:, :, :, 0].flatten(1, 2).to(query.dtype)

    def extend(self, pool: Tensor, slot: Tensor, position: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """L tokens of one sequence, which are added to its state in place.

        Args:
            slot: () int64. position: tokens that are in the slot; 0: it may hold anything.
            query: (L, H, d). key, value: (L, G, d).

        Returns:
            (L, H, d). Where numbers are not finite it has NaN, and what the sequence had read before may be lost.
        """
        groups, window = self.feature_map.num_kv_heads, self.feature_map.config.window
        own = pool[:, self.begin : self.begin + self.words]
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        state = AttentionState.expanded(self.feature_map.config, k, v, batch=1, compute=torch.float32)
        if position:
            fields = self._views(own.index_select(0, slot.view(1)))
            if window:
                turned = {name: fields[name].roll(-position % window, 2) for name in ("recent_key", "recent_value")}
                fields |= turned
            state = AttentionState(count=state.count + position, **fields)
        problem = Problem(
            query=q.unflatten(1, (groups, -1)), key=k, value=v,
            lengths=torch.full((1,), query.shape[0], dtype=torch.int64, device=query.device),
            scaling=self.scaling, parameters=self._parameters, state=state, is_causal=True, padded=False,
            softcap=self.softcap, fresh=position == 0,
        )  # fmt: skip
        try:
            output, after = (native if why_not(problem) is None else chunked)(problem)
        except NonFiniteError:  # one request's; and what an earlier sequence left in the slot must not be read
            output = problem.query.new_full(problem.query.shape, torch.nan)
            after = AttentionState.expanded(self.feature_map.config, k, v, batch=1, compute=torch.float32)
        assert isinstance(after, AttentionState)
        rows = own.new_zeros(1, self.words)
        for name, x in self._views(rows).items():
            new = getattr(after, name)
            if window and name.startswith("recent"):
                new = new.roll((position + query.shape[0]) % window, 2)
            x.copy_(new)
        own.index_copy_(0, slot.view(1), rows)
        return output[0].flatten(0, 1).transpose(0, 1).to(query.dtype)
