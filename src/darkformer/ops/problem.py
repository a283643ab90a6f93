"""What every backend receives: a checked problem whose real tokens are contiguous, and the running state."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import DarkConfig, InputError
from ..features.maps import FeatureParameters

#: Stands for log 0 in stabilisers. Finite, so that differences of two of them are 0 and never NaN.
LOG_ZERO = -1e30


@dataclass(frozen=True)
class AttentionState:
    """Everything a causal layer remembers. Its size does not depend on how many tokens went in.

    The sums run over the keys at positions sinks … count-window-1 and are stored scaled by exp(-log_scale).

    Attributes:
        count: (B,) int64, real tokens seen.
        feature_values: (B, G, m, d_v) Σ_j exp(ℓ_k(j) - log_scale) v_j. float32 (float64 for float64 inputs).
        feature_sum: (B, G, m) Σ_j exp(ℓ_k(j) - log_scale).
        log_scale: (B, G, m) running maximum of the keys' log-features.
        recent_key, recent_value: (B, G, window, d or d_v), the last `window` keys, right-aligned.
        sink_key, sink_value: (B, G, sinks, d or d_v), the first keys.
    """

    count: Tensor
    feature_values: Tensor
    feature_sum: Tensor
    log_scale: Tensor
    recent_key: Tensor
    recent_value: Tensor
    sink_key: Tensor
    sink_value: Tensor

    @classmethod
    def empty(
        cls, config: DarkConfig, key: Tensor, value: Tensor, *, batch: int, compute: torch.dtype
    ) -> AttentionState:
        """The state before the first token; `key` (B, G, L, d) and `value` give sizes, dtype and device."""
        groups, m = key.shape[1], config.feature_count
        window, sinks = (0, 0) if config.method == "exact" else (config.window, config.sinks)
        d, d_v, device = key.shape[-1], value.shape[-1], key.device
        return cls(
            count=torch.zeros(batch, dtype=torch.int64, device=device),
            feature_values=torch.zeros(batch, groups, m, d_v, dtype=compute, device=device),
            feature_sum=torch.zeros(batch, groups, m, dtype=compute, device=device),
            log_scale=torch.full((batch, groups, m), LOG_ZERO, dtype=compute, device=device),
            recent_key=key.new_zeros(batch, groups, window, d),
            recent_value=value.new_zeros(batch, groups, window, d_v),
            sink_key=key.new_zeros(batch, groups, sinks, d),
            sink_value=value.new_zeros(batch, groups, sinks, d_v),
        )

    def select(self, rows: Tensor) -> AttentionState:
        """The state of batch rows `rows` (int64), in that order; repeats allowed."""
        return AttentionState(**{f.name: getattr(self, f.name).index_select(0, rows) for f in fields(self)})

    def detach(self) -> AttentionState:
        """The same numbers outside the autograd graph."""
        return AttentionState(**{f.name: getattr(self, f.name).detach() for f in fields(self)})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(getattr(self, f.name).nbytes for f in fields(self))


class Problem(NamedTuple):
    """One call after the public door: real tokens first in every row, pads after them and zero."""

    query: Tensor  # (B, G, R, L, d)
    key: Tensor  # (B, G, L, d)
    value: Tensor  # (B, G, L, d_v)
    lengths: Tensor  # (B,) int64, real tokens of each row
    scaling: float
    parameters: FeatureParameters  # in the compute dtype
    state: AttentionState
    is_causal: bool
    padded: bool  # whether any row is shorter than L
    softcap: float | None = None  # the exact part's logits are softcap·tanh(logit / softcap); features are not capped

    @property
    def config(self) -> DarkConfig:
        return self.parameters.config


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap·tanh(logits / softcap), or the logits as they are without a cap."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def compact(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Order that puts each row's real tokens first. mask (B, L) bool → (order (B, L) int64, lengths (B,))."""
    return torch.argsort(~mask, dim=1, stable=True), mask.sum(1)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x (B, G, …, L, d) at token positions index (B, K) → (B, G, …, K, d)."""
    shape = (index.shape[0],) + (1,) * (x.dim() - 3) + (index.shape[1], 1)
    return x.gather(-2, index.view(shape).expand(*x.shape[:-2], -1, x.shape[-1]))


def next_buffers(problem: Problem) -> dict[str, Tensor]:
    """Counts, recent and sink keys after this call, as fields of `AttentionState`."""
    state, config = problem.state, problem.config
    window, length = state.recent_key.shape[2], problem.key.shape[2]
    result = {"count": state.count + problem.lengths}
    keep = config.window if config.method != "exact" else window + length
    shift = torch.arange(keep, device=problem.key.device) - (keep - window)
    index = problem.lengths[:, None] + shift  # into [recent | new], invalid ones negative
    sinks = state.sink_key.shape[2]
    slots = torch.arange(sinks, device=problem.key.device) - state.count[:, None]
    fresh = (slots >= 0) & (slots < problem.lengths[:, None])
    for name, new in (("key", problem.key), ("value", problem.value)):
        recent = getattr(state, f"recent_{name}").to(new.dtype)
        if keep and length:  # never a copy of [recent | new]: it would be as long as the sequence
            entering = gather_tokens(new, (index - window).clamp(0, length - 1))
            if window:
                staying = gather_tokens(recent, index.clamp(0, window - 1))
                entering = torch.where((index < window)[:, None, :, None], staying, entering)
            recent = entering.masked_fill((index < 0)[:, None, :, None], 0)
        result[f"recent_{name}"] = recent
        sink = getattr(state, f"sink_{name}").to(new.dtype)
        if sinks and length:
            entering = gather_tokens(new, slots.clamp(0, length - 1))
            sink = torch.where(fresh[:, None, :, None], entering, sink)
        result[f"sink_{name}"] = sink
    return result


def check_state(state: AttentionState, expected: AttentionState, config: DarkConfig) -> AttentionState:
    """Refuses a state of another layer, configuration or batch; gives its tensors the dtypes of `expected`.

    Raises:
        InputError: names the first tensor whose shape differs.
    """
    if not isinstance(state, AttentionState):
        raise InputError(f"initial_state is a {type(state).__name__}: give the AttentionState of an earlier call.")
    for f in fields(AttentionState):
        got, want = getattr(state, f.name).shape, getattr(expected, f.name).shape
        grows = config.method == "exact" and f.name.startswith("recent_")
        if got != want and not (grows and (got[:2], got[3:]) == (want[:2], want[3:])):
            raise InputError(
                f"initial_state.{f.name} has shape {tuple(got)}, this call needs {tuple(want)}: "
                "the state belongs to another batch, layer or configuration."
            )
    names = [f.name for f in fields(AttentionState)]
    return AttentionState(**{name: getattr(state, name).to(getattr(expected, name).dtype) for name in names})
