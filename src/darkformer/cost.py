"""What attention costs, as named functions with units."""

from __future__ import annotations

from .config import DarkConfig


def state_bytes(
    config: DarkConfig, *, num_kv_heads: int, head_dim: int, value_dim: int | None = None, element_bytes: int = 4
) -> int:
    """Bytes one sequence's state takes in one converted layer, whatever its length.

    Sums and scales are float32: m·(d_v + 2) numbers a kv head. Window and sinks keep keys and values in the model's
    dtype (`element_bytes`): (window + sinks)·(d + d_v). One int64 counts the tokens.
    """
    d_v = head_dim if value_dim is None else value_dim
    sums = 4 * config.feature_count * (d_v + 2)
    exact = element_bytes * (config.window + config.sinks) * (head_dim + d_v)
    return num_kv_heads * (sums + exact) + 8


def kv_cache_bytes(
    seq_len: int, *, num_kv_heads: int, head_dim: int, value_dim: int | None = None, element_bytes: int = 4
) -> int:
    """Bytes of one softmax layer's keys and values for one sequence of `seq_len` tokens."""
    d_v = head_dim if value_dim is None else value_dim
    return element_bytes * seq_len * num_kv_heads * (head_dim + d_v)
