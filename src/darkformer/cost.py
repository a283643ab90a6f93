"""What attention costs, as named functions with units."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .config import DarkConfig
from .errors import ConfigError


def memory_bytes() -> int | None:
    """Bytes of this machine's memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def check_memory(size: int, what: str) -> None:
    """Refuses what this machine cannot hold before anything is allocated: an allocation may first fill the memory.

    Args:
        size: bytes. what: is to take them, for the message.

    Raises:
        ConfigError: more than the machine has.
    """
    memory = memory_bytes()
    if memory is not None and size > memory:
        raise ConfigError(f"{what}: that takes {size / 1e9:,.0f} GB, and this machine has {memory / 1e9:,.0f} GB.")


def state_bytes(
    config: DarkConfig, *, num_kv_heads: int, head_dim: int, value_dim: int | None = None, element_bytes: int = 4
) -> int:
    """Bytes one sequence's state takes in a layer whose heads all have constant state, whatever the length.

    Sums and scales are float32: m·(d_v + 2) numbers a kv head. Window and sinks keep keys and values in the model's
    dtype (`element_bytes`): (window + sinks)·(d + d_v). One int64 counts the tokens.
    """
    d_v = head_dim if value_dim is None else value_dim
    sums = 4 * config.feature_count * (d_v + 2)
    exact = element_bytes * (config.window + config.sinks) * (head_dim + d_v)
    return num_kv_heads * (sums + exact) + 8


def layer_bytes(
    config: DarkConfig, layer: int, seq_len: int, *, num_kv_heads: int, head_dim: int, value_dim: int | None = None,
    element_bytes: int = 4,
) -> int:  # fmt: skip
    """Bytes one sequence of `seq_len` tokens keeps in one converted layer, its exact heads and its states.

    A cache allocates windows whole: a sequence shorter than the window takes as much.
    """
    shape: dict[str, Any] = dict(head_dim=head_dim, value_dim=value_dim, element_bytes=element_bytes)
    exact = len(config.head_kinds(layer, num_kv_heads).exact)
    total = kv_cache_bytes(seq_len, num_kv_heads=exact, **shape) if exact else 0
    for form, heads in config.constant_parts(layer, num_kv_heads):
        total += state_bytes(form, num_kv_heads=len(heads), **shape)
    return total


def kv_cache_bytes(
    seq_len: int, *, num_kv_heads: int, head_dim: int, value_dim: int | None = None, element_bytes: int = 4
) -> int:
    """Bytes of one softmax layer's keys and values for one sequence of `seq_len` tokens."""
    d_v = head_dim if value_dim is None else value_dim
    return element_bytes * seq_len * num_kv_heads * (head_dim + d_v)


def model_bytes(
    settings: Any, layers: Iterable[Any], config: DarkConfig | None, seq_len: int, *, element_bytes: int = 4
) -> int:
    """Bytes one sequence of `seq_len` tokens keeps in a whole model, converted by `config`; softmax with None.

    Layers that stay as they are keep their keys and values, sliding ones those of their window.

    Args:
        settings: transformers' configuration of the language model.
        layers: what a conversion knows of each layer that it takes (`darkformer.hf.layers.Layer`).
    """
    heads = settings.num_attention_heads
    usual: dict[str, Any] = {
        "num_kv_heads": getattr(settings, "num_key_value_heads", None) or heads,
        "head_dim": getattr(settings, "head_dim", None) or settings.hidden_size // heads,
        "element_bytes": element_bytes,
    }
    kinds = getattr(settings, "layer_types", None) or ["full_attention"] * settings.num_hidden_layers
    taken = {slot: layer for layer in layers for slot in layer.slots}
    total = 0
    for slot, kind in enumerate(kinds):
        if (layer := taken.get(slot)) is not None:
            shape = {"num_kv_heads": layer.num_kv_heads, "head_dim": layer.head_dim, "element_bytes": element_bytes}
            one = kv_cache_bytes(seq_len, **shape) if config is None else layer_bytes(
                config, layer.layer, seq_len, **shape
            )  # fmt: skip
            total += layer.calls * one
        elif kind in ("full_attention", "sliding_attention", "chunked_attention"):
            near = None if kind == "full_attention" else getattr(settings, "sliding_window", None)
            total += kv_cache_bytes(min(seq_len, near or seq_len), **usual)
    return total


class Work(NamedTuple):
    """What one call has to do at least, and so how fast a machine can do it at best."""

    flops: float  # a multiplication and an addition are two
    exps: float
    bytes: float  # inputs read once, outputs written once

    def seconds(self, flops_per_second: float, exps_per_second: float, bytes_per_second: float) -> float:
        """The lower bound max(FLOPs/peak + exps/rate, bytes/bandwidth)."""
        return max(self.flops / flops_per_second + self.exps / exps_per_second, self.bytes / bytes_per_second)


#: Chunk the lower bound assumes: the smallest one whose products are matrix products. A larger one costs more.
BOUND_CHUNK = 32


def linear_attention_work(
    seq_len: int,
    *,
    batch: int = 1,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_features: int,
    window: int,
    element_bytes: int = 4,
    backward: bool = False,
) -> Work:
    """FLOPs, exponentials and bytes of causal random-feature attention with an exact window, d_v = d.

    Forward: features 2·d·m a head and a kv head (the map M folded into Ω), sums 2·m·d to update (kv) and to read, the
    triangle of a chunk of `BOUND_CHUNK`, 4·d a key in the window. Backward: features again and their input's
    gradient, the sums forward (update) and backward (six products), five products for every (query, key) pair.
    Not counted: the norm ½‖Mx‖², stabilisers, parameter gradients.
    """
    tokens_q, tokens_k = batch * seq_len * num_heads, batch * seq_len * num_kv_heads
    d, m = head_dim, num_features
    pairs, near = (BOUND_CHUNK + 1) / 2, min(window, (seq_len + 1) / 2)
    features = 2 * d * m * (tokens_q + tokens_k)
    flops = features + 2 * m * d * (tokens_q + tokens_k) + tokens_q * (2 * pairs * (m + d) + 2 * m + 4 * near * d)
    exps = m * (tokens_q + tokens_k) + tokens_q * near
    size = element_bytes * d * (2 * tokens_q + 2 * tokens_k)
    if backward:
        flops += 2 * features + 2 * m * d * (2 * tokens_q + 3 * tokens_k)
        flops += tokens_q * (2 * pairs * (3 * m + 2 * d) + 10 * near * d)
        exps *= 2
        size += element_bytes * d * (4 * tokens_q + 4 * tokens_k)
    return Work(float(flops), float(exps), float(size))


def softmax_attention_work(
    seq_len: int, *, batch: int = 1, num_heads: int, num_kv_heads: int, head_dim: int, element_bytes: int = 4,
    backward: bool = False,
) -> Work:  # fmt: skip
    """FLOPs, exponentials and bytes of causal softmax attention: 2 products a pair forward, 5 more backward."""
    pairs = batch * num_heads * seq_len * (seq_len + 1) / 2
    size = element_bytes * head_dim * batch * seq_len * 2 * (num_heads + num_kv_heads)
    return Work(
        pairs * head_dim * (14 if backward else 4), pairs * (2 if backward else 1), size * (3 if backward else 1)
    )


def times_as_fast(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """How many times as fast `ours` is, of two rows of a benchmark's record.

    The median over the turns they took together, so that a machine that changes its speed changes it for both; the
    ratio of the medians where one of them was not repeated.
    """
    pairs = ours.get("turns", ()), theirs.get("turns", ())
    if len(pairs[0]) != len(pairs[1]) or not pairs[0]:
        return float(theirs["median"] / ours["median"])
    return statistics.median(y / x for x, y in zip(*pairs, strict=True))
