"""One token at a time in place: the state of a layer in the library's hands, for generation."""

from __future__ import annotations

import ctypes
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError, NonFiniteError
from ...features.feature_map import FeatureMap
from ...features.tracing import traced, transformed
from ..state import AttentionState, check_state
from . import load
from .load import Status
from .maps import pack

#: Fields of `StepCall` by those of `AttentionState`.
_STATE = {
    "feature_values": "feature_values", "feature_sum": "feature_sum", "log_scale": "log_scale",
    "recent_key": "recent_k", "recent_value": "recent_v", "sink_key": "sink_k", "sink_value": "sink_v",
    "count": "counts",
}  # fmt: skip
_MAPS = ("map_q", "offset_q", "map_k", "offset_k")

#: Bytes of state and maps from which on more threads gain more than waking them costs: between tokens a model's other
#: weights push them out of the caches.
THREADED = 1 << 18


def _prepared(
    feature_map: FeatureMap, dtype: torch.dtype, value_dim: int, *, scaling: float, softcap: float | None
) -> tuple[load.StepCall, list[Tensor]]:
    """A call with everything that stays the same from token to token, and the maps that it points to.

    Raises:
        InputError: a dtype besides float32 and bfloat16, or maps with fewer rows than there are features.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise InputError(f"a step takes keys and values in float32 or bfloat16, not in {dtype}.")
    config, groups, d = feature_map.config, feature_map.num_kv_heads, feature_map.head_dim
    with torch.no_grad():
        maps = pack(feature_map.parameters_for(torch.float32), groups, d, scaling, tokens=0)[:4]
    m, rows = config.feature_count, maps[0].shape[1]
    if rows < m:
        raise InputError(f"the feature map's tensors give {rows} rows, its configuration has {m} features.")
    memory = [
        load.as_memory(name, x, shape, torch.float32)
        for name, x, shape in zip(_MAPS, maps, 2 * [(groups, rows, d), (groups, rows)], strict=True)
    ]
    call = load.StepCall()
    call.G, call.R = groups, feature_map.num_heads // groups
    call.d, call.d_v, call.m, call.r = d, value_dim, m, rows - m
    call.window, call.sinks = config.window, config.sinks
    call.bf16, call.head = dtype == torch.bfloat16, 0
    call.scaling, call.softcap, call.omp_parallel = scaling, softcap or 0.0, load.omp_parallel()
    for name, x in zip(_MAPS, memory, strict=True):
        setattr(call, name, x.data_ptr())
    return call, memory


def _finite(maps: list[Tensor]) -> bool:
    """Whether maps can be computed with: the maximum of vectors lets NaN vanish, so others give wrong numbers."""
    return all(bool((x.abs() < load.LARGEST_NUMBER).all()) for x in maps)


class Step:
    """A layer's state that a call advances by one real token per row, in place; nothing is allocated but the output.

    The window is a ring: no key moves. Maps are computed once, so the feature map must not change meanwhile.

    Args:
        state: where to start; copied.
        feature_map: one of the methods in `darkformer.ops.native.METHODS`.
        scaling, softcap: as for `darkformer.attention`.

    Raises:
        InputError: the state is of another layer or configuration, or in a dtype besides float32 and bfloat16.
            NonFiniteError: it holds NaN or infinity.
    """

    def __init__(
        self, state: AttentionState, feature_map: FeatureMap, *, scaling: float, softcap: float | None
    ) -> None:
        self.feature_map, self.options = feature_map, (scaling, softcap)
        self.dtype, groups, d = state.recent_key.dtype, feature_map.num_kv_heads, feature_map.head_dim
        if self.dtype not in (torch.float32, torch.bfloat16) or state.recent_value.dim() != 4:
            raise InputError(f"a step takes keys and values (B, G, W, d) in float32 or bfloat16, not in {self.dtype}.")
        batch, _, _, value_dim = state.recent_value.shape
        key, value = (torch.empty(batch, groups, 0, n, dtype=self.dtype) for n in (d, value_dim))
        like = AttentionState.expanded(feature_map.config, key, value, batch=batch, compute=torch.float32)
        checked = check_state(state, like)
        assert isinstance(checked, AttentionState)
        state = checked
        tensors = {
            name: getattr(state, name).detach().resolve_neg().clone(memory_format=torch.contiguous_format)
            for name in _STATE
        }
        call, self._maps = _prepared(feature_map, self.dtype, value_dim, scaling=scaling, softcap=softcap)
        self.finite = _finite(self._maps)
        self.nbytes, self._tensors = sum(x.nbytes for x in tensors.values()), tensors
        self._bytes_read = self.nbytes + sum(x.nbytes for x in self._maps)
        self._call, call.B = call, batch
        for name, x in zip(_STATE.values(), tensors.values(), strict=True):
            setattr(call, name, x.data_ptr())
        self._shapes = tuple(
            (batch, heads, 1, n) for heads, n in ((feature_map.num_heads, d), (groups, d), (groups, value_dim))
        )
        self._output_shape = (batch, feature_map.num_heads, 1, value_dim)
        self._step, self._call_reference = load.library().darkformer_step, ctypes.byref(call)

    def takes(self, query: Tensor, key: Tensor, scaling: float, softcap: float | None) -> bool:
        """Whether a call is one more token of these shapes, dtype and options."""
        return (
            query.shape == self._shapes[0]
            and key.shape == self._shapes[1]
            and query.dtype == key.dtype == self.dtype
            and (scaling, softcap) == self.options
            and not (transformed() or traced(query))
        )

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query (B, H, 1, d), key (B, G, 1, d), value (B, G, 1, d_v) → (B, H, 1, d_v) in their dtype.

        Raises:
            InputError: other shapes or dtypes than the state's. NonFiniteError: NaN or infinity in one of them, and the
                state is as before; or in the output.
            OutOfMemoryError: there is no memory to work in; the state is of no more use.
        """
        call, named = self._call, (("query", query), ("key", key), ("value", value))
        inputs = [
            load.as_memory(name, x, shape, self.dtype, strided=True)
            for (name, x), shape in zip(named, self._shapes, strict=True)
        ]
        output = query.new_empty(self._output_shape)
        call.q, call.k, call.v = (x.data_ptr() for x in inputs)
        call.q_strides[:], call.k_strides[:], call.v_strides[:] = (x.stride()[:2] for x in inputs)
        call.out, call.threads = output.data_ptr(), torch.get_num_threads() if self._bytes_read > THREADED else 1
        status = self._step(self._call_reference)
        if status == Status.NON_FINITE_INPUT:
            raise NonFiniteError(
                "query, key or value hold NaN, infinity or numbers whose logits exceed the range of float32: the token "
                "was not taken."
            )
        if status:
            load.check(
                status,
                "the output holds NaN or infinity although query, key and value do not: the state has diverged, or the "
                "logits exceed the range of float32.",
            )
        return output

    @property
    def count(self) -> Tensor:
        """(B,) int64, tokens seen; changes with the next one."""
        return self._tensors["count"]

    def state(self) -> AttentionState:
        """A copy of the state after the last token."""
        copies = {}
        for name, x in self._tensors.items():
            head = self._call.head if name.startswith("recent") else 0
            copies[name] = torch.cat([x[:, :, head:], x[:, :, :head]], dim=2) if head else x.clone()
        return AttentionState(**{f.name: copies[f.name] for f in fields(AttentionState)})

    def __deepcopy__(self, memo: dict[int, Any]) -> Step:
        scaling, softcap = self.options
        return Step(self.state(), self.feature_map, scaling=scaling, softcap=softcap)


class SlotStep:
    """`Step` for sequences whose states lie in slots of a pool: one token for each of those in a call.

    Maps are computed once, so the feature map must not change meanwhile.

    Args:
        feature_map: one of the methods in `darkformer.ops.native.METHODS`.
        dtype: of queries, keys and values.
        offsets: bytes from the beginning of a slot to each field of `AttentionState` but the count.
        scaling, softcap: as for `darkformer.attention`.

    Raises:
        InputError: see `_prepared`.
    """

    def __init__(
        self, feature_map: FeatureMap, dtype: torch.dtype, offsets: dict[str, int], *,
        scaling: float, softcap: float | None,
    ) -> None:  # fmt: skip
        self._call, self._maps = _prepared(feature_map, dtype, feature_map.head_dim, scaling=scaling, softcap=softcap)
        self.finite = _finite(self._maps)
        self._offsets = {_STATE[name]: offset for name, offset in offsets.items()}
        self._map_bytes = sum(x.nbytes for x in self._maps)
        self._step, self._call_reference = load.library().darkformer_step, ctypes.byref(self._call)

    def __call__(
        self, pool: Tensor, slots: Tensor, positions: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor
    ) -> None:
        """Fills `output` (N, H, d) for queries (N, H, d), keys and values (N, G, d); all in the dtype.

        A row whose numbers are not finite, or whose state has diverged, gets NaN; other rows do not notice.

        Args:
            pool: (slots, words) float32, written to. slots: (N,) int64, all different.
            positions: (N,) int64, tokens that are in the slots already; before the first one a slot may hold anything.

        Raises:
            OutOfMemoryError: there is no memory to work in; the states are of no more use.
        """
        call, base = self._call, pool.data_ptr()
        call.B, call.slot_bytes = query.shape[0], pool.stride(0) * pool.element_size()
        for name, offset in self._offsets.items():
            setattr(call, name, base + offset)
        call.slots, call.counts = slots.data_ptr(), positions.data_ptr()
        call.q, call.k, call.v, call.out = (x.data_ptr() for x in (query, key, value, output))
        call.q_strides[:], call.k_strides[:], call.v_strides[:] = (x.stride()[:2] for x in (query, key, value))
        work = call.slot_bytes * call.B + self._map_bytes
        call.threads = torch.get_num_threads() if work > THREADED else 1
        status = self._step(self._call_reference)
        if status == Status.OUT_OF_MEMORY:
            load.check(status)
