"""What every backend receives: a checked problem whose real tokens are contiguous, and the running state."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ..config import DarkConfig
from ..errors import InputError, NonFiniteError
from ..features.affine import FeatureParameters
from ..features.tracing import traced, transformed

#: Stands for log 0 in stabilisers. Finite, so that differences of two of them are 0 and never NaN.
LOG_ZERO = -1e30
#: Tokens. Above it a position plus the length of a call could leave int64.
LARGEST_COUNT = 1 << 48
#: Message of the NonFiniteError of a backward pass.
OVERFLOW = "a gradient exceeds the range of {} although the gradient of the output is finite."


def compute_dtype(query: Tensor) -> torch.dtype:
    """float64 for float64 inputs, else float32: the dtype of features, normalisers and sums."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class _Tensors:
    """A dataclass of tensors whose first dimension is the batch."""

    def select(self, rows: Tensor) -> Self:
        """The state of batch rows `rows` (int64), in that order; repeats allowed."""
        return type(self)(**{f.name: getattr(self, f.name).index_select(0, rows) for f in fields(self)})

    def detach(self) -> Self:
        """The same numbers outside the autograd graph."""
        return type(self)(**{f.name: getattr(self, f.name).detach() for f in fields(self)})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(getattr(self, f.name).nbytes for f in fields(self))


@dataclass(frozen=True)
class AttentionState(_Tensors):
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
        state = cls.expanded(config, key, value, batch=batch, compute=compute)
        return state.select(torch.arange(batch, device=key.device))

    @classmethod
    def expanded(
        cls, config: DarkConfig, key: Tensor, value: Tensor, *, batch: int, compute: torch.dtype
    ) -> AttentionState:
        """`empty` for reading only: its sums are single numbers, so that a short call need not fill memory for them."""
        groups, m, window, sinks = key.shape[1], config.feature_count, config.window, config.sinks
        d, d_v, device = key.shape[-1], value.shape[-1], key.device
        zero = torch.zeros((), dtype=compute, device=device)
        return cls(
            count=torch.zeros(batch, dtype=torch.int64, device=device),
            feature_values=zero.expand(batch, groups, m, d_v),
            feature_sum=zero.expand(batch, groups, m),
            log_scale=torch.full((), LOG_ZERO, dtype=compute, device=device).expand(batch, groups, m),
            recent_key=key.new_zeros(batch, groups, window, d),
            recent_value=value.new_zeros(batch, groups, window, d_v),
            sink_key=key.new_zeros(batch, groups, sinks, d),
            sink_value=value.new_zeros(batch, groups, sinks, d_v),
        )


@dataclass(frozen=True)
class KeyValueState(_Tensors):
    """What method `exact` remembers: every key and value. It grows with the tokens.

    Attributes:
        count: (B,) int64, real tokens seen.
        key, value: (B, G, T, d or d_v), right-aligned: of a row only the last `count` are its own.
    """

    count: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def expanded(
        cls, config: DarkConfig, key: Tensor, value: Tensor, *, batch: int, compute: torch.dtype
    ) -> KeyValueState:
        """The state before the first token; arguments as for `AttentionState.empty`."""
        count, groups = torch.zeros(batch, dtype=torch.int64, device=key.device), key.shape[1]
        empty = (x.new_zeros(batch, groups, 0, x.shape[-1]) for x in (key, value))
        return cls(count, *empty)


State = AttentionState | KeyValueState


class Problem(NamedTuple):
    """One call after the public door: real tokens first in every row, pads after them and zero."""

    query: Tensor  # (B, G, R, L, d)
    key: Tensor  # (B, G, L, d)
    value: Tensor  # (B, G, L, d_v)
    lengths: Tensor  # (B,) int64, real tokens of each row
    scaling: float
    parameters: FeatureParameters  # in the compute dtype
    state: Any  # AttentionState, of method `exact` KeyValueState
    is_causal: bool
    padded: bool  # whether any row is shorter than L
    softcap: float | None = None  # the exact part's logits are softcap·tanh(logit / softcap); features are not capped
    fresh: bool = False  # the state is the one before the first token
    wants_state: bool = True  # whether the state after the last token is looked at
    traced: bool = False  # nothing may be decided by numbers, nor by the length: see `features.tracing`

    @property
    def config(self) -> DarkConfig:
        return self.parameters.config


def join(total: Tensor, decay: Tensor, summand: Tensor, position: Tensor) -> Tensor:
    """decay·total + summand, rounded so that a total of millions of summands keeps its digits.

    Rounded to nearest, a float32 total loses the same fraction of every equal summand, and all of it from 2^24 of them
    on. So a dither of (u - ½) units of the total's last place is added first, u the golden-ratio (Weyl) sequence: each
    rounding is then right on average over positions (Lipshitz, Wannamaker and Vanderkooy 1992, "Quantization and
    dither"), at no memory. Positions in order, not random numbers: the result depends on the tokens alone, and the
    error after n equal summands is of order log n units, not √n.

    Args:
        total: (B, …) in the compute dtype; float64 is left to round to nearest.
        decay, summand: broadcast to it.
        position: (B,) int64, any number that differs from join to join.
    """
    if total.dtype == torch.float32:
        u = ((position * 0x9E3779B9) & 0xFFFFFFFF).to(torch.float32) * 2.0**-32 - 0.5
        power = total.detach().view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)  # 2^⌊log2 |total|⌋
        summand = torch.addcmul(summand, power, (u * 2.0**-23).view(-1, *(1,) * (total.dim() - 1)))
    return torch.addcmul(summand, total, decay)


def non_finite(**tensors: Tensor) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""

    def total(x: Tensor) -> Tensor:  # a sum in another dtype copies the whole tensor first; only float16 overflows
        return x.detach().sum(dtype=torch.float32 if x.dtype == torch.float16 else None)

    bad = [name for name, x in tensors.items() if not bool(torch.isfinite(total(x)))]
    return [name for name in bad if not bool(torch.isfinite(tensors[name]).all())]  # a sum may overflow by itself


def without_digits(top: Tensor) -> Tensor:
    """Where a row's largest logit is so large, or NaN, that rounding decides: by a quarter and more in its dtype."""
    return ~(top.abs() <= 0.25 / torch.finfo(top.dtype).eps)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap·tanh(logits / softcap), or the logits as they are without a cap."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def compact(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Order that puts each row's real tokens first. mask (B, L) bool → (order and its inverse (B, L), lengths (B,))."""
    real, lengths = mask.cumsum(1), mask.sum(1)
    token = torch.arange(mask.shape[1], device=mask.device).expand_as(real)
    place = torch.where(mask, real - 1, lengths[:, None] + token - real)
    return torch.zeros_like(place).scatter(1, place, token), place, lengths


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x (B, G, …, L, d) at token positions index (B, K) → (B, G, …, K, d), a view of (B, K, G, …, d) in memory.

    By rows of d numbers: `torch.gather` goes number by number, two to five times as long.
    """
    row = torch.arange(index.shape[0], device=index.device)[:, None]
    return x.movedim(-2, 1)[row, index].movedim(1, -2)


class _Reorder(torch.autograd.Function):
    """`gather_tokens` by a permutation. Its gradient is one too; in general it would be a sum, slow on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return gather_tokens(x, order)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Reorder.apply(grad_output, inverse, order), None, None


def reorder(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """x (B, G, …, L, d) with the tokens of each row in another order; both orders (B, L)."""
    if transformed() or traced(x):  # one of torch's own operators
        return gather_tokens(x, order)
    return _Reorder.apply(x, order, inverse)


def last_tokens(problem: Problem, before: Tensor, new: Tensor, keep: int) -> Tensor:
    """The last `keep` rows of [before | new real tokens], zeros before the first: a copy with memory of its own."""
    window, length = before.shape[2], new.shape[2]
    if not keep or not length:
        return before
    if not (problem.padded or problem.traced):  # slices: a gather costs a short call a sixth of its time
        first = window + length - keep
        return torch.cat([before[:, :, first:], new[:, :, max(first - window, 0) :]], dim=2)
    index = problem.lengths[:, None] + torch.arange(keep, device=new.device) - (keep - window)
    entering = gather_tokens(new, (index - window).clamp(0, length - 1))  # index counts in [before | new]
    if window:
        staying = gather_tokens(before, index.clamp(0, window - 1))
        entering = torch.where((index < window)[:, None, :, None], staying, entering)
    return entering.masked_fill((index < 0)[:, None, :, None], 0)


def next_buffers(problem: Problem) -> dict[str, Tensor]:
    """Counts, recent and sink keys after this call, as fields of `AttentionState`."""
    state, window, length = problem.state, problem.config.window, problem.key.shape[2]
    buffers, sinks = {"count": state.count + problem.lengths}, state.sink_key.shape[2]
    if sinks and length:
        slots = torch.arange(sinks, device=problem.key.device) - state.count[:, None]
        is_new = ((slots >= 0) & (slots < problem.lengths[:, None]))[:, None, :, None]
    for name, new in (("key", problem.key), ("value", problem.value)):
        buffers[f"recent_{name}"] = last_tokens(problem, getattr(state, f"recent_{name}").to(new.dtype), new, window)
        sink = getattr(state, f"sink_{name}").to(new.dtype)
        if sinks and length:
            sink = torch.where(is_new, gather_tokens(new, slots.clamp(0, length - 1)), sink)
        buffers[f"sink_{name}"] = sink
    return buffers


def _check_numbers(state: State) -> None:
    """Refuses NaN, which a maximum in a backend may lose, and counts, which they index by, that no sequence has."""
    names = [f.name for f in fields(state) if f.name != "count"]
    floats = {name: x for name in names if (x := getattr(state, name)).numel()}
    # The total shows NaN and infinity in a fraction of the time; it may overflow by itself, so then each number counts.
    total = torch.stack([x.sum() for x in floats.values()]).sum() if floats else torch.zeros(())
    if not math.isfinite(total) and (bad := [name for name, x in floats.items() if not bool(x.isfinite().all())]):
        raise NonFiniteError(
            f"{' and '.join(f'initial_state.{name}' for name in bad)} hold NaN or infinity: the state has diverged, go "
            "back to an earlier one."
        )
    if bool(((state.count < 0) | (state.count > LARGEST_COUNT)).any()):
        raise InputError(f"initial_state.count is {state.count.tolist()}: each must be a number of tokens.")


def check_state(state: State, expected: State) -> State:
    """Refuses a state of another layer, configuration or batch, or with numbers that no call returns.

    Returns:
        The state with the dtypes of `expected`.

    Raises:
        InputError: names the first tensor whose shape, kind of dtype or device differs, or whose numbers cannot be.
            NonFiniteError: NaN or infinity.
    """
    if type(state) is not type(expected):
        raise InputError(
            f"initial_state is a {type(state).__name__}, this call needs a {type(expected).__name__}: "
            "the state belongs to another batch, layer or configuration."
        )
    names = [f.name for f in fields(expected)]
    for name in names:
        x, like = getattr(state, name), getattr(expected, name)
        shape, needed = list(x.shape), list(like.shape)
        if isinstance(expected, KeyValueState) and len(shape) == len(needed) == 4:
            needed[2] = shape[2]  # any number of tokens
        if shape != needed:
            raise InputError(
                f"initial_state.{name} has shape {tuple(shape)}, this call needs {tuple(needed)}: "
                "the state belongs to another batch, layer or configuration."
            )
        if x.dtype.is_floating_point != like.dtype.is_floating_point or (x.dtype.is_complex or x.dtype == torch.bool):
            raise InputError(f"initial_state.{name} has dtype {x.dtype}, this call needs {like.dtype}.")
        if x.device != like.device:
            raise InputError(f"initial_state.{name} is on {x.device}, this call is on {like.device}.")
    if not (traced(state.count, expected.count) or transformed()):
        with torch.no_grad():
            _check_numbers(state)
    return type(expected)(**{name: getattr(state, name).to(getattr(expected, name).dtype) for name in names})
