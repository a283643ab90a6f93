"""A converted layer in vLLM: states in pages, beside vLLM's own attention for heads that keep softmax."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor, split_decodes_and_prefills
from vllm.v1.kv_cache_interface import KVCacheSpec

from ..ops.slots import SlotAttention
from .settings import BACKEND, layout_for


class Piece(NamedTuple):
    """New tokens of one request that are more than one: rows begin … end-1 of the batch."""

    begin: int
    end: int
    position: int  # tokens of the request before them
    slot: Tensor  # () int64


class StateMetadata(NamedTuple):
    """Which rows of a batch belong to which slots. Requests with one new token come first.

    Attributes:
        slots, positions: (N,) int64, the slot of each request with one new token, and its tokens before.
        pieces: of the other requests.
    """

    slots: Tensor
    positions: Tensor
    pieces: list[Piece]


class StateMetadataBuilder(AttentionMetadataBuilder[StateMetadata]):
    """Reads vLLM's description of a batch; nothing in it waits for a device."""

    reorder_batch_threshold = 1
    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # which is abstract

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StateMetadata:
        batch = common_attn_metadata
        mode = self.vllm_config.cache_config.mamba_cache_mode
        table = mamba_get_block_table_tensor(batch.block_table_tensor, batch.seq_lens, self.kv_cache_spec, mode)
        slots = table[:, 0].long()
        count, others, _, _ = split_decodes_and_prefills(batch, decode_threshold=1)
        pieces = []
        if others:
            # The copy on the host is exact for requests that still read their prompt.
            lengths = batch.seq_lens if batch.seq_lens_cpu_upper_bound is None else batch.seq_lens_cpu_upper_bound
            starts = batch.query_start_loc_cpu.tolist()
            for row in range(count, count + others):
                begin, end = starts[row], starts[row + 1]
                pieces.append(Piece(begin, end, int(lengths[row]) - (end - begin), slots[row]))
        return StateMetadata(slots[:count], batch.seq_lens[:count].long() - 1, pieces)


class StateBackend(AttentionBackend):
    """Where vLLM finds the builder for layers of type `BACKEND`."""

    @staticmethod
    def get_name() -> str:
        return BACKEND

    @staticmethod
    def get_builder_cls() -> type[StateMetadataBuilder]:
        return StateMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


class ExactAttention(Attention):
    """vLLM's attention, whose blocks fill a page of the same size as a state's."""

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        spec: Any = super().get_kv_cache_spec(vllm_config)
        per_token = spec.real_page_size_bytes // spec.block_size
        page = layout_for(vllm_config).page
        return dataclasses.replace(spec, block_size=page // per_token, page_size_padded=None)


class StatePage(nn.Module, MambaBase):
    """One page of each sequence, which vLLM gives out: the states of some heads, of one layer or several.

    Args:
        prefix: its name in vLLM.
    """

    kv_cache: tuple[Tensor, ...]

    def __init__(self, prefix: str) -> None:
        super().__init__()
        config = get_current_vllm_config()
        self.prefix, self.words = prefix, layout_for(config).page // 4
        self.kv_cache = (torch.empty(0),)
        _announce(prefix, self)

    @property
    def mamba_type(self) -> Any:
        return MambaAttentionBackendEnum[BACKEND]

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return ((self.words,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.float32,)


def _announce(name: str, module: nn.Module) -> None:
    """Makes vLLM find a layer by its name while a model runs."""
    layers = get_current_vllm_config().compilation_config.static_forward_context
    if name in layers:
        raise ValueError(f"Duplicate layer name: {name}")
    layers[name] = module


class _Part(NamedTuple):
    """Heads of a layer with constant state."""

    heads: slice | Tensor  # among the key/value heads
    query_heads: slice | Tensor
    attention: SlotAttention
    page: StatePage


def _places(numbers: Sequence[int]) -> slice | Tensor:
    """Indices as a slice, which copies nothing, where they are consecutive."""
    first, last = numbers[0], numbers[-1]
    return slice(first, last + 1) if last - first + 1 == len(numbers) else torch.tensor(numbers)


def _query_heads(heads: Sequence[int], group: int) -> list[int]:
    return [g * group + r for g in heads for r in range(group)]


class StateHeads(nn.Module):
    """The heads of one layer whose state is constant.

    Args:
        parts: attention, the numbers of its key/value heads, and the page with its states.
        group: query heads of a key/value head.
        prefix: the layer's name in vLLM.
    """

    def __init__(
        self, parts: Sequence[tuple[SlotAttention, tuple[int, ...], StatePage]], *, group: int, prefix: str
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self._parts = [
            _Part(_places(heads), _places(_query_heads(heads, group)), attention, page)
            for attention, heads, page in parts
        ]
        _announce(prefix, self)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        """Fills this layer's heads of `output` (T, H, d) for a flat batch: query (T, H, d), key, value (T, G, d)."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM measures memory
            output.zero_()
            return
        for part in self._parts:
            batch: StateMetadata = metadata[part.page.prefix]
            (pool,), count = part.page.kv_cache, len(batch.slots)
            q, k, v = query[:, part.query_heads], key[:, part.heads], value[:, part.heads]
            if count:
                output[:count, part.query_heads] = part.attention.step(
                    pool, batch.slots, batch.positions, q[:count], k[:count], v[:count]
                )
            for begin, end, position, slot in batch.pieces:
                output[begin:end, part.query_heads] = part.attention.extend(
                    pool, slot, position, q[begin:end], k[begin:end], v[begin:end]
                )


class DarkAttention(nn.Module):
    """Stands where vLLM's `Attention` stood in a converted layer: flat query (T, H·d), key, value (T, G·d) → (T, H·d).

    Args:
        state: the heads with constant state; None if there are none.
        exact: vLLM's attention for the others, with the numbers of their key/value heads.
    """

    def __init__(
        self,
        state: StateHeads | None,
        exact: Sequence[tuple[Attention, tuple[int, ...]]],
        *,
        group: int,
        head_size: int,
    ) -> None:
        super().__init__()
        self.head_size, self.name = head_size, None if state is None else state.prefix
        self.exact = nn.ModuleList(attention for attention, _ in exact)
        self._exact_heads = [(_places(heads), _places(_query_heads(heads, group))) for _, heads in exact]

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (-1, self.head_size)) for x in (query, key, value))
        output = torch.empty_like(q)
        if self.name is not None:
            torch.ops.vllm.darkformer_state_attention(q, k, v, output, self.name)
        for attention, (heads, query_heads) in zip(self.exact, self._exact_heads, strict=True):
            part = attention(*(x.flatten(1) for x in (q[:, query_heads], k[:, heads], v[:, heads])))
            output[:, query_heads] = part.unflatten(-1, (-1, self.head_size))
        return output.flatten(1)


def _state_attention(query: Tensor, key: Tensor, value: Tensor, output: Tensor, layer_name: str) -> None:
    get_forward_context().no_compile_layers[layer_name].attend(query, key, value, output)


def _no_state_attention(query: Tensor, key: Tensor, value: Tensor, output: Tensor, layer_name: str) -> None:
    return


# One operator, so that torch.compile does not look inside.
direct_register_custom_op(
    "darkformer_state_attention", _state_attention, mutates_args=["output"], fake_impl=_no_state_attention
)
